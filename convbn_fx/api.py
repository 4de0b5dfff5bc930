"""The pipeline, phase by phase: what users call."""

from typing import Final

import torch
from torch import nn

from convbn_fx.graph_module import GraphModule
from convbn_fx.matching import find_pairs
from convbn_fx.records import Report
from convbn_fx.rewriting import copied, rewrite

_META_KEY: Final = "convbn_fx"


def transform(graph_module: torch.fx.GraphModule, *, include_training: bool = False) -> GraphModule:
    """Fuses every convolution and Eval-mode batch norm of a graph into one convolution (Tune mode).

    Outputs and all gradients stay the same (arXiv 2305.11624, section 3); the feature map between convolution and
    batch norm is no longer saved for the backward pass. Pairs follow their batch norm's mode from then on: switched to
    Train mode, they run convolution and batch norm as before.

    Args:
        graph_module: Any GraphModule: from [`symbolic_trace`][convbn_fx.symbolic_trace] or
            `torch.fx.symbolic_trace`, from `torch.export.export(...).module()`, from `make_fx`, from Dynamo.
            It is left untouched; the result shares its modules, parameters and buffers.
        include_training: Rewrite pairs whose batch norm is in Train mode now as well; they fuse as soon as it is
            switched to Eval mode.

    Returns:
        A new GraphModule with the same `state_dict` keys. [`report`][convbn_fx.report] tells what was fused in it.

    Raises:
        TypeError: `graph_module` is not a `torch.fx.GraphModule`, or its forward is not its graph's.

    Example:
        ```python
        model = torchvision.models.resnet50().eval()
        gm = convbn_fx.transform(torch.fx.symbolic_trace(model))
        print(convbn_fx.report(gm))
        ```
    """
    if not isinstance(graph_module, torch.fx.GraphModule):
        raise TypeError(
            f"transform: expected a torch.fx.GraphModule, got {type(graph_module).__name__}. "
            "Trace the model first: transform(convbn_fx.symbolic_trace(model))"
        )
    if "forward" in vars(graph_module):
        raise TypeError(
            "transform: this GraphModule has a forward of its own as an instance attribute, which is not its graph's. "
            "Remove it, or trace a module that calls it."
        )
    result = copied(graph_module)
    for name, part in _called_graph_modules(result):
        setattr(result, name, transform(part, include_training=include_training))
    fused = list(graph_module.meta.get(_META_KEY, Report()).fused)
    while True:  # the second time round for the skips: they speak of the graph as it is in the end
        matches, skips = find_pairs(result, include_training)
        if not matches:
            break
        rewrite(result, matches)
        fused += [match.pair for match in matches]
    result.meta[_META_KEY] = Report(fused, skips)
    return result


def _called_graph_modules(graph_module: GraphModule) -> list[tuple[str, torch.fx.GraphModule]]:
    """The graphs inside the graph: bodies of higher-order operators, parts that were split off."""
    targets = {node.target for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    return [
        (name, part)
        for name, part in graph_module.named_children()
        if name in targets and isinstance(part, torch.fx.GraphModule)
    ]


def report(model: nn.Module) -> Report:
    """What the pass did to a model and what it left alone, with reasons.

    Args:
        model: The result of [`transform`][convbn_fx.transform], or a model that holds such results as sub-modules,
            whose reports are added up under their qualified names.

    Returns:
        The report; `print` it for a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Nothing in the model was rewritten by this library.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected a torch.nn.Module, got {type(model).__name__}")
    reports = [
        module.meta[_META_KEY].prefixed(name)
        for name, module in model.named_modules()
        if isinstance(module, torch.fx.GraphModule) and _META_KEY in module.meta
    ]
    if not reports:
        raise ValueError(
            f"report: nothing in this {type(model).__name__} was rewritten by convbn_fx. "
            "Pass the model that convbn_fx.transform returned."
        )
    return sum(reports, Report())
