"""The benchmark of adversarial examples at toy size: its rows, its claims, and that these could fail."""

import copy
import json

import pytest
import torch
from models import data, prepared
from torch import nn
from torch.nn import functional as F

from bench.experiments import adversarial
from bench.experiments.adversarial import CONTENDERS, PixelLosses
from bench.harness.contenders import COMPOSITE, DEPLOY, EVAL, TUNE
from bench.harness.results import Options, Result
from bench.harness.unet import UNet
from convbn_fx import tune

pytestmark = pytest.mark.slow  # the benchmark runs, at toy size

MODELS = list(adversarial.SMOKE)
ATTACKS = list(adversarial._attacks(1))


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    return Result("adversarial", "", {}, *adversarial.run(Options(smoke=True)))


@pytest.fixture(params=range(len(MODELS) * len(ATTACKS)))
def row(request, result):
    return result.rows[request.param]


def test_a_row_for_each_model_and_attack(result):
    assert [(row["model"], row["attack"]) for row in result.rows] == [
        (model, attack) for model in MODELS for attack in ATTACKS
    ]
    assert len({tuple(row) for row in result.rows}) == 1
    json.dumps([result.settings, result.rows, result.notes], allow_nan=False)


def test_examples_are_the_same_in_float64(row):
    for contender in (EVAL, TUNE):
        assert row["differences"]["float64"][contender] == {"pixels": 0, "fraction": 0.0, "largest": 0.0}
    assert row["changed"] > 0.5  # steps back and forth leave some as they were
    assert 0 < row["gradient_errors"]["float64"][TUNE] < 1e-12  # not 0: it really is computed otherwise


def test_memory(row):
    frozen, trainable = row["bytes"]["frozen"], row["bytes"]["trainable"]
    assert frozen[TUNE] < trainable[TUNE] < trainable[EVAL]
    assert frozen[TUNE] < frozen[EVAL]
    for contender in (EVAL, DEPLOY):  # PyTorch's convolution saves its input for whichever gradient
        assert frozen[contender] == pytest.approx(trainable[contender], rel=0.01)


def test_what_the_rivals_formula_cannot_do_is_none(row):
    absent = {COMPOSITE} if row["model"] == "unet" else set()
    for values in (row["seconds"], row["bytes"]["frozen"], row["differences"]["float32"]):
        assert {contender for contender in CONTENDERS if values[contender] is None} == absent
    assert all(len(seconds) >= 2 for seconds in row["seconds"].values() if seconds is not None)


def test_tables_and_picture(result, tmp_path):
    first, *others = adversarial.tables(result)
    for model in MODELS:
        assert all(f"| {model} |" in table for table in (first, *others))
        for attack in ATTACKS:
            assert f"| {model} | {attack} |" in first
    result.write(tmp_path / "result.json")
    adversarial.plot(result).savefig(tmp_path / "picture.png")


def test_pixels_that_differ_are_told():
    images = torch.zeros(1, 1, 2, 2)
    moved = images.clone()
    moved[0, 0, 1, 1] = 0.25
    found = adversarial._difference(moved, images)
    assert found == {"pixels": 1, "fraction": 0.25, "largest": 0.25}
    row = {"differences": {"float64": {TUNE: found}}}
    assert adversarial._pixels(row, "float64", TUNE) == "1 (25 %), by 0.25"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_model_makes_other_examples(attack):
    original = prepared(UNet(width=4))
    wrong = tune(copy.deepcopy(original))
    wrong.up1[1].eps = 0.5
    batch, targets = data(1, 3, 8, 8).sigmoid(), torch.zeros(1, 8, 8, dtype=torch.long)
    expected, found = (
        adversarial._victim(model, batch, targets).examples(adversarial._attacks(2)[attack])
        for model in (original, wrong)
    )
    assert adversarial._difference(found, expected)["pixels"] > 0


def test_the_bytes_of_frozen_pairs_hold_no_input_of_a_convolution():
    """The last of them feeds nothing that saves anything."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    size = 2 * 8 * 8 * 4
    counted = {
        name: adversarial._count(each, (2, 3, 8, 8), of_pixels=False)
        for name, each in ((EVAL, model), (TUNE, tune(model)))
    }
    assert counted[EVAL] >= (3 + 4) * size
    assert counted[TUNE] == 0


def test_pixel_losses_are_a_cross_entropy_of_two_classes():
    scores = data(2, 5, 4, 4).requires_grad_()
    targets = torch.randint(5, (2, 4, 4))
    classes = torch.zeros(2, dtype=torch.long)
    found = F.cross_entropy(PixelLosses(nn.Identity(), targets)(scores), classes)
    expected = F.cross_entropy(scores, targets)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, scores)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients)
