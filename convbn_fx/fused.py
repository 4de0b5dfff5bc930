"""The fused convolution's autograd: it saves its input alone.

With `dW'` and `db'` the gradients of the bare convolution with the fused parameters,

    dW = scale dW',   db = scale db',   dbeta = db',   dgamma = (<dW', W> + db' (b - mu)) / sqrt(var + eps),

so that of activation size the input is all that is saved, and that only if W or gamma wants a gradient. The fused
weight is computed again in the backward pass.

The scale can go to either side of the convolution, and the gradients need no more than the input either way. Where the
output is the larger of the two it goes to the weight. Where the weight is, it stays on the output; and so it does in
float16 and bfloat16, because there a scaled weight would overflow, or be rounded, where Eval mode's output is neither.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convbn_fx.arithmetic import (
    along_output_channels,
    batch_norm,
    centred,
    convolution,
    fold,
    inverse_deviation,
    is_half,
    products,
    scale_of,
    scaled,
)
from convbn_fx.autocast import without_autocast
from convbn_fx.geometry import Geometry
from convbn_fx.operands import BatchNorm, Convolution

# A scale on the output has to be divided out of gamma's gradient. Down to this size it is; below, this constant stands
# on the output in its place and what is missing on the weight, so that gamma may be tiny or 0.
_SMALLEST_DIVISOR: Final = 2.0**-7


class _Wanted(NamedTuple):
    """Which operands a gradient is wanted for."""

    input: bool
    weight: bool
    bias: bool
    gamma: bool
    beta: bool


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
        input,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        conv._replace(weight=None, bias=None),
        scale_on_output,
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
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        conv: Convolution,
        scale_on_output: bool,
    ) -> Tensor:
        wanted = _Wanted(*ctx.needs_input_grad[:5])
        ctx.save_for_backward(
            input if wanted.weight or wanted.gamma else None,
            weight if wanted.input or wanted.gamma else None,
            bias if wanted.gamma else None,
            gamma,
            running_mean if wanted.gamma else None,
            running_var,
        )
        ctx.conv, ctx.eps, ctx.scale_on_output = conv, eps, scale_on_output
        ctx.input_shape, ctx.input_dtype, ctx.weight_shape = input.shape, input.dtype, weight.shape
        ctx.parameter_dtypes = [
            None if tensor is None else tensor.dtype for tensor in (weight, bias, gamma, beta)
        ]
        norm = BatchNorm(running_mean, running_var, gamma, beta, eps)
        with without_autocast(input.device.type):
            if scale_on_output:
                conv = conv._replace(weight=_to(input.dtype, weight), bias=_to(input.dtype, bias))
                return batch_norm(norm, convolution(conv, input))
            weight, bias = fold(conv._replace(weight=weight, bias=bias), norm)
            return convolution(conv._replace(weight=weight, bias=bias), input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_output.device.type):
            gradients = _gradients(ctx, grad_output)
        return (*gradients, None, None, None, None, None)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients with respect to input, weight, bias, gamma and beta."""
    wanted = _Wanted(*ctx.needs_input_grad[:5])
    conv: Convolution = ctx.conv
    input, weight, bias, gamma, running_mean, running_var = ctx.saved_tensors
    # As the convolution saw them:
    weight, bias = _to(ctx.input_dtype, weight), _to(ctx.input_dtype, bias)
    norm = BatchNorm(running_mean, running_var, gamma, None, ctx.eps)
    inverse = inverse_deviation(running_var, ctx.eps)
    scale = scale_of(gamma, inverse)
    # With the scale on the output, gamma's gradient comes out of the weight's, if that is computed anyway.
    from_weight = wanted.gamma and (wanted.weight or not ctx.scale_on_output)
    output_scale, weight_scale = _sides(scale, ctx.scale_on_output, from_weight)

    grad_convolution = grad_output if output_scale is None else _on_channels(grad_output, output_scale)
    fused_weight = _on_weight(weight, weight_scale, conv) if wanted.input else None
    grad_input, grad_weight = _convolution_backward(
        ctx, grad_convolution, input if wanted.weight or from_weight else None, fused_weight
    )

    grad_shift: Any = None
    grad_bias = grad_gamma = grad_beta = None
    if wanted.bias or wanted.beta or from_weight:
        grad_shift = _sum_over_positions(grad_output)
        grad_bias = scale * grad_shift if wanted.bias else None
        grad_beta = grad_shift if wanted.beta else None
    if from_weight:
        per_scale = products(_at_least_float32(grad_weight), _at_least_float32(weight), conv)
        if output_scale is not None:
            per_scale = per_scale / output_scale
        grad_gamma = (per_scale + grad_shift * centred(bias, running_mean)) * inverse
    if wanted.gamma and (not from_weight or (is_half(ctx.input_dtype) and _overflowed(grad_gamma))):
        grad_gamma = _gradient_of_gamma(conv._replace(weight=weight, bias=bias), norm, input, grad_output)
    if wanted.weight:
        nobody_else_sees_it = not torch.is_grad_enabled()
        grad_weight = _on_weight(grad_weight, weight_scale, conv, in_place=nobody_else_sees_it)
    gradients = (grad_weight if wanted.weight else None, grad_bias, grad_gamma, grad_beta)
    return grad_input, *(
        _to(dtype, gradient) for gradient, dtype in zip(gradients, ctx.parameter_dtypes, strict=True)
    )


