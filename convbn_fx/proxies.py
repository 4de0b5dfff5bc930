"""What stands for tensors while a forward is traced."""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node


class Proxy(torch.fx.Proxy):
    """A proxy for which augmented assignment is what it is for tensors: a change in place, seen by every alias."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node") and hasattr(Tensor, name):  # such as data, grad
            raise RuntimeError(
                f"the forward assigns a tensor's {name}, which a graph cannot do at every call"
            )
        super().__setattr__(name, value)


def _augmented_assignment(
    function: Callable[[Any, Any], Any],
) -> Callable[[torch.fx.Proxy, Any], torch.fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift),
    operator.irshift,
):
    setattr(Proxy, f"__{_function.__name__}__", _augmented_assignment(_function))


class StoredTensor(Proxy):
    """A parameter or buffer of a model. It becomes a node when something is done with it; what is known of it is told.

    Args:
        owner: Has the tracer that is at work as `tracer`.
        tensor: The parameter or buffer.
    """

    def __init__(self, owner: Any, tensor: Tensor) -> None:
        vars(self).update(owner=owner, tensor=tensor)

    @property
    def tracer(self) -> Any:  # type: ignore[override]
        """The tracer that is at work."""
        return vars(self)["owner"].tracer

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node that reads it."""
        return self.read().node

    def read(self) -> torch.fx.Proxy:
        """Records that it is read."""
        return self.tracer.read(vars(self)["tensor"])  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tensor"], name) if name in _METADATA else super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTensor":
        return self


_METADATA: Final = frozenset(
    (
        "dtype",
        "device",
        "shape",
        "ndim",
        "requires_grad",
        "is_cuda",
        "is_floating_point",
        "size",
        "dim",
        "numel",
    )
)
