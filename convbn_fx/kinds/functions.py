"""The functions that are convolutions and batch norms, and how a call of each is read.

The same readers read tensors, when a function is called, and graph nodes, when its call is matched.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional as F

from convbn_fx.kinds.rows import BatchNormKind, ConvolutionKind
from convbn_fx.operands import BatchNorm, Convolution, T

aten = torch.ops.aten
Reader = Callable[..., tuple[Any, Convolution[Any]]]

# --- Readers: these signatures are those of the functions ---------------------------------------------------------


def conv_call(op: str) -> Reader:
    """Reads `torch.conv1d` and its like."""

    def operands(
        input: T,
        weight: T,
        bias: T | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> tuple[T, Convolution[T]]:
        return input, Convolution(op, weight, bias, stride, padding, dilation, groups=groups)

    return operands


def conv_transpose_call(op: str) -> Reader:
    """Reads `torch.conv_transpose1d` and its like, whose `groups` comes before `dilation`."""

    def operands(
        input: T,
        weight: T,
        bias: T | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> tuple[T, Convolution[T]]:
        return input, Convolution(op, weight, bias, stride, padding, dilation, True, output_padding, groups)

    return operands


def convolution_call(
    input: T,
    weight: T,
    bias: T | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: Any,
) -> tuple[T, Convolution[T]]:
    """Reads `torch.convolution`."""
    return input, Convolution(
        "convolution", weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def linear_call(input: T, weight: T, bias: T | None = None) -> tuple[T, Convolution[T]]:
    """Reads `F.linear`."""
    return input, Convolution("linear", weight, bias)


def functional_batch_norm_call(
    input: T,
    running_mean: T,
    running_var: T,
    weight: T | None = None,
    bias: T | None = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> tuple[T, Any, BatchNorm[T]]:
    """Reads `F.batch_norm`."""
    return input, training, BatchNorm(running_mean, running_var, weight, bias, eps)


def batch_norm_call(
    input: T,
    weight: T | None,
    bias: T | None,
    running_mean: T,
    running_var: T,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any = True,
) -> tuple[T, Any, BatchNorm[T]]:
    """Reads `torch.batch_norm` and its like."""
    return input, training, BatchNorm(running_mean, running_var, weight, bias, eps)


def batch_norm_no_training_call(
    input: T, weight: T | None, bias: T | None, running_mean: T, running_var: T, momentum: Any, eps: Any
) -> tuple[T, Any, BatchNorm[T]]:
    """Reads the overloads that know Eval mode only."""
    return input, False, BatchNorm(running_mean, running_var, weight, bias, eps)


# --- The table ---------------------------------------------------------------------------------------------------

# Each row: the function, its name in reports, how its call is read, and the rank of a batched input.
CONVOLUTION_FUNCTIONS: Final[dict[object, ConvolutionKind]] = {
    function: ConvolutionKind(name, operands, batched_rank)
    for function, name, operands, batched_rank in (
        (torch.conv1d, "conv1d", conv_call("conv1d"), 3),
        (torch.conv2d, "conv2d", conv_call("conv2d"), 4),
        (torch.conv3d, "conv3d", conv_call("conv3d"), 5),
        (torch.conv_transpose1d, "conv_transpose1d", conv_transpose_call("conv_transpose1d"), 3),
        (torch.conv_transpose2d, "conv_transpose2d", conv_transpose_call("conv_transpose2d"), 4),
        (torch.conv_transpose3d, "conv_transpose3d", conv_transpose_call("conv_transpose3d"), 5),
        (torch.convolution, "convolution", convolution_call, None),
        (F.linear, "linear", linear_call, 2),
        (aten.conv1d.default, "aten.conv1d", conv_call("conv1d"), 3),
        (aten.conv1d.padding, "aten.conv1d", conv_call("conv1d"), 3),
        (aten.conv2d.default, "aten.conv2d", conv_call("conv2d"), 4),
        (aten.conv2d.padding, "aten.conv2d", conv_call("conv2d"), 4),
        (aten.conv3d.default, "aten.conv3d", conv_call("conv3d"), 5),
        (aten.conv3d.padding, "aten.conv3d", conv_call("conv3d"), 5),
        (aten.conv_transpose1d.default, "aten.conv_transpose1d", conv_transpose_call("conv_transpose1d"), 3),
        (aten.conv_transpose2d.input, "aten.conv_transpose2d", conv_transpose_call("conv_transpose2d"), 4),
        (aten.conv_transpose3d.input, "aten.conv_transpose3d", conv_transpose_call("conv_transpose3d"), 5),
        (aten.convolution.default, "aten.convolution", convolution_call, None),
        (aten.linear.default, "aten.linear", linear_call, 2),
    )
}

# Each row: the function, its name in reports, how its call is read, and where its output is.
BATCH_NORM_FUNCTIONS: Final[dict[object, BatchNormKind]] = {
    function: BatchNormKind(name, operands, output_index=output_index)
    for function, name, operands, output_index in (
        (F.batch_norm, "batch_norm", functional_batch_norm_call, None),
        (torch.batch_norm, "batch_norm", batch_norm_call, None),
        (torch.native_batch_norm, "native_batch_norm", batch_norm_call, 0),
        (aten.batch_norm.default, "aten.batch_norm", batch_norm_call, None),
        (aten.native_batch_norm.default, "aten.native_batch_norm", batch_norm_call, 0),
        (aten.cudnn_batch_norm.default, "aten.cudnn_batch_norm", batch_norm_call, 0),
        (aten._native_batch_norm_legit.default, "aten._native_batch_norm_legit", batch_norm_call, 0),
        (
            aten._native_batch_norm_legit_no_training.default,
            "aten._native_batch_norm_legit_no_training",
            batch_norm_no_training_call,
            0,
        ),
        (
            aten._batch_norm_no_update.default,
            "aten._batch_norm_no_update",
            batch_norm_no_training_call,
            0,
        ),
    )
}
