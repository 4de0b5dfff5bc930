"""Inplace-ABN as a contender (Rota Bulò et al., "In-Place Activated BatchNorm", 2018; its package is `inplace_abn`).

It overwrites the convolution's output by the activated and normalised one, which the next convolution saves anyway,
and inverts the activation in the backward pass. An activation that can be inverted is a leaky ReLU, not a ReLU, and a
gamma that can be divided by is `|gamma| + eps`: it is another network.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from convbn_fx.tuning.cloning import clone


def with_inplace_abn(model: ResNet, norm_class: Callable[..., nn.Module]) -> nn.Module:
    """A ResNet of Bottlenecks with activated batch norms, on the same parameters.

    Args:
        model: The ResNet; left untouched.
        norm_class: `inplace_abn.InPlaceABN`.

    Returns:
        The other network.
    """
    result: nn.Module = clone(model)
    for module in list(result.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                # Those before a sum, and those of a shortcut, have no activation of their own.
                activation = "leaky_relu" if name in ("bn1", "bn2") else "identity"
                setattr(module, name, _activated(child, norm_class, activation))
    for module in list(result.modules()):
        for name, child in module.named_children():
            if isinstance(child, Bottleneck):
                setattr(module, name, _Block(child))
    result.relu = nn.Identity()  # the stem's
    return result


def _activated(norm: nn.BatchNorm2d, norm_class: Callable[..., nn.Module], activation: str) -> nn.Module:
    result = norm_class(norm.num_features, eps=norm.eps, activation=activation)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(result, name, getattr(norm, name))
    return result.train(norm.training)


class _Block(nn.Module):
    """A Bottleneck's forward less the ReLUs that its batch norms have taken over."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.block = block

    def forward(self, input: Tensor) -> Tensor:
        block = self.block
        output = block.bn1(block.conv1(input))
        output = block.bn2(block.conv2(output))
        output = block.bn3(block.conv3(output))
        shortcut = input if block.downsample is None else block.downsample(input)
        result: Tensor = block.relu(output + shortcut)  # a sum in place would change what bn3 has saved
        return result
