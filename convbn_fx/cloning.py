"""A copy of a model that shares every tensor with it: modules are copied, parameters and buffers are not.

What `copy.copy` does for one module, for all of a tree at once, so that modes, hooks and sub-modules of the two are
their own. References from module to module (bound methods, lists of modules) lead to the copies.
"""

import copy
import copyreg
import functools
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, MethodType
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from convbn_fx import kinds
from convbn_fx.graph_module import GraphModule
from convbn_fx.rewriting import copied
from convbn_fx.roles import FUNCTION_CALLS, PAIRING, REPORT, SCOPE, STAYS_IN_EVAL_MODE, become, remade

Model = TypeVar("Model", bound=nn.Module)


def clone(model: Model) -> Model:
    """Copies a model's modules, not its tensors.

    Args:
        model: Any model. If it was tuned, its copy is of the original classes again, but for batch norms that
            `norm_eval=True` keeps in Eval mode.

    Returns:
        A model of the same classes, hooks, modes and attributes, whose parameters and buffers are those of `model`.
        Moving one with `to()` moves the other; replacing a parameter or a sub-module does not.

    Raises:
        TypeError: FSDP has sharded the model: its hooks belong to these very modules.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise TypeError(
            f"{type(model).__name__} is sharded by FSDP already: tune the model first, then fully_shard it"
        )
    copies: dict[int, Any] = {}
    for module in model.modules():
        copies[id(module)] = _blank(module)
    for module in model.modules():
        if copies[id(module)] is not module:
            _fill(copies[id(module)], module, copies)
    return copies[id(model)]  # type: ignore[no-any-return]


def _blank(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module  # compiled: there is nothing in it to tune
    if isinstance(module, torch.fx.GraphModule):
        if type(module).train is nn.Module.train:  # else it may put another graph in place (torchvision's do)
            return copied(module)
        return _instance(_class_of_its_own(type(module)))
    return _instance(_untuned(module))


def _instance(cls: type[nn.Module]) -> nn.Module:
    instance: nn.Module = object.__new__(cls)
    return instance


def _class_of_its_own(cls: type[nn.Module]) -> type[nn.Module]:
    """A GraphModule writes its forward onto its class."""
    return remade(cls, *cls.__bases__, without=("__call__", "_wrapped_call"))


def _untuned(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    # PyTorch takes properties off this class when it unparametrises.
    if nn.utils.parametrize.is_parametrized(module):
        (base,) = cls.__bases__
        return remade(cls, vars(base).get(kinds.TUNED_FROM, base))
    original: type[nn.Module] = vars(cls).get(kinds.TUNED_FROM, cls)
    return original


def _fill(blank: nn.Module, module: nn.Module, copies: dict[int, Any]) -> None:
    # It has the graph and the state already; its children are to be the copies.
    if isinstance(blank, GraphModule):
        blank._modules = {name: copies.get(id(child), child) for name, child in blank._modules.items()}
        return
    vars(blank).update(
        (name, _mirrored(value, copies))
        for name, value in vars(module).items()
        if name not in (PAIRING, SCOPE, FUNCTION_CALLS, REPORT)
    )
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined] # as copy.copy does
        if hasattr(module, name):
            setattr(blank, name, getattr(module, name))
    if STAYS_IN_EVAL_MODE in vars(blank):
        become(blank, "batch_norm")
    # The very same dictionary: `to()` replaces buffers where it changes parameters in place.
    vars(blank)["_buffers"] = module._buffers


def _mirrored(value: Any, copies: dict[int, Any]) -> Any:
    """The value, with every module of the model in it replaced by its copy, and with containers of its own."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a namedtuple
        return type(value)(*(_mirrored(item, copies) for item in value))
    mirror = _MIRRORS.get(type(value))
    if mirror is not None:
        return mirror(value, copies)
    if isinstance(value, (list, set, deque, dict)) and _refers_to_a_copy(
        value.values() if isinstance(value, dict) else value, copies
    ):
        return _mirrored_container(value, copies)  # of a class of its own
    if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, torch.Tensor)):
        return _mirrored_object(value, copies)
    return value


