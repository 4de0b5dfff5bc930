"""The architectures that benchmarks run on: by name, with random weights, nothing downloaded."""

from collections.abc import Callable

import timm
import torchvision
from torch import nn

from bench.harness.unet import UNet

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "resnet50": lambda: torchvision.models.resnet50(weights=None),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "googlenet": lambda: torchvision.models.googlenet(weights=None, init_weights=False),
    "densenet121": lambda: torchvision.models.densenet121(weights=None),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", pretrained=False),
    "regnety_002": lambda: timm.create_model("regnety_002", pretrained=False),
    "unet": UNet,
}
