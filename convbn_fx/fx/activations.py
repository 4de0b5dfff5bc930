"""Rewrites the activations of a graph, and the batch norms that stay in it, so that they save less.

It matters where a fused pair is near: what these need not save is saved by the next pair, or made again for it.
"""

import numbers
import operator
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule, Node

from convbn_fx import kinds
from convbn_fx.functional import (
    activation,
    batch_norm_that_stays,
    conv_batch_norm,
    conv_batch_norm_act,
    gated,
    product,
)
from convbn_fx.functional.activations import PRODUCT, parts_that_save_less, what_is_saved
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
    target: Any = gated if kinds.is_gate(module) else batch_norm_that_stays
    if kinds.activation_kind(module) is not None:
        target = activation
    return target, record, name, inputs[0]


def _of_function(node: Node) -> _Found | None:
    if node.op != "call_function":
        return None
    if node.target in (operator.mul, torch.mul):
        return _of_product(node)
    read = _of_activation if node.target in kinds.ACTIVATION_FUNCTIONS else _of_batch_norm
    try:
        found = read(node)
    except TypeError:  # numbers that are computed, arguments that are none of its own
        return None
    if found is None or not isinstance(found[2], Node):
        return None
    target, operands, input = found
    record = what_is_saved(node.name, operands)
    return None if record is None else (target, record, operands, input)


def _of_activation(node: Node) -> tuple[Any, Activation, Any] | None:
    input, operands = kinds.ACTIVATION_FUNCTIONS[node.target](*node.args, **node.kwargs)
    if operands is None or not isinstance(operands.inplace, bool):
        return None
    are_known = all(isinstance(number, numbers.Real) for number in operands.numbers)
    return (activation, operands, input) if are_known else None


def _of_batch_norm(node: Node) -> tuple[Any, BatchNorm[Any], Any] | None:
    row = kinds.BATCH_NORM_FUNCTIONS.get(node.target)
    if row is None or row.output_index is not None:
        return None
    input, training, operands = row.operands(*node.args, **node.kwargs)
    if training is not False or operands.running_mean is None or operands.running_var is None:
        return None
    return batch_norm_that_stays, operands, input


def _of_product(node: Node) -> _Found | None:
    """A product that a pair or an activation takes: not one of numbers."""
    left_and_right = [arg for arg in node.args if isinstance(arg, Node)]
    if len(left_and_right) != 2 or node.kwargs or not any(user.target in _TAKING for user in node.users):
        return None
    left, right = left_and_right
    return product, SavedLess(node.name, "product", PRODUCT), left, right


_TAKING: Final = (conv_batch_norm, conv_batch_norm_act, activation, batch_norm_that_stays)
