"""The operands of a convolution and of a batch norm in one normal form, and how each spelling is read into it.

The same functions read tensors, when a module is called, and graph nodes, when a function's call is matched.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Convolution(NamedTuple):
    """Operands of a functional convolution or linear layer, besides its input.

    The tensors are tensors at run time and graph nodes in a rewritten graph. `op` says which PyTorch function is
    meant (autocast treats `conv2d` and `convolution` differently): a key of
    [`OPERATIONS`][convbn_fx.arithmetic.OPERATIONS].
    """

    op: str
    weight: Any
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    transposed: bool = False
    output_padding: Any = 0
    groups: Any = 1


class BatchNorm(NamedTuple):
    """Operands of a batch norm with frozen statistics, besides its input: four vectors of shape (C,), and eps."""

    running_mean: Any
    running_var: Any
    weight: Any = None
    bias: Any = None
    eps: Any = 1e-5


# --- How modules hold their operands -----------------------------------------------------------------------------


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


# --- How functions are called: these signatures are those of the functions ----------------------------------------


def conv_call(op: str) -> Callable[..., tuple[Any, Convolution]]:
    """Reads `torch.conv1d` and its like."""

    def operands(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> tuple[Any, Convolution]:
        return input, Convolution(op, weight, bias, stride, padding, dilation, groups=groups)

    return operands


def conv_transpose_call(op: str) -> Callable[..., tuple[Any, Convolution]]:
    """Reads `torch.conv_transpose1d` and its like, whose `groups` comes before `dilation`."""

    def operands(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> tuple[Any, Convolution]:
        return input, Convolution(op, weight, bias, stride, padding, dilation, True, output_padding, groups)

    return operands


def convolution_call(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: Any,
) -> tuple[Any, Convolution]:
    """Reads `torch.convolution`."""
    return input, Convolution(
        "convolution", weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def linear_call(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Convolution]:
    """Reads `F.linear`."""
    return input, Convolution("linear", weight, bias)


def functional_batch_norm_call(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> tuple[Any, Any, BatchNorm]:
    """Reads `F.batch_norm`."""
    return input, training, BatchNorm(running_mean, running_var, weight, bias, eps)


def batch_norm_call(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any = True,
) -> tuple[Any, Any, BatchNorm]:
    """Reads `torch.batch_norm` and its like."""
    return input, training, BatchNorm(running_mean, running_var, weight, bias, eps)


def batch_norm_no_training_call(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: Any
) -> tuple[Any, Any, BatchNorm]:
    """Reads the overloads that know Eval mode only."""
    return input, False, BatchNorm(running_mean, running_var, weight, bias, eps)
