"""The benchmark of coefficients: those of a model and of its checkpoint are the same, and what they are by hand."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench.experiments import coefficients
from bench.harness import results
from bench.harness.results import Options, Result
from bench.harness.transfer import small_resnet
from convbn_fx.testing import randomize_batchnorms


@pytest.fixture
def model():
    return nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.Conv2d(3, 4, 1), "c": nn.BatchNorm1d(3)})


@pytest.fixture
def tensors(model):
    model["a"].weight.data = torch.tensor([2.0, -3.0, 0.0, 0.5])
    model["a"].running_var.data = torch.tensor([4.0, 0.0001, 1.0, 100.0]) - 1e-5
    model["a"].running_var.data[1] = 0.0001 - 1e-5
    return model.state_dict()


def of(path, **options):
    settings, rows, notes = coefficients.run(Options(checkpoint=path, **options))
    return Result("coefficients", "", {}, settings, rows, notes)


@pytest.fixture
def result(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.pt")
    return of(tmp_path / "model.pt")


def test_rows(result, tmp_path):
    first, second = result.rows
    assert [first["batch_norm"], second["batch_norm"]] == ["a", "c"]
    assert first["values"] == pytest.approx([1.0, -300.0, 0.0, 0.05], rel=1e-3)
    assert first["median"] == pytest.approx(0.525, rel=1e-3)
    assert first["lower"] == pytest.approx(0.0375, rel=1e-3)
    assert {
        name: first[name] for name in ("channels", "below", "above", "negative", "zero", "not_finite")
    } == {
        "channels": 4,
        "below": 2,
        "above": 1,
        "negative": 1,
        "zero": 1,
        "not_finite": 0,
    }
    assert second["values"] == pytest.approx(3 * [1 / math.sqrt(1 + 1e-5)], rel=1e-12)
    result.write(tmp_path / "result.json")
    assert results.read(tmp_path / "result.json").rows == results.to_six_digits(result.rows)


def test_every_way_to_keep_a_checkpoint(result, tensors, tmp_path):
    torch.save({"epoch": 3, "args": {"rate": 0.1}, "state_dict": tensors}, tmp_path / "nested.pth")
    assert of(tmp_path / "nested.pth").rows == result.rows
    save_file(tensors, tmp_path / "model.safetensors")
    by_name = {row["batch_norm"]: row for row in of(tmp_path / "model.safetensors").rows}
    assert by_name == {row["batch_norm"]: row for row in result.rows}


def test_a_batch_norm_alone(tmp_path):
    torch.save(nn.BatchNorm2d(1).state_dict(), tmp_path / "norm.pt")
    (row,) = of(tmp_path / "norm.pt").rows
    assert (row["batch_norm"], row["channels"]) == ("", 1)
    assert row["lower"] == row["median"] == row["upper"]


def test_eps_is_the_one_told(result, tmp_path):
    larger = of(tmp_path / "model.pt", eps=1.0)
    assert larger.rows[1]["values"] == pytest.approx(3 * [1 / math.sqrt(2)], rel=1e-12)
    assert any("taken to be 1 " in note for note in larger.notes)
    assert any("taken to be 1e-05 " in note for note in result.notes)


def test_what_is_not_finite_is_counted(tensors, tmp_path):
    tensors["c.weight"][0] = math.nan
    torch.save(tensors, tmp_path / "model.pt")
    result = of(tmp_path / "model.pt")
    assert result.rows[1]["values"][0] is None
    assert result.rows[1]["not_finite"] == 1
    result.write(tmp_path / "result.json")
    (table,) = coefficients.tables(result)
    assert table.splitlines()[-1].startswith("| all | 7 |")
    assert table.splitlines()[-1].endswith("| 1 | 1 | 1 |")
    coefficients.plot(result)


def test_a_checkpoint_without_batch_norms(tmp_path):
    torch.save({"weight": torch.ones(3), "other": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="has no running_var"):
        of(tmp_path / "model.pt")


def test_those_of_a_trained_model_are_those_of_its_checkpoint(monkeypatch, tmp_path):
    model = randomize_batchnorms(small_resnet(5, seed=0, smoke=True)[0])
    monkeypatch.setattr(coefficients, "pretrained", lambda device, smoke: (model, "a model", 0.5))
    _, rows, _ = coefficients.run(Options(smoke=True))
    assert len(rows) == 12
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert of(tmp_path / "model.pt").rows == rows


def test_a_model_is_trained_where_there_is_no_checkpoint():
    settings, rows, notes = coefficients.run(Options(smoke=True))
    result = Result("coefficients", "", {}, settings, rows, notes)
    values = {value for row in rows for value in row["values"]}
    assert len(values) > 1000  # statistics of its own in every channel
    (table,) = coefficients.tables(result)
    names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert names == [f"| {row['batch_norm']}" for row in rows] + ["| all"]
    (axes,) = coefficients.plot(result).axes
    drawn = sum(patch.get_height() for patch in axes.patches)
    assert drawn >= sum(row["channels"] - row["zero"] for row in rows)
