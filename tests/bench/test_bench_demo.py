"""`make demo`, the first thing that a newcomer runs."""

import json

import pytest

from bench import demo


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", pytest.param("efficientnet_b0", marks=pytest.mark.slow), "unet"]
)
def test_nothing_differs(name, tmp_path, capsys):
    """Of plain pairs, of batch norms with an activation of their own, of transposed convolutions."""
    file = tmp_path / "demo.json"
    assert demo.main(["--smoke", "--only", name, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text(encoding="utf-8"))["models"]
    assert row["failures"] == []
    assert row["fused"] > 0
    assert row["left"] == {}
    assert 0 < row["gradient_error"] < 1e-10
    assert row["saved_bytes"]["Tune"] < row["saved_bytes"]["Eval"]
    assert set(row["step_seconds"]) == {"Eval", "Tune", "Deploy"}
    assert name in capsys.readouterr().out


def test_what_differs_is_told(monkeypatch, capsys):
    monkeypatch.setattr("bench.harness.measure.TOLERANCE", 0.0)
    assert demo.main(["--smoke", "--only", "mobilenet_v2"]) == 1
    assert "FAILED mobilenet_v2: Tune" in capsys.readouterr().out
