"""Convolutions and batch norms of other libraries, by name: none of them is imported here.

A class is looked up in these tables when a model that holds it is first seen; its library is imported by then.
"""

import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx.operands import BatchNorm, Convolution


def _same_padded(module: Any, input: Tensor) -> Tensor:
    """The input padded as TensorFlow's `SAME` does, by timm's own function."""
    pad_same: Callable[..., Tensor] = sys.modules["timm.layers.padding"].pad_same
    return pad_same(input, module.weight.shape[-2:], module.stride, module.dilation)


def _conv2d_same(module: Any, input: Tensor) -> tuple[Tensor, Convolution]:
    """Reads timm's `Conv2dSame`, whatever padding it was built with."""
    return _same_padded(module, input), Convolution(
        "conv2d", module.weight, module.bias, module.stride, 0, module.dilation, groups=module.groups
    )


def _standardised(module: Any) -> Tensor:
    """A weight of mean 0 and variance 1 in each output channel, times the gain of timm's scaled variant."""
    gain = getattr(module, "gain", None)
    weight: Tensor = F.batch_norm(
        module.weight.reshape(1, module.out_channels, -1),
        None,
        None,
        weight=None if gain is None else (gain * module.scale).view(-1),
        training=True,
        momentum=0.0,
        eps=module.eps,
    )
    return weight.reshape_as(module.weight)


def _std_conv(module: Any, input: Tensor) -> tuple[Tensor, Convolution]:
    """Reads timm's weight-standardised convolutions: linear in the standardised weight."""
    if getattr(module, "same_pad", False):
        input = _same_padded(module, input)
    return input, Convolution(
        "conv2d",
        _standardised(module),
        module.bias,
        module.stride,
        module.padding,
        module.dilation,
        groups=module.groups,
    )


def _plain_conv2d_same(module: Any) -> tuple[type[nn.Module], Tensor]:
    """A plain convolution cannot pad as much as its input needs: timm's class has to stay."""
    return sys.modules["timm.layers.conv2d_same"].Conv2dSame, module.weight


def _plain_std_conv(module: Any) -> tuple[type[nn.Module], Tensor]:
    """Standardised once and for all."""
    if getattr(module, "same_pad", False):
        return sys.modules["timm.layers.conv2d_same"].Conv2dSame, _standardised(module)
    return nn.Conv2d, _standardised(module)


#: Qualified name of each convolution class, how its operands are read, and its plain form for Deploy mode.
CONVOLUTIONS: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "timm.layers.conv2d_same.Conv2dSame": (_conv2d_same, _plain_conv2d_same),
    "timm.layers.std_conv.StdConv2d": (_std_conv, _plain_std_conv),
    "timm.layers.std_conv.StdConv2dSame": (_std_conv, _plain_std_conv),
    "timm.layers.std_conv.ScaledStdConv2d": (_std_conv, _plain_std_conv),
    "timm.layers.std_conv.ScaledStdConv2dSame": (_std_conv, _plain_std_conv),
}


def _drop_and_act(module: Any, normalised: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """What timm's norm-and-activation classes do after normalising; converted ones may lack either."""
    for name in ("drop", "act"):
        if hasattr(module, name):
            normalised = call(getattr(module, name), normalised)
    return normalised


def _frozen_operands(module: Any) -> BatchNorm:
    """Reads the frozen batch norms of transformers' detectors, whose eps stands in their forward."""
    return BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, _FROZEN_EPS)


_FROZEN_EPS: Final = 1e-5


#: Qualified name of each batch-norm class, and the fields in which its row differs from that of `nn.BatchNorm2d`. A
#: star stands for any part of a name.
BATCH_NORMS: Final[dict[str, dict[str, Any]]] = {
    "timm.layers.norm_act.BatchNormAct2d": {"epilogue": _drop_and_act},
    "timm.layers.norm_act.SyncBatchNormAct": {"accepted_ranks": None, "epilogue": _drop_and_act},
    "timm.layers.norm_act.FrozenBatchNormAct2d": {
        "always_frozen": True,
        "promotes": True,
        "epilogue": _drop_and_act,
    },
    "torchvision.ops.misc.FrozenBatchNorm2d": {"always_frozen": True, "promotes": True},
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": {"always_frozen": True, "promotes": True},
    "transformers.models.*FrozenBatchNorm2d": {
        "operands": _frozen_operands,
        "reads": (),
        "always_frozen": True,
        "promotes": True,
    },
}


#: Qualified name of each activation class, and its kind. A star stands for any part of a name.
ACTIVATIONS: Final[dict[str, str]] = {
    "timm.layers.activations*.Swish*": "composed_silu",
    "timm.layers.activations*.HardSwish*": "composed_hardswish",
    "timm.layers.activations*.HardSigmoid*": "composed_hardsigmoid",
    "timm.layers.activations*.Mish*": "composed_mish",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "efficientnet_pytorch.utils.Swish": "composed_silu",
    "efficientnet_pytorch.utils.MemoryEfficientSwish": "composed_silu",
}


#: Qualified names of squeeze-and-excite modules: they multiply their input by what their last child returns.
GATED: Final = (
    "timm.layers.squeeze_excite.SEModule",
    "timm.layers.squeeze_excite.EffectiveSEModule",
    "timm.models._efficientnet_blocks.SqueezeExcite",
    "timm.models.senet.SEModule",
    "torchvision.ops.misc.SqueezeExcitation",
)


def is_gated(cls: type) -> bool:
    """Whether a class is one of those."""
    return f"{cls.__module__}.{cls.__qualname__}" in GATED


def activation_kind(cls: type) -> str | None:
    """The kind of an activation class that is in the table, else None."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return next((kind for pattern, kind in ACTIVATIONS.items() if fnmatchcase(name, pattern)), None)


def batch_norm_fields(cls: type) -> dict[str, Any] | None:
    """The fields of the row of a class that is in the table, else None."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    for pattern, fields in BATCH_NORMS.items():
        if fnmatchcase(name, pattern):
            return fields if "*" not in pattern or _has_the_frozen_forward(cls) else None
    return None


def _has_the_frozen_forward(cls: Any) -> bool:
    """Whether a forward that is known by a pattern reads what `_frozen_operands` reads, and does nothing more."""
    code = getattr(cls.forward, "__code__", None)
    return (
        code is not None
        and sorted(code.co_names)
        == sorted(("reshape", "rsqrt", "weight", "bias", "running_mean", "running_var"))
        and [constant for constant in code.co_consts if isinstance(constant, float)] == [_FROZEN_EPS]
    )


def is_kept_whole(module: object) -> bool:
    """Whether timm lists the module's class as one that symbolic tracing must not enter."""
    timm = sys.modules.get("timm.layers")
    return timm is not None and type(module) in timm.get_notrace_modules()


def functions_kept_whole() -> tuple[Callable[..., Any], ...]:
    """The functions that timm lists as ones that symbolic tracing must not enter."""
    timm = sys.modules.get("timm.layers")
    return () if timm is None else tuple(filter(callable, timm.get_notrace_functions()))
