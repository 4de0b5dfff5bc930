"""Copies of what modules hold: of the modules, and of whatever leads to them, so that it leads to the copies."""

import copy
import copyreg
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final

import torch
from torch import nn


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that a module itself has, those in slots as well."""
    yield from vars(module).items()
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined] # as copy.copy does
        if hasattr(module, name):
            yield name, getattr(module, name)


# --- What is copied -----------------------------------------------------------------------------------------------

#: What a module has of its own, if it is an attribute, or inside of one in such.
_OWN: Final = frozenset({list, set, deque, dict, OrderedDict, defaultdict, torch.fx.Graph})
#: What nothing is looked for in.
_NOT_FOLLOWED: Final = (
    *(torch.Tensor, torch.fx.Graph, torch.jit.ScriptModule, type, ModuleType, CodeType, FrameType),
    *(GeneratorType, str, bytes, int, float, complex, type(None)),
)


class Memo(dict[int, Any]):
    """What `copy.deepcopy` is to put in the place of an object, by its id: a copy, or the object itself.

    Args:
        model: The model.
        blank: Makes the empty copy of a module.
        attributes: Of a module, those that its copy is to have.
        not_shared: Whether a copy is to have an object of its own, wherever it is found.
        entered: In what, besides containers, a copy is to have containers of its own.

    Attributes:
        modules: The model's modules, and those it leads to that are not registered in it. Their copies are there and
            empty; others are made when they are asked for.
        own: What is not shared.
    """

    def __init__(
        self,
        model: nn.Module,
        blank: Callable[[nn.Module], nn.Module],
        attributes: Callable[[nn.Module], Iterable[tuple[str, Any]]],
        not_shared: Callable[[Any], bool] = lambda _: False,
        entered: tuple[type, ...] = (),
    ) -> None:
        super().__init__()
        self._entered = (*_OWN, tuple, *entered)
        self.modules = list(model.modules())
        while unregistered := self._follow(model, attributes, not_shared):
            self.modules += unregistered
        self.update((id(module), blank(module)) for module in self.modules)

    def get(self, key: int, default: Any = None) -> Any:
        """The copy; the default where `copy.deepcopy` knows itself how to make it."""
        if key in self._reached and key not in self:
            value = self._reached[key]
            if key not in self._copied or not _can_be_copied(value):
                self[key] = value
            elif type(value) in _COPIED_BY:
                copied = _COPIED_BY[type(value)](value, self)
                self.setdefault(key, copied)  # the same object may have been asked for meanwhile
        return super().get(key, default)

    def is_shared(self, value: Any) -> bool:
        """Whether no copy of a value has been made."""
        return super().get(id(value), value) is value

    def _follow(
        self,
        model: nn.Module,
        attributes: Callable[[nn.Module], Iterable[tuple[str, Any]]],
        not_shared: Callable[[Any], bool],
    ) -> list[nn.Module]:
        """Finds what is to be copied; returns the modules among it that are not registered in the model."""
        values = [value for module in self.modules for _, value in attributes(module)]
        modules = {id(module) for module in self.modules}
        inside, _ = _walk(values, lambda value: _references(value) if type(value) in self._entered else [])
        own = modules | {id(value) for value in inside.values() if type(value) in _OWN}

        def references(value: Any) -> list[Any]:
            if id(value) in modules or _is_around(value, model):
                return []
            if issubclass(type(value), _WEAK_REFERENCES):
                return [referent for referent in _references(value) if id(referent) in own]
            return _references(value)

        self._reached, holders = _walk(values, references)
        self.own = [value for value in self._reached.values() if not_shared(value)]
        own |= {id(value) for value in self.own}
        pending = list(own)
        self._copied = own
        while pending:
            more = holders[pending.pop()] - self._copied
            self._copied |= more
            pending += more
        found = [self._reached[key] for key in self._copied - modules if key in self._reached]
        return [value for value in found if issubclass(type(value), nn.Module)]


def _walk(
    values: Iterable[Any], references: Callable[[Any], list[Any]]
) -> tuple[dict[int, Any], defaultdict[int, set[int]]]:
    """All that values lead to, themselves included, and what holds what; by id."""
    reached: dict[int, Any] = {}
    holders: defaultdict[int, set[int]] = defaultdict(set)
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) not in reached:
            reached[id(value)] = value
            for part in references(value):
                holders[id(part)].add(id(value))
                pending.append(part)
    return reached, holders


def reached_from(value: Any) -> dict[int, Any]:
    """All that a value leads to, registered in a module or not; by id."""
    return _walk([value], _references)[0]


def _references(value: Any) -> list[Any]:
    """What an object refers to, whatever its class."""
    cls = type(value)  # a weak proxy passes for what it refers to
    if issubclass(cls, _NOT_FOLLOWED):
        return []
    if cls is FunctionType:  # all but its globals
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
    return [_referent(value)] if issubclass(cls, _WEAK_REFERENCES) else gc.get_referents(value)


def _referent(reference: Any) -> Any:
    """What a weak reference or proxy refers to; None if it is gone."""
    if issubclass(type(reference), weakref.ReferenceType):
        return weakref.ReferenceType.__call__(reference)
    try:
        return getattr(reference.__repr__, "__self__", None)
    except ReferenceError:
        return None


def _is_around(value: Any, model: nn.Module) -> bool:
    """Whether the model is a part of a module: it is not the model's, then."""
    return issubclass(type(value), nn.Module) and any(part is model for part in value.modules())


