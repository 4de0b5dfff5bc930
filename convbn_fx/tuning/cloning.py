"""A copy of a model that shares every tensor with it: modules are copied, parameters and buffers are not.

What `copy.copy` does for one module, for all of a tree at once, so that modes, hooks, sub-modules and containers of
the two are their own. Whatever leads to one of these (a closure, a bound method, a weak reference, an object of any
class) is copied as well, so that it leads to the copy. Everything else is shared.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import torch
from torch import nn

from convbn_fx import kinds
from convbn_fx.fx.copying import Memo, attributes
from convbn_fx.fx.graph_module import OF_ONE_GRAPH, GraphModule, instance_like
from convbn_fx.fx.rewriting import copied
from convbn_fx.tuning.tuned_classes import (
    FUNCTION_CALLS,
    PAIRING,
    REPORT,
    SCOPE,
    STAYS_IN_EVAL_MODE,
    ScopeHooks,
    give_role,
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
    memo = Memo(model, _blank, _attributes)
    for module in memo.modules:
        if memo[id(module)] is not module:
            _fill(memo[id(module)], module, memo)
    for module in memo.modules:
        if STAYS_IN_EVAL_MODE in vars(module):
            give_role(memo[id(module)], "batch_norm")
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
    return ((name, value) for name, value in attributes(module) if name not in _OF_TUNED_MODULES)


_OF_TUNED_MODULES: Final = frozenset({PAIRING, SCOPE, FUNCTION_CALLS, REPORT})


def _fill(blank: nn.Module, module: nn.Module, memo: Memo) -> None:
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
