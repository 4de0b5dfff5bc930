"""The benchmark of transfer learning, at toy size: what its page claims, and that a user's images go the same way."""

import copy

import pytest
from images import folder_of_images

from bench.experiments import classification
from bench.experiments.classification import MODES
from bench.harness import results
from bench.harness.contenders import DEPLOY, EVAL, TRAIN, TUNE
from bench.harness.results import Options, Result

pytestmark = pytest.mark.slow  # the benchmark runs, at toy size


@pytest.fixture(scope="module")
def result():
    settings, rows, notes = classification.run(Options(smoke=True, seeds=1))
    return Result("classification", "", {}, settings, rows, notes)


def row(result, mode, dtype):
    (found,) = [row for row in result.rows if (row["mode"], row["dtype"]) == (mode, dtype)]
    return found


def test_rows(result, tmp_path):
    assert len({tuple(row) for row in result.rows}) == 1
    assert [row["mode"] for row in result.rows] == [*MODES, EVAL, TUNE, DEPLOY]
    for each in result.rows:
        steps = "steps" if each["dtype"] == "float32" else "steps_in_float64"
        assert len(each["losses"]) == len(each["seconds"]) == result.settings[steps]
        assert each["accuracy"] is None or 0 <= each["accuracy"] <= 1
    result.write(tmp_path / "result.json")
    assert results.read(tmp_path / "result.json").rows == results.to_six_digits(result.rows)


def test_tune_is_eval_and_deploy_is_not(result):
    losses = {mode: row(result, mode, "float64")["losses"] for mode in (EVAL, TUNE, DEPLOY)}
    assert losses[TUNE] == pytest.approx(losses[EVAL], rel=1e-12)
    assert losses[DEPLOY][0] == pytest.approx(losses[EVAL][0], rel=1e-12)
    assert losses[DEPLOY][1] != pytest.approx(losses[EVAL][1], rel=1e-6)


def test_the_modes_are_those_they_are_called(result):
    saved = {mode: row(result, mode, "float32")["bytes"] for mode in MODES}
    assert saved[DEPLOY] <= saved[TUNE] < saved[EVAL] < saved[TRAIN]
    first = {mode: row(result, mode, "float32")["losses"][0] for mode in MODES}
    assert first[TUNE] == pytest.approx(first[EVAL], rel=1e-4)
    assert first[TRAIN] != pytest.approx(first[EVAL], rel=1e-4)


def test_tables(result):
    costs, losses = classification.tables(result)
    assert [line.split(" | ")[0] for line in costs.splitlines()[2:]] == [f"| {mode}" for mode in MODES]
    assert "| Eval | " in costs
    assert costs.splitlines()[3].endswith("| 1.000 | 1.00 (1.00-1.00) |")
    assert [line.split(" | ")[0] for line in losses.splitlines()[2:]] == ["| Tune", "| Deploy"]
    away = abs(row(result, DEPLOY, "float64")["losses"][1] / row(result, EVAL, "float64")["losses"][1] - 1)
    assert losses.splitlines()[3].endswith(f" {away:.1e} |")


def test_a_training_that_diverges_has_a_line_and_a_curve(result):
    result = copy.deepcopy(result)
    row(result, DEPLOY, "float64")["losses"][1] = None
    row(result, DEPLOY, "float32")["losses"][-1] = None
    costs, losses = classification.tables(result)
    assert "| – |" in costs.splitlines()[-1]  # noqa: RUF001 - an en dash is meant
    assert losses.splitlines()[-1].startswith("| Deploy | – |")  # noqa: RUF001 - an en dash is meant
    classification.plot(result)


def test_plot(result):
    curves, differences = classification.plot(result).axes
    assert [line.get_label() for line in curves.lines] == [EVAL, TUNE, DEPLOY]
    assert [line.get_label() for line in differences.lines] == [TUNE, DEPLOY]
    # A logarithmic axis shows every point.
    assert all((line.get_ydata() > 0).all() for line in differences.lines)


def test_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "STEPS_OF_SMOKE", 1)
    folder_of_images(tmp_path / "birds", "abc", 3)
    options = Options(smoke=True, seeds=1, image_folder=tmp_path / "birds")
    settings, rows, notes = classification.run(options, weights=None)
    assert (settings["data"], settings["classes"], settings["batch"]) == ("birds", 3, 7)
    assert [row["mode"] for row in rows] == [*MODES, EVAL, TUNE, DEPLOY]
    result = Result("classification", "", {}, settings, rows, notes)
    losses = {mode: row(result, mode, "float64")["losses"] for mode in (EVAL, TUNE)}
    assert losses[TUNE] == pytest.approx(losses[EVAL], rel=1e-12)
    assert len(list(classification.tables(result))) == 2
