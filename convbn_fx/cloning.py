"""A copy of a model that shares every tensor with it: modules are copied, parameters and buffers are not.

What `copy.copy` does for one module, for all of a tree at once, so that modes, hooks and sub-modules of the two are
their own. References from module to module (bound methods, lists of modules) lead to the copies.
"""

import copy
import functools
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook

from convbn_fx import kinds
from convbn_fx.deferral import FUNCTION_CALLS, PAIRING, REPORT, SCOPE, remade
from convbn_fx.graph_module import GraphModule
from convbn_fx.rewriting import copied

Model = TypeVar("Model", bound=nn.Module)


def clone(model: Model) -> Model:
    """Copies a model's modules, not its tensors.

    Args:
        model: Any model. If it was tuned, its copy is of the original classes again.

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
    if nn.utils.parametrize.is_parametrized(module) and kinds.TUNED_FROM in vars(cls.__bases__[0]):
        return remade(cls, vars(cls.__bases__[0])[kinds.TUNED_FROM])
    original: type[nn.Module] = vars(cls).get(kinds.TUNED_FROM, cls)
    return original


def _fill(blank: nn.Module, module: nn.Module, copies: dict[int, Any]) -> None:
    if isinstance(
        blank, GraphModule
    ):  # has the graph and the state already; its children are to be the copies
        blank._modules = {name: copies.get(id(child), child) for name, child in blank._modules.items()}
        return
    vars(blank).update(
        (name, _mirrored(value, copies))
        for name, value in vars(module).items()
        if name not in (PAIRING, SCOPE, FUNCTION_CALLS, REPORT)
    )
    # The very same dictionary: `to()` replaces buffers where it changes parameters in place.
    vars(blank)["_buffers"] = module._buffers


def _mirrored(value: Any, copies: dict[int, Any]) -> Any:
    """The value, with every module of the model in it replaced by its copy, and with containers of its own."""
    if id(value) in copies:
        return copies[id(value)]
    mirrored: Any = value
    if type(value) in (list, set, deque, dict, OrderedDict, defaultdict):
        copies[id(value)] = mirrored = copy.copy(value)
        content = [_mirrored(item, copies) for item in (value.items() if isinstance(value, dict) else value)]
        mirrored.clear()
        (mirrored.extend if isinstance(mirrored, (list, deque)) else mirrored.update)(content)
    elif type(value) is tuple:
        mirrored = tuple(_mirrored(item, copies) for item in value)
    elif type(value) is MethodType:
        mirrored = MethodType(value.__func__, _mirrored(value.__self__, copies))
    elif type(value) is functools.partial:
        function, args, keywords = (
            _mirrored(part, copies) for part in (value.func, value.args, value.keywords)
        )
        mirrored = functools.partial(function, *args, **keywords)
    elif type(value) is _WrappedHook:
        module = _mirrored(value.module(), copies) if value.with_module else None
        mirrored = _WrappedHook(_mirrored(value.hook, copies), module)
    elif type(value) is weakref.ReferenceType and id(value()) in copies:
        mirrored = weakref.ref(copies[id(value())])
    return mirrored
