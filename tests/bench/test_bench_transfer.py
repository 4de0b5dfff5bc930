"""What the benchmarks of training share: images that do not mix, the same batches for all, training that can fork."""

import copy
import math

import pytest
import torch
from images import folder_of_images
from torch import nn

from bench.harness.transfer import Recipe, Training, batches, digits, evaluate, image_folder, mean, take_turns

RECIPE = Recipe(epochs=2, batch=8, rate=0.1, steps=7)


@pytest.fixture(scope="module")
def data():
    return digits(range(3, 6), smoke=True)


def linear(data, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * data.size**2, data.classes))


# --- Images -------------------------------------------------------------------------------------------------------


def test_digits_are_of_the_classes_asked_for_and_upsampled(data):
    images, labels = zip(*data.train, strict=True)
    assert set(map(int, labels)) == {0, 1, 2} == set(range(data.classes))
    assert {tuple(image.shape) for image in images} == {(3, 24, 24)}
    assert -1 <= torch.stack(images).min() < 0 < torch.stack(images).max() <= 1


def test_no_image_is_learned_and_tested(data):
    assert data.train.dataset is data.test.dataset
    assert set(data.train.indices).isdisjoint(data.test.indices)
    assert digits(range(3, 6), smoke=True).test.indices == data.test.indices


def test_a_folder_without_parts_is_split_and_only_what_is_learned_is_augmented(tmp_path):
    data = image_folder(folder_of_images(tmp_path / "birds", "ab", 10), 32, "cpu")
    assert (len(data.train), len(data.test), data.classes, data.name) == (16, 4, 2, "birds")
    assert set(data.train.indices).isdisjoint(data.test.indices)
    image, _ = data.test[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image, data.test[0][0])


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_of_train_and_test_is_taken_as_it_is(tmp_path, held_out):
    folder_of_images(tmp_path / "train", "ab", 3)
    folder_of_images(tmp_path / held_out, "ab", 2, first=3)
    data = image_folder(tmp_path, 32, "cpu")
    assert (len(data.train), len(data.test), data.classes) == (6, 4, 2)


def test_a_folder_that_cannot_be_learned_from(tmp_path):
    with pytest.raises(ValueError, match="1 class;"):
        image_folder(folder_of_images(tmp_path / "one", "a", 3), 32, "cpu")
    folder_of_images(tmp_path / "two" / "train", "ab", 1)
    folder_of_images(tmp_path / "two" / "test", "ac", 1)
    with pytest.raises(ValueError, match="classes of the test images"):
        image_folder(tmp_path / "two", 32, "cpu")


# --- Training -----------------------------------------------------------------------------------------------------


def test_batches_are_a_seeds_own(data):
    def labels(seed):
        return [batch.tolist() for _, batch in batches(data, RECIPE, seed)]

    assert len(labels(0)) == 7 == RECIPE.length(data)
    assert labels(0) == labels(0) != labels(1)


def test_an_epoch_after_the_other_in_a_new_order(data):
    recipe = Recipe(epochs=2, batch=len(data.train), rate=0.1)
    (_, first), (_, second) = batches(data, recipe, 0)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()


def test_fewer_images_than_a_batch(data):
    recipe = Recipe(epochs=3, batch=10_000, rate=0.1)
    assert recipe.length(data) == 3 == len(list(batches(data, recipe, 0)))


def test_turns_are_on_the_same_batches_and_their_order_changes():
    taken = []

    class Spy:
        model = linear(digits(range(2), smoke=True))

        def __init__(self, name):
            self.name = name

        def step(self, images, labels):
            taken.append((self.name, images.dtype, labels.tolist()))

    stream = [(torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.tensor([place, 0])) for place in range(3)]
    take_turns([Spy("a"), Spy("b")], stream)
    assert [name for name, *_ in taken] == ["a", "b", "b", "a", "a", "b"]
    assert [labels[0] for *_, labels in taken] == [0, 0, 1, 1, 2, 2]
    assert {dtype for _, dtype, _ in taken} == {torch.float32}


def test_equal_models_learn_equally_and_the_rate_ends_at_zero(data):
    both = [Training(linear(data).double(), RECIPE, 7) for _ in range(2)]
    take_turns(both, batches(data, RECIPE, 0))
    assert both[0].losses == both[1].losses
    assert len(both[0].losses) == len(both[0].seconds) == 7
    assert both[0].losses[-1] < both[0].losses[0]
    (group,) = both[0]._optimizer.param_groups
    assert 0 < group["lr"] < 0.1 * RECIPE.rate


def test_a_branch_goes_on_as_the_trunk_does(data):
    trunk = Training(linear(data).double(), RECIPE, 7)
    stream = list(batches(data, RECIPE, 0))
    take_turns([trunk], stream[:4])
    branch = trunk.branch(copy.deepcopy(trunk.model))
    fresh = Training(copy.deepcopy(trunk.model), RECIPE, 7)  # without momentum, at the highest rate
    take_turns([trunk, branch, fresh], stream[4:])
    assert branch.losses == trunk.losses
    assert branch.seconds[:4] == trunk.seconds[:4]
    assert fresh.losses != trunk.losses[4:]


def test_a_loss_that_is_not_finite_is_none(data):
    model = linear(data)
    nn.init.constant_(model[1].bias, math.nan)
    training = Training(model, RECIPE, 1)
    take_turns([training], [next(batches(data, RECIPE, 0))])
    assert training.losses == [None]
    assert evaluate(model, data)[1] is None


def test_evaluating(data):
    model = linear(data).train()
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([0.0, 9.0, 0.0])
    accuracy, loss = evaluate(model, data)
    labels = [int(label) for _, label in data.test]
    assert accuracy == labels.count(1) / len(labels)
    wrong = math.log(2 + math.exp(9))
    assert loss == pytest.approx(wrong - 9 * accuracy, rel=1e-5)
    assert not model.training


def test_means():
    assert mean([1.0], 1) == "1.0"
    assert mean([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert mean([1.0, None], 2) is None