def _sides(scale: Tensor, scale_on_output: bool, divides: bool) -> tuple[Tensor | None, Tensor | None]:
    """The scale as the product of one on the output and one on the weight; None stands for ones."""
    if not scale_on_output:
        return None, scale
    if not divides:
        return scale, None
    tiny = scale.detach().abs() < _SMALLEST_DIVISOR
    if _is_known(scale) and not tiny.any():
        return scale, None
    divisor = torch.where(tiny, _SMALLEST_DIVISOR, scale.detach())
    return divisor, scale / divisor


def _gradient_of_gamma(conv: Convolution, norm: BatchNorm, input: Tensor, grad_output: Tensor) -> Tensor:
    """Eval mode's gradient of gamma, from the convolution's output computed again."""
    output = _at_least_float32(convolution(conv, input))
    mean = norm.running_mean.detach().to(output.dtype).view(-1, *[1] * (output.ndim - 2))
    return _sum_over_positions(grad_output * (output - mean)) * inverse_deviation(norm.running_var, norm.eps)


def _overflowed(gradient: Any) -> bool:
    """Whether the weight's gradient is too large for its dtype, though gamma's may not be."""
    return _is_known(gradient) and not bool(gradient.isfinite().all())


def _is_known(tensor: Tensor) -> bool:
    """Whether the values can be looked at, and without a synchronisation: nobody traces or batches this."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _on_channels(grad_output: Tensor, scale: Tensor) -> Tensor:
    """A gradient of the output with each channel multiplied by its element of `scale`, in float32 at least."""
    per_channel = scale.to(torch.promote_types(grad_output.dtype, torch.float32))
    return (grad_output * per_channel.view(-1, *[1] * (grad_output.ndim - 2))).to(grad_output.dtype)


def _on_weight(weight: Tensor, scale: Tensor | None, conv: Convolution, in_place: bool = False) -> Tensor:
    """A weight, or its gradient, with each output channel multiplied by its element of `scale`."""
    if scale is None:
        return weight
    if in_place and not is_half(weight.dtype):
        return weight.mul_(along_output_channels(scale, weight, conv))
    return scaled(weight, scale, conv)


def _convolution_backward(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> tuple[Any, Any]:  # Tensor or None each, as ctx.needs_input_grad has it
    """Gradients of a bare convolution: of its input if `weight` is given, of its weight if `input` is."""
    conv: Convolution = ctx.conv
    wants_input, wants_weight = weight is not None, input is not None
    if conv.op == "linear":
        grad_input = grad_output @ weight if weight is not None else None
        return grad_input, grad_output.t() @ input if input is not None else None
    if not (wants_input or wants_weight):
        return None, None
    # Of an operand that no wanted gradient reads, only the shape counts.
    nothing = grad_output.new_empty(())
    input = nothing.expand(ctx.input_shape) if input is None else input
    weight = nothing.expand(ctx.weight_shape) if weight is None else weight
    geometry = Geometry.of(conv, ctx.weight_shape[2:])
    if any(geometry.uneven):
        input = F.pad(input, [pad for extra in reversed(geometry.uneven) for pad in (0, extra)])
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
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
    if wants_input and any(geometry.uneven):
        for dimension, size in enumerate(ctx.input_shape[2:], start=2):
            grad_input = grad_input.narrow(dimension, 0, size)
    return grad_input, grad_weight


def _sum_over_positions(grad_output: Tensor) -> Tensor:
    """The gradient of the shift: shape (C_out,), in float32 at least."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    return grad_output.sum([0, *range(2, grad_output.ndim)], dtype=dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _to(dtype: torch.dtype | None, tensor: Any) -> Any:
    return None if tensor is None else tensor.to(dtype)
