"""The classes of torch.nn that are convolutions and batch norms, and how a call of each is read."""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx.kinds.rows import FORWARD_METHODS, BatchNormKind, ConvolutionKind, Methods
from convbn_fx.operands import BatchNorm, Convolution

# --- Readers -----------------------------------------------------------------------------------------------------


def conv_module(op: str) -> Callable[..., tuple[Tensor, Convolution]]:
    """Reads the modules whose forward is `op` after their padding mode's padding."""

    def operands(module: Any, input: Tensor) -> tuple[Tensor, Convolution]:
        padding = module.padding
        if module.padding_mode != "zeros":
            input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        weight, bias = _weight_and_bias(module)
        return input, Convolution(
            op, weight, bias, module.stride, padding, module.dilation, False, 0, module.groups
        )

    return operands


def conv_transpose_module(op: str, spatial_rank: int) -> Callable[..., tuple[Tensor, Convolution]]:
    """Reads the modules whose forward is the transposed convolution `op`, of so many spatial dimensions."""

    def operands(
        module: Any, input: Tensor, output_size: list[int] | None = None
    ) -> tuple[Tensor, Convolution]:
        output_padding = module._output_padding(
            input,
            output_size,
            module.stride,
            module.padding,
            module.kernel_size,
            spatial_rank,
            module.dilation,
        )
        return input, Convolution(
            op,
            *_weight_and_bias(module),
            module.stride,
            module.padding,
            module.dilation,
            True,
            output_padding,
            module.groups,
        )

    return operands


def linear_module(module: Any, input: Tensor) -> tuple[Tensor, Convolution]:
    """Reads `nn.Linear`."""
    return input, Convolution("linear", *_weight_and_bias(module))


def batch_norm_module(module: Any) -> BatchNorm:
    """Reads torch.nn's batch norms."""
    buffers = module._buffers
    try:
        mean, variance = buffers["running_mean"], buffers["running_var"]
    except KeyError:
        mean, variance = module.running_mean, module.running_var
    return BatchNorm(mean, variance, *_weight_and_bias(module), module.eps)


def _weight_and_bias(module: Any) -> tuple[Any, Any]:
    """Reads them where they most often are, in 0.1 microseconds; over `nn.Module.__getattr__` it is 0.8."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # parametrised, for example
        return module.weight, module.bias


class AsAttributes:
    """A module without the short ways to its parameters and buffers: everything is read as its forward reads it."""

    _parameters: Final[Mapping[str, Tensor]] = MappingProxyType({})
    _buffers: Final[Mapping[str, Tensor]] = MappingProxyType({})

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# --- The table ---------------------------------------------------------------------------------------------------


def is_as_shipped(cls: type[nn.Module]) -> bool:
    """Whether nobody had replaced a method of a torch.nn class before this file was imported."""
    methods = [getattr(cls, name, None) for name in FORWARD_METHODS]
    return all(
        method.__module__.startswith("torch.nn.modules.")
        for method in methods
        if isinstance(method, FunctionType)
    )


def _own_weight(cls: type[nn.Module], module: Any) -> tuple[type[nn.Module], Tensor]:
    return cls, module.weight


PARAMETERS: Final = ("weight", "bias")
_CONVOLUTION: Final = (*PARAMETERS, "stride", "padding", "dilation", "groups")
_TRANSPOSED: Final = (*_CONVOLUTION, "kernel_size", "output_padding")
BATCH_NORM: Final = (*PARAMETERS, "running_mean", "running_var", "eps")

# Each row: the class, how its call is read, the rank of a batched input, and the attributes that are read.
CONVOLUTIONS: Final[dict[type[nn.Module], ConvolutionKind]] = {
    cls: ConvolutionKind(cls.__name__, operands, batched_rank, partial(_own_weight, cls), Methods(cls), reads)
    for cls, operands, batched_rank, reads in (
        (nn.Conv1d, conv_module("conv1d"), 3, (*_CONVOLUTION, "padding_mode")),
        (nn.Conv2d, conv_module("conv2d"), 4, (*_CONVOLUTION, "padding_mode")),
        (nn.Conv3d, conv_module("conv3d"), 5, (*_CONVOLUTION, "padding_mode")),
        (nn.ConvTranspose1d, conv_transpose_module("conv_transpose1d", 1), 3, _TRANSPOSED),
        (nn.ConvTranspose2d, conv_transpose_module("conv_transpose2d", 2), 4, _TRANSPOSED),
        (nn.ConvTranspose3d, conv_transpose_module("conv_transpose3d", 3), 5, _TRANSPOSED),
        (nn.Linear, linear_module, 2, PARAMETERS),
    )
    if is_as_shipped(cls)
}

BATCH_NORMS: Final[dict[type[nn.Module], BatchNormKind]] = {
    cls: BatchNormKind(
        cls.__name__, batch_norm_module, accepted_ranks, methods=Methods(cls), reads=BATCH_NORM
    )
    for cls, accepted_ranks in (
        (nn.BatchNorm1d, (2, 3)),
        (nn.BatchNorm2d, (4,)),
        (nn.BatchNorm3d, (5,)),
        (nn.SyncBatchNorm, None),
    )
    if is_as_shipped(cls)
}
