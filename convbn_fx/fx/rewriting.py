"""Rewrites matched pairs: the only code that changes a graph.

Each pair becomes one `call_function` of [`conv_batch_norm`][convbn_fx.functional.conv_batch_norm] in the place of the
convolution, or of the batch norm where its operands are computed in between. Modules are handed to it as modules
(`get_attr` nodes), so that every call sees them as they are then.
"""

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from convbn_fx.functional import conv_batch_norm
from convbn_fx.functional.activations import activation, plain_activation, product
from convbn_fx.functional.arithmetic import batch_norm, convolution
from convbn_fx.functional.norms import batch_norm_that_stays, conv_batch_norm_as_written
from convbn_fx.fx.graph_module import GraphModule
from convbn_fx.fx.pairs import Match
from convbn_fx.operands import BatchNorm

#: Key in the meta of a fused call: the name of its batch norm in the report.
BATCH_NORM: Final = "convbn_fx_batch_norm"


def copied(graph_module: Any) -> GraphModule:
    """A GraphModule with a graph of its own that shares everything else with `graph_module`.

    Args:
        graph_module: Any GraphModule.

    Returns:
        The copy: its graph may be changed, its modules and tensors are those of `graph_module`.

    Example:
        ```python
        import torch
        from convbn_fx.fx.rewriting import copied

        graph_module = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
        copy = copied(graph_module)
        assert copy.graph is not graph_module.graph
        assert copy.get_submodule("0") is graph_module.get_submodule("0")
        ```
    """
    return GraphModule(graph_module, copy.deepcopy(graph_module.graph), type(graph_module).__name__)


def rewrite(graph_module: GraphModule, matches: Iterable[Match]) -> None:
    """Replaces each match by a call of the fused convolution, in place.

    Args:
        graph_module: The graph that the matches were found in. Modules, parameters and buffers are not touched.
        matches: What matching found; their nodes are gone afterwards.

    Example:
        ```python
        import torch
        import convbn_fx
        from convbn_fx.fx.matching import find_pairs
        from convbn_fx.fx.rewriting import copied, rewrite

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        graph_module = copied(convbn_fx.symbolic_trace(model))
        matches, _ = find_pairs(graph_module)
        rewrite(graph_module, matches)
        assert "conv_batch_norm" in graph_module.code
        ```
    """
    graph = graph_module.graph
    replaced: dict[Node, Node] = {}  # a later match may have been found to read what an earlier one replaces
    for match in matches:
        replaced[match.output_node] = _fuse(graph, match, replaced)
    if replaced:
        graph.lint()
        graph_module.recompile()


def _fuse(graph: Graph, match: Match, replaced: dict[Node, Node]) -> Node:
    for operand in match.batch_norm if isinstance(match.batch_norm, BatchNorm) else ():
        if isinstance(operand, Node) and match.position < operand:  # a get_attr: matching has looked
            match.position.prepend(operand)
    with graph.inserting_before(match.position):
        operands = [
            graph.create_node("get_attr", operand) if isinstance(operand, str) else operand
            for operand in (match.convolution, match.batch_norm)
        ]
        args, kwargs = map_arg(
            ((*operands, *match.args), match.kwargs), lambda node: replaced.get(node, node)
        )
        fused = graph.call_function(conv_batch_norm, args, kwargs)
    fused.meta = {**match.output_node.meta, BATCH_NORM: match.pair.batch_norm}
    match.output_node.replace_all_uses_with(fused)
    match.convolution_node.replace_all_uses_with(fused, lambda user: user is not match.batch_norm_node)
    for node in (*match.batch_norm_node.users, match.batch_norm_node, match.convolution_node):
        graph.erase_node(node)
    return fused


def unfuse(graph_module: GraphModule) -> None:
    """The way back: calls the convolution and the batch norm of each pair after one another, in place.

    Args:
        graph_module: A rewritten graph. Modules, parameters and buffers are not touched.
    """
    graph = graph_module.graph
    unfuse_activations(graph_module)
    for node in graph.find_nodes(op="call_function", target=conv_batch_norm):
        conv, norm, *args = node.args
        with graph.inserting_before(node):
            output = _called(graph, convolution, conv, tuple(args), node.kwargs)
            normalised = _called(graph, batch_norm, norm, (output,), {})
        normalised.meta = {key: value for key, value in node.meta.items() if key != BATCH_NORM}
        node.replace_all_uses_with(normalised)
        graph.erase_node(node)
        for module in (conv, norm):
            if isinstance(module, Node) and not module.users:
                graph.erase_node(module)
    graph.lint()
    graph_module.recompile()


#: What saves less, and the same as it was called.
_ALONE: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    activation: plain_activation,
    batch_norm_that_stays: batch_norm,
}


def unfuse_activations(graph_module: GraphModule) -> None:
    """The way back for activations, and for batch norms that stay: calls each as it was called, in place.

    Args:
        graph_module: A rewritten graph. Modules, parameters and buffers are not touched.
    """
    graph = graph_module.graph
    for target, function in _ALONE.items():
        for node in graph.find_nodes(op="call_function", target=target):
            operands, *args = node.args
            with graph.inserting_before(node):
                output = _called(graph, function, operands, tuple(args), {})
            node.op, node.target, node.args, node.kwargs = (
                output.op,
                output.target,
                output.args,
                output.kwargs,
            )
            graph.erase_node(output)
            if isinstance(operands, Node) and not operands.users:
                graph.erase_node(operands)
    others: tuple[tuple[Any, Any], ...] = (
        (conv_batch_norm_as_written, conv_batch_norm),
        (product, operator.mul),
    )
    for target, function in others:
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = function
    graph.lint()
    graph_module.recompile()


def _called(
    graph: Graph, function: Callable[..., Any], operands: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    """A call of a convolution or a batch norm: of the module, or of the function that takes the operands."""
    if isinstance(operands, Node) and operands.op == "get_attr":
        return graph.call_module(str(operands.target), args, kwargs)
    if isinstance(operands, Node):  # traced again, as unpickling does, making operands is a call
        operands = operands.target(*operands.args, **operands.kwargs)  # type: ignore[operator]
    tracer = GraphAppendingTracer(graph)
    proxies: Any = map_arg((operands, args), lambda node: Proxy(node, tracer))  # type: ignore[arg-type, return-value]
    return function(proxies[0], *proxies[1]).node  # type: ignore[no-any-return]
