"""The fused convolution's autograd: it saves its input alone.

Of activation size the input is all that is saved, and that only if W or gamma wants a gradient. The fused weight is
computed again in the backward pass.

The scale can go to either side of the convolution, and the gradients need no more than the input either way. Where the
output is the larger of the two it goes to the weight. Where the weight is, it stays on the output; and so it does in
float16 and bfloat16, because there a scaled weight would overflow, or be rounded, where Eval mode's output is neither.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convbn_fx.functional.arithmetic import (
    at_least_float32,
    batch_norm,
    convolution,
    inverse_deviation,
    is_eager,
    is_half,
    plus_centred,
    products,
    scale_of,
    scaled,
)
from convbn_fx.functional.autocast import without_autocast
from convbn_fx.functional.folding import Folding
from convbn_fx.functional.geometry import Geometry
from convbn_fx.operands import BatchNorm, Convolution

# A scale on the output has to be divided out of gamma's gradient. Down to this size it is; below, this constant stands
# on the output in its place and what is missing on the weight, so that gamma may be tiny or 0.
_SMALLEST_DIVISOR: Final = 2.0**-7


_CONVOLUTION_BACKWARD: Final = torch.ops.aten.convolution_backward.default


def fused_convolution(input: Tensor, conv: Convolution, norm: BatchNorm, scale_on_output: bool) -> Tensor:
    """The convolution with the batch norm folded in, as one differentiable operation.

    Args:
        input: Batched input in the dtype that the convolution computes in, of shape (N, C_in, ...).
        conv: The convolution; its parameters may have a wider dtype (they have, under autocast).
        norm: The batch norm with frozen statistics.
        scale_on_output: Whether the scale stays on the output or goes to the weight.

    Returns:
        The normalised tensor, of shape (N, C_out, ...), in the dtype of `input`.
    """
    output: Tensor = _FusedConvolution.apply(
        input, conv.weight, conv.bias, norm.weight, norm.bias, conv, norm, scale_on_output
    )
    return output


class _FusedConvolution(torch.autograd.Function):
    """Both passes. The backward consists of differentiable operations and so can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        conv: Convolution,
        norm: BatchNorm,
        scale_on_output: bool,
    ) -> Tensor:
        wants_input, wants_weight, _, wants_gamma, _, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            input if wants_weight or wants_gamma else None,
            weight if wants_input or wants_gamma else None,
            bias if wants_gamma else None,
            gamma,
            norm.running_mean,
            norm.running_var,
        )
        ctx.conv = Convolution(conv.op, None, None, *conv[3:])
        ctx.eps, ctx.scale_on_output = norm.eps, scale_on_output
        ctx.input_shape, ctx.input_dtype, ctx.weight_shape = input.shape, input.dtype, weight.shape
        with without_autocast(input.device.type):
            if scale_on_output:
                ctx.parameter_dtypes = [
                    None if tensor is None else tensor.dtype for tensor in (weight, bias, gamma, beta)
                ]
                conv = conv._replace(weight=_to(input.dtype, weight), bias=_to(input.dtype, bias))
                return batch_norm(norm, convolution(conv, input))
            return convolution(Convolution(conv.op, *Folding(conv, norm).parameters(), *conv[3:]), input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _gradients_of_scaled if ctx.scale_on_output else _gradients_of_folded
        with without_autocast(grad_output.device.type):
            return (*gradients(ctx, grad_output), None, None, None)


def _gradients_of_folded(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, gamma and beta, where the scale went to the weight."""
    wants_input, wants_weight, wants_bias, wants_gamma, wants_beta, *_ = ctx.needs_input_grad
    input, weight, bias, gamma, running_mean, running_var = ctx.saved_tensors
    conv = Convolution(ctx.conv.op, weight, bias, *ctx.conv[3:])
    norm = BatchNorm(running_mean, running_var, gamma, None, ctx.eps)
    fold = Folding(conv, norm)
    fused_weight = fold.weight() if wants_input else None
    grad_input, grad_weight = _convolution_backward(ctx, grad_output, input, fused_weight)
    grad_shift = _sum_over_positions(grad_output) if wants_bias or wants_gamma or wants_beta else None
    gradients = fold.gradients(grad_weight, grad_shift, fused_weight, wants_weight, wants_bias, wants_gamma)
    return grad_input, *gradients, grad_shift if wants_beta else None


def _gradients_of_scaled(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, gamma and beta, where the scale stayed on the output."""
    wants_input, wants_weight, wants_bias, wants_gamma, wants_beta, *_ = ctx.needs_input_grad
    conv: Convolution = ctx.conv
    input, weight, bias, gamma, running_mean, running_var = ctx.saved_tensors
    # As the convolution saw them:
    weight, bias = _to(ctx.input_dtype, weight), _to(ctx.input_dtype, bias)
    inverse = inverse_deviation(running_var, ctx.eps)
    scale = scale_of(gamma, inverse)
    from_weight = wants_gamma and wants_weight  # then gamma's gradient comes out of the weight's
    output_scale, weight_scale = _sides(scale) if from_weight else (scale, None)
    fused_weight = weight if weight_scale is None or weight is None else scaled(weight, weight_scale, conv)
    grad_scaled = _on_channels(grad_output, output_scale)
    grad_input, grad_weight = _convolution_backward(
        ctx,
        grad_scaled,
        input if wants_weight else None,
        fused_weight if wants_input else None,
    )
    grad_shift: Any = None
    grad_bias = grad_gamma = None
    if wants_bias or wants_beta or from_weight:
        grad_shift = _sum_over_positions(grad_output)
        grad_bias = scale * grad_shift if wants_bias else None
    if from_weight:
        per_scale = products(at_least_float32(grad_weight), at_least_float32(weight), conv) / output_scale
        centring = grad_shift
        if is_half(ctx.parameter_dtypes[0]):
            # What rounding has added to the scaled gradient is in `per_scale`, times a mean that may be large.
            centring = _sum_over_positions(grad_scaled) / output_scale
        grad_gamma = plus_centred(per_scale, centring, bias, running_mean) * inverse
    if wants_gamma and (not from_weight or (is_half(ctx.input_dtype) and _overflowed(grad_gamma))):
        norm = BatchNorm(running_mean, running_var, gamma, None, ctx.eps)
        grad_gamma = _gradient_of_gamma(conv._replace(weight=weight, bias=bias), norm, input, grad_output)
        if weight_scale is not None:  # then the weight's gradient, not scaled yet, has overflowed
            _, grad_weight = _convolution_backward(ctx, _on_channels(grad_output, scale), input, None)
            weight_scale = None
    if grad_weight is not None and weight_scale is not None:
        grad_weight = scaled(grad_weight, weight_scale, conv)
    gradients = (grad_weight, grad_bias, grad_gamma, grad_shift if wants_beta else None)
    return grad_input, *(
        _to(dtype, gradient) for gradient, dtype in zip(gradients, ctx.parameter_dtypes, strict=True)
    )


def _sides(scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale as the product of one on the output, to divide by, and one on the weight; None stands for ones."""
    tiny = scale.detach().abs() < _SMALLEST_DIVISOR
    if _is_known(scale) and not tiny.any():
        return scale, None
    divisor = torch.where(tiny, _SMALLEST_DIVISOR, scale.detach())
    return divisor, scale / divisor


def _gradient_of_gamma(conv: Convolution, norm: BatchNorm, input: Tensor, grad_output: Tensor) -> Tensor:
    """Eval mode's gradient of gamma, from the convolution's output computed again."""
    output = at_least_float32(convolution(conv, input))
    mean = norm.running_mean.detach().to(output.dtype).view(-1, *[1] * (output.ndim - 2))
    return _sum_over_positions(grad_output * (output - mean)) * inverse_deviation(norm.running_var, norm.eps)


def _overflowed(gradient: Any) -> bool:
    """Whether the weight's gradient is too large for its dtype, though gamma's may not be."""
    return _is_known(gradient) and not bool(gradient.isfinite().all())


def _is_known(tensor: Tensor) -> bool:
    """Whether the values can be looked at, and without a synchronisation."""
    return tensor.device.type == "cpu" and is_eager(tensor)


def _on_channels(grad_output: Tensor, scale: Tensor) -> Tensor:
    """A gradient of the output with each channel multiplied by its element of `scale`, in float32 at least."""
    per_channel = scale.to(torch.promote_types(grad_output.dtype, torch.float32))
    return (grad_output * per_channel.view(-1, *[1] * (grad_output.ndim - 2))).to(grad_output.dtype)


def convolution_gradients(
    conv: Convolution, input: Tensor, grad_output: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution's input, weight and bias, differentiable again.

    Args:
        conv: The convolution.
        input: Its input, of any dtype that autocast casts.
        grad_output: The gradient of its output, in the dtype that it computes in.
        wanted: Which of the three are wanted; the others are None.
    """
    wants_input, wants_weight, wants_bias = wanted
    with without_autocast(grad_output.device.type):
        grad_input, grad_weight = _convolution_backward(
            Call(conv, input.shape, conv.weight.shape),
            grad_output,
            input.to(grad_output.dtype) if wants_weight else None,
            conv.weight.to(grad_output.dtype) if wants_input else None,
        )
        return (
            _to(input.dtype, grad_input),
            _to(conv.weight.dtype, grad_weight),
            _to(conv.bias.dtype, _sum_over_positions(grad_output))
            if wants_bias and conv.bias is not None
            else None,
        )


class Call(NamedTuple):
    """What a convolution's gradients need to know besides tensors."""

    conv: Convolution
    input_shape: Sequence[int]
    weight_shape: Sequence[int]


def _convolution_backward(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> tuple[Any, Any]:  # Tensor or None each, as ctx.needs_input_grad has it
    """Gradients of a bare convolution: of its input if `weight` is given, of its weight if `input` is.

    Not of its bias: the sums that backends make of it are four times as far off as Eval mode's.
    """
    conv: Convolution = ctx.conv
    wants_input, wants_weight = weight is not None, input is not None
    if conv.op == "linear":
        grad_input = grad_output @ weight if weight is not None else None
        return grad_input, grad_output.t() @ input if input is not None else None
    if not (wants_input or wants_weight):
        return None, None
    # Of an operand that no wanted gradient reads, only the shape counts.
    input = grad_output.new_empty(()).expand(ctx.input_shape) if input is None else input
    weight = grad_output.new_empty(()).expand(ctx.weight_shape) if weight is None else weight
    geometry = Geometry.of(conv, ctx.weight_shape)
    if geometry.uneven is not None:
        input = F.pad(input, [pad for extra in reversed(geometry.uneven) for pad in (0, extra)])
    grad_input, grad_weight, _ = _CONVOLUTION_BACKWARD(
        grad_output,
        input,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        conv.transposed,
        geometry.output_padding,
        conv.groups,
        [wants_input, wants_weight, False],
    )
    if wants_input and geometry.uneven is not None:
        for dimension, size in enumerate(ctx.input_shape[2:], start=2):
            grad_input = grad_input.narrow(dimension, 0, size)
    return grad_input, grad_weight


def _sum_over_positions(grad_output: Tensor) -> Tensor:
    """The gradient of the shift: shape (C_out,), in float32 at least."""
    dtype = torch.float32 if is_half(grad_output.dtype) else None
    return grad_output.sum(_POSITIONS[: grad_output.ndim - 1], dtype=dtype)


# The dimensions of a batch of up to three spatial ones, but that of the channels.
_POSITIONS: Final = (0, 2, 3, 4)


def _to(dtype: torch.dtype | None, tensor: Any) -> Any:
    return None if tensor is None else tensor.to(dtype)
