"""The benchmark of pre-training, at toy size: schedules differ where they say; Tune mode tracks no statistics."""

import pytest
import torch

import convbn_fx
from bench.experiments import pretraining
from bench.experiments.pretraining import ALL_TRAIN, ALTERNATING
from bench.harness import results
from bench.harness.contenders import TRAIN, TUNE
from bench.harness.results import Options, Result
from bench.harness.transfer import small_resnet


def statistics(training):
    return {name: buffer.clone() for name, buffer in training.model.named_buffers() if "running" in name}


@pytest.fixture(scope="module")
def observed():
    """The result, and for each turn whether each model's statistics moved."""
    moved = []

    def take_turns(trainings, stream):
        before = [statistics(training) for training in trainings]
        original(trainings, stream)
        moved.append(
            [
                {not torch.equal(buffer, old[name]) for name, buffer in statistics(training).items()}
                for training, old in zip(trainings, before, strict=True)
            ]
        )

    original = pretraining.take_turns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "take_turns", take_turns)
        settings, rows, notes = pretraining.run(Options(smoke=True, seeds=1))
    return Result("pretraining", "", {}, settings, rows, notes), moved


@pytest.fixture
def result(observed):
    return observed[0]


def test_rows(result, tmp_path):
    assert len({tuple(row) for row in result.rows}) == 1
    plain, alternating = result.rows
    assert (plain["schedule"], alternating["schedule"]) == (ALL_TRAIN, ALTERNATING)
    assert (plain["epochs"], alternating["epochs"]) == ([TRAIN, TRAIN, TRAIN], [TRAIN, TUNE, TRAIN])
    for row in result.rows:
        assert len(row["losses"]) == len(row["seconds"]) == result.settings["steps"] == 9
        assert 0 <= row["accuracy"] <= 1
    result.write(tmp_path / "result.json")
    assert results.read(tmp_path / "result.json").rows == results.to_six_digits(result.rows)


def test_schedules_differ_from_the_first_step_in_tune_mode_on(result):
    plain, alternating = (row["losses"] for row in result.rows)
    assert result.settings["steps_per_epoch"] == 3
    assert plain[:3] == alternating[:3]
    assert plain[3] != pytest.approx(alternating[3], rel=1e-3)


def test_statistics_move_in_train_mode_alone(observed):
    _, moved = observed
    assert moved == [[{True}], [{True}, {False}], [{True}, {True}]]


def test_tune_mode_saves_less(result):
    for row in result.rows:
        assert row["bytes"][TUNE] < row["bytes"][TRAIN]


def test_a_tuned_model_has_its_parameters_in_the_order_of_the_optimizers_state():
    model, _ = small_resnet(10, seed=0, smoke=True)
    tuned = convbn_fx.tune(model.train(), include_training=True)
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_schedules_have_one_length():
    for schedules in (pretraining.SCHEDULES, pretraining.SMOKE):
        assert len({len(epochs) for epochs in schedules.values()}) == 1
        assert set(schedules[ALL_TRAIN]) == {TRAIN}
        assert schedules[ALTERNATING][-1] == TRAIN
    assert len(pretraining.SCHEDULES[ALL_TRAIN]) == pretraining.RECIPE.epochs


def test_tables(result):
    schedules, steps = pretraining.tables(result)
    assert [line.split(" | ")[0] for line in schedules.splitlines()[2:]] == [
        f"| {ALL_TRAIN}",
        f"| {ALTERNATING}",
    ]
    assert schedules.splitlines()[2].endswith("| 1.000 |")
    assert [line.split(" | ")[0] for line in steps.splitlines()[2:]] == [f"| {TRAIN}", f"| {TUNE}"]


def test_times_are_compared_within_epochs_of_one_mode(result):
    """Made up: an epoch's first step takes very long; the tuned model's take 3 s in Train mode and 1 s in Tune mode."""
    rows = [dict(row) for row in result.rows]
    rows[0]["seconds"] = 3 * [100.0, 2.0, 2.0]
    rows[1]["seconds"] = [100.0, 2.0, 2.0, 900.0, 1.0, 1.0, 900.0, 3.0, 3.0]
    made_up = Result("pretraining", "", {}, result.settings, rows)
    schedules, steps = pretraining.tables(made_up)
    assert schedules.splitlines()[3].endswith(f"| {1808 / 208:.3f} |")
    assert steps.splitlines()[2].endswith("| 1.50 (1.50-1.50) |")
    assert steps.splitlines()[3].endswith("| 0.50 (0.50-0.50) |")


def test_plot(result):
    curves, costs = pretraining.plot(result).axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        ALL_TRAIN,
        ALTERNATING,
        "epoch in Tune mode",
    ]
    assert [len(line.get_xdata()) for line in curves.lines] == [3, 3]
    assert costs.get_ylim()[0] == 0
