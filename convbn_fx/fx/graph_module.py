"""A GraphModule that stays what its root was.

`torch.fx.GraphModule` keeps of its root only what the graph refers to, and forgets hooks, attributes and `meta` when
copied or unpickled. Checkpoints, however, hold the unused sub-modules too. Here the root's whole state is shared:
its children are the very same modules, its parameters and buffers the very same tensors.
"""

import copy
import operator
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.fx.graph_module import reduce_graph_module
from torch.package.importer import sys_importer

from convbn_fx import _torch
from convbn_fx._torch import WrappedHook

# What belongs to one GraphModule and its graph, or is merged below.
_OF_ONE_GRAPH: Final = frozenset(
    {"forward", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"}
    | (vars(torch.fx.GraphModule({}, torch.fx.Graph())).keys() - vars(nn.Module()).keys())
)


class GraphModule(torch.fx.GraphModule):
    """A `torch.fx.GraphModule` with all of its root's sub-modules, buffers, hooks and attributes, used or not.

    Args:
        root: The module that the graph was traced from, or another GraphModule.
        graph: The graph to run, whose targets are qualified names in `root`.
        class_name: Name of the class, for printing.
        constants: What the graph reads by names that the root does not have.
    """

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: torch.fx.Graph,
        class_name: str = "GraphModule",
        constants: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(_with(root, graph, constants) if constants else root, graph, class_name)
        if isinstance(root, nn.Module):
            self._share_state(root)

    def _share_state(self, root: nn.Module) -> None:
        if isinstance(root, torch.fx.GraphModule):
            self.meta = dict(root.meta)
        # Tensors that tracing made constants, and tensors that are plain attributes, are no part of a checkpoint.
        constants = {name: tensor for name, tensor in self._buffers.items() if name not in root._buffers}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | set(constants)
        self._buffers = {**root._buffers, **constants}
        self._parameters = dict(root._parameters)
        self._modules = {**self._modules, **root._modules}
        for name, value in vars(root).items():
            if name in _OF_ONE_GRAPH or name in constants:
                continue
            if isinstance(value, (dict, list, set)):
                value = value.copy()  # hooks added to one are not added to the other
            if isinstance(value, dict):
                value.update((key, self._bound_here(hook, root)) for key, hook in list(value.items()))
            vars(self)[name] = self._bound_here(value, root)

    def _bound_here(self, value: Any, root: nn.Module) -> Any:
        """A method or hook that is bound to the root, bound to this module instead."""
        if isinstance(value, MethodType) and value.__self__ is root:
            return MethodType(value.__func__, self)
        if isinstance(value, WrappedHook) and value.with_module and value.module() is root:
            return WrappedHook(self._bound_here(value.hook, root), self)
        return value

    def _deepcopy_init(self) -> Any:
        return partial(GraphModule.__init__, class_name=type(self).__name__)

    def __copy__(self) -> "GraphModule":
        return GraphModule(self, self.graph, type(self).__name__)

    def to_folder(self, folder: str | os.PathLike[str], module_name: str = "FxModule") -> None:
        """Writes the module as code, as `torch.fx.GraphModule` does, with the imports that the code needs."""
        super().to_folder(folder, module_name)
        file = Path(folder) / "module.py"
        names = self.graph.python_code("self").globals
        imports = _torch.format_import_block(names, sys_importer)
        file.write_text(f"{imports}\n{file.read_text()}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as `torch.fx.GraphModule` does, by generated code; unpickling makes this class again."""
        _, (state, import_block) = super().__reduce__()
        if not getattr(state.get("_tracer_cls"), "proxy_buffer_attributes", False):
            state["_tracer_cls"] = _CodeTracer
        return _rebuild, (state, import_block, type(self).__name__)


def keep_all_in_copies(module: torch.fx.GraphModule) -> None:
    """Makes copies and pickles of a GraphModule keep all of its graphs, hooks and attributes, as ours do."""
    if not isinstance(module, GraphModule):
        cls: Any = type(module)  # the class of this very instance
        cls.__deepcopy__, cls.__reduce_ex__ = _deepcopied, _reduced


def _deepcopied(self: torch.fx.GraphModule, memo: dict[int, Any]) -> torch.fx.GraphModule:
    memo[id(self)] = result = empty(type(self), type(self).__name__)
    _set_state(result, copy.deepcopy(vars(self), memo))
    return result


def _reduced(self: torch.fx.GraphModule, _: Any) -> tuple[Any, ...]:
    # Above the class of this very instance, which nobody can import.
    cls, name = type(self).__bases__[0], type(self).__name__
    return empty, (cls, name), vars(self), None, None, _set_state


def empty(cls: type[torch.fx.GraphModule], name: str) -> torch.fx.GraphModule:
    """A GraphModule without attributes. Each instance has a subclass of its own, for its forward."""
    instance: torch.fx.GraphModule = cls.__new__(cls)
    type(instance).__name__ = name
    return instance


def _set_state(module: torch.fx.GraphModule, state: dict[str, Any]) -> None:
    vars(module).update(state)
    module.graph = module._graph  # writes its forward
    keep_all_in_copies(module)


def make_plain(module: GraphModule) -> None:
    """Makes a GraphModule one of `torch.fx` alone; all that it holds, it keeps."""
    type(module).__bases__ = (torch.fx.GraphModule,)  # the class of this very instance
    for holder in (module, module.graph):
        if getattr(holder._tracer_cls, "__module__", "").startswith(f"{__package__}."):
            holder._tracer_cls = None


def _with(root: Any, graph: torch.fx.Graph, constants: Mapping[str, Any]) -> dict[str, Any]:
    """All that a graph refers to."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return {name: operator.attrgetter(name)(root) for name in targets - constants.keys()} | dict(constants)


class _CodeTracer(torch.fx.Tracer):
    """Traces generated code again, in which a fused call may read nothing but buffers."""

    proxy_buffer_attributes = True


def _rebuild(state: dict[str, Any], import_block: str, class_name: str) -> GraphModule:
    graph: Any = reduce_graph_module(dict(state), import_block).graph
    root = nn.Module()
    vars(root).update(state)
    result = GraphModule(root, graph, class_name)
    result.meta = state["meta"]
    return result
