"""Folding a batch norm into a convolution, and the way back for the gradients, as plain operations.

With `dW'` and `db'` the gradients of the convolution with the fused parameters,

    dW = scale dW',   db = scale db',   dbeta = db',   dgamma = (<dW', W> + db' (b - mu)) / sqrt(var + eps).
"""

from typing import Any

import torch
from torch import Tensor

from convbn_fx.functional.arithmetic import (
    along_output_channels,
    inverse_deviation,
    is_eager,
    plus_centred,
    products,
    scale_of,
    scaled,
)
from convbn_fx.operands import BatchNorm, Convolution


def fold(conv: Convolution, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The parameters of the one convolution that equals a convolution and the batch norm after it.

    `(scale W, beta + scale (b - mu))` with `scale = gamma / sqrt(var + eps)`, differentiable in every operand but the
    statistics.

    Args:
        conv: The convolution; weight of shape (C_out, C_in / groups, ...), transposed (C_in, C_out / groups, ...).
        norm: The batch norm with frozen statistics; vectors of shape (C_out,).

    Returns:
        The fused weight, shaped like `conv.weight`, and the fused bias, of shape (C_out,), in the dtype of
        `conv.weight`.

    Example:
        ```python
        import torch
        from torch.nn import functional as F
        from convbn_fx.functional import fold
        from convbn_fx.operands import BatchNorm, Convolution

        conv = Convolution("conv2d", torch.randn(8, 3, 3, 3), torch.randn(8), padding=1)
        norm = BatchNorm(torch.randn(8), torch.rand(8) + 0.5, weight=torch.randn(8), bias=torch.randn(8))
        weight, bias = fold(conv, norm)

        x = torch.randn(2, 3, 16, 16)
        apart = F.batch_norm(F.conv2d(x, conv.weight, conv.bias, padding=1), *norm[:4])
        torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), apart, rtol=1e-3, atol=1e-4)
        ```
    """
    weight, bias = Folding(conv, norm).parameters()
    return weight, bias.to(weight.dtype)


class Folding:
    """A convolution and the batch norm after it, about to become one convolution.

    Args:
        conv: The convolution.
        norm: The batch norm with frozen statistics, in the same dtype.
    """

    def __init__(self, conv: Convolution, norm: BatchNorm) -> None:
        self.conv, self.norm = conv, norm
        self.inverse = inverse_deviation(norm.running_var, norm.eps)  # (C_out,)
        self.scale = scale_of(norm.weight, self.inverse)  # (C_out,)

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The fused weight and the fused bias."""
        conv, norm = self.conv, self.norm
        return self.weight(), plus_centred(norm.bias, self.scale, conv.bias, norm.running_mean)

    def weight(self) -> Tensor:
        """The fused weight alone."""
        return scaled(self.conv.weight, self.scale, self.conv)

    def gradients(
        self, grad_weight: Any, grad_shift: Any, spare: Tensor | None, *wanted: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the parameters out of those of the fused ones.

        Args:
            grad_weight: Gradient of the fused weight, which nobody else has: it may become the weight's, in place.
            grad_shift: Gradient of the fused bias.
            spare: A tensor like the weight whose values nobody needs any more.
            wanted: Whether the gradients of weight, bias and gamma are wanted.

        Returns:
            These gradients.
        """
        wants_weight, wants_bias, wants_gamma = wanted
        # Gradients that are to be differentiated again need their operands as they are.
        in_place = not torch.is_grad_enabled()
        grad_gamma = None
        if wants_gamma:
            out = spare if in_place and is_eager(grad_weight) else None
            per_scale = products(grad_weight, self.conv.weight, self.conv, out)  # (C_out,)
            centred = plus_centred(per_scale, grad_shift, self.conv.bias, self.norm.running_mean)  # (C_out,)
            grad_gamma = centred * self.inverse
        if wants_weight:
            scale = along_output_channels(self.scale, grad_weight, self.conv)
            grad_weight = grad_weight.mul_(scale) if in_place else grad_weight * scale
        return (
            grad_weight if wants_weight else None,
            self.scale * grad_shift if wants_bias else None,
            grad_gamma,
        )
