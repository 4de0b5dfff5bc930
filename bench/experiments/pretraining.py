"""Train and Tune mode in alternation, in the last part of training from scratch (the paper's figure 6).

A model learns in Train mode for some epochs. Then it goes on twice, in turns and on the same batches: in Train mode to
the end, and with every other epoch in Tune mode, which freezes the statistics and saves less. The last epoch is one of
Train mode, so that the statistics are those of the last weights.
"""

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from matplotlib.figure import Figure
from torch import nn

import convbn_fx
from bench.harness.contenders import TRAIN, TUNE
from bench.harness.markdown import megabytes, spread, table
from bench.harness.results import Options, Result
from bench.harness.steps import count
from bench.harness.timing import Ratio, ratio
from bench.harness.transfer import (
    BYTES,
    TIMES,
    Data,
    Recipe,
    Training,
    batches,
    digits,
    drawn,
    evaluate,
    mean,
    settings_of,
    small_resnet,
    smoke_of,
    take_turns,
)

ALL_TRAIN: Final = "all Train"
ALTERNATING: Final = "alternating"

RECIPE: Final = Recipe(epochs=8, batch=32, rate=0.05)

#: The modes of the epochs, by schedule; the schedules are one until they differ.
SCHEDULES: Final[dict[str, list[str]]] = {
    ALL_TRAIN: 8 * [TRAIN],
    ALTERNATING: 4 * [TRAIN] + 2 * [TUNE, TRAIN],
}
SMOKE: Final[dict[str, list[str]]] = {ALL_TRAIN: 3 * [TRAIN], ALTERNATING: [TRAIN, TUNE, TRAIN]}


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Trains from scratch.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    schedules = SMOKE if options.smoke else SCHEDULES
    data = digits(range(10), smoke=options.smoke)
    recipe = smoke_of(RECIPE, steps=3 * len(SMOKE[ALL_TRAIN])) if options.smoke else RECIPE
    seeds = min(options.seeds, 2) if options.smoke else options.seeds
    models = [small_resnet(data.classes, seed, smoke=options.smoke) for seed in range(seeds)]
    rows = [
        row
        for seed, (model, _) in enumerate(models)
        for row in _rows(model, data, recipe, schedules, seed, options.device)
    ]
    settings = settings_of(data, recipe) | {
        "model": models[0][1],
        "seeds": seeds,
        "common_epochs": schedules[ALTERNATING].index(TUNE),
        "steps_per_epoch": recipe.length(data) // len(schedules[ALL_TRAIN]),
    }
    notes = [
        f"{settings['model']} from scratch on {data.name}: {settings['steps']} steps of {settings['batch']} images.",
        f"Of {len(schedules[ALL_TRAIN])} epochs the first {settings['common_epochs']} are common and done once.",
        "A seed draws the weights and the order of the images; the test images are always the same.",
        BYTES,
        f"{TIMES} Each epoch's first step warms up and is left out.",
    ]
    return settings, rows, notes


def _rows(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    schedules: Mapping[str, Sequence[str]],
    seed: int,
    device: str,
) -> Iterator[dict[str, Any]]:
    length = recipe.length(data)
    per_epoch = length // len(schedules[ALL_TRAIN])
    common = schedules[ALTERNATING].index(TUNE)
    stream = batches(data, recipe, seed)
    saved = _saved(model, (recipe.batch_of(data), 3, data.size, data.size))

    plain = Training(model.to(device).train(), recipe, length)
    take_turns([plain], islice(stream, common * per_epoch))
    tuned = plain.branch(convbn_fx.tune(copy.deepcopy(model), include_training=True))
    for mode in schedules[ALTERNATING][common:]:
        convbn_fx.batchnorm_mode(tuned.model, train=mode == TRAIN)
        take_turns([plain, tuned], islice(stream, per_epoch))

    for schedule, training in ((ALL_TRAIN, plain), (ALTERNATING, tuned)):
        accuracy, loss = evaluate(training.model, data)
        yield {
            "schedule": schedule,
            "seed": seed,
            "accuracy": accuracy,
            "test_loss": loss,
            "losses": training.losses,
            "seconds": training.seconds,
            "epochs": schedules[schedule],
            "bytes": saved,
        }


