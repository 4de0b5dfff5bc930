"""The fused convolution: what rewritten graphs call. Its run-time dispatch, its arithmetic, its autograd.

A convolution `Y = W * X + b` followed by a batch norm with frozen statistics,

    Z = gamma * (Y - mu) / sqrt(var + eps) + beta,

is with `scale = gamma / sqrt(var + eps)` the same as one convolution with parameters fused on the fly,

    Z = (scale W) * X + shift,    shift = beta + scale (b - mu)

(You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3). The second form
never needs Y for its backward pass. With `dW'` and `db'` the gradients of a plain convolution with respect to its
weight and bias,

    dW = scale dW',   db = scale db',   dbeta = db',   dgamma = (<dW', W> + db' (b - mu)) / sqrt(var + eps),

so that the input is all of activation size that is saved, and that only if W or gamma wants a gradient.

The scale can go to either side of the convolution. In float32 and float64 it goes to the weight. In float16 and
bfloat16 it stays on the output, as in Eval mode: a scaled weight would overflow or be rounded where Eval's output is
neither; the gradients need no more than the input there either.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from convbn_fx import kinds
from convbn_fx.kinds import BatchNorm, Convolution

__all__ = ["OPERATIONS", "batch_norm", "conv_batch_norm", "convolution", "fold"]

# --- What rewritten graphs call ----------------------------------------------------------------------------------


def conv_batch_norm(
    conv: nn.Module | Convolution, norm: nn.Module | BatchNorm, /, *args: Any, **kwargs: Any
) -> Tensor:
    """A convolution and the batch norm after it, as one convolution wherever that is the same function.

    Everything is looked up at this call: the batch norm's mode, parameters, statistics, eps, hooks, ranks, dtypes.
    Where the two cannot be one (Train mode, hooks on either module, dimensions that do not match, ...) the convolution
    and then the batch norm are run as they are.

    Args:
        conv: A convolution or linear module, or the operands of a functional one.
        norm: A batch-norm module, or the operands of a functional one with frozen statistics.
        *args: What the convolution is called with; for a functional one its input, of shape (N, C_in, ...).
        **kwargs: As `args`; `output_size` of a transposed convolution, for example.

    Returns:
        The normalised tensor, of shape (N, C_out, ...) and the dtype that Eval mode gives.

    Raises:
        Exception: What the convolution or the batch norm raises for such an input.
    """
    proxies = [value for value in (*args, *kwargs.values()) if _is_proxy(value)]
    if proxies:  # somebody traces a rewritten graph again (unpickling does): stay one node
        return torch.overrides.handle_torch_function(  # type: ignore[no-any-return]
            conv_batch_norm, proxies, conv, norm, *args, **kwargs
        )
    if not _can_be_fused(conv, norm):
        return batch_norm(norm, convolution(conv, *args, **kwargs))
    if isinstance(conv, Convolution):
        (input,) = args
    else:
        kind = kinds.convolution_kind(conv)
        assert kind is not None  # noqa: S101 - narrows the type; _can_be_fused has looked
        input, conv = kind.operands(conv, *args, **kwargs)
    if not _channels_agree(input, conv, norm):
        return batch_norm(norm, convolution(conv, input))
    if isinstance(norm, nn.Module):
        norm = _norm_operands(norm)
    return _fused(input, conv, norm)


def convolution(conv: nn.Module | Convolution, /, *args: Any, **kwargs: Any) -> Tensor:
    """The convolution alone: the module called, or the PyTorch function that the operands name."""
    if isinstance(conv, Convolution):
        return OPERATIONS[conv.op](*args, conv)
    return conv(*args, **kwargs)  # type: ignore[no-any-return]


def batch_norm(norm: nn.Module | BatchNorm, input: Tensor, /) -> Tensor:
    """The batch norm alone: the module called, or `F.batch_norm` with frozen statistics."""
    if isinstance(norm, BatchNorm):
        return F.batch_norm(
            input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    return norm(input)  # type: ignore[no-any-return]


def _convolve(function: Callable[..., Tensor]) -> Callable[[Tensor, Convolution], Tensor]:
    return lambda input, conv: function(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _convolve_transposed(function: Callable[..., Tensor]) -> Callable[[Tensor, Convolution], Tensor]:
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


#: The PyTorch functions behind `Convolution.op`, each called as `OPERATIONS[op](input, convolution)`.
OPERATIONS: Final[dict[str, Callable[[Tensor, Convolution], Tensor]]] = {
    "conv1d": _convolve(torch.conv1d),
    "conv2d": _convolve(torch.conv2d),
    "conv3d": _convolve(torch.conv3d),
    "conv_transpose1d": _convolve_transposed(torch.conv_transpose1d),
    "conv_transpose2d": _convolve_transposed(torch.conv_transpose2d),
    "conv_transpose3d": _convolve_transposed(torch.conv_transpose3d),
    "convolution": lambda input, conv: torch.convolution(input, *conv[1:]),
    "linear": lambda input, conv: F.linear(input, conv.weight, conv.bias),
}


# --- May this call be fused? -------------------------------------------------------------------------------------


def _is_proxy(value: object) -> bool:
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def _can_be_fused(conv: nn.Module | Convolution, norm: nn.Module | BatchNorm) -> bool:
    """Whether running neither module's `__call__` would go unnoticed, and the batch norm's statistics are frozen."""
    if isinstance(conv, nn.Module) and (kinds.convolution_kind(conv) is None or kinds.has_hooks(conv)):
        return False
    if isinstance(norm, nn.Module):
        kind = kinds.batch_norm_kind(norm)
        if norm.training or kind is None or kinds.has_hooks(norm) or not kind.has_statistics(norm):
            return False
    return not _has_any_global_hook() and not torch.jit.is_tracing()


def _norm_operands(norm: nn.Module) -> BatchNorm:
    kind = kinds.batch_norm_kind(norm)
    assert kind is not None  # noqa: S101 - narrows the type; _can_be_fused has looked
    operands: BatchNorm = kind.operands(norm)
    return operands


def _channels_agree(input: Tensor, conv: Convolution, norm: nn.Module | BatchNorm) -> bool:
    """Whether dimension 1, which the batch norm reads, holds the convolution's output channels.

    It does not for an unbatched convolution, nor for a linear layer's input of more than two dimensions.
    """
    rank = 2 if conv.op == "linear" else conv.weight.ndim
    if input.ndim != rank:
        return False
    if isinstance(norm, nn.Module):
        kind = kinds.batch_norm_kind(norm)
        return kind is not None and kind.accepts(rank)
    return True


def _are_ordinary(input: Tensor, conv: Convolution, norm: BatchNorm, dtype: torch.dtype) -> bool:
    """Whether types, dtypes and shapes are such that Eval mode works and the fused form is known to equal it.

    `dtype` is the one that the convolution computes in.
    """
    tensors = (input, conv.weight, conv.bias, *norm[:4])
    vectors = [vector for vector in norm[:4] if vector is not None]
    return (
        all(
            (type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, (FakeTensor, FunctionalTensor)))
            and tensor.is_floating_point()
            and tensor.layout is torch.strided
            for tensor in tensors
            if tensor is not None
        )
        and all(tensor is None or _computes_in(tensor, dtype, conv.op) for tensor in tensors[:3])
        and all(vector.dtype == norm.running_var.dtype for vector in vectors)
        and (norm.running_var.dtype == dtype or (_is_half(dtype) and norm.running_var.dtype == torch.float32))
        and all(vector.shape == (_output_channels(conv),) for vector in vectors)
        and input.numel() > 0
    )


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _output_channels(conv: Convolution) -> int:
    return int(conv.weight.shape[1] * conv.groups if conv.transposed else conv.weight.shape[0])


# --- Autocast ----------------------------------------------------------------------------------------------------


def _autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _computing_dtype(input: Tensor, op: str) -> torch.dtype:
    """The dtype that the convolution computes in: autocast's for the functions that it casts, else the input's."""
    device_type = input.device.type
    if op != "convolution" and _autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return input.dtype


def _computes_in(tensor: Tensor, dtype: torch.dtype, op: str) -> bool:
    """Whether the convolution sees the tensor in `dtype`. Autocast leaves float64 alone."""
    if op != "convolution" and _autocast_enabled(tensor.device.type):
        return tensor.dtype != torch.float64
    return tensor.dtype == dtype


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if _autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


# --- Which form? -------------------------------------------------------------------------------------------------

# Folding reads and writes a weight several times; normalising reads and writes an output once or twice. From this
# many weight elements per output element on, Eval mode's two steps are the cheaper way, and what they save for the
# backward pass, the output, is this much smaller than the weight.
_WEIGHT_PER_OUTPUT: Final = 16


def _fused(input: Tensor, conv: Convolution, norm: BatchNorm) -> Tensor:
    """The fused convolution in the form that suits the call, or Eval mode's two steps where those are better."""
    dtype = _computing_dtype(input, conv.op)
    if not _are_ordinary(input, conv, norm, dtype):
        return batch_norm(norm, convolution(conv, input))
    if _is_transformed(input) or not _wants_gradient(input, conv, norm):
        # Compilers recompute what is cheap, function transforms need plain operations, and without a backward pass
        # nothing is saved: the formula as it stands. In half precision the formula is Eval mode's (see above).
        if _is_half(dtype) or (not _is_transformed(input) and _folding_costs_more(input, conv)):
            return batch_norm(norm, convolution(conv, input))
        weight, bias = fold(conv, norm)
        return convolution(conv._replace(weight=weight, bias=bias), input)
    if _folding_costs_more(input, conv):
        return batch_norm(norm, convolution(conv, input))
    output: Tensor = _FusedConvolution.apply(  # type: ignore[no-untyped-call]
        input.to(dtype),
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        conv._replace(weight=None, bias=None),
    )
    return output


