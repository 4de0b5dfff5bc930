"""Module -> GraphModule: symbolic tracing that keeps convolutions and batch norms visible as nodes.

Whatever tracing walks through is baked in: branches taken, `self.training`, optional arguments. So the tracer walks
through as little as it can. A module that holds no batch norm stays a leaf, whatever it does (dropout, stochastic
depth, attention, squeeze-and-excitation), and so does one with hooks. A leaf whose output a batch norm reads is
opened afterwards, if it holds a convolution and can be traced: that is where a pair crosses a module's border.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from convbn_fx import kinds
from convbn_fx.graph_module import GraphModule


class TracingError(RuntimeError):
    """A model whose forward cannot be traced symbolically. Names the module at fault and the way out."""


class Tracer(torch.fx.Tracer):
    """The tracer behind [`symbolic_trace`][convbn_fx.symbolic_trace]; usable with torch.fx's own machinery too.

    Args:
        opened: Qualified names of modules to walk through although they hold no batch norm.
    """

    # Buffers are read where the forward reads them, not when it is traced, and tracing never changes them.
    proxy_buffer_attributes = True

    def __init__(self, opened: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.opened = opened
        self.culprit: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calling `m` becomes one node."""
        if kinds.convolution_kind(m) or kinds.batch_norm_kind(m) or kinds.has_hooks(m):
            return True
        if module_qualified_name in self.opened:
            return False
        return not any(kinds.resembles_batch_norm(module) for module in m.modules())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records or walks through one module call, and remembers the innermost module in which tracing failed."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.culprit is None:
                self.culprit = f"{self.path_of_module(m)} ({type(m).__name__})"
            raise


def symbolic_trace(root: nn.Module, concrete_args: dict[str, Any] | None = None) -> GraphModule:
    """Traces a model into a graph in which convolutions and batch norms are nodes.

    Made for [`transform`][convbn_fx.transform]. Differs from `torch.fx.symbolic_trace` in what is a node: every
    convolution and batch norm of the table of kinds (parametrised ones too), and every module that holds no batch
    norm or has hooks. Buffers are read at every call. The result keeps all sub-modules of `root`, called or not.

    What every symbolic trace bakes in remains: the branches that the walked-through forwards take on `self.training`,
    on optional arguments and on Python values, and hooks that are registered later on modules walked through.

    Args:
        root: The model. It is left as it was found, whatever its forward does while it is traced.
        concrete_args: Arguments of the forward to make constants, as in `torch.fx.symbolic_trace`.

    Returns:
        A GraphModule that shares the modules and tensors of `root`.

    Raises:
        TypeError: `root` is no module.
        TracingError: The forward cannot be traced; names the module that stopped it.

    Example:
        ```python
        gm = convbn_fx.transform(convbn_fx.symbolic_trace(model.eval()))
        ```
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"symbolic_trace: expected a torch.nn.Module, got {type(root).__name__}")
    if "forward" in vars(root):
        raise TracingError(
            f"{type(root).__name__} has a forward of its own as an instance attribute, which tracing would ignore. "
            "Move it to the class, or wrap the model in a module that calls it."
        )
    traced = _trace(root, concrete_args, frozenset())
    refused: frozenset[str] = frozenset()
    while candidates := _leaves_before_batch_norms(traced) - refused:
        name = min(candidates)
        try:
            traced = _trace(root, concrete_args, traced.meta["opened"] | {name})
        except TracingError:  # then it stays a leaf, and its batch norm gets a Skip
            refused |= {name}
    del traced.meta["opened"]
    return traced


def _trace(root: nn.Module, concrete_args: dict[str, Any] | None, opened: frozenset[str]) -> GraphModule:
    tracer = Tracer(opened)
    with _left_as_found(root):
        try:
            graph = tracer.trace(root, concrete_args)
        except Exception as error:
            culprit = tracer.culprit or f"the forward of {type(root).__name__}"
            raise TracingError(
                f"{type(root).__name__} cannot be traced symbolically: {culprit} raised "
                f"{type(error).__name__}: {error}\nTrace the traceable sub-modules by themselves "
                "(model.backbone = transform(symbolic_trace(model.backbone))), make the arguments that its control "
                "flow depends on constants (concrete_args=...), or capture the model with torch.export."
            ) from error
        traced = GraphModule(root, graph, type(root).__name__)
    traced.meta["opened"] = opened
    return traced


def _leaves_before_batch_norms(traced: GraphModule) -> frozenset[str]:
    """Leaf modules that hold a convolution and whose output is read by a batch norm."""
    leaves = set()
    for node in traced.graph.nodes:
        producer = node.args[0] if node.args else node.kwargs.get("input")
        if not (isinstance(producer, Node) and producer.op == "call_module" and _is_batch_norm(node, traced)):
            continue
        module = traced.get_submodule(str(producer.target))
        if (
            kinds.convolution_kind(module) is None
            and not kinds.has_hooks(module)
            and any(kinds.resembles_convolution(inner) for inner in module.modules())
        ):
            leaves.add(str(producer.target))
    return frozenset(leaves)


def _is_batch_norm(node: Node, traced: GraphModule) -> bool:
    if node.op == "call_module":
        return kinds.resembles_batch_norm(traced.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in kinds.BATCH_NORM_FUNCTIONS


@contextmanager
def _left_as_found(root: nn.Module) -> Iterator[None]:
    """Undoes what a forward, run with proxies, assigns to the modules, and what tracing stores on the root."""
    found = {
        module: {name: _copied(value) for name, value in vars(module).items()} for module in root.modules()
    }
    try:
        yield
    finally:
        for module, attributes in found.items():
            vars(module).clear()
            vars(module).update(attributes)


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else value
