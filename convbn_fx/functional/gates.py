"""Squeeze-and-excite modules: their forward runs as it is written, but for the product of its input and the gate.

Their last activation returns a [`Gate`][convbn_fx.functional.gates.Gate], which knows when it is multiplied. To
everything else it is the tensor that it holds, and it does not leave the module.
"""

import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from convbn_fx.functional.activations import product


class Gate:
    """The output of the last activation in a squeeze-and-excite module.

    Args:
        tensor: The output.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __mul__(self, other: Tensor) -> Tensor:
        """The product, which saves less."""
        return product(self.tensor, other)

    def __getattr__(self, name: str) -> Any:
        """Whatever the tensor has."""
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any function of PyTorch computes with the tensor; a product is one that saves less."""
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return product(*map(without_gate, args))
        return func(*without_gate(args), **without_gate(kwargs or {}))


_PRODUCTS: Final = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})


def without_gate(value: Any) -> Any:
    """The value, or values in containers, with tensors in the place of gates."""
    cls = type(value)
    if cls is Gate:
        return value.tensor
    if cls is tuple or cls is list:
        return cls(map(without_gate, value))
    return {key: without_gate(each) for key, each in value.items()} if cls is dict else value


class Running(threading.local):
    """How many squeeze-and-excite modules this thread is in."""

    depth = 0


running: Final = Running()
