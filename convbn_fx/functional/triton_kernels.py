"""Folding on CUDA: one kernel where plain operations launch half a dozen. To be imported where Triton is installed.

A program of either kernel does one output channel. A channel's elements of a weight are runs of `positions` elements:
one run for a convolution, C_in / groups of them for a transposed one.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convbn_fx.functional.folding import Folding
from convbn_fx.operands import BatchNorm, Convolution

_BLOCK = 1024


class _Layout(NamedTuple):
    """How the channels of a weight lie, in elements."""

    elements: int
    positions: int
    per_group: int
    group_stride: int
    run_stride: int


def applies_to(conv: Convolution, norm: BatchNorm) -> bool:
    """Whether the kernels can read these operands: CUDA tensors in float32, the weight without gaps."""
    vectors = (conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        conv.weight.dtype == torch.float32
        and (_is_dense(conv.weight) if not conv.transposed else conv.weight.is_contiguous())
        and all(vector is None or vector.is_contiguous() for vector in vectors)
    )


def _is_dense(weight: Tensor) -> bool:
    """Whether the elements of a channel lie side by side, in whatever order."""
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


class KernelFolding(Folding):
    """A folding by these kernels, of operands that they apply to."""

    def __init__(self, conv: Convolution, norm: BatchNorm) -> None:
        self.conv, self.norm = conv, norm

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The fused weight and the fused bias."""
        conv, norm = self.conv, self.norm
        fused_weight = torch.empty_like(conv.weight)
        fused_bias = torch.empty_like(norm.running_mean)
        _fold[(fused_bias.numel(),)](
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            fused_weight,
            fused_bias,
            norm.eps,
            *_layout(conv),
            has_bias=conv.bias is not None,
            has_gamma=norm.weight is not None,
            has_beta=norm.bias is not None,
            block=_BLOCK,
        )
        return fused_weight, fused_bias

    def weight(self) -> Tensor:
        """The fused weight; with the fused bias, which costs nothing more."""
        return self.parameters()[0]

    def gradients(
        self, grad_weight: Any, grad_shift: Any, spare: Tensor | None, *wanted: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the parameters out of those of the fused ones, in one kernel."""
        wants_weight, wants_bias, wants_gamma = wanted
        if not (wants_weight or wants_gamma) or grad_weight.stride() != self.conv.weight.stride():
            return Folding(self.conv, self.norm).gradients(grad_weight, grad_shift, spare, *wanted)
        conv, norm = self.conv, self.norm
        grad_bias, grad_gamma = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_mean)
        _unfold[(grad_gamma.numel(),)](
            grad_weight,
            grad_shift,
            conv.weight,
            conv.bias,
            norm.weight,
            norm.running_mean,
            norm.running_var,
            grad_bias,
            grad_gamma,
            norm.eps,
            *_layout(conv),
            has_bias=conv.bias is not None,
            has_gamma=norm.weight is not None,
            has_shift=grad_shift is not None,
            wants_weight=wants_weight,
            block=_BLOCK,
        )
        return (
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            grad_gamma if wants_gamma else None,
        )


def _layout(conv: Convolution) -> _Layout:
    weight: Tensor = conv.weight
    if not conv.transposed:
        elements = weight.numel() // weight.shape[0]
        return _Layout(elements, elements, weight.shape[0], 0, 0)
    rows = weight.shape[0] // conv.groups
    positions = weight[0, 0].numel()
    row = weight.shape[1] * positions
    return _Layout(rows * positions, positions, weight.shape[1], rows * row, row)


@triton.jit
def _places(channel, element, positions, per_group, group_stride, run_stride):
    first = (channel // per_group) * group_stride + (channel % per_group) * positions
    return first + (element // positions) * run_stride + element % positions


@triton.jit
def _fold(
    weight,
    bias,
    gamma,
    beta,
    mean,
    var,
    fused_weight,
    fused_bias,
    eps,
    elements,
    positions,
    per_group,
    group_stride,
    run_stride,
    has_bias: tl.constexpr,
    has_gamma: tl.constexpr,
    has_beta: tl.constexpr,
    block: tl.constexpr,
):
    channel = tl.program_id(0)
    scale = 1.0 / tl.sqrt(tl.load(var + channel) + eps)
    if has_gamma:
        scale = tl.load(gamma + channel) * scale
    difference = -tl.load(mean + channel)
    if has_bias:
        difference += tl.load(bias + channel)
    shift = scale * difference
    if has_beta:
        shift += tl.load(beta + channel)
    tl.store(fused_bias + channel, shift)
    for start in range(0, elements, block):
        element = start + tl.arange(0, block)
        inside = element < elements
        places = _places(channel, element, positions, per_group, group_stride, run_stride)
        tl.store(fused_weight + places, scale * tl.load(weight + places, inside), inside)


@triton.jit
def _unfold(
    grad_weight,
    grad_shift,
    weight,
    bias,
    gamma,
    mean,
    var,
    grad_bias,
    grad_gamma,
    eps,
    elements,
    positions,
    per_group,
    group_stride,
    run_stride,
    has_bias: tl.constexpr,
    has_gamma: tl.constexpr,
    has_shift: tl.constexpr,
    wants_weight: tl.constexpr,
    block: tl.constexpr,
):
    channel = tl.program_id(0)
    inverse = 1.0 / tl.sqrt(tl.load(var + channel) + eps)
    scale = inverse
    if has_gamma:
        scale = tl.load(gamma + channel) * inverse
    difference = -tl.load(mean + channel)
    if has_bias:
        difference += tl.load(bias + channel)
    products = tl.zeros((block,), tl.float32)
    for start in range(0, elements, block):
        element = start + tl.arange(0, block)
        inside = element < elements
        places = _places(channel, element, positions, per_group, group_stride, run_stride)
        gradient = tl.load(grad_weight + places, inside, 0.0)
        products += gradient * tl.load(weight + places, inside, 0.0)
        if wants_weight:
            tl.store(grad_weight + places, scale * gradient, inside)
    per_scale = tl.sum(products)
    if has_shift:
        shift = tl.load(grad_shift + channel)
        per_scale += shift * difference
        tl.store(grad_bias + channel, scale * shift)
    tl.store(grad_gamma + channel, per_scale * inverse)
