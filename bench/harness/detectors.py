"""Detectors that train with frozen statistics: backbones of torchvision and timm under torchvision's heads.

Weights are random, nothing is downloaded. All batch norms are in the backbone, as BatchNorm2d, with random affine
parameters and with the statistics of what they see. As is usual in detectors, the stem and the first stage of every
backbone are frozen: their parameters have no gradient, and nothing of them is saved for the backward pass.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

import convbn_fx
from convbn_fx.testing import randomize_batchnorms

#: COCO's, with the background.
CLASSES: Final = 91
#: How many there are to be found in each image.
BOXES: Final = 8
#: Channels of every level of the pyramid.
WIDTH: Final = 256
#: The transform pads images to multiples of this.
DIVISOR: Final = 32

#: What the stem and the first stage are called, in whichever backbone.
FIRST: Final = frozenset({"stem", "block1", "stages_0", "conv1", "bn1", "conv2", "bn2", "layer1"})

#: Makes a backbone with a pyramid of an architecture, the levels that are used (1 to 4, of strides 4 to 32), and what
#: comes on top.
Builder = Callable[[str, Sequence[int], nn.Module], nn.Module]


def _resnet(architecture: str, levels: Sequence[int], top: nn.Module) -> nn.Module:
    backbone: nn.Module = resnet_fpn_backbone(
        backbone_name=architecture,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=3,
        returned_layers=list(levels),
        extra_blocks=top,
    )
    return backbone


def _regnet(architecture: str, levels: Sequence[int], top: nn.Module) -> nn.Module:
    model = torchvision.models.get_model(architecture, weights=None)
    stages: Any = nn.Sequential(OrderedDict(stem=model.stem, **dict(model.trunk_output.named_children())))
    names = {f"block{level}": str(index) for index, level in enumerate(levels)}
    channels = [stages[level][-1].f.c.out_channels for level in levels]
    backbone: nn.Module = BackboneWithFPN(_frozen_first(stages), names, channels, WIDTH, top)
    return backbone


def _timm(architecture: str, levels: Sequence[int], top: nn.Module) -> nn.Module:
    # HRNet's own resolutions, not those that its classifier widens.
    options: dict[str, Any] = {"feature_location": ""} if architecture.startswith("hrnet") else {}
    features: Any = timm.create_model(
        architecture, pretrained=False, features_only=True, out_indices=tuple(levels), **options
    )
    return FeaturesWithFPN(_frozen_first(features), features.feature_info.channels(), top)


def _frozen_first(body: nn.Module) -> nn.Module:
    """The body, with its stem and its first stage frozen."""
    for name, child in body.named_children():
        if name in FIRST:
            child.requires_grad_(False)
    return body


class FeaturesWithFPN(nn.Module):
    """A pyramid on a list of feature maps, as timm returns them; torchvision's own wants a sequence of stages.

    Args:
        body: Returns feature maps from fine to coarse.
        channels: Theirs.
        top: Makes the coarsest levels.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int], top: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), WIDTH, top)
        self.out_channels = WIDTH

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """The levels of the pyramid by name, from fine to coarse."""
        features = self.body(images)
        levels: Mapping[str, Tensor] = self.fpn(
            OrderedDict((str(index), feature) for index, feature in enumerate(features))
        )
        return levels


#: Each backbone's builder, and the name of its architecture.
BACKBONES: Final[dict[str, tuple[Builder, str]]] = {
    "ResNet-50": (_resnet, "resnet50"),
    "ResNet-101": (_resnet, "resnet101"),
    "ResNeXt-101": (_resnet, "resnext101_32x8d"),
    "RegNet": (_regnet, "regnet_x_3_2gf"),
    "HRNet": (_timm, "hrnet_w32"),
    "RepVGG": (_timm, "repvgg_b0"),
    # For trials.
    "ResNet-18": (_resnet, "resnet18"),
    "small RegNet": (_regnet, "regnet_y_400mf"),
    "small HRNet": (_timm, "hrnet_w18_small"),
    "small RepVGG": (_timm, "repvgg_a0"),
}

#: Each detector, the levels of the backbone that it uses, and what makes those above.
DETECTORS: Final[dict[str, tuple[Any, tuple[int, ...], Callable[[], nn.Module]]]] = {
    "Faster R-CNN": (FasterRCNN, (1, 2, 3, 4), LastLevelMaxPool),
    "Mask R-CNN": (MaskRCNN, (1, 2, 3, 4), LastLevelMaxPool),
    "RetinaNet": (RetinaNet, (2, 3, 4), lambda: LastLevelP6P7(WIDTH, WIDTH)),
}


def build(detector: str, backbone: str, *, toy: bool = False) -> nn.Module:
    """A detector with random weights.

    Args:
        detector: One of `DETECTORS`.
        backbone: One of `BACKBONES`.
        toy: With a small box head and few boxes to train it on, for trials.

    Returns:
        The detector in Eval mode.
    """
    torch.manual_seed(0)
    cls, levels, top = DETECTORS[detector]
    builder, architecture = BACKBONES[backbone]
    # The images come in the size that is wanted.
    model: Any = cls(builder(architecture, levels, top()), num_classes=CLASSES, _skip_resize=True)
    if toy and cls is not RetinaNet:
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.roi_heads.box_head = TwoMLPHead(WIDTH * 7 * 7, 16)
        model.roi_heads.box_predictor = FastRCNNPredictor(16, CLASSES)
    randomize_batchnorms(model.eval(), seed=0)
    _calibrate(model.backbone)
    return model  # type: ignore[no-any-return]


def _calibrate(backbone: Any) -> None:
    """Gives batch norms the statistics of what they see in noise, so that activations do not grow with the depth."""
    norms: list[Any] = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics become those of one batch
    with torch.no_grad(), convbn_fx.batchnorm_mode(backbone, train=True):
        backbone(torch.randn(2, 3, 4 * DIVISOR, 4 * DIVISOR, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def batch(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise, and random boxes, labels and masks in them.

    Args:
        shape: Of the batch: images, channels, height, width.
        dtype: Of images and boxes; the values are the same in each.
        device: Where they are to be.

    Returns:
        Images and targets, as torchvision's detectors are given them.
    """
    generator = torch.Generator().manual_seed(0)
    count, channels, height, width = shape
    images = torch.rand(count, channels, height, width, generator=generator, dtype=torch.float64)
    targets = [_target(height, width, generator) for _ in range(count)]
    return list(images.to(device, dtype)), [
        {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in target.items()
        }
        for target in targets
    ]


def _target(height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    corners, extents = torch.rand(2, BOXES, 2, generator=generator, dtype=torch.float64)
    corners, extents = 0.6 * corners, 0.1 + 0.3 * extents  # inside of the image, and none of them empty
    boxes = torch.cat([corners, corners + extents], 1) * torch.tensor([width, height, width, height])
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    across, down = torch.arange(width), torch.arange(height)[:, None]
    masks = (across >= left) & (across < right) & (down >= top) & (down < bottom)
    labels = torch.randint(1, CLASSES, (BOXES,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks.byte()}
