"""What was fused in the graphs that Dynamo captured, kept by the tensors that the graphs read.

A backend is given graphs, not the model: what it did in them is found again by the parameters and buffers of the model
that is asked for.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx import kinds
from convbn_fx.records import Pair, Report, Skip


@dataclass(frozen=True)
class _Compiled:
    """A record of a graph, and the tensors by which its convolution and batch norm are known."""

    record: Pair | Skip
    weight: Callable[[], Tensor | None]
    running_mean: Callable[[], Tensor | None]


_compiled: Final[list[_Compiled]] = []


def remember(report: Report, graph_module: torch.fx.GraphModule, example_inputs: Iterable[Any]) -> None:
    """Keeps the report of one graph.

    Args:
        report: By node names.
        graph_module: The graph as it was captured.
        example_inputs: The tensors that its placeholders stand for.
    """
    tensors = _tensors_by_node(graph_module, example_inputs)
    for pair in report.fused:
        weight, running_mean = (tensors.get(name) for name in (pair.convolution, pair.batch_norm))
        _compiled.append(_Compiled(pair, _reference(weight), _reference(running_mean)))
    for skip in report.skipped:
        _compiled.append(_Compiled(skip, _reference(None), _reference(tensors.get(skip.batch_norm))))


def compiled_report(model: nn.Module) -> Report | None:
    """What was fused in the graphs that Dynamo captured of a model so far; None where it captured none."""
    names = _names_by_tensor(model)
    _compiled[:] = [entry for entry in _compiled if entry.running_mean() is not None]
    pairs: dict[tuple[str, str], Pair] = {}
    skips: dict[str, Skip] = {}
    for entry in _compiled:
        norm, conv = names.get(id(entry.running_mean())), names.get(id(entry.weight()))
        if norm is None:
            continue
        if isinstance(entry.record, Pair):
            pair = replace(entry.record, batch_norm=norm, convolution=conv or entry.record.convolution)
            pairs[pair.convolution, norm] = pair
        else:
            skips[norm] = replace(entry.record, batch_norm=norm)
    fused = {pair.batch_norm for pair in pairs.values()}
    left = [skip for norm, skip in skips.items() if norm not in fused]
    return Report(list(pairs.values()), left) if pairs or skips else None


def _names_by_tensor(model: nn.Module) -> dict[int, str]:
    return {
        id(tensor): name.replace("_orig_mod.", "")
        for name, module in model.named_modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }


def _tensors_by_node(graph_module: torch.fx.GraphModule, example_inputs: Iterable[Any]) -> dict[str, Any]:
    """For each convolution's and batch norm's node, by name: its weight or running mean, where that is an input."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=False))
    tensors = {}
    for node in graph_module.graph.nodes:
        if node.target in kinds.CONVOLUTION_FUNCTIONS:
            _, operands = kinds.CONVOLUTION_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
            tensors[node.name] = inputs.get(operands.weight)
        elif node.target in kinds.BATCH_NORM_FUNCTIONS:
            _, _, operands = kinds.BATCH_NORM_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
            tensors[node.name] = inputs.get(operands.running_mean)
    return tensors


def _reference(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return (lambda: None) if tensor is None else weakref.ref(tensor)
