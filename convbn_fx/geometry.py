"""Where a convolution's kernel goes, as numbers per spatial dimension, whichever way it was written."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from convbn_fx.operands import Convolution


class Geometry(NamedTuple):
    """Strides and paddings of a convolution, one number per spatial dimension.

    `padding_right` differs from `padding` where `"same"` cannot be symmetric: the kernel reaches an even way.
    """

    stride: list[int]
    padding: list[int]
    padding_right: list[int]
    dilation: list[int]
    output_padding: list[int]

    @classmethod
    def of(cls, conv: Convolution, kernel_size: Sequence[int]) -> "Geometry":
        """The geometry of a convolution (not a linear layer) with a kernel of that size."""
        dimensions = len(kernel_size)
        dilation = _per_dimension(conv.dilation, dimensions)
        if conv.padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True)]
            padding = [pad // 2 for pad in total]
            padding_right = [pad - pad // 2 for pad in total]
        else:
            padding = _per_dimension(0 if conv.padding == "valid" else conv.padding, dimensions)
            padding_right = padding
        stride = _per_dimension(conv.stride, dimensions)
        output_padding = _per_dimension(conv.output_padding, dimensions)
        return cls(stride, padding, padding_right, dilation, output_padding)

    @property
    def uneven(self) -> list[int]:
        """How much more is padded on the right than on the left."""
        return [right - left for left, right in zip(self.padding, self.padding_right, strict=True)]

    def output_size(
        self, input_size: Sequence[int], kernel_size: Sequence[int], transposed: bool
    ) -> list[int]:
        """Spatial sizes of the output, by the formulas of torch.nn's convolutions."""
        sizes = []
        for size, kernel, stride, left, right, dilation, extra in zip(
            input_size, kernel_size, *self, strict=True
        ):
            reach = dilation * (kernel - 1)
            if transposed:
                sizes.append((size - 1) * stride - left - right + reach + extra + 1)
            else:
                sizes.append(
                    (size + left + right - reach - 1) // max(stride, 1) + 1
                )  # a stride of 0 is for the convolution to refuse
        return sizes


def _per_dimension(value: Any, dimensions: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [int(value)]
    return values * dimensions if len(values) == 1 else values
