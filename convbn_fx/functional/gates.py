"""Squeeze-and-excite modules: their forward runs as it is written, but for the product of its input and a gate."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convbn_fx.functional.activations import is_for_the_operator, multiplied


def with_gated_input(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a forward makes of its arguments, where products of the first of them save less."""
    input: Any = args[0] if args else None
    if not is_for_the_operator(input):
        return forward(*args, **kwargs)
    with _ProductsOf(input):
        return forward(*args, **kwargs)


class _ProductsOf(TorchFunctionMode):
    """While it is on, products of the input save less."""

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.input = input

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            left, right = args
            if (left is self.input or right is self.input) and (
                output := multiplied(left, right)
            ) is not None:
                return output
        return func(*args, **(kwargs or {}))


_PRODUCTS: Final = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
