"""Drawings of a model's graph before the pass and after it, for those who have pydot."""

from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.fx.passes.graph_drawer import FxGraphDrawer

from convbn_fx.api import transform
from convbn_fx.cli import Unusable
from convbn_fx.fx.tracing import symbolic_trace

#: The first is text, and needs no Graphviz.
GRAPH_FORMATS: Final = (".dot", ".png", ".svg", ".pdf")


def draw(model: nn.Module, path: Path) -> tuple[Path, Path]:
    """Draws the graph of a model as it is traced, and as [`transform`][convbn_fx.transform] rewrites it.

    Args:
        model: The model, batch norms in Eval mode; it is not run.
        path: Where to: `graph.svg` gives `graph-before.svg` and `graph-after.svg`, the two files that are returned.

    Raises:
        Unusable: pydot is not installed, or Graphviz, which lays out all but `.dot` files, is not.
        Exception: What [`symbolic_trace`][convbn_fx.symbolic_trace] raises.
    """
    before = symbolic_trace(model)
    return _drawn(before, path, "before"), _drawn(transform(before), path, "after")


def _drawn(graph_module: Any, path: Path, which: str) -> Path:
    try:
        drawer = FxGraphDrawer(graph_module, which, ignore_parameters_and_buffers=True)
    except RuntimeError as error:  # what stands in its place without pydot
        raise Unusable("draw: a graph is drawn by pydot: pip install pydot") from error
    drawing: Any = drawer.get_dot_graph()
    file = path.with_stem(f"{path.stem}-{which}")
    suffix = path.suffix.lower()
    try:
        drawing.write(str(file), format="raw" if suffix == ".dot" else suffix[1:])
    except FileNotFoundError as error:
        if file.parent.is_dir():  # then it is `dot` that is not found
            raise Unusable(f"draw: {suffix[1:]} needs Graphviz's dot; install it, or write .dot") from error
        raise
    return file
