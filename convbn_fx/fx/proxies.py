"""What stands for tensors while a forward is traced."""

import builtins
import dis
import operator
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from convbn_fx import kinds


class Proxy(torch.fx.Proxy):
    """A proxy for which augmented assignment is what it is for tensors: a change in place, seen by every alias."""

    @property  # type: ignore[misc] # which is how an object passes for one of another class
    def __class__(self) -> Any:
        """The class of what it stands for, to a forward that asks by `isinstance`; else its own."""
        asking = sys._getframe(1)
        if is_ours_or_torchs(asking) or questions_of_class(asking.f_code).get(asking.f_lasti) != "isinstance":
            return type(self)
        tracer: Any = self.tracer
        return tracer.class_of(self.node)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node") and hasattr(Tensor, name):  # such as data, grad
            raise RuntimeError(
                f"the forward assigns a tensor's {name}, which a graph cannot do at every call"
            )
        super().__setattr__(name, value)


def _augmented_assignment(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], torch.fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift),
    operator.irshift,
):
    setattr(Proxy, f"__{_function.__name__}__", _augmented_assignment(_function))


#: In the meta of a node: the forward has named the parameter or buffer, not come to it as one of all.
READ_BY_NAME: Final = "convbn_fx_read_by_name"


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

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The tensor's class, to a forward that asks; asking does not read it."""
        asking = sys._getframe(1)
        is_asked = not is_ours_or_torchs(asking) and asking.f_lasti in questions_of_class(asking.f_code)
        return type(vars(self)["tensor"]) if is_asked else type(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tensor"], name) if name in _METADATA else super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTensor":
        return self


_METADATA: Final = {
    *("dtype", "device", "layout", "shape", "ndim", "size", "dim", "numel", "nelement", "element_size"),
    *("requires_grad", "is_cuda", "is_floating_point", "is_complex"),
}


@lru_cache(maxsize=256)
def questions_of_class(code: CodeType) -> dict[int, str]:
    """Where code asks for a class: the offset of each instruction that does, and whether by `isinstance`."""
    instructions = [
        (instruction, (instruction.positions.lineno, instruction.positions.col_offset))
        for instruction in dis.get_instructions(code)
        if instruction.positions is not None and instruction.positions.col_offset is not None
    ]
    begins = {place for instruction, place in instructions if instruction.argval == "isinstance"}
    found = {}
    for instruction, place in instructions:
        if instruction.opname == "LOAD_ATTR" and instruction.argval == "__class__":
            found[instruction.offset] = "__class__"
        elif instruction.opname in ("CALL", "PRECALL") and place in begins:
            found[instruction.offset] = "isinstance"
    return found


def is_ours_or_torchs(frame: FrameType) -> bool:
    """Whether code of this library or of PyTorch is running."""
    return str(frame.f_globals.get("__name__")).startswith(("torch.", "convbn_fx."))


_CLASSES_OF_METADATA: Final = {"shape": torch.Size, "size": torch.Size, "ndim": int, "dim": int, "numel": int}


def known_class(node: Node, root: nn.Module) -> type | None:
    """The class of what a node stands for, where that is beyond doubt."""
    match node.op, node.target, node.args:
        case "get_attr", _, _:
            return Tensor
        case "call_module", name, _:
            module = root.get_submodule(str(name))
            known = kinds.convolution_kind(module) or kinds.batch_norm_kind(module)
            return None if known is None else Tensor
        case "call_method", "size", (_, *dimensions) if dimensions or node.kwargs:
            return int
        case ("call_method", name, _) | ("call_function", builtins.getattr, (_, name)):
            return _CLASSES_OF_METADATA.get(str(name))
        case "call_function", operator.getitem, (Node() as owner, int()) if _is_size(owner, root):
            return int
        case "call_function", operator.getitem, (Node() as owner, _) if _is_size(owner, root):
            return torch.Size
        case "call_function", function, _ if function in kinds.CONVOLUTION_FUNCTIONS:
            return Tensor
    return None


def _is_size(node: Node, root: nn.Module) -> bool:
    return known_class(node, root) is torch.Size
