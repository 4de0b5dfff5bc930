"""torchvision's detectors, segmentation and video models: norms frozen, the rest in Train mode."""

from functools import partial

import pytest
import torch
from models import data, prepared
from originals import assert_trains_like, pairs_run, with_frozen_norms
from torch import nn
from torchvision.models import detection, resnet18, segmentation, video
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

SIZE = 64
CLASSES = 3
KEYPOINTS = 4
IMAGES = [data(3, 56, SIZE, seed=1).sigmoid(), data(3, SIZE, 48, seed=2).sigmoid()]


def target(image, boxes, labels):
    boxes = torch.tensor(boxes, dtype=torch.float64)
    masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left + 2 : right] = 1
    corners = data(len(boxes), KEYPOINTS, 2).sigmoid()
    keypoints = boxes[:, None, :2] + corners * (boxes[:, None, 2:] - boxes[:, None, :2])
    visible = torch.ones(len(boxes), KEYPOINTS, 1, dtype=torch.float64)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels),
        "masks": masks,
        "keypoints": torch.cat([keypoints, visible], 2).float(),  # no other dtype is accepted
    }


def batch(detector):
    """Images and what is to be found in them."""
    classes = 2 if detector == "keypoint_rcnn" else CLASSES
    return IMAGES, [
        target(IMAGES[0], [[4, 6, 40, 50], [10, 12, 60, 30]], [1, classes - 1]),
        target(IMAGES[1], [[2, 3, 30, 62]], [1]),
    ]


SIZES = {"min_size": SIZE, "max_size": SIZE}
SMALL_RCNN = SIZES | {
    "rpn_anchor_generator": AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
    "rpn_pre_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 8,
    "box_batch_size_per_image": 8,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 6,
}


def backbone(norm_layer, **options):
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm_layer, trainable_layers=5, **options
    )


def box_head():
    return faster_rcnn.TwoMLPHead(256 * 7 * 7, 16)


def box_predictor(classes):
    return faster_rcnn.FastRCNNPredictor(16, classes)


def rcnn(cls, norm_layer, classes=CLASSES, **options):
    return cls(
        backbone(norm_layer),
        box_head=box_head(),
        box_predictor=box_predictor(classes),
        **SMALL_RCNN,
        **options,
    )


def mask_rcnn_v2(norm_layer):
    """Batch norms in the pyramid and in the heads as well, as the second versions have them."""
    return detection.MaskRCNN(
        _resnet_fpn_extractor(resnet18(weights=None, norm_layer=norm_layer), 5, norm_layer=norm_layer),
        box_head=faster_rcnn.FastRCNNConvFCHead((256, 7, 7), [16, 16], [16], norm_layer=norm_layer),
        box_predictor=box_predictor(CLASSES),
        mask_head=mask_rcnn.MaskRCNNHeads(256, [16, 16], 1, norm_layer=norm_layer),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 8, CLASSES),
        **SMALL_RCNN,
    )


