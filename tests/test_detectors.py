"""Detectors, segmentation models and video models of torchvision: they freeze their batch norms, and train everything else."""

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
    corners = torch.rand(len(boxes), KEYPOINTS, 2, dtype=torch.float64)
    keypoints = boxes[:, None, :2] + corners * (boxes[:, None, 2:] - boxes[:, None, :2])
    visible = torch.ones(len(boxes), KEYPOINTS, 1, dtype=torch.float64)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels),
        "masks": masks,
        "keypoints": torch.cat([keypoints, visible], 2),
    }


def targets(classes):
    return [
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
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        norm_layer=partial(norm_layer, eps=0.001),
        topk_candidates=20,
        detections_per_img=6,
    )


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
            num_keypoints=KEYPOINTS,
            keypoint_head=detection.keypoint_rcnn.KeypointRCNNHeads(256, [16]),
            keypoint_predictor=detection.keypoint_rcnn.KeypointRCNNPredictor(16, KEYPOINTS),
        ),
        20,
    ),
    "retinanet": (partial(dense, detection.RetinaNet), 20),
    "fcos": (partial(dense, detection.FCOS), 20),
    "ssdlite": (ssdlite, 80),
}


@pytest.fixture(params=DETECTORS)
def detector(request):
    return request.param


@pytest.fixture(params=[nn.BatchNorm2d, FrozenBatchNorm2d], ids=lambda cls: cls.__name__)
def norm_layer(request):
    return request.param


def test_losses_and_gradients(detector, norm_layer):
    build, pairs = DETECTORS[detector]
    classes = 2 if detector == "keypoint_rcnn" else CLASSES
    assert_trains_like(build(norm_layer), pairs, IMAGES, targets(classes))