# --- What `copy.deepcopy` shares, or cannot copy ------------------------------------------------------------------

_WEAK_REFERENCES: Final = (weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType)


def _can_be_copied(value: Any) -> bool:
    if type(value) in _OWN or type(value) in _COPIED_BY:
        return True
    try:
        copy.copy(value)
    except Exception:  # noqa: BLE001 - a file, a socket, a process: classes raise what they like
        return False
    return True


def _copied_function(function: FunctionType, memo: Memo) -> FunctionType:
    closure = copy.deepcopy(function.__closure__, memo)
    blank = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    copied: FunctionType = memo.setdefault(id(function), blank)  # it may be in its own closure
    functools.update_wrapper(copied, function)
    del vars(copied)["__wrapped__"]
    vars(copied).update(copy.deepcopy(dict(vars(function)), memo))
    for name in ("__defaults__", "__kwdefaults__"):
        setattr(copied, name, copy.deepcopy(getattr(function, name), memo))
    return copied


def _copied_cell(cell: CellType, memo: Memo) -> CellType:
    memo[id(cell)] = copied = CellType()
    copied.cell_contents = copy.deepcopy(cell.cell_contents, memo)  # an empty one leads nowhere
    return copied


_COPIED_BY: Final[dict[type, Callable[[Any, Memo], Any]]] = {
    FunctionType: _copied_function,
    CellType: _copied_cell,
    MethodType: lambda method, memo: MethodType(
        copy.deepcopy(method.__func__, memo), copy.deepcopy(method.__self__, memo)
    ),
    BuiltinMethodType: lambda method, memo: getattr(copy.deepcopy(method.__self__, memo), method.__name__),
    weakref.ReferenceType: lambda reference, memo: weakref.ref(copy.deepcopy(reference(), memo)),
    weakref.WeakMethod: lambda reference, memo: weakref.WeakMethod(copy.deepcopy(reference(), memo)),
    **dict.fromkeys(
        (weakref.ProxyType, weakref.CallableProxyType),
        lambda proxy, memo: weakref.proxy(copy.deepcopy(_referent(proxy), memo)),
    ),
    weakref.WeakSet: lambda values, memo: weakref.WeakSet(copy.deepcopy(list(values), memo)),
    **dict.fromkeys(
        (weakref.WeakValueDictionary, weakref.WeakKeyDictionary),
        lambda values, memo: type(values)(copy.deepcopy(dict(values), memo)),
    ),
}


def derived(cls: type[nn.Module], body: dict[str, Any]) -> type[nn.Module]:
    """A subclass of which `__init_subclass__` is not told, by which some classes keep registers."""
    derived: type[nn.Module] = types.new_class(
        cls.__name__, (nn.Module,), {"metaclass": type(cls)}, lambda namespace: namespace.update(body)
    )
    try:
        derived.__bases__ = (cls,)
    except TypeError:  # a class with slots is laid out in another way
        derived = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body))
    return derived
