"""`torch.compile(model, backend="convbn")`: the pass on the graphs that Dynamo captures.

Dynamo calls a backend once for each graph, and again when a guard fails: a batch norm's mode flipped, a shape changed.
What was fused in each is kept by the tensors that it reads, by which [`report`][convbn_fx.report] finds it again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from convbn_fx import _torch
from convbn_fx.api import META_KEY, rewritten
from convbn_fx.fx.notes import Notes


def convbn(
    graph_module: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="convbn")` names.

    Args:
        graph_module: A graph of Dynamo's.
        example_inputs: What it will be called with.
        options: `{"inner": name}` hands the rewritten graph to another backend, such as `"inductor"`; without it the
            graph runs operator by operator.

    Returns:
        What runs in place of the graph.

    Raises:
        ValueError: An option is not known.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        compiled = torch.compile(model, backend="convbn", options={"inner": "aot_eager"})  # or "inductor"
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        assert len(convbn_fx.report(compiled).fused) == 1
        ```
    """
    inner = dict(options or {})
    name = inner.pop("inner", None)
    if inner:
        unknown = ", ".join(map(repr, inner))
        raise ValueError(f"convbn: unknown option {unknown}. The only one is 'inner': a backend's name")
    fused = rewritten(graph_module, activations=False)  # compilers decide what to recompute
    notes = Notes(fused.meta[META_KEY], graph_module)
    notes.leave_on(example_inputs)
    if name is None:
        for node in fused.graph.nodes:
            # Dynamo's reference to the tensor, of which it clears its own graph alone.
            node.meta.pop("grapharg", None)

        def run(*inputs: Any) -> Any:
            notes.leave_on(inputs)
            return fused.forward(*inputs)

        return run
    for placeholder, original in zip(fused.graph.nodes, graph_module.graph.nodes, strict=False):
        if placeholder.op != "placeholder":
            break
        # Dynamo tells AOT Autograd by this attribute what an input is; no copy of a graph keeps it.
        placeholder._dynamo_source = getattr(original, "_dynamo_source", None)
    compiled: Callable[..., Any] = _torch.lookup_backend(name)(fused, example_inputs)
    return compiled
