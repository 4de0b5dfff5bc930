"""The arithmetic: a convolution, a batch norm with frozen statistics, and the two folded into one set of parameters.

A convolution `Y = W * X + b` followed by a batch norm with frozen statistics,

    Z = gamma (Y - mu) / sqrt(var + eps) + beta,

is with `scale = gamma / sqrt(var + eps)` the same as one convolution with parameters fused on the fly,

    Z = (scale W) * X + shift,    shift = beta + scale (b - mu)

(You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx import _torch
from convbn_fx._torch import FakeTensor
from convbn_fx.operands import BatchNorm, Convolution


def convolution(conv: nn.Module | Convolution, /, *args: Any, **kwargs: Any) -> Tensor:
    """The convolution alone: the module called, or the PyTorch function that the operands name."""
    if isinstance(conv, Convolution):
        (input,) = args
        return OPERATIONS[conv.op](input, conv)
    return conv(*args, **kwargs)  # type: ignore[no-any-return]


def batch_norm(norm: nn.Module | BatchNorm, input: Tensor, /) -> Tensor:
    """The batch norm alone: the module called, or `F.batch_norm` with frozen statistics."""
    if isinstance(norm, BatchNorm):
        return F.batch_norm(
            input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    return norm(input)  # type: ignore[no-any-return]


def _conv(function: Callable[..., Tensor]) -> Callable[[Tensor, Convolution], Tensor]:
    return lambda input, conv: function(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _conv_transpose(function: Callable[..., Tensor]) -> Callable[[Tensor, Convolution], Tensor]:
    return lambda input, conv: function(
        input,
        conv.weight,
        conv.bias,
        conv.stride,
        conv.padding,
        conv.output_padding,
        conv.groups,
        conv.dilation,
    )


#: The PyTorch functions behind `Convolution.op`, each called as `OPERATIONS[op](input, conv)`.
OPERATIONS: Final[dict[str, Callable[[Tensor, Convolution], Tensor]]] = {
    "conv1d": _conv(torch.conv1d),
    "conv2d": _conv(torch.conv2d),
    "conv3d": _conv(torch.conv3d),
    "conv_transpose1d": _conv_transpose(torch.conv_transpose1d),
    "conv_transpose2d": _conv_transpose(torch.conv_transpose2d),
    "conv_transpose3d": _conv_transpose(torch.conv_transpose3d),
    "convolution": lambda input, conv: torch.convolution(input, *conv[1:]),
    "linear": lambda input, conv: F.linear(input, conv.weight, conv.bias),
}


def inverse_deviation(running_var: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(var + eps)`, of shape (C_out,), in float32 at least."""
    variance = at_least_float32(running_var)
    return torch.rsqrt(variance + (_kept(eps, variance.dtype) if is_eager(variance) else eps))


@lru_cache(maxsize=64)
def _kept(number: float, dtype: torch.dtype) -> Tensor:
    """The number as a tensor, kept: adding it takes 1.0 microseconds, adding a number, of which one is made, 1.8."""
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=dtype, device="cpu")


def is_eager(tensor: Tensor) -> bool:
    """Whether operations on the tensor are just run: nobody traces, batches or differentiates them in other ways."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and _torch.dispatch_modes() == 0
        and not _torch.are_transforms_active()
        and not _torch.is_legacy_batched(tensor)
    )


def is_plainly_fake(tensor: Tensor) -> bool:
    """Whether the tensor stands for one that `is_eager`: shapes and dtypes are followed, and nothing else looks on."""
    return (
        type(tensor) is FakeTensor
        and not torch.compiler.is_compiling()
        and _torch.dispatch_modes() == 1  # the fake tensors' own
        and not _torch.are_transforms_active()
    )


def scale_of(gamma: Tensor | None, inverse_deviation: Tensor) -> Tensor:
    """`gamma / sqrt(var + eps)`, of shape (C_out,). It may be zero: nothing divides by it."""
    return inverse_deviation if gamma is None else gamma * inverse_deviation


def plus_centred(base: Tensor | None, factor: Tensor, bias: Tensor | None, running_mean: Tensor) -> Tensor:
    """`base + factor (b - mu)`, of shape (C_out,); b and mu may be large and nearly cancel, so they go first."""
    mean = at_least_float32(running_mean)
    if base is None:
        return factor * (-mean if bias is None else bias - mean)
    if bias is None:
        return torch.addcmul(base, factor, mean, value=-1)
    return torch.addcmul(base, factor, bias - mean)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def scaled(weight: Tensor, scale: Tensor, conv: Convolution) -> Tensor:
    """The weight with each output channel multiplied by its element of `scale`, in the weight's dtype.

    Args:
        weight: Weight of the convolution, or its gradient. Half precision is multiplied in float32.
        scale: Shape (C_out,), in float32 at least.
        conv: How the channels lie. A transposed convolution holds C_out / groups output channels in dimension 1,
            those of group g in the g-th part of its C_in rows.
    """
    return rounded(weight * along_output_channels(scale, weight, conv), weight.dtype)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def along_output_channels(scale: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """`scale`, of shape (C_out,), in a shape that broadcasts over the output channels of `weight`."""
    if not conv.transposed:
        return scale.view(-1, *[1] * (weight.ndim - 1))  # (C_out, 1, ...)
    ones = [1] * (weight.ndim - 2)
    if conv.groups == 1:
        return scale.view(1, -1, *ones)  # (1, C_out, ...)
    # (groups, C_out / groups), each row once for every input channel of its group: (C_in, C_out / groups)
    rows = scale.view(conv.groups, -1).repeat_interleave(weight.shape[0] // conv.groups, dim=0)
    return rows.view(weight.shape[0], -1, *ones)


def products(left: Tensor, right: Tensor, conv: Convolution, out: Tensor | None = None) -> Tensor:
    """The scalar products of two weights, one per output channel: shape (C_out,).

    Args:
        left: A weight.
        right: Another.
        conv: How the channels lie.
        out: A weight that nobody needs any more: there the products of single elements go.
    """
    elements = torch.mul(left, right, out=out)  # shaped like the weight
    if not conv.transposed:
        return elements.sum(_ALL_BUT_THE_FIRST[: elements.ndim - 1])
    by_group = elements.view(
        conv.groups, -1, *elements.shape[1:]
    )  # (groups, C_in / groups, C_out / groups, ...)
    return by_group.sum((1, *range(3, by_group.ndim))).view(-1)


_ALL_BUT_THE_FIRST: Final = (1, 2, 3, 4)


def output_channels(conv: Convolution) -> int:
    """C_out."""
    return int(conv.weight.shape[1] * conv.groups if conv.transposed else conv.weight.shape[0])


def is_half(dtype: torch.dtype) -> bool:
    """Whether a convolution in this dtype leaves the scale on its output."""
    return dtype in _HALF


_HALF: Final = frozenset({torch.float16, torch.bfloat16})
