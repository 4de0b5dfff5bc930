"""What each pair keeps for the backward pass: whenever a tensor is saved, the stack tells for which module.

Hooks on the modules would tell it as well, but with hooks on it a tuned pair runs apart. An activation that is part of
the batch norm's class belongs to the pair.
"""

import copy
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any, Final, NamedTuple

from torch import nn
from torch.fx import GraphModule

from convbn_fx._torch import FakeCopyMode, FakeTensorMode
from convbn_fx.functional import conv_batch_norm
from convbn_fx.fx.rewriting import BATCH_NORM
from convbn_fx.memory import saved_storages
from convbn_fx.records import without_wrappers


class SavedBytes(NamedTuple):
    """Bytes saved for the backward pass, of a model or of a pair.

    Attributes:
        eval: As the model is: convolution, then batch norm.
        tune: Of what [`tune`][convbn_fx.tune] makes of it.
        deploy: Of what [`deploy`][convbn_fx.deploy] makes of it.
    """

    eval: int
    tune: int
    deploy: int


def storages_by_module(
    model: nn.Module, inputs: tuple[Any, ...], names: Collection[str], *, body: str = ""
) -> dict[str | None, dict[int, int]]:
    """Calls a model on fake tensors, and asks of each storage that is saved in which of some modules it is.

    Args:
        model: In any mode; it is left untouched.
        inputs: Positional arguments of the call.
        names: The modules' qualified names.
        body: Qualified name of a sub-module that is called in the place of the model.

    Returns:
        By name, and for None what is saved outside of these modules, the sizes in bytes by the storages' addresses.
        What two modules save has the same address in both.
    """
    mode, memo = FakeTensorMode(), dict[int, Any]()
    with FakeCopyMode(mode):
        part, inputs = copy.deepcopy((model.get_submodule(body), inputs), memo)
    modules = {
        id(memo[id(module)]): name for name, module in _named(model) if name in names and id(module) in memo
    }
    with mode:
        return saved_storages(part, inputs, {}, partial(_running, modules))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name; those that a graph in Deploy mode calls in the place of pairs by their batch norms'."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield without_wrappers(name), module
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if node.op == "call_module" and BATCH_NORM in node.meta:
                norm = f"{name}.{node.meta[BATCH_NORM]}".removeprefix(".")
                yield without_wrappers(norm), module.get_submodule(node.target)


#: The variable that holds the module, in the functions that call one. (In a graph, one function calls both of a pair.)
#: Of other frames no variables are read: that would keep what they hold alive.
_CALLED: Final = {nn.Module.__call__.__code__: "self", conv_batch_norm.__code__: "norm"}


def _running(modules: Mapping[int, str]) -> str | None:
    """The name of the module whose call is the innermost."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _CALLED:
            called = frame.f_locals[_CALLED[frame.f_code]]
            if id(called) in modules:
                return modules[id(called)]
        frame = frame.f_back
    return None
