"""What graphs and tuned models call for batch norms that stay, and for those of which an activation is part."""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from convbn_fx import kinds
from convbn_fx.functional.activations import activation, is_bare, is_for_the_operator
from convbn_fx.functional.arithmetic import batch_norm
from convbn_fx.functional.dispatch import (
    FUNCTIONAL_BATCH_NORM,
    are_plain,
    batch_norm_operands,
    conv_batch_norm,
    fusible_kind,
    with_epilogue,
)
from convbn_fx.operands import BatchNorm, Convolution


def conv_batch_norm_as_written(
    conv: nn.Module | Convolution, norm: nn.Module | BatchNorm, /, *args: Any, **kwargs: Any
) -> Tensor:
    """As [`conv_batch_norm`][convbn_fx.functional.conv_batch_norm]; activations in the batch norm run as they are.

    Args:
        conv: As there.
        norm: As there.
        *args: As there.
        **kwargs: As there.

    Returns:
        As there.

    Raises:
        Exception: As there.
    """
    kind = fusible_kind(norm)
    if kind is None or kind.epilogue is None or kind.promotes or not args:
        return conv_batch_norm(conv, norm, *args, **kwargs)
    if not (isinstance(args[0], Tensor) and kind.accepts(args[0].ndim)):
        return conv_batch_norm(conv, norm, *args, **kwargs)
    normalised = conv_batch_norm(conv, kind.operands(norm), *args, **kwargs)
    return with_epilogue(norm, kind, normalised, operator.call)


#: What a rewritten graph calls in the place of a pair.
FUSED: Final = (conv_batch_norm, conv_batch_norm_as_written)


def batch_norm_that_stays(norm: nn.Module | BatchNorm, input: Tensor, /) -> Tensor:
    """A batch norm that is in no pair: in Eval mode, whoever is to save its output saves its input instead.

    Args:
        norm: A batch-norm module, or the operands of a functional one with frozen statistics.
        input: Its input, of shape (N, C, ...).

    Returns:
        What calling the module or the function returns.

    Raises:
        Exception: What the module or the function raises for such an input.
    """
    if isinstance(input, torch.fx.Proxy):
        return handle_torch_function(batch_norm_that_stays, (input,), norm, input)
    output = normalised(norm, input, activation) if is_bare(norm) else None
    return batch_norm(norm, input) if output is None else output


def normalised(
    norm: nn.Module | BatchNorm, input: Any, call: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor | None:
    """What the batch norm makes of its input, saving less; None where it has to run as it is written.

    Args:
        norm: A module, or the operands of a function.
        input: Its input.
        call: What calls the modules that are part of it.
    """
    if not is_for_the_operator(input):
        return None
    kind = FUNCTIONAL_BATCH_NORM if isinstance(norm, BatchNorm) else kinds.frozen_kind(norm)
    if kind is None or kind.promotes or not kind.accepts(input.ndim):
        return None
    mean, variance, gamma, beta, eps = batch_norm_operands(norm, kind)
    if not are_plain(gamma, beta, mean, variance) or mean.requires_grad or variance.requires_grad:
        return None
    output: Tensor = torch.ops.convbn_fx.frozen_batch_norm.default(input, gamma, beta, mean, variance, eps)
    return with_epilogue(norm, kind, output, call)
