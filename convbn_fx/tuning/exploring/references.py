"""Who can reach a module or a tensor of a model, on ways that a forward can go."""

import dis
import gc
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convbn_fx import kinds
from convbn_fx.fx.copying import referent

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: In what cannot lead back to an instance of a model, or not by what a forward does.
_NOT_ENTERED: Final = (
    type,
    ModuleType,
    CodeType,
    FrameType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
)


class _HooksOf:
    """Stands for the hooks of a module in the graph of references."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class References:
    """The graph of references between the modules of a model, its tensors, and whatever else they hold.

    Args:
        model: Where to start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sources: defaultdict[int, list[Any]] = defaultdict(list)
        self.inside: dict[int, set[int]] = {}
        known: dict[int, Any] = {}
        todo: list[Any] = [model]
        while todo:
            value = todo.pop()
            if id(value) in known:
                continue
            known[id(value)] = value
            for target in _targets(value):
                if not issubclass(type(target), _NOT_ENTERED) and target is not None:
                    self.sources[id(target)].append(value)
                    todo.append(target)
        self.kept_alive = known
        tensors = [value for value in known.values() if issubclass(type(value), Tensor)]
        for identity, others in in_one_memory(tensors).items():
            self.sources[identity] += [other for other in others if id(other) != identity]

    def doubt(self, member: nn.Module, followed: Set[int], lost: dict[int, str]) -> str:
        """Who may use a convolution or a batch norm in a way that was not followed; empty if nobody."""
        for target in (member, *tensors_of(member)):
            for module in self._reaching(target, member):
                doubt = self._doubt_about(module, target, followed, lost)
                if doubt:
                    return doubt
        return ""

    def _reaching(self, target: Any, member: nn.Module) -> Iterator[Any]:
        """Modules and hooks from which a reference leads to the target, not by way of the member."""
        known, todo = {id(member)} if target is not member else set(), [target]
        while todo:
            for source in self.sources[id(todo.pop())]:
                if id(source) not in known:
                    known.add(id(source))
                    todo.append(source)
                    # By its type: a weak proxy passes for what it stands for.
                    if issubclass(type(source), (nn.Module, _HooksOf)):
                        yield source

    def _doubt_about(self, module: Any, target: Any, followed: Set[int], lost: dict[int, str]) -> str:
        if isinstance(module, _HooksOf):
            return f"a hook of {type(module.module).__name__} reaches it"
        if _runs_only_what_it_is_known_for(module):
            return ""
        if id(target) not in self._inside(module):
            return f"{type(module).__name__} reaches it, and is not around it"
        if id(module) not in followed:
            return f"{type(module).__name__}, whose forward was not explored, is around it"
        return lost.get(id(module), "")

    def _inside(self, module: nn.Module) -> set[int]:
        """Ids of the modules and tensors that are registered inside a module."""
        if id(module) not in self.inside:
            parts = list(module.modules())
            tensors = [tensor for part in parts for tensor in tensors_of(part)]
            self.inside[id(module)] = {*map(id, parts), *map(id, tensors)}
        return self.inside[id(module)]


def _runs_only_what_it_is_known_for(module: nn.Module) -> bool:
    """Whether the module's own forward uses nothing but its own parameters, or there is none."""
    if vars(module).get("forward") is not None:
        return False
    known = kinds.convolution_kind(module) is not None or kinds.batch_norm_kind(module) is not None
    if known or type(module).forward is nn.Module.forward:
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _targets(value: Any) -> Iterable[Any]:
    """What a value refers to, in ways that a forward can follow."""
    if issubclass(type(value), (weakref.ReferenceType, *weakref.ProxyTypes)):
        return [referent(value)]
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, nn.Module):
        attributes = [part for name, part in vars(value).items() if name not in _HOOKS]
        return [*attributes, *_slots(value), *([_HooksOf(value)] if kinds.has_hooks(value) else ())]
    if isinstance(value, _HooksOf):
        hooks = [hook for name in _HOOKS for hook in vars(value.module).get(name, {}).values()]
        return [*hooks, *([value.module] if any(map(_uses_its_module, hooks)) else ())]
    if isinstance(value, FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
    return gc.get_referents(value)


def _slots(module: nn.Module) -> list[Any]:
    names = [name for cls in type(module).__mro__ for name in vars(cls).get("__slots__", ())]
    return [getattr(module, name) for name in names if hasattr(module, name)]


def _uses_its_module(hook: Any) -> bool:
    """Whether a hook may do anything with the module that it is called with."""
    if not isinstance(hook, FunctionType) or hook.__code__.co_argcount == 0:
        return True
    first = hook.__code__.co_varnames[0]
    return any(
        instruction.argval == first or (isinstance(instruction.argval, tuple) and first in instruction.argval)
        for instruction in dis.get_instructions(hook)
        if instruction.opname.startswith("LOAD")
    )


# --- Tensors -----------------------------------------------------------------------------------------------------


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that a module itself has."""
    return [
        tensor
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    ]


def in_one_memory(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """For tensors, by id, all that lie in the same memory, at least in part; itself, too."""
    groups = {id(tensor): [tensor] for tensor in tensors}
    places: list[tuple[int, int, int, int]] = []
    for (tensor,) in groups.values():
        if tensor.layout is torch.strided and not is_lazy(tensor) and tensor.numel():
            size, begin = tensor.element_size(), int(tensor.storage_offset())
            lengths = zip(tensor.shape, tensor.stride(), strict=True)
            end = begin + 1 + sum((length - 1) * stride for length, stride in lengths)
            places.append((tensor.untyped_storage()._cdata, begin * size, end * size, id(tensor)))
    before, reach = (0, 0), 0  # the storage and the id of the last one, and how far they went
    for storage, begin, end, identity in sorted(places):
        if before[0] == storage and begin < reach:
            groups[before[1]] += groups[identity]
            groups[identity] = groups[before[1]]
            end = max(end, reach)
        before, reach = (storage, identity), end
    return groups
