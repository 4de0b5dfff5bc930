"""The benchmark of detectors: its rows, and what it claims of losses and of memory."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from bench.experiments import detection
from bench.harness import detectors
from bench.harness.contenders import EVAL, TUNE
from bench.harness.markdown import NOTHING
from bench.harness.results import Options, Result

pytestmark = pytest.mark.slow  # the benchmark runs, at toy size

SHAPE = detection.TOY.counted
PRECISIONS = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def result():
    options = Options(smoke=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "SMOKE", detection.SMOKE[:1])
        settings, rows, notes = detection.run(options)
    return Result("detection", "test", {}, settings, rows, notes)


@pytest.fixture(scope="module")
def retinanets():
    return detection.make_detectors(detectors.build("RetinaNet", "ResNet-18", toy=True))


def test_rows(result):
    json.dumps(asdict(result), allow_nan=False)
    assert [row["precision"] for row in result.rows] == ["float32", "bfloat16"]
    assert len({tuple(row) for row in result.rows}) == 1
    for row in result.rows:
        assert row["fused"] == 20
        assert not row["left"]
        for name in ("backbone_bytes", "loss_differences", "seconds"):
            assert tuple(row[name]) == detection.CONTENDERS
        assert all(len(seconds) >= 2 for seconds in row["seconds"].values())
        assert row["backbone_bytes"][TUNE] < row["backbone_bytes"][EVAL]


def test_losses_are_the_same_in_float64(result):
    exact, half = (row["loss_differences"] for row in result.rows)
    assert all(difference < 1e-12 for found in exact.values() for difference in found.values())
    assert {*exact[TUNE]} > {detection.TOTAL, "loss_classifier", "loss_box_reg", "loss_objectness"}
    assert all(difference > 1e-12 for difference in half[EVAL].values())


def test_losses_tell_detectors_apart(retinanets):
    model = copy.deepcopy(retinanets[EVAL]).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.body.layer4[1].bn2.bias += 1e-6
    found, changed = (
        detection.losses(each, detection.TOY.compared, torch.float64, "cpu") for each in (model, other)
    )
    assert abs(found[detection.TOTAL] - changed[detection.TOTAL]) > 1e-12 * found[detection.TOTAL]


def test_what_is_saved_less_as_a_whole_is_what_the_backbone_saves_less(result):
    for row in result.rows:
        whole, backbone = row["whole_bytes"], row["backbone_bytes"]
        assert whole[EVAL] - whole[TUNE] == backbone[EVAL] - backbone[TUNE] > 0


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_parts_are_the_whole(precision, retinanets):
    """To the byte where what a detector does depends on the boxes alone, as a RetinaNet's training does."""
    heads = detection.count_heads(retinanets[EVAL], SHAPE, precision, "cpu")
    for name in detection.CHECKED:
        backbone = detection.count_backbone(retinanets[name], SHAPE, precision, "cpu")
        assert backbone + heads == detection.count_whole(retinanets[name], SHAPE, precision, "cpu"), name


@pytest.mark.parametrize("backbone", ["ResNet-18", "small RegNet", "small HRNet", "small RepVGG"])
def test_a_backbone(backbone):
    model = detectors.build("Faster R-CNN", backbone, toy=True)
    body = model.backbone.body
    frozen = {
        name.split(".")[0] for name, parameter in body.named_parameters() if not parameter.requires_grad
    }
    trained = {name.split(".")[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert frozen
    assert frozen <= detectors.FIRST
    assert not trained & frozen
    assert all(parameter.requires_grad for parameter in model.backbone.fpn.parameters())
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms
    assert all(name.startswith("backbone.body.") for name in norms)
    with torch.no_grad():
        levels = model.backbone(torch.randn(1, 3, 64, 64))
    assert [level.shape[-1] for level in levels.values()] == [16, 8, 4, 2, 1]
    assert {level.shape[1] for level in levels.values()} == {detectors.WIDTH}


def test_a_batch():
    (images, targets), (doubles, same) = (
        detectors.batch(SHAPE, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert [tuple(image.shape) for image in images] == [SHAPE[1:]] * SHAPE[0]
    for image, double in zip(images, doubles, strict=True):
        assert torch.equal(image, double.float())
    assert not torch.equal(targets[0]["boxes"], targets[1]["boxes"])
    for target, other in zip(targets, same, strict=True):
        assert torch.equal(target["boxes"], other["boxes"].float())
        left, top, right, bottom = target["boxes"].unbind(1)
        assert left.min() >= 0
        assert top.min() >= 0
        assert right.max() <= SHAPE[3]
        assert bottom.max() <= SHAPE[2]
        assert min((right - left).min(), (bottom - top).min()) > 1
        assert target["masks"].shape == (detectors.BOXES, *SHAPE[2:])
        assert target["masks"].flatten(1).any(1).all()
        assert target["labels"].min() >= 1


def test_tables_and_picture(result):
    main, parts, times = detection.tables(result)
    for text in (main, parts, times):
        assert text.count("\n") == 2 + len(result.rows)
        assert text.count("| Faster R-CNN | ResNet-18 |") == len(result.rows)
    assert "| 20 | 0 |" in parts
    panels = detection.plot(result).axes
    assert [panel.get_title() for panel in panels] == ["float32", "bfloat16"]
    assert all(len(panel.patches) == 2 and panel.get_xlim()[0] == 0 for panel in panels)


def test_what_was_not_measured_is_left_out(result):
    row = {**result.rows[1], "seconds": None, "whole_bytes": {}}
    row["loss_differences"] = {**row["loss_differences"], TUNE: {detection.TOTAL: None}}
    main, parts, times = detection.tables(Result("detection", "", {}, {}, [row]))
    assert main.splitlines()[-1].endswith(f"| {NOTHING} | {NOTHING} |")
    assert parts.splitlines()[-1].endswith(f"| {NOTHING} | {NOTHING} |")
    assert times.count("\n") == 2


def test_every_detector_and_backbone_is_known():
    for detector, backbone in (*detection.MODELS, *detection.SMOKE):
        assert detector in detectors.DETECTORS
        assert backbone in detectors.BACKBONES
    assert len(set(detection.MODELS)) == len(detection.MODELS)
