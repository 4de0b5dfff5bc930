"""A copy of a model that shares every tensor with it: modules are copied, parameters and buffers are not.

What `copy.copy` does for one module, for all of a tree at once, so that modes, hooks, sub-modules and containers of
the two are their own. Whatever leads to one of these (a closure, a bound method, a weak reference, an object of any
class) is copied as well, so that it leads to the copy. Everything else is shared.
"""

import sys
from typing import TypeVar

import torch
from torch import nn

from convbn_fx import kinds
from convbn_fx.fx.copying import Copies
from convbn_fx.fx.graph_module import GraphModule, empty
from convbn_fx.tuning.tuned_classes import (
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
    copies = _Clone(model)
    for module in copies.modules:
        if not copies.is_shared(module):
            copies.fill(module)
    for module in copies.modules:
        if STAYS_IN_EVAL_MODE in vars(module):
            give_role(copies[id(module)], "batch_norm")
    return copies[id(model)]  # type: ignore[no-any-return]


class _Clone(Copies):
    """What a model's clone does not share with it."""

    def blank(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module  # compiled: there is nothing in it to tune
        if isinstance(module, torch.fx.GraphModule):
            # One whose train() is its own may put another graph in place (torchvision's do).
            is_its_graph = type(module).train is nn.Module.train and "forward" not in vars(module)
            return empty(GraphModule if is_its_graph else type(module), type(module).__name__)
        instance: nn.Module = object.__new__(untuned_class(module))
        return instance

    def fill(self, module: nn.Module) -> None:
        super().fill(module)
        blank = self[id(module)]
        if isinstance(blank, torch.fx.GraphModule):
            blank.graph = blank._graph  # writes its forward
            ScopeHooks.removed_from(blank)


def untuned_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was tuned."""
    cls = type(module)
    # PyTorch takes properties off this class when it unparametrises.
    if nn.utils.parametrize.is_parametrized(module):
        (base,) = cls.__bases__
        return remade(cls, vars(base).get(kinds.TUNED_FROM, base))
    original: type[nn.Module] = vars(cls).get(kinds.TUNED_FROM, cls)
    return original
