"""Images in folders, as users keep theirs."""

from PIL import Image


def folder_of_images(root, classes, count, *, first=0):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(first, first + count):
            color = (80 * number, 10 * index, 99)
            Image.new("RGB", (40 + index, 50), color).save(root / name / f"{index}.png")
    return root
