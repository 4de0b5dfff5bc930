"""Transfer learning in the four modes (the paper's tables 3 and 7, figure 2b): accuracy, memory, time, loss curves.

All modes begin with the same pre-trained weights and see the same batches in the same order; they train in turns, step
by step, so that whatever else the machine does meets all of them. That Deploy's steps are not Eval's is what is shown
here; that training by them is unstable where coefficients are small is the paper's finding, and these models have
hardly any small ones.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn

import convbn_fx
from bench.harness.better import Case
from bench.harness.contenders import DEPLOY, EAGER, EVAL, TRAIN, TUNE
from bench.harness.markdown import error, megabytes, spread, table
from bench.harness.results import Options, Result
from bench.harness.steps import count
from bench.harness.timing import ratio
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
    image_folder,
    mean,
    pretrained,
    settings_of,
    smoke_of,
    take_turns,
    without_first,
)

MODES: Final = (TRAIN, EVAL, TUNE, DEPLOY)

#: Those whose losses are the same in exact arithmetic, and the one that begins with the same.
COMPARED: Final = (EVAL, TUNE, DEPLOY)

FINE_TUNING: Final = Recipe(epochs=5, batch=32, rate=0.01)
OF_A_FOLDER: Final = Recipe(epochs=20, batch=32, rate=0.01)

#: Steps in float64.
STEPS: Final = 30
STEPS_OF_SMOKE: Final = 2

#: What is equal to the last bit is drawn there: a logarithmic axis has no zero.
LAST_BIT: Final = 2.0**-53

#: After which of them the table tells how far the losses are apart.
TOLD: Final = (1, 2, 3, 5, 10, 20, 30)


def run(
    options: Options, *, weights: str | None = "DEFAULT"
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Fine-tunes.

    Args:
        options: The command line's.
        weights: torchvision's for the model that learns an image folder; None for random ones.

    Returns:
        Settings, rows and notes.
    """
    settings: dict[str, Any]
    if options.image_folder is None:
        data, recipe = digits(range(5, 10), smoke=options.smoke), FINE_TUNING
        model, name, accuracy = pretrained(options.device, smoke=options.smoke)
        settings = {"model": name, "pretrained_accuracy": accuracy}
    else:
        data = image_folder(options.image_folder, 32 if options.smoke else 224, options.device)
        recipe = OF_A_FOLDER
        architecture = "resnet18" if options.smoke else "resnet50"
        model = torchvision.models.get_model(architecture, weights=weights)
        settings = {"model": f"torchvision's {architecture}, weights {weights}", "pretrained_accuracy": None}
    recipe = smoke_of(recipe) if options.smoke else recipe
    seeds = min(options.seeds, 2) if options.smoke else options.seeds
    rows = [row for seed in range(seeds) for row in _rows(model, data, recipe, seed, options.device)]
    steps = min(STEPS_OF_SMOKE if options.smoke else STEPS, recipe.length(data))
    rows += _curves(model, data, recipe, steps, options.device)
    settings |= settings_of(data, recipe) | {"seeds": seeds, "steps_in_float64": steps}
    notes = [
        f"{settings['model']}, fine-tuned on {data.name}: {settings['steps']} steps of {settings['batch']} images.",
        "A seed draws the new last layer and the order of the images; weights and test images are always the same.",
        BYTES,
        f"{TIMES} Each training's first step warms up and is left out.",
        "Deploy trains the weights and biases of the baked convolutions, by the same recipe.",
    ]
    return settings, rows, notes


def _rows(model: nn.Module, data: Data, recipe: Recipe, seed: int, device: str) -> Iterator[dict[str, Any]]:
    """Trains in float32, to the end."""
    trainings = _started(model, data, recipe, seed, MODES, torch.float32, device, recipe.length(data))
    shape = (recipe.batch_of(data), 3, data.size, data.size)
    saved = {mode: count(copy.deepcopy(training.model).cpu(), shape) for mode, training in trainings.items()}
    take_turns(list(trainings.values()), batches(data, recipe, seed))
    for mode, training in trainings.items():
        accuracy, _ = evaluate(training.model, data)
        yield _row(mode, seed, "float32", training) | {"accuracy": accuracy, "bytes": saved[mode]}


def _curves(
    model: nn.Module, data: Data, recipe: Recipe, length: int, device: str
) -> Iterator[dict[str, Any]]:
    """Trains in float64, as long as the losses are compared."""
    trainings = _started(model, data, recipe, 0, COMPARED, torch.float64, device, length)
    take_turns(list(trainings.values()), islice(batches(data, recipe, 0), length))
    for mode, training in trainings.items():
        yield _row(mode, 0, "float64", training) | {"accuracy": None, "bytes": None}