def _saved(model: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """What a step of each kind saves for its backward pass, in bytes."""
    tuned = convbn_fx.tune(model.train(), include_training=True)
    saved = {}
    for mode in (TRAIN, TUNE):
        convbn_fx.batchnorm_mode(tuned, train=mode == TRAIN)
        saved[mode] = count(tuned, shape)
    return saved


def tables(result: Result) -> Iterator[str]:
    """What comes out of the two schedules; then the two kinds of steps.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    plain, alternating = (_of(result, schedule) for schedule in (ALL_TRAIN, ALTERNATING))
    yield table(
        (
            "schedule",
            "accuracy, %",
            f"minus {ALL_TRAIN}'s",
            "test loss",
            "last epoch's loss",
            "its last part's time / all Train's",
        ),
        (
            (
                schedule,
                mean([100 * row["accuracy"] for row in rows], 2),
                mean([100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(rows, plain, strict=True)], 2),
                mean([row["test_loss"] for row in rows], 4),
                mean([_last_loss(row) for row in rows], 4),
                mean([_late(result, a) / _late(result, b) for a, b in zip(rows, plain, strict=True)], 3),
            )
            for schedule, rows in ((ALL_TRAIN, plain), (ALTERNATING, alternating))
        ),
    )
    saved = result.rows[0]["bytes"]
    yield table(
        ("step of the tuned model", "MB saved", "MB / Train's", f"time / {ALL_TRAIN}'s"),
        (
            (mode, megabytes(saved[mode]), f"{saved[mode] / saved[TRAIN]:.3f}", spread(_ratio(result, mode)))
            for mode in (TRAIN, TUNE)
        ),
    )


def _of(result: Result, schedule: str) -> list[Any]:
    return [row for row in result.rows if row["schedule"] == schedule]


def _epochs(row: Mapping[str, Any], key: str) -> list[list[Any]]:
    """The samples of its steps, an epoch a list."""
    length = len(row[key]) // len(row["epochs"])
    return [row[key][start : start + length] for start in range(0, len(row[key]), length)]


def _last_loss(row: Mapping[str, Any]) -> float | None:
    """The last epoch's mean loss; None if one of them is not finite."""
    losses = _epochs(row, "losses")[-1]
    return None if None in losses else statistics.mean(losses)


def _late(result: Result, row: Mapping[str, Any]) -> float:
    """Seconds of the part in which the schedules differ."""
    return sum(map(sum, _epochs(row, "seconds")[result.settings["common_epochs"] :]))


def _ratio(result: Result, mode: str) -> Ratio:
    """Times of the tuned model's steps in a mode, against those of the other model in the same rounds."""
    tuned: list[float] = []
    plain: list[float] = []
    for row, other in zip(_of(result, ALTERNATING), _of(result, ALL_TRAIN), strict=True):
        epochs = zip(row["epochs"], _epochs(row, "seconds"), _epochs(other, "seconds"), strict=True)
        for its_mode, ours, theirs in islice(epochs, result.settings["common_epochs"], None):
            if its_mode == mode:
                tuned += ours[1:]
                plain += theirs[1:]
    return ratio(tuned, plain)


def plot(result: Result) -> Figure:
    """The losses of both schedules, and what a step of each kind costs.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, costs = figure.subplots(1, 2, width_ratios=(2, 1))
    for schedule, color in ((ALL_TRAIN, "C0"), (ALTERNATING, "C1")):
        for place, row in enumerate(_of(result, schedule)):
            losses = [None if None in epoch else statistics.mean(epoch) for epoch in _epochs(row, "losses")]
            curves.plot(
                range(1, len(losses) + 1),
                drawn(losses),
                color=color,
                alpha=0.7,
                marker=".",
                label=schedule if place == 0 else None,
            )
    epochs = _of(result, ALTERNATING)[0]["epochs"]
    for epoch, mode in enumerate(epochs, start=1):
        if mode == TUNE:
            first = epochs.index(TUNE) + 1 == epoch
            label = "epoch in Tune mode" if first else None
            curves.axvspan(epoch - 0.5, epoch + 0.5, color="C1", alpha=0.15, linewidth=0, label=label)
    curves.set(xlabel="epoch", ylabel="its mean loss, a line a seed", yscale="log")
    curves.legend()

    saved, taken = result.rows[0]["bytes"], _ratio(result, TUNE)
    heights = [saved[TUNE] / saved[TRAIN], taken.median]
    quartiles = [[0, taken.median - taken.lower], [0, taken.upper - taken.median]]
    costs.bar(["memory", "time"], heights, yerr=quartiles, color="C1", capsize=4)
    costs.axhline(1, color="C0")
    costs.set(ylabel="Tune's step / Train's", ylim=(0, None))
    return figure
