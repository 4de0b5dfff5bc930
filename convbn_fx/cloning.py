"""A copy of a model that shares every tensor with it: modules are copied, parameters and buffers are not.

What `copy.copy` does for one module, for all of a tree at once, so that modes, hooks, sub-modules and containers of
the two are their own. Whatever leads to one of these (a closure, a bound method, a weak reference, an object of any
class) is copied as well, so that it leads to the copy. Everything else is shared.
"""

import copy
import copyreg
import functools
import gc
import sys
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
from typing import Any, Final, TypeVar

import torch
from torch import nn

from convbn_fx import kinds
from convbn_fx.graph_module import OF_ONE_GRAPH, GraphModule, instance_like
from convbn_fx.rewriting import copied
from convbn_fx.roles import (
    FUNCTION_CALLS,
    PAIRING,
    REPORT,
    SCOPE,
    STAYS_IN_EVAL_MODE,
    ScopeHooks,
    become,
    remade,
)

Model = TypeVar("Model", bound=nn.Module)


def clone(model: Model) -> Model:
    """Copies a model's modules, not its tensors.

    Args:
        model: Any model. If it was tuned, its copy is of the original classes again, but for batch norms that
            `norm_eval=True` keeps in Eval mode.

    Returns:
        A model of the same classes, hooks, modes and attributes, whose parameters and buffers are those of `model`.
        What changes a tensor in place shows in both; what puts another tensor in its place does not. `to()` does
        either: parameters move in both, buffers in the one that it is called on.

    Raises:
        TypeError: FSDP has sharded the model: its hooks belong to these very modules.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise TypeError(
            f"{type(model).__name__} is sharded by FSDP already: tune the model first, then fully_shard it"
        )
    memo = _Memo(model)
    for module in memo.modules:
        if memo[id(module)] is not module:
            _fill(memo[id(module)], module, memo)
    for module in memo.modules:
        if STAYS_IN_EVAL_MODE in vars(module):
            become(memo[id(module)], "batch_norm")
    return memo[id(model)]  # type: ignore[no-any-return]


def _blank(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module  # compiled: there is nothing in it to tune
    if isinstance(module, torch.fx.GraphModule):
        # One whose train() is its own may put another graph in place (torchvision's do).
        is_its_graph = type(module).train is nn.Module.train and "forward" not in vars(module)
        return copied(module) if is_its_graph else instance_like(module)
    instance: nn.Module = object.__new__(untuned_class(module))
    return instance


def untuned_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was tuned."""
    cls = type(module)
    # PyTorch takes properties off this class when it unparametrises.
    if nn.utils.parametrize.is_parametrized(module):
        (base,) = cls.__bases__
        return remade(cls, vars(base).get(kinds.TUNED_FROM, base))
    original: type[nn.Module] = vars(cls).get(kinds.TUNED_FROM, cls)
    return original


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that its copy has as well."""
    for name, value in vars(module).items():
        if name not in _OF_TUNED_MODULES:
            yield name, value
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined] # as copy.copy does
        if hasattr(module, name):
            yield name, getattr(module, name)


_OF_TUNED_MODULES: Final = frozenset({PAIRING, SCOPE, FUNCTION_CALLS, REPORT})


def _fill(blank: nn.Module, module: nn.Module, memo: "_Memo") -> None:
    for name, value in _attributes(module):
        if not isinstance(blank, GraphModule) or name not in OF_ONE_GRAPH:
            # Past the methods of the module, which look at what they are given.
            object.__setattr__(blank, name, copy.deepcopy(value, memo))
    if isinstance(blank, GraphModule):  # whose tensors are those of its graph, too
        vars(blank)["_modules"] = copy.deepcopy(vars(blank)["_modules"], memo)
    if isinstance(blank, torch.fx.GraphModule) and not isinstance(blank, GraphModule):
        blank.graph = blank._graph  # writes its forward
    if isinstance(blank, torch.fx.GraphModule):
        for name in _OF_TUNED_MODULES:
            vars(blank).pop(name, None)
        ScopeHooks.removed_from(blank)


# --- What is copied -----------------------------------------------------------------------------------------------

#: What a module has of its own, if it is an attribute, or inside of one in such.
_OWN: Final = frozenset({list, set, deque, dict, OrderedDict, defaultdict, torch.fx.Graph})
#: What nothing is looked for in.
_NOT_FOLLOWED: Final = (
    *(torch.Tensor, torch.fx.Graph, torch.jit.ScriptModule, type, ModuleType, CodeType, FrameType),
    *(GeneratorType, str, bytes, int, float, complex, type(None)),
)


class _Memo(dict[int, Any]):
    """What `copy.deepcopy` is to put in the place of an object, by its id: a copy, or the object itself.

    Args:
        model: The model. The copies of its modules are there and empty; others are made when they are asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = list(model.modules())
        while unregistered := self._follow(model):
            self.modules += unregistered
        self.update((id(module), _blank(module)) for module in self.modules)

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

    def _follow(self, model: nn.Module) -> list[nn.Module]:
        """Finds what is to be copied; returns the modules among it that are not registered in the model."""
        values = [value for module in self.modules for _, value in _attributes(module)]
        modules = {id(module) for module in self.modules}
        inside, _ = _walk(values, lambda value: _references(value) if type(value) in {*_OWN, tuple} else [])
        own = modules | {id(value) for value in inside.values() if type(value) in _OWN}

        def references(value: Any) -> list[Any]:
            if id(value) in modules or _is_around(value, model):
                return []
            if issubclass(type(value), _WEAK_REFERENCES):
                return [referent for referent in _references(value) if id(referent) in own]
            return _references(value)

        self._reached, holders = _walk(values, references)
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


def _copied_function(function: FunctionType, memo: _Memo) -> FunctionType:
    closure = copy.deepcopy(function.__closure__, memo)
    blank = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    copied: FunctionType = memo.setdefault(id(function), blank)  # it may be in its own closure
    functools.update_wrapper(copied, function)
    del vars(copied)["__wrapped__"]
    vars(copied).update(copy.deepcopy(dict(vars(function)), memo))
    for name in ("__defaults__", "__kwdefaults__"):
        setattr(copied, name, copy.deepcopy(getattr(function, name), memo))
    return copied


def _copied_cell(cell: CellType, memo: _Memo) -> CellType:
    memo[id(cell)] = copied = CellType()
    copied.cell_contents = copy.deepcopy(cell.cell_contents, memo)  # an empty one leads nowhere
    return copied


_COPIED_BY: Final[dict[type, Callable[[Any, _Memo], Any]]] = {
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