def _started(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    modes: Sequence[str],
    dtype: torch.dtype,
    device: str,
    length: int,
) -> dict[str, Training]:
    """A copy of the model in each mode, with one new last layer, and whatever else is drawn while it trains."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model.fc = nn.Linear(model.fc.in_features, data.classes)  # type: ignore[arg-type, union-attr]
    convbn_fx.batchnorm_mode(model.to(device, dtype).train(), train=False)
    return {mode: Training(EAGER[mode](copy.deepcopy(model)), recipe, length) for mode in modes}


def _row(mode: str, seed: int, dtype: str, training: Training) -> dict[str, Any]:
    return {
        "mode": mode,
        "seed": seed,
        "dtype": dtype,
        "losses": training.losses,
        "seconds": training.seconds,
    }


def tables(result: Result) -> Iterator[str]:
    """Accuracy, memory and time; then how far the losses are from Eval's.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    rows = {mode: [row for row in _of(result, "float32") if row["mode"] == mode] for mode in MODES}
    yield table(
        ("mode", "accuracy, %", "minus Eval's", "last loss", "MB saved", "MB / Eval's", "time / Eval's"),
        (
            (
                mode,
                mean([100 * row["accuracy"] for row in rows[mode]], 2),
                mean(_gains(rows[mode], rows[EVAL]), 2),
                mean([row["losses"][-1] for row in rows[mode]], 4),
                megabytes(rows[mode][0]["bytes"]),
                f"{rows[mode][0]['bytes'] / rows[EVAL][0]['bytes']:.3f}",
                spread(ratio(without_first(rows[mode]), without_first(rows[EVAL]))),
            )
            for mode in MODES
        ),
    )
    away = {row["mode"]: _away(result, row["mode"]) for row in _of(result, "float64") if row["mode"] != EVAL}
    length = len(next(iter(away.values())))
    told = [step for step in TOLD if step <= length]
    yield table(
        ("loss in float64, relative to Eval's", "at most", *(f"step {step}" for step in told)),
        (
            (mode, error(_largest(values)), *(error(values[step - 1]) for step in told))
            for mode, values in away.items()
        ),
    )


def cases(result: Result) -> Iterator[Case]:
    """The comparison in which another mode may be better.

    Args:
        result: The benchmark's.

    Yields:
        It.
    """
    rows = {mode: [row for row in _of(result, "float32") if row["mode"] == mode] for mode in MODES}
    counts = {mode: of_mode[0]["bytes"] for mode, of_mode in rows.items()}
    yield Case("a step", counts, {mode: without_first(of_mode) for mode, of_mode in rows.items()})


def _of(result: Result, dtype: str) -> list[Any]:
    return [row for row in result.rows if row["dtype"] == dtype]


def _gains(rows: Sequence[Any], others: Sequence[Any]) -> list[float]:
    """Points of accuracy above the others, seed by seed."""
    return [100 * (row["accuracy"] - other["accuracy"]) for row, other in zip(rows, others, strict=True)]


def _away(result: Result, mode: str) -> list[float | None]:
    """How far a mode's losses in float64 are from Eval's, relative to these, step by step."""
    losses = {row["mode"]: row["losses"] for row in _of(result, "float64")}
    return [
        None if None in (loss, reference) else abs(loss - reference) / abs(reference)
        for loss, reference in zip(losses[mode], losses[EVAL], strict=True)
    ]


def _largest(values: Sequence[float | None]) -> float | None:
    """None if one of them is not finite."""
    finite = [value for value in values if value is not None]
    return max(finite) if len(finite) == len(values) else None


def plot(result: Result) -> Figure:
    """The losses in float64, and how far Tune's and Deploy's are from Eval's.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    styles: dict[str, dict[str, Any]] = {
        EVAL: {"linewidth": 4, "alpha": 0.4},
        TUNE: {"linestyle": "--"},
        DEPLOY: {},
    }
    for place, row in enumerate(_of(result, "float64")):
        mode, steps = row["mode"], range(1, len(row["losses"]) + 1)
        color = f"C{place}"
        curves.plot(steps, drawn(row["losses"]), label=mode, color=color, **styles[mode])
        if mode != EVAL:
            away = [None if value is None else max(value, LAST_BIT) for value in _away(result, mode)]
            differences.plot(steps, drawn(away), marker=".", label=mode, color=color)
    curves.set(xlabel="step", ylabel="loss, in float64", yscale="log")
    differences.set(xlabel="step", ylabel="difference from Eval's loss, relative", yscale="log")
    curves.legend()
    differences.legend()
    return figure