def dense(cls, norm_layer, **options):
    pyramid = backbone(norm_layer, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return cls(
        pyramid, CLASSES, score_thresh=0.0, topk_candidates=20, detections_per_img=6, **SIZES, **options
    )


def ssdlite(norm_layer):
    model = detection.ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        norm_layer=partial(norm_layer, eps=0.001),
        topk_candidates=20,
        detections_per_img=6,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # initialised so small that all scores are the same
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


#: How each is built, and how many pairs it has.
DETECTORS = {
    "faster_rcnn": (partial(rcnn, detection.FasterRCNN), 20),
    "mask_rcnn": (
        partial(
            rcnn,
            detection.MaskRCNN,
            mask_head=mask_rcnn.MaskRCNNHeads(256, [16], 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 8, CLASSES),
        ),
        20,
    ),
    "mask_rcnn_v2": (mask_rcnn_v2, 32),
    "keypoint_rcnn": (
        partial(
            rcnn,
            detection.KeypointRCNN,
            classes=2,
            keypoint_head=detection.keypoint_rcnn.KeypointRCNNHeads(256, [16]),
            keypoint_predictor=detection.keypoint_rcnn.KeypointRCNNPredictor(16, KEYPOINTS),
        ),
        20,
    ),
    "retinanet": (partial(dense, detection.RetinaNet), 20),
    "fcos": (partial(dense, detection.FCOS), 20),
    "ssdlite": (ssdlite, 70),
}


def case(name, norm_layer, *marks):
    return pytest.param((name, norm_layer), marks=marks, id=f"{name}-{norm_layer.__name__}")


@pytest.fixture(
    scope="module",
    params=[
        case("faster_rcnn", nn.BatchNorm2d),
        case("mask_rcnn", nn.BatchNorm2d, pytest.mark.slow),
        case("mask_rcnn_v2", nn.BatchNorm2d),
        case("keypoint_rcnn", nn.BatchNorm2d),
        case("retinanet", nn.BatchNorm2d),
        case("fcos", nn.BatchNorm2d),
        case("ssdlite", nn.BatchNorm2d),
        case("faster_rcnn", FrozenBatchNorm2d),
        case("mask_rcnn", FrozenBatchNorm2d),
        case("keypoint_rcnn", FrozenBatchNorm2d, pytest.mark.slow),
        case("retinanet", FrozenBatchNorm2d, pytest.mark.slow),
        case("fcos", FrozenBatchNorm2d, pytest.mark.slow),
    ],
)
def detector(request):
    """One that freezes its batch norms by hand, the tuned one, the number of pairs, and a batch."""
    name, norm_layer = request.param
    torch.manual_seed(0)
    build, pairs = DETECTORS[name]
    original = prepared(build(norm_layer))
    return with_frozen_norms(original), tune(original, norm_eval=True), pairs, batch(name)


def test_the_pairs_of_a_detector(detector):
    original, tuned, pairs, (images, _) = detector
    assert len(report(tuned).fused) == pairs_run(original.eval(), images) == pairs
    assert not report(tuned).skipped


def test_losses_and_gradients(detector):
    original, tuned, _, inputs = detector
    assert_equivalent(with_frozen_norms(original), tuned.train(), *inputs)
    assert all(loss.isfinite() and loss > 0 for loss in tuned(*inputs).values())


def test_detections(detector):
    original, tuned, _, (images, _) = detector
    original.eval(), tuned.eval()
    with torch.no_grad():
        assert_equivalent(original, tuned, images)
        assert all(len(found["boxes"]) for found in tuned(images))


def test_what_a_detector_saves_for_its_backward_pass(detector):
    """A FrozenBatchNorm2d that has no parameters saves nothing of its input: then less cannot be saved, only more."""
    original, tuned, _, inputs = detector
    before, after = (saved_bytes(model, *inputs) for model in (with_frozen_norms(original), tuned.train()))
    assert after <= before
    assert after < before or not any(isinstance(module, nn.BatchNorm2d) for module in original.modules())


# --- Segmentation and video ---------------------------------------------------------------------------------------

SEGMENTATION = {
    "deeplabv3": (partial(segmentation.deeplabv3_mobilenet_v3_large, aux_loss=True), 54),
    "fcn": (partial(segmentation.fcn_resnet50, aux_loss=True), 55),
    "lraspp": (segmentation.lraspp_mobilenet_v3_large, 47),
}


@pytest.mark.parametrize("name", ["deeplabv3", pytest.param("fcn", marks=pytest.mark.slow), "lraspp"])
def test_segmentation(name):
    build, pairs = SEGMENTATION[name]
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES)
    tuned = assert_trains_like(model, pairs, data(2, 3, 32, 40))
    assert tuned(data(2, 3, 32, 40)).keys() == {"out"} | ({"aux"} if name != "lraspp" else set())


VIDEO = {"r3d_18": 20, "mc3_18": 20, "r2plus1d_18": 37}


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", pytest.param("r2plus1d_18", marks=pytest.mark.slow)])
def test_video(name):
    model = getattr(video, name)(weights=None, num_classes=CLASSES)
    assert_trains_like(model, VIDEO[name], data(1, 3, 4, 16, 16))