def _is_transformed(input: Tensor) -> bool:
    """Whether something looks at the operations themselves: a compiler, a function transform, forward-mode AD."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or isinstance(input, FunctionalTensor)
    )


def _wants_gradient(input: Tensor, conv: Convolution, norm: BatchNorm) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (input, conv.weight, conv.bias, norm.weight, norm.bias)
    )


def _folding_costs_more(input: Tensor, conv: Convolution) -> bool:
    weight: Tensor = conv.weight
    positions = input.shape[0]
    if conv.op != "linear":
        geometry = _Geometry.of(conv, weight.shape)
        for size, kernel, *numbers in zip(
            input.shape[2:], weight.shape[2:], *geometry.per_dimension, strict=True
        ):
            positions *= _output_size(size, kernel, conv.transposed, *numbers)
    return weight.numel() > _WEIGHT_PER_OUTPUT * positions * _output_channels(conv)


def _output_size(
    size: int,
    kernel: int,
    transposed: bool,
    stride: int,
    padding: int,
    padding_right: int,
    dilation: int,
    output_padding: int,
) -> int:
    reach = dilation * (kernel - 1)
    if transposed:
        return (size - 1) * stride - padding - padding_right + reach + output_padding + 1
    return (size + padding + padding_right - reach - 1) // stride + 1


class _Geometry(NamedTuple):
    """Where a convolution's kernel goes, as numbers per spatial dimension, whichever way it was written."""

    stride: list[int]
    padding: list[int]
    padding_right: list[int]  # differs from `padding` where "same" cannot be symmetric
    dilation: list[int]
    output_padding: list[int]

    @classmethod
    def of(cls, conv: Convolution, weight_shape: torch.Size) -> "_Geometry":
        kernel_size = weight_shape[2:]
        dilation = _per_dimension(conv.dilation, len(kernel_size))
        if conv.padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True)]
            padding = [pad // 2 for pad in total]
            padding_right = [pad - pad // 2 for pad in total]
        else:
            padding = _per_dimension(0 if conv.padding == "valid" else conv.padding, len(kernel_size))
            padding_right = padding
        return cls(
            _per_dimension(conv.stride, len(kernel_size)),
            padding,
            padding_right,
            dilation,
            _per_dimension(conv.output_padding, len(kernel_size)),
        )

    @property
    def per_dimension(self) -> tuple[list[int], ...]:
        return tuple(self)


def _per_dimension(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


# --- The arithmetic ----------------------------------------------------------------------------------------------


def fold(conv: Convolution, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The parameters of the one convolution that equals a convolution and the batch norm after it.

    Equations (2) and (3) of arXiv 2305.11624, differentiable in every operand but the statistics.

    Args:
        conv: The convolution; weight of shape (C_out, C_in / groups, ...), transposed (C_in, C_out / groups, ...).
        norm: The batch norm with frozen statistics, vectors of shape (C_out,).

    Returns:
        The fused weight, shaped like `conv.weight`, and the fused bias, of shape (C_out,), in the dtype of
        `conv.weight`; computed in float32 at least.
    """
    scale = _scale(norm.weight, _inverse_deviation(norm.running_var, norm.eps))
    centre = norm.running_mean.detach().to(scale.dtype)
    shift = scale * (-centre if conv.bias is None else conv.bias - centre)
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = conv.weight * _along_output_channels(scale, conv.weight, conv)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def _inverse_deviation(running_var: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(running_var.detach().to(torch.promote_types(running_var.dtype, torch.float32)) + eps)


def _scale(gamma: Tensor | None, inverse_deviation: Tensor) -> Tensor:
    return inverse_deviation if gamma is None else gamma * inverse_deviation


def _along_output_channels(vector: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """Reshapes a vector of shape (C_out,) so that it multiplies the output channels of a weight.

    A transposed convolution holds C_out / groups output channels in dimension 1, those of group g in the g-th part of
    its C_in rows.
    """
    ones = [1] * (weight.ndim - 2)
    if not conv.transposed:
        return vector.view(-1, 1, *ones)
    if conv.groups == 1:
        return vector.view(1, -1, *ones)
    rows = vector.view(conv.groups, -1).repeat_interleave(weight.shape[0] // conv.groups, dim=0)
    return rows.view(weight.shape[0], -1, *ones)


def _sum_per_output_channel(left: Tensor, right: Tensor, conv: Convolution) -> Tensor:
    """The scalar products of two weights, one per output channel: shape (C_out,)."""
    if not conv.transposed:
        return torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    groups = conv.groups
    left, right = (
        weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2).flatten(0, 1) for weight in (left, right)
    )
    return torch.linalg.vecdot(left, right)


# --- Its autograd ------------------------------------------------------------------------------------------------

# A gradient through the output scale needs a division; from this scale on downwards it is by this constant instead.
_SMALLEST_DIVISOR: Final = 2.0**-7


class _FusedConvolution(torch.autograd.Function):
    """The fused convolution that saves its input alone and recomputes the fused weight in the backward pass.

    The input comes in the dtype that the convolution computes in, the weight and bias in theirs. The backward pass is
    written in differentiable operations, so that it can be differentiated again.
    """

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
    ) -> Tensor:
        wants_input, wants_weight, _, wants_gamma, _ = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            input if wants_weight or wants_gamma else None,
            weight if wants_input or wants_gamma else None,
            bias if wants_gamma else None,
            gamma,
            running_mean if wants_gamma else None,
            running_var,
        )
        ctx.eps = eps
        ctx.conv = conv
        ctx.input_shape = input.shape
        ctx.weight_shape = weight.shape
        ctx.dtypes = [
            None if tensor is None else tensor.dtype for tensor in (input, weight, bias, gamma, beta)
        ]
        norm = BatchNorm(running_mean, running_var, gamma, beta, eps)
        with _without_autocast(input.device.type):
            if _is_half(input.dtype):
                half_bias = None if bias is None else bias.to(input.dtype)
                output = convolution(conv._replace(weight=weight.to(input.dtype), bias=half_bias), input)
                return batch_norm(norm, output)
            fused_weight, fused_bias = fold(conv._replace(weight=weight, bias=bias), norm)
            return convolution(conv._replace(weight=fused_weight, bias=fused_bias), input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with _without_autocast(grad_output.device.type):
            return (*_gradients(ctx, grad_output), None, None, None, None)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients with respect to input, weight, bias, gamma and beta (equations in the module's docstring)."""
    wants_input, wants_weight, wants_bias, wants_gamma, wants_beta = ctx.needs_input_grad[:5]
    input, weight, bias, gamma, running_mean, running_var = ctx.saved_tensors
    input_dtype, weight_dtype, bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
    conv: Convolution = ctx.conv
    inverse_deviation = _inverse_deviation(running_var, ctx.eps)
    scale = _scale(gamma, inverse_deviation)

    # scale = weight_scale * output_scale: the former multiplies the weight, the latter the output.
    weight_scale, output_scale = scale, None
    if _is_half(input_dtype):
        weight_scale, output_scale = None, scale
        if wants_gamma:
            output_scale = scale.detach().abs().clamp(min=_SMALLEST_DIVISOR)
            weight_scale = scale / output_scale
    grad_conv = grad_output
    if output_scale is not None:
        along_channels = output_scale.view(-1, *[1] * (grad_output.ndim - 2))
        grad_conv = (grad_output * along_channels).to(input_dtype)

    grad_input = grad_weight = grad_bias = grad_gamma = grad_beta = None
    plain_grad_weight = None
    if wants_input or wants_weight or wants_gamma:
        fused_weight = None
        if wants_input:
            fused_weight = weight
            if weight_scale is not None:
                fused_weight = weight * _along_output_channels(weight_scale, weight, conv)
            fused_weight = fused_weight.to(input_dtype)
        grad_input, plain_grad_weight = _convolution_backward(
            grad_conv, input, fused_weight, ctx, wants_weight or wants_gamma
        )
    if wants_bias or wants_gamma or wants_beta:
        every_but_channels = [0, *range(2, grad_output.ndim)]
        grad_shift = grad_output.sum(every_but_channels, dtype=scale.dtype)
        if wants_beta:
            grad_beta = grad_shift.to(beta_dtype)
        if wants_bias:
            grad_bias = (scale * grad_shift).to(bias_dtype)
    if wants_gamma:
        product = _sum_per_output_channel(
            plain_grad_weight.to(scale.dtype), weight.to(input_dtype).to(scale.dtype), conv
        )
        if output_scale is not None:
            product = product / output_scale
        centred = -running_mean if bias is None else bias.to(input_dtype) - running_mean
        grad_gamma = ((product + grad_shift * centred) * inverse_deviation).to(gamma_dtype)
    if wants_weight:
        grad_weight = plain_grad_weight
        if weight_scale is not None:
            along_channels = _along_output_channels(weight_scale, plain_grad_weight, conv)
            if not torch.is_grad_enabled() and plain_grad_weight.dtype == scale.dtype:
                grad_weight = plain_grad_weight.mul_(along_channels)  # nobody else has seen it
            else:
                grad_weight = plain_grad_weight * along_channels
        grad_weight = grad_weight.to(weight_dtype)
    return grad_input, grad_weight, grad_bias, grad_gamma, grad_beta


def _convolution_backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, ctx: Any, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the bare convolution with respect to its input (if given its weight) and its weight."""
    conv: Convolution = ctx.conv
    wants_input = weight is not None
    # Of an operand that no requested gradient reads, only the shape counts.
    if input is None:
        input = grad_output.new_empty(()).expand(ctx.input_shape)
    if weight is None:
        weight = grad_output.new_empty(()).expand(ctx.weight_shape)
    if conv.op == "linear":
        return (
            grad_output @ weight if wants_input else None,
            grad_output.t() @ input if wants_weight else None,
        )
    geometry = _Geometry.of(conv, ctx.weight_shape)
    uneven = [right - left for left, right in zip(geometry.padding, geometry.padding_right, strict=True)]
    if any(uneven):
        input = F.pad(input, [pad for extra in reversed(uneven) for pad in (0, extra)])
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
    if any(uneven) and wants_input:
        for dimension, size in enumerate(ctx.input_shape[2:], start=2):
            grad_input = grad_input.narrow(dimension, 0, size)
    return grad_input, grad_weight
