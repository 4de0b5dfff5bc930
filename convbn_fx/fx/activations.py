"""Rewrites the activations of a graph, and the batch norms that stay in it, so that they save less.

It matters where a fused pair is near: what these need not save is saved by the next pair, or made again for it.
"""

import numbers
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from convbn_fx import kinds
from convbn_fx.functional import activation, batch_norm_that_stays, conv_batch_norm, conv_batch_norm_act
from convbn_fx.functional.activations import parts_that_save_less, what_is_saved
from convbn_fx.operands import Activation, BatchNorm
from convbn_fx.records import SavedLess


def save_less(graph_module: GraphModule) -> list[SavedLess]:
    """Replaces calls of known activations, and of batch norms with frozen statistics, in place.

    Args:
        graph_module: A graph whose pairs are rewritten. Modules, parameters and buffers are not touched.

    Returns:
        A record of each.
    """
    graph = graph_module.graph
    records: list[SavedLess] = []
    for node in graph.find_nodes(op="call_function", target=conv_batch_norm):
        norm = node.args[1]
        if isinstance(norm, Node) and norm.op == "get_attr":
            inside = parts_that_save_less(str(norm.target), graph_module.get_submodule(str(norm.target)))
            node.target = conv_batch_norm_act if inside else conv_batch_norm
            records += inside
    for node in list(graph.nodes):
        found = _of_module(node, graph_module) if node.op == "call_module" else _of_function(node)
        if found is None:
            continue
        target, record, operands, input = found
        with graph.inserting_before(node):
            first = graph.create_node("get_attr", operands) if isinstance(operands, str) else operands
            replacement = graph.call_function(target, (first, input))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        records.append(record)
        if node.op == "call_module":
            records += parts_that_save_less(str(node.target), graph_module.get_submodule(str(node.target)))
    if records:
        graph.lint()
        graph_module.recompile()
    return records


_Found = tuple[Any, SavedLess, Any, Node]


def _of_module(node: Node, root: nn.Module) -> _Found | None:
    inputs = [*node.args, *node.kwargs.values()]
    name, module = str(node.target), root.get_submodule(str(node.target))
    if len(inputs) != 1 or not isinstance(inputs[0], Node) or not node.kwargs.keys() <= {"input", "x"}:
        return None
    record = what_is_saved(name, module)
    if record is None:
        return None
    target = activation if kinds.activation_kind(module) is not None else batch_norm_that_stays
    return target, record, name, inputs[0]


def _of_function(node: Node) -> _Found | None:
    if node.op != "call_function":
        return None
    operands: Activation | BatchNorm[Any] | None
    try:
        if node.target in kinds.ACTIVATION_FUNCTIONS:
            target = activation
            input, operands = kinds.ACTIVATION_FUNCTIONS[node.target](*node.args, **node.kwargs)
        elif (row := kinds.BATCH_NORM_FUNCTIONS.get(node.target)) is not None and row.output_index is None:
            target = batch_norm_that_stays
            input, training, operands = row.operands(*node.args, **node.kwargs)
            if training is not False or operands.running_mean is None or operands.running_var is None:
                return None
        else:
            return None
    except TypeError:  # numbers that are computed, arguments that are none of its own
        return None
    if not isinstance(input, Node) or operands is None or not _is_constant(operands):
        return None
    record = what_is_saved(node.name, operands)
    return None if record is None else (target, record, operands, input)


def _is_constant(operands: Any) -> bool:
    """Whether the graph tells an activation's numbers; those of a batch norm may be computed."""
    if isinstance(operands, BatchNorm):
        return True
    return isinstance(operands.inplace, bool) and all(
        isinstance(number, numbers.Real) for number in operands.numbers
    )