def _mirrored_container(value: Any, copies: dict[int, Any]) -> Any:
    copies[id(value)] = mirrored = copy.copy(value)
    content = [_mirrored(item, copies) for item in (value.items() if isinstance(value, dict) else value)]
    mirrored.clear()
    (mirrored.extend if isinstance(mirrored, (list, deque)) else mirrored.update)(content)
    return mirrored


def _mirrored_partial(value: Any, copies: dict[int, Any]) -> Any:
    function, args, keywords = (_mirrored(part, copies) for part in (value.func, value.args, value.keywords))
    return functools.partial(function, *args, **keywords)


def _mirrored_hook(value: Any, copies: dict[int, Any]) -> Any:
    module = _mirrored(value.module(), copies) if value.with_module else None
    return _WrappedHook(_mirrored(value.hook, copies), module)


def _mirrored_object(value: Any, copies: dict[int, Any]) -> Any:
    """An object of any other class: copied if it holds a module of the model."""
    if not _refers_to_a_copy(vars(value).values(), copies):
        return value
    copies[id(value)] = mirrored = copy.copy(value)
    vars(mirrored).update((name, _mirrored(part, copies)) for name, part in vars(value).items())
    return mirrored


def _refers_to_a_copy(values: Iterable[Any], copies: dict[int, Any]) -> bool:
    """Whether one of the values is, or holds in a container, a module that has a copy or a bound method of one."""
    owners = (getattr(value, "__self__", value) for value in pytree.tree_leaves(list(values)))
    return any(isinstance(owner, nn.Module) and id(owner) in copies for owner in owners)


def _cells(function: FunctionType) -> list[Any]:
    """The values that a function closes over."""
    return [value for cell in function.__closure__ or () for value in _contents(cell)]


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # nothing has been assigned to it yet
        return []


def _mirrored_function(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    """The function, closing over the copies."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not _refers_to_a_copy(_cells(function) + defaults, copies):
        return function
    cells = tuple(
        CellType(_mirrored(cell.cell_contents, copies))
        if _refers_to_a_copy(_contents(cell), copies)
        else cell
        for cell in function.__closure__ or ()
    )
    mirrored = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        _mirrored(function.__defaults__, copies),
        cells or None,
    )
    mirrored.__kwdefaults__ = _mirrored(function.__kwdefaults__, copies)
    vars(mirrored).update(vars(function))
    return mirrored


def _mirrored_handle(handle: RemovableHandle, copies: dict[int, Any]) -> RemovableHandle:
    """The handle, of the hook in the copy's own dictionary."""
    hooks = handle.hooks_dict_ref()
    others = [reference() for reference in getattr(handle, "extra_dict_ref", ())]
    mirrored = RemovableHandle(
        _mirrored(hooks, copies) if hooks is not None else OrderedDict(),
        extra_dict=[_mirrored(other, copies) for other in others if other is not None],
    )
    mirrored.id = handle.id
    return mirrored


_MIRRORS: Final[dict[type, Callable[[Any, dict[int, Any]], Any]]] = {
    **dict.fromkeys((list, set, deque, dict, OrderedDict, defaultdict), _mirrored_container),
    tuple: lambda value, copies: tuple(_mirrored(item, copies) for item in value),
    MethodType: lambda value, copies: MethodType(value.__func__, _mirrored(value.__self__, copies)),
    functools.partial: _mirrored_partial,
    FunctionType: _mirrored_function,
    _WrappedHook: _mirrored_hook,
    RemovableHandle: _mirrored_handle,
    weakref.ReferenceType: lambda value, copies: (
        weakref.ref(copies[id(value())]) if id(value()) in copies else value
    ),
}
