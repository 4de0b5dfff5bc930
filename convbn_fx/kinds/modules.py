"""How modules of PyTorch's hold their operands."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor
from torch.nn import functional as F

from convbn_fx.operands import BatchNorm, Convolution


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
    """Reads them where they most often are, because the way over `nn.Module.__getattr__` is ten times as long."""
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
