"""Copies of what modules hold: of the modules, and of whatever leads to them, so that it leads to the copies."""

import copy
import copyreg
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Final

import torch
from torch import nn

# --- What is copied -----------------------------------------------------------------------------------------------

#: What a module has of its own, if it is an attribute, or inside of one in such.
_OWN: Final = frozenset({list, set, deque, dict, OrderedDict, defaultdict, torch.fx.Graph})
#: What nothing is looked for in.
_NOT_FOLLOWED: Final = (
    *(
        torch.Tensor,
        torch.fx.Graph,
        torch.jit.ScriptModule,
        types.ModuleType,
        types.CodeType,
        types.FrameType,
    ),
    *(types.GeneratorType, type, str, bytes, int, float, complex, type(None)),
)
#: How the names of attributes begin that are a module's part in a pair.
PART_OF_PAIR: Final = "_convbn_fx_"


class Copies(dict[int, Any]):
    """Copies of a model's modules and of what leads to them; all else is shared, but for what a subclass copies.

    By id, what `copy.deepcopy` is to put in the place of an object.

    Args:
        model: The model.

    Attributes:
        modules: The model's modules, and those it leads to that are not registered in it. Their copies are there,
            empty until they are filled; copies of others are made when they are asked for.
        own: What `is_own` tells of.
    """

    #: In what a copy has containers of its own.
    entered: ClassVar[tuple[type, ...]] = (*_OWN, tuple)

    #: Whether what only weak references lead to is copied: somebody has to hold the copies then.
    holds_all: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = list(model.modules())
        while unregistered := self._follow(model):
            self.modules += unregistered
        self.update((id(module), self.blank(module)) for module in self.modules)

    def blank(self, module: nn.Module) -> nn.Module:
        """The empty copy of a module."""
        instance: nn.Module = object.__new__(type(module))
        return instance

    def is_own(self, _: Any) -> bool:
        """Whether a copy has an object of its own in the place of this one, wherever it is found."""
        return False

    def fill(self, module: nn.Module) -> None:
        """Gives a module's copy its attributes, past the methods of the module, which look at what they are given."""
        for name, value in _attributes(module):
            object.__setattr__(self[id(module)], name, copy.deepcopy(value, self))

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

    def _follow(self, model: nn.Module) -> list[nn.Module]:
        """Finds what is to be copied; returns the modules among it that are not registered in the model."""
        values = [value for module in self.modules for _, value in _attributes(module)]
        modules = {id(module) for module in self.modules}
        inside, _ = _walk(values, lambda value: _references(value) if type(value) in self.entered else [])
        own = modules | {id(value) for value in inside.values() if type(value) in _OWN}

        def references(value: Any) -> list[Any]:
            if id(value) in modules or _is_around(value, model):
                return []
            found = _references(value)
            if issubclass(type(value), _WEAK_REFERENCES) and not self.holds_all:
                return [referent for referent in found if id(referent) in own]
            return found

        self._reached, holders = _walk(values, references)
        self.own = [value for value in self._reached.values() if self.is_own(value)]
        own |= {id(value) for value in self.own}
        pending = list(own)
        for key in pending:
            pending += holders[key] - own
            own |= holders[key]
        self._copied = own
        found = [self._reached[key] for key in self._copied - modules if key in self._reached]
        return [value for value in found if issubclass(type(value), nn.Module)]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself has, in slots as well, but for its part in a pair, which no copy has."""
    yield from ((name, value) for name, value in vars(module).items() if not name.startswith(PART_OF_PAIR))
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined] # as copy.copy does
        if hasattr(module, name):
            yield name, getattr(module, name)


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
    if cls is types.FunctionType:  # all but its globals
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
    return [referent(value)] if issubclass(cls, _WEAK_REFERENCES) else gc.get_referents(value)


def referent(reference: Any) -> Any:
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


def _copied_function(function: types.FunctionType, memo: Copies) -> types.FunctionType:
    closure = copy.deepcopy(function.__closure__, memo)
    blank = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    copied: types.FunctionType = memo.setdefault(id(function), blank)  # it may be in its own closure
    functools.update_wrapper(copied, function, updated=())
    vars(copied).clear()
    vars(copied).update(copy.deepcopy(dict(vars(function)), memo))
    for name in ("__defaults__", "__kwdefaults__"):
        setattr(copied, name, copy.deepcopy(getattr(function, name), memo))
    return copied


def _copied_cell(cell: types.CellType, memo: Copies) -> types.CellType:
    memo[id(cell)] = copied = types.CellType()
    copied.cell_contents = copy.deepcopy(cell.cell_contents, memo)  # an empty one leads nowhere
    return copied


def _made_of(parts: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any, Copies], Any]:
    """Makes a copy by a function of copies of arguments, both of which `parts` tells."""

    def copied(value: Any, memo: Copies) -> Any:
        make, *arguments = parts(value)
        return make(*copy.deepcopy(arguments, memo))

    return copied


_COPIED_BY: Final[dict[type, Callable[[Any, Copies], Any]]] = {
    types.FunctionType: _copied_function,
    types.CellType: _copied_cell,
    types.MethodType: _made_of(lambda method: (types.MethodType, method.__func__, method.__self__)),
    types.BuiltinMethodType: _made_of(lambda method: (getattr, method.__self__, method.__name__)),
    weakref.ReferenceType: _made_of(lambda reference: (weakref.ref, reference())),
    weakref.WeakMethod: _made_of(lambda reference: (weakref.WeakMethod, reference())),
    weakref.ProxyType: _made_of(lambda proxy: (weakref.proxy, referent(proxy))),
    weakref.CallableProxyType: _made_of(lambda proxy: (weakref.proxy, referent(proxy))),
    weakref.WeakSet: _made_of(lambda values: (weakref.WeakSet, list(values))),
    weakref.WeakValueDictionary: _made_of(lambda values: (weakref.WeakValueDictionary, dict(values))),
    weakref.WeakKeyDictionary: _made_of(lambda values: (weakref.WeakKeyDictionary, dict(values))),
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
