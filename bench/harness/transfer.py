"""Images to train on, a model to train, and training in turns: what the benchmarks of training share.

The digits come with scikit-learn, so that nothing is downloaded: 1797 grey images of 8x8, written by hand.
"""

import copy
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, permutations, repeat
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock, ResNet

BYTES: Final = "Bytes are those that autograd saves for the backward pass, parameters and buffers apart."
TIMES: Final = "Times are of whole steps, taken in turns: the median of the ratios, quartiles in brackets."

MOMENTUM: Final = 0.9
WEIGHT_DECAY: Final = 1e-4

#: How the images of ImageNet are normalised, and with them those of every model that was pre-trained on it.
IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Data:
    """Images to learn and others to test on.

    Attributes:
        name: What they are.
        train: Pairs of an image, of shape (3, size, size), and a label.
        test: The same.
        classes: Number of classes.
        size: Of an image.
        workers: Processes that load them; 0 for this one.
    """

    name: str
    train: Subset[Any]
    test: Subset[Any]
    classes: int
    size: int
    workers: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: SGD with momentum, the learning rate going down to 0 along a cosine.

    Attributes:
        epochs: How often each image is seen.
        batch: Images of a step.
        rate: The learning rate at the beginning.
        steps: Stop there, if that is earlier.
    """

    epochs: int
    batch: int
    rate: float
    steps: int | None = None

    def length(self, data: Data) -> int:
        """Number of steps on these images."""
        steps = self.epochs * (len(data.train) // self.batch_of(data))
        return steps if self.steps is None else min(steps, self.steps)

    def batch_of(self, data: Data) -> int:
        """Images of a step: all of them where there are fewer."""
        return min(self.batch, len(data.train))


#: From scratch on the digits 0 to 4, for `classification` and `coefficients`.
PRETRAINING: Final = Recipe(epochs=10, batch=32, rate=0.05)


def digits(labels: range, *, smoke: bool = False) -> Data:
    """Some of scikit-learn's digits, half of them to test on, at 32x32 and in three equal channels.

    Args:
        labels: Which digits.
        smoke: 24x24 and few to test on.

    Returns:
        The images, with values from -1 to 1.
    """
    from sklearn.datasets import load_digits

    everything = load_digits()
    grey, digit = torch.from_numpy(everything.images), torch.from_numpy(everything.target)
    chosen = (digit >= labels.start) & (digit < labels.stop)
    size = 24 if smoke else 32
    images = F.interpolate(grey[chosen][:, None].float() / 8 - 1, size=(size, size), mode="bilinear")
    dataset = TensorDataset(images.expand(-1, 3, -1, -1), digit[chosen] - labels.start)
    train, test = _split(len(dataset), share=0.5)
    if smoke:
        test = test[:32]
    name = f"scikit-learn's digits {labels.start} to {labels.stop - 1}"
    return Data(name, Subset(dataset, train), Subset(dataset, test), len(labels), size)


def image_folder(root: Path, size: int, device: str) -> Data:
    """Images of one's own, a folder a class, prepared as is usual with ImageNet's.

    Args:
        root: Holds the folders of the classes; or `train`, and `test` or `val`, which hold them. Without those a fifth
            of the images, always the same, is to test on.
        size: That they get.
        device: For a `cuda` device other processes load them.

    Returns:
        The images.

    Raises:
        ValueError: There are fewer than two classes, or those of the test images are others.
    """
    prepare = (transforms.ToTensor(), transforms.Normalize(*IMAGENET))
    crop = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *prepare]
    )
    whole = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *prepare])
    held_out = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if held_out and (root / "train").is_dir():
        train, test = ImageFolder(root / "train", crop), ImageFolder(held_out[0], whole)
        indices = list(range(len(train))), list(range(len(test)))
    else:
        train, test = ImageFolder(root, crop), ImageFolder(root, whole)
        indices = _split(len(train), share=0.2)
    if len(train.classes) < 2:
        raise ValueError(f"{root} has {len(train.classes)} class; each class is a folder of images in it")
    if train.classes != test.classes:
        raise ValueError(f"{root}: the classes of the test images are not those of train")
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0  # on a CPU they would spoil the times
    learned, tested = Subset(train, indices[0]), Subset(test, indices[1])
    return Data(root.name, learned, tested, len(train.classes), size, workers)


def _split(count: int, share: float) -> tuple[list[int], list[int]]:
    """Indices to learn from and a share of them to test on; the same at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    tested = max(1, round(share * count))
    return order[tested:], order[:tested]


