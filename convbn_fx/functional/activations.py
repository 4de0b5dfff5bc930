"""What rewritten graphs and tuned models call for activations, and for batch norms that stay: they save less.

An activation whose output tells its derivative saves the output, which the next convolution saves, too. One that needs
its input saves that alone: the operator in C++ computes its own input from it again in the backward pass. The same for
a batch norm that stays, and the activation after it. Values are those of PyTorch's own functions, to the bit.

The operator is what knows of all this. Without it, under a compiler (whose partitioner does the same), in transforms
and for tensors of other classes, everything runs as it is written.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from convbn_fx import _torch, kinds
from convbn_fx._torch import has_any_global_hook
from convbn_fx.functional import native
from convbn_fx.functional.arithmetic import is_eager, is_plainly_fake
from convbn_fx.operands import Activation, BatchNorm
from convbn_fx.records import SavedLess

#: The functions of PyTorch behind `Activation.kind`, each called as `FUNCTIONS[kind](input, *numbers, inplace=...)`.
FUNCTIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": lambda input, inplace: input.sigmoid_() if inplace else torch.sigmoid(input),
    "tanh": lambda input, inplace: input.tanh_() if inplace else torch.tanh(input),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": lambda input, inplace: F.gelu(input),
    "gelu_tanh": lambda input, inplace: F.gelu(input, approximate="tanh"),
    "mish": F.mish,
}


def activation(function: nn.Module | Activation, input: Tensor, /) -> Tensor:
    """An activation that saves no more for the backward pass than is saved anyway.

    Args:
        function: An activation module, or the operands of a functional one.
        input: Its input, of any shape. Overwritten if the function says so.

    Returns:
        What calling the module or the function returns.

    Raises:
        Exception: What the module or the function raises for such an input.

    Example:
        ```python
        import torch
        from convbn_fx.functional.activations import activation
        from convbn_fx.operands import Activation

        x = torch.randn(2, 8, requires_grad=True)
        assert torch.equal(activation(torch.nn.SiLU(), x), torch.nn.functional.silu(x))
        assert torch.equal(activation(Activation("hardtanh", (0.0, 6.0)), x), torch.nn.functional.relu6(x))
        ```
    """
    if isinstance(input, torch.fx.Proxy):  # a rewritten graph is traced again: stay one node
        return handle_torch_function(activation, (input,), function, input)
    if is_for_the_operator(input) and is_bare(function):
        operands = function if isinstance(function, Activation) else _operands_of(function)
        if operands is not None:
            return activated(operands, input)
    return plain_activation(function, input)


def product(left: Tensor, right: Tensor, /) -> Tensor:
    """The product of two tensors, such as a feature map and its gate: who is to save it saves the factors instead.

    Args:
        left: A tensor.
        right: Another, of a shape that broadcasts.

    Returns:
        The product.

    Raises:
        RuntimeError: The shapes do not broadcast.
    """
    if isinstance(left, torch.fx.Proxy):
        return handle_torch_function(product, (left,), left, right)
    if is_for_the_operator(left) and is_for_the_operator(right):
        return torch.ops.convbn_fx.product.default(left, right)  # type: ignore[no-any-return]
    return left * right


def activated(operands: Activation, input: Tensor) -> Tensor:
    """The activation by the operator, which it is for."""
    kind, numbers, inplace = operands
    first, second, *_ = (*numbers, 0.0, 0.0)
    return (native.activation_ if inplace else native.activation)(
        input, native.activation_kinds[kind], first, second
    )


def is_for_the_operator(input: Any) -> bool:
    """Whether operations on it are recorded and just run: it is a plain tensor, or stands for one without memory."""
    return (
        native.operator is not None
        and (is_eager(input) or is_plainly_fake(input))
        and input.requires_grad
        and not _torch.is_jit_tracing()
        and not _torch.is_forward_ad_on()
    )


def what_is_saved(name: str, function: nn.Module | Activation | BatchNorm) -> SavedLess | None:
    """The record of an activation, or of a batch norm that stays, that saves less where the operator runs it.

    Args:
        name: What the record is to call it.
        function: A module, or the operands of a function.

    Returns:
        The record; None for what is neither.
    """
    if native.operator is None:
        return None
    if isinstance(function, BatchNorm):
        return SavedLess(name, "batch_norm", _RECOMPUTED)
    if isinstance(function, Activation):
        return SavedLess(name, function.kind, _saved_by(function))
    kind, operands = kinds.activation_kind(function), _operands_of(function)
    if kind is not None and operands is not None:
        return SavedLess(name, kind.name, _saved_by(operands))
    if kinds.is_gated(function):
        return SavedLess(name, type(function).__name__, PRODUCT)
    norm = kinds.frozen_kind(function)
    return None if norm is None or norm.promotes else SavedLess(name, norm.name, _RECOMPUTED)


def parts_that_save_less(name: str, norm: nn.Module) -> list[SavedLess]:
    """The records of the activations that are part of a batch norm of this name."""
    kind = kinds.batch_norm_kind(norm)
    if kind is None or kind.epilogue is None:
        return []
    found = [what_is_saved(f"{name}.{part}", child) for part, child in norm.named_children()]
    return [record for record in found if record is not None]


def is_saved_anyway(record: SavedLess) -> bool:
    """Whether PyTorch's own saves what the record tells, but where nothing trains or its input is recomputed."""
    return record.saves == _OUTPUT_ANYWAY


def _saved_by(function: Activation) -> str:
    if function.kind in ("relu", "sigmoid", "tanh"):
        return _OUTPUT_ANYWAY
    return _OUTPUT if function.kind in _BY_OUTPUT else _RECOMPUTED


_OUTPUT_ANYWAY: Final = "saves its output"
_OUTPUT: Final = "saves its output, not its input"
_RECOMPUTED: Final = "saves its input, of which its output is recomputed"
PRODUCT: Final = "saves the factors, of which the product is recomputed"
_BY_OUTPUT: Final = frozenset({"hardtanh", "leaky_relu", "elu", "hardsigmoid", "composed_hardsigmoid"})


def _operands_of(module: nn.Module) -> Activation | None:
    kind = kinds.activation_kind(module)
    return None if kind is None else kind.operands(module)


def plain_activation(function: nn.Module | Activation, input: Tensor, /) -> Tensor:
    """The activation alone: the module called, or PyTorch's function."""
    if isinstance(function, Activation):
        return FUNCTIONS[function.kind](input, *function.numbers, inplace=function.inplace)
    return function(input)  # type: ignore[no-any-return]


def is_bare(function: Any) -> bool:
    """Whether calling it runs nothing but what it computes."""
    return not isinstance(function, nn.Module) or not (kinds.has_hooks(function) or has_any_global_hook())
