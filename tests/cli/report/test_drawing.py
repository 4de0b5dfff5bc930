"""Drawings of a graph before and after the pass."""

import shutil

import pytest
from torch import nn

from convbn_fx import TracingError
from convbn_fx.cli import Unusable
from convbn_fx.cli.report import drawing
from convbn_fx.cli.report.drawing import draw


def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def test_before_and_after(tmp_path):
    model = block()
    before, after = draw(model, tmp_path / "graph.dot")
    assert (before.name, after.name) == ("graph-before.dot", "graph-after.dot")
    assert "BatchNorm2d" in before.read_text()
    assert "conv_batch_norm" not in before.read_text()
    assert "conv_batch_norm" in after.read_text()
    assert "BatchNorm2d" not in after.read_text()
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_pictures(tmp_path, suffix, begins):
    for file in draw(block(), tmp_path / f"graph{suffix}"):
        assert file.read_bytes().startswith(begins)


def test_without_graphviz_text_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unusable, match=r"install it, or write \.dot"):
        draw(block(), tmp_path / "graph.svg")
    draw(block(), tmp_path / "graph.dot")


def test_without_pydot(tmp_path, monkeypatch):
    class Absent:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("FXGraphDrawer requires the pydot package")

    monkeypatch.setattr(drawing, "FxGraphDrawer", Absent)
    with pytest.raises(Unusable, match="pip install pydot"):
        draw(block(), tmp_path / "graph.dot")


def test_a_folder_that_is_not_there_is_no_missing_program(tmp_path):
    with pytest.raises(FileNotFoundError):
        draw(block(), tmp_path / "absent" / "graph.dot")


def test_what_cannot_be_traced_cannot_be_drawn(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TracingError):
        draw(Branching(), tmp_path / "graph.dot")