def batches(data: Data, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All the batches of a training, the images in a new order at every epoch."""
    loader = DataLoader(
        data.train,
        recipe.batch_of(data),
        shuffle=True,
        drop_last=True,
        num_workers=data.workers,
        generator=torch.Generator().manual_seed(seed),
    )
    return islice(chain.from_iterable(repeat(loader)), recipe.length(data))


def small_resnet(classes: int, seed: int, *, smoke: bool = False) -> tuple[nn.Module, str]:
    """A ResNet-18 of torchvision's with random weights and a stem for small images: 3x3, and no pooling after it.

    Args:
        classes: Number of classes.
        seed: Of the weights.
        smoke: A ResNet-10: one block in the place of two.

    Returns:
        The model, and what to call it.
    """
    torch.manual_seed(seed)
    blocks = 1 if smoke else 2
    model: nn.Module = ResNet(BasicBlock, 4 * [blocks], num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model, f"ResNet-{8 * blocks + 2} with a stem for small images"


class Training:
    """A model in training.

    Args:
        model: The model, on its device; its modules stay in the modes they are in.
        recipe: How it is trained.
        length: Number of steps.

    Attributes:
        losses: Of each step; None where it is not finite.
        seconds: That each step took.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, length: int) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.losses: list[float | None] = []
        self.seconds: list[float] = []
        self._recipe, self._length = recipe, length
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def branch(self, model: nn.Module) -> "Training":
        """The same training, gone as far, of another model with parameters of the same values and order."""
        other = Training(model, self._recipe, self._length)
        # A copy: loading alone would leave the two with one momentum.
        other._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        other.losses, other.seconds = list(self.losses), list(self.seconds)
        return other

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step: forward, backward, update."""
        start = time.perf_counter()
        rate = self._recipe.rate * (1 + math.cos(math.pi * len(self.losses) / self._length)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self._optimizer.step()
        value = loss.detach().item()  # on CUDA it waits for all that has been asked for, the update too
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value if math.isfinite(value) else None)


def take_turns(trainings: Sequence[Training], stream: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Trains several models in turns, on the same batches, in an order that changes from step to step.

    Args:
        trainings: What is trained; all on one device and in one dtype.
        stream: The batches.
    """
    parameter = next(trainings[0].model.parameters())
    for order, (images, labels) in zip(cycle(permutations(trainings)), stream, strict=False):
        images = images.to(parameter.dtype, memory_format=torch.channels_last).to(parameter.device)
        labels = labels.to(parameter.device)
        for training in order:
            training.step(images, labels)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float | None]:
    """Puts a model in Eval mode and tries it on the test images.

    Args:
        model: The model.
        data: The images.

    Returns:
        The share that it tells right, and the mean loss; None if that is not finite.
    """
    model.eval()
    parameter = next(model.parameters())
    right, loss = 0, 0.0
    for images, labels in DataLoader(data.test, 128, num_workers=data.workers):
        outputs = model(images.to(parameter.device, parameter.dtype)).cpu()
        right += int((outputs.argmax(1) == labels).sum())
        loss += F.cross_entropy(outputs, labels, reduction="sum").item()
    mean = loss / len(data.test)
    return right / len(data.test), mean if math.isfinite(mean) else None


def pretrained(device: str, *, smoke: bool) -> tuple[nn.Module, str, float]:
    """A small ResNet that has learned the digits 0 to 4 from scratch, always the same.

    Args:
        device: Where it is trained.
        smoke: Three steps only.

    Returns:
        The model, on the CPU, what to call it, and its accuracy on test images.
    """
    data = digits(range(5), smoke=smoke)
    model, name = small_resnet(data.classes, seed=0, smoke=smoke)
    recipe = smoke_of(PRETRAINING) if smoke else PRETRAINING
    training = Training(model.to(device), recipe, recipe.length(data))
    take_turns([training], batches(data, recipe, seed=0))
    accuracy, _ = evaluate(training.model, data)
    return training.model.cpu(), f"{name}, trained on {data.name}", accuracy


def smoke_of(recipe: Recipe, steps: int = 3) -> Recipe:
    """A few steps of it, of few images."""
    return Recipe(recipe.epochs, min(recipe.batch, 8), recipe.rate, steps)


def mean(values: Sequence[float | None], digits: int) -> str | None:
    """The mean and, of several, the standard deviation: `97.31 ± 0.42`; None if one value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else text


def drawn(values: Iterable[float | None]) -> list[float]:
    """The values for a plot, with gaps where there are none."""
    return [math.nan if value is None else value for value in values]


def settings_of(data: Data, recipe: Recipe) -> dict[str, Any]:
    """What a page has to tell about a training."""
    return {
        "data": data.name,
        "classes": data.classes,
        "training_images": len(data.train),
        "test_images": len(data.test),
        "size": data.size,
        "batch": recipe.batch_of(data),
        "steps": recipe.length(data),
        "rate": recipe.rate,
        "schedule": "cosine",
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
    }


def without_first(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """The seconds of all steps but each training's first, which warms up."""
    return [seconds for row in rows for seconds in row["seconds"][1:]]
