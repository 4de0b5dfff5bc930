"""Where a convolution's kernel goes, as numbers per spatial dimension, whichever way it was written."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from convbn_fx.operands import Convolution

Result = TypeVar("Result")


class Geometry(NamedTuple):
    """Strides and paddings of a convolution, one number per spatial dimension.

    `uneven` is how much more is padded on the right than on the left: None but where `"same"` cannot be
    symmetric, because the kernel reaches an even way.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    uneven: tuple[int, ...] | None
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: Convolution, weight_shape: Sequence[int]) -> "Geometry":
        """The geometry of a convolution (not a linear layer) whose weight has that shape."""
        return _geometry(weight_shape, conv.stride, conv.padding, conv.dilation, conv.output_padding)


def output_size(input: Tensor, weight: Tensor, conv: Any) -> int:
    """Number of elements of the output of a convolution: the product of its `output_shape`."""
    return math.prod(output_shape(input, weight, conv))


def output_shape(input: Tensor, weight: Tensor, conv: Any) -> tuple[int, ...]:
    """Shape of the output of a convolution, or of a linear layer with inputs of two dimensions.

    Args:
        input: Its batched input.
        weight: Its weight.
        conv: Its other operands, or a module of torch.nn, which has attributes of the same names.

    Returns:
        The shape, by the formulas of torch.nn's convolutions; with no channels where the input's are not the weight's.
    """
    return _output_shape(
        input.shape,
        weight.shape,
        conv.transposed,
        conv.groups,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.output_padding,
    )


def _remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which keeps its last results: shapes come again at every call."""
    known = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def remembered(*args: Any) -> Result:
        try:
            return known(*args)
        except TypeError:  # lists and symbolic sizes have no hash
            return function(*args)

    return remembered


@_remembered
def _geometry(
    weight_shape: Sequence[int], stride: Any, padding: Any, dilation: Any, output_padding: Any
) -> Geometry:
    dimensions = len(weight_shape) - 2
    dilation = _per_dimension(dilation, dimensions)
    uneven = None
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, weight_shape[2:], strict=True)]
        padding = tuple(pad // 2 for pad in total)
        if any(pad % 2 for pad in total):
            uneven = tuple(pad % 2 for pad in total)
    else:
        padding = _per_dimension(0 if padding == "valid" else padding, dimensions)
    stride, output_padding = _per_dimension(stride, dimensions), _per_dimension(output_padding, dimensions)
    return Geometry(stride, padding, uneven, dilation, output_padding)


@_remembered
def _output_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    groups: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
) -> tuple[int, ...]:
    taken, channels = weight_shape[0], weight_shape[1] * groups
    if not transposed:
        taken, channels = channels, taken
    geometry = _geometry(weight_shape, stride, padding, dilation, output_padding)
    spatial: list[int] = []
    for size, kernel, step, pad, pad_right, spacing, extra in zip(
        input_shape[2:],
        weight_shape[2:],
        geometry.stride,
        geometry.padding,
        geometry.uneven or (0,) * len(geometry.padding),
        geometry.dilation,
        geometry.output_padding,
        strict=True,
    ):
        reach = spacing * (kernel - 1)
        if transposed:
            spatial.append((size - 1) * step - 2 * pad + reach + extra + 1)
        else:  # a stride of 0 is for the convolution to refuse
            spatial.append((size + 2 * pad + pad_right - reach - 1) // max(step, 1) + 1)
    return (input_shape[0], channels if input_shape[1] == taken else 0, *spatial)


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (int(value),)
    return values * dimensions if len(values) == 1 else values
