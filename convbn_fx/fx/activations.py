"""Rewrites the activations of a graph, and the batch norms that stay in it, so that they save less.

It matters where a fused pair is near: what these need not save is saved by the next pair, or made again for it.
"""

import numbers
import operator
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from convbn_fx import kinds
from convbn_fx.functional import conv_batch_norm
from convbn_fx.functional.activations import (
    PRODUCT,
    activation,
    is_saved_anyway,
    parts_that_save_less,
    product,
    what_is_saved,
)
from convbn_fx.functional.norms import batch_norm_that_stays, conv_batch_norm_as_written
from convbn_fx.operands import Activation, BatchNorm
from convbn_fx.records import SavedLess

_Found = tuple[Any, SavedLess, Any, Node]  # what is to be called, its record, its arguments


def save_less(graph_module: GraphModule) -> list[SavedLess]:
    """Replaces calls of known activations, and of batch norms with frozen statistics, in place.

    Args:
        graph_module: A graph whose pairs are rewritten. Modules, parameters and buffers are not touched.

    Returns:
        A record of each.
    """
    graph = graph_module.graph
    records: list[SavedLess] = []
    pairs = graph.find_nodes(op="call_function", target=conv_batch_norm)
    is_frozen = any(
        not any(tensor.requires_grad for tensor in _tensors_of(graph_module, node)) for node in pairs
    )
    for node in pairs:
        records += _parts(graph_module, node.args[1])
    # Until there is no more: what takes a product may be rewritten after it.
    while more := _rewritten(graph_module, is_frozen):
        records += more
    graph.lint()
    graph_module.recompile()
    return records


def _rewritten(graph_module: GraphModule, is_frozen: bool) -> list[SavedLess]:
    """Goes over the graph once; returns a record of each node that is rewritten."""
    graph = graph_module.graph
    records: list[SavedLess] = []
    for node in list(graph.nodes):
        found = _of_module(node, graph_module) if node.op == "call_module" else _of_function(node)
        if found is None:
            continue
        target, record, first, input = found
        if is_saved_anyway(record) and not (is_frozen or input.target in _RECOMPUTED):
            continue
        with graph.inserting_before(node):
            first = graph.create_node("get_attr", first) if isinstance(first, str) else first
        # The same node, so that names stay.
        node.op, node.target, node.args, node.kwargs = "call_function", target, (first, input), {}
        records += [record, *_parts(graph_module, first)]
    return records


def save_as_written(graph_module: GraphModule) -> None:
    """Calls the activations that are part of fused batch norms as they are written, in place.

    Args:
        graph_module: A graph whose pairs are rewritten. Modules, parameters and buffers are not touched.
    """
    for node in graph_module.graph.find_nodes(op="call_function", target=conv_batch_norm):
        if _parts(graph_module, node.args[1]):
            node.target = conv_batch_norm_as_written
    graph_module.recompile()


#: What is computed again for whoever is to save it.
_RECOMPUTED: Final = (activation, batch_norm_that_stays, product)


def _parts(root: nn.Module, norm: Any) -> list[SavedLess]:
    """The records of the activations that are part of a batch norm."""
    if not (isinstance(norm, Node) and norm.op == "get_attr"):
        return []
    module = operator.attrgetter(str(norm.target))(root)
    return parts_that_save_less(str(norm.target), module) if isinstance(module, nn.Module) else []


def _tensors_of(root: nn.Module, pair: Node) -> Iterator[Tensor]:
    """The tensors that a fused call reads besides its input."""
    for operand in pair.all_input_nodes:
        if operand.op == "get_attr":
            value = operator.attrgetter(str(operand.target))(root)
            yield from value.parameters() if isinstance(value, nn.Module) else (value,)


def _of_module(node: Node, root: nn.Module) -> _Found | None:
    inputs = [*node.args, *node.kwargs.values()]
    name, module = str(node.target), root.get_submodule(str(node.target))
    if len(inputs) != 1 or not isinstance(inputs[0], Node) or not node.kwargs.keys() <= {"input", "x"}:
        return None
    record = what_is_saved(name, module)
    if record is None or kinds.is_gated(module):
        return None
    target: Any = activation if kinds.activation_kind(module) is not None else batch_norm_that_stays
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
    factors = [arg for arg in node.args if isinstance(arg, Node)]
    if len(factors) != 2 or node.kwargs or not any(user.target in _TAKING for user in node.users):
        return None
    left, right = factors
    return product, SavedLess(node.name, "product", PRODUCT), left, right


_TAKING: Final = (conv_batch_norm, activation, batch_norm_that_stays)
