"""What was fused in the graphs that Dynamo captured, noted on the tensors that the graphs read.

A backend is given graphs, not the model: what it did in them is found again by the parameters and buffers of the model
that is asked for.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx import kinds
from convbn_fx.records import Pair, Report, Skip, SkipReason, without_wrappers

#: Attribute of a batch norm's running mean (of its convolution's weight, if the mean is a constant of the graph): the
#: records that are about it, each with the id of the convolution's weight.
_NOTES: Final = "_convbn_fx_notes"


class _NotesOfTensor(OrderedDict[tuple[Pair | Skip, int | None], None]):
    """Stay with the tensor: a copy belongs to another model, and a file is read where this library is not."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OrderedDict, ()


class Notes:
    """The report of one graph, to be left on the tensors that it reads; Dynamo may run a graph for several models.

    Args:
        report: By node names.
        graph_module: The graph as it was captured.
    """

    def __init__(self, report: Report, graph_module: torch.fx.GraphModule) -> None:
        inputs = _inputs_by_node(graph_module)
        records: list[Pair | Skip] = [*report.fused, *report.skipped]
        self._notes = [
            (number, record, weight)
            for record in records
            for weight in [inputs.get(getattr(record, "convolution", ""))]
            if (number := inputs.get(record.batch_norm, weight)) is not None
        ]

    def leave_on(self, inputs: Sequence[Any]) -> None:
        """Notes on each batch norm's tensor among the inputs of a call what was done in the graph."""
        for number, record, weight in self._notes:
            note = (record, None if weight is None else id(inputs[weight]))
            if isinstance(inputs[number], Tensor):
                if type(vars(inputs[number]).get(_NOTES)) is not _NotesOfTensor:
                    vars(inputs[number])[_NOTES] = _NotesOfTensor()
                vars(inputs[number])[_NOTES].setdefault(note)


def compiled_report(model: nn.Module) -> Report | None:
    """What was fused in the graphs that Dynamo captured of a model so far; None where it captured none."""
    classes = {
        cls for module in model.modules() for cls in type(module).__mro__ if cls not in nn.Module.__mro__
    }
    methods = _tensors_in(value for cls in classes for value in vars(cls).values())
    tensors = [("", tensor) for tensor in methods] + [
        (without_wrappers(name), tensor)
        for name, module in model.named_modules()
        for tensor in _tensors_in(vars(module).values())
    ]
    names: dict[int | None, str] = {id(tensor): name for name, tensor in tensors}
    pairs: dict[tuple[str, str], Pair] = {}
    skips: dict[tuple[str, SkipReason], Skip] = {}
    for norm, tensor in tensors:
        for record, weight in vars(tensor).get(_NOTES, ()):
            if weight is not None and weight not in names:
                continue  # of another model that uses this tensor, too
            if isinstance(record, Skip):
                record = replace(record, batch_norm=norm or record.batch_norm)
                skips[record.batch_norm, record.reason] = record
                continue
            convolution = names.get(weight, record.convolution)
            if convolution != norm:  # else they are functions of one module, and their nodes' names say more
                record = replace(
                    record,
                    convolution=convolution or record.convolution,
                    batch_norm=norm or record.batch_norm,
                )
            pairs[record.convolution, record.batch_norm] = record
    fused = {pair.batch_norm for pair in pairs.values()}
    left = [skip for (norm, _), skip in skips.items() if norm not in fused]
    return Report(list(pairs.values()), left) if pairs or skips else None


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among values and in containers, and those of globals and closures that functions among them name."""
    pending = list(values)
    seen = set()
    for value in pending:
        kind = type(value)  # a weak proxy passes for what it refers to
        if issubclass(kind, Tensor):
            yield value
        elif id(value) in seen:
            continue
        elif issubclass(kind, (list, tuple)):
            pending += value
        elif issubclass(kind, dict):
            pending += value.values()
        elif kind is FunctionType and not str(value.__module__).startswith("torch."):
            named = inspect.getclosurevars(value)
            pending += [*named.nonlocals.values(), *named.globals.values()]
        seen.add(id(value))


def _inputs_by_node(graph_module: torch.fx.GraphModule) -> dict[str, int]:
    """For each convolution's and batch norm's node, by name: which input is its weight or running mean."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    numbers: dict[Any, int] = {node: number for number, node in enumerate(placeholders)}
    inputs: dict[str, int | None] = {}
    for node in graph_module.graph.nodes:
        if node.target in kinds.CONVOLUTION_FUNCTIONS:
            _, operands = kinds.CONVOLUTION_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
            inputs[node.name] = numbers.get(operands.weight)
        elif node.target in kinds.BATCH_NORM_FUNCTIONS:
            _, _, operands = kinds.BATCH_NORM_FUNCTIONS[node.target].operands(*node.args, **node.kwargs)
            inputs[node.name] = numbers.get(operands.running_mean, numbers.get(operands.weight))
    return {name: number for name, number in inputs.items() if number is not None}
