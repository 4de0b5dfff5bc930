"""The paper's numbers beside those of the experiments that repeat its tables: shares of Eval's, row by row."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

from bench.harness.contenders import DEPLOY, EVAL, INPLACE, TRAIN, TUNE
from bench.harness.markdown import NOTHING, table
from bench.harness.results import Result
from bench.harness.timing import ratio

#: A share so much above the paper's is less good than it.
WORSE: Final = 0.01


class Beside(NamedTuple):
    """A row of the paper's that an experiment has, too; None where one of the two has no number.

    Attributes:
        label: What the row is.
        memory: As a share of Eval's: the paper's, by the peak, and ours, of the bytes saved for the backward pass.
        time: As a share of Eval's: the paper's and ours, the median over rounds.
        accuracy: What is gained over Eval, in points of a hundred: the paper's and ours, the mean over seeds.
    """

    label: str
    memory: tuple[float | None, float | None] = (None, None)
    time: tuple[float | None, float | None] = (None, None)
    accuracy: tuple[float | None, float | None] = (None, None)


def rows(name: str) -> list[dict[str, str]]:
    """A table of the paper's.

    Args:
        name: Of its file, such as `table6`.

    Returns:
        Its rows, by the names of the columns.
    """
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _share(row: Mapping[str, str], one: str, other: str) -> float:
    return float(row[one]) / float(row[other])


def _seconds(row: Mapping[str, Any], one: str, other: str = EVAL) -> float | None:
    seconds = row["seconds"] or {}
    if not (seconds.get(one) and seconds.get(other)):
        return None
    return ratio(seconds[one], seconds[other]).median


def _of_grid(result: Result) -> Iterator[Beside]:
    ours = {(row["batch"], row["size"]): row for row in result.rows if row["model"] == "resnet50"}
    for theirs in rows("table6"):
        row = ours.get((int(theirs["batch"]), int(theirs["side"])))
        if row is None:
            continue
        for mode, name in ((TUNE, "tune"), (DEPLOY, "deploy")):
            yield Beside(
                f"{row['batch']}x{row['size']}, {mode}",
                (_share(theirs, f"{name}_gb", "eval_gb"), row["bytes"][mode] / row["bytes"][EVAL]),
                (_share(theirs, f"{name}_s", "eval_s"), _seconds(row, mode)),
            )


def _of_classification(result: Result) -> Iterator[Beside]:
    ours = {
        mode: [row for row in result.rows if (row["mode"], row["dtype"]) == (mode, "float32")]
        for mode in (TRAIN, EVAL, DEPLOY, TUNE)
    }
    theirs = {(row["dataset"], row["mode"]): row for row in rows("table7")}
    for (dataset, mode), row in theirs.items():
        if mode == EVAL or not (ours[mode] and ours[EVAL]):
            continue
        pairs = list(zip(ours[mode], ours[EVAL], strict=True))
        reference = theirs[dataset, EVAL]
        yield Beside(
            f"{dataset}, {mode}",
            (
                float(row["memory_gb"]) / float(reference["memory_gb"]),
                pairs[0][0]["bytes"] / pairs[0][1]["bytes"],
            ),
            (
                float(row["time_s"]) / float(reference["time_s"]),
                mean(ratio(one["seconds"], other["seconds"]).median for one, other in pairs),
            ),
            (
                float(row["accuracy"]) - float(reference["accuracy"]),
                100 * mean(one["accuracy"] - other["accuracy"] for one, other in pairs),
            ),
        )


#: What stands here for a precision of the paper's.
_PRECISIONS: Final = {"FP32": "float32", "FP16": "bfloat16"}


def _of_detection(result: Result) -> Iterator[Beside]:
    ours = {(row["detector"], row["backbone"], row["precision"]): row for row in result.rows}

    def memory(row: Mapping[str, Any], mode: str) -> float:
        saved = {each: row["backbone_bytes"][each] + row["head_bytes"] for each in (mode, EVAL)}
        return float(saved[mode] / saved[EVAL])

    for theirs in rows("table8"):
        row = ours.get((theirs["detector"], theirs["backbone"], _PRECISIONS[theirs["precision"]]))
        if row is not None:
            yield Beside(
                f"{theirs['detector']}, {theirs['backbone']}, {theirs['batch']} images, {theirs['precision']}",
                (_share(theirs, "tune_gb", "eval_gb"), memory(row, TUNE)),
                (None, _seconds(row, TUNE)),
                (100 * (float(theirs["tune_map"]) - float(theirs["eval_map"])), None),
            )
    row = ours.get(("Faster R-CNN", "ResNet-101", "float32"))
    modes = {each["mode"]: each for each in rows("table9")}
    for mode in (TUNE, DEPLOY) if row is not None else ():
        yield Beside(
            f"the same in table 9: Faster R-CNN, ResNet-101, {mode}",
            (float(modes[mode]["memory_gb"]) / float(modes[EVAL]["memory_gb"]), memory(row or {}, mode)),
            (float(modes[mode]["time_s"]) / float(modes[EVAL]["time_s"]), _seconds(row or {}, mode)),
            (100 * (float(modes[mode]["map"]) - float(modes[EVAL]["map"])), None),
        )


def _of_adversarial(result: Result) -> Iterator[Beside]:
    ours = {row["model"]: row for row in result.rows if row["attack"] == "PGD"}
    for theirs in rows("table10"):
        row = ours.get(theirs["model"].lower())
        if row is not None:
            saved = row["bytes"]["trainable"]
            yield Beside(
                theirs["model"],
                (_share(theirs, "tune_gb", "eval_gb"), saved[TUNE] / saved[EVAL]),
                (_share(theirs, "tune_s", "eval_s"), _seconds(row, TUNE)),
            )


def _of_alternatives(result: Result) -> Iterator[Beside]:
    """Beside Train: table 12 has no Eval."""
    ours = {row["contender"]: row for row in result.rows if row["model"] == "resnet50"}
    batch = str(result.settings["batches"][0])
    theirs = {(row["dataset"], row["method"]): row for row in rows("table12")}
    for method, contender in (("Inplace-ABN", INPLACE), ("Tune", TUNE)):
        row, reference = ours.get(contender), ours.get(TRAIN)
        if row is None or reference is None:
            continue
        saved, seconds = row["bytes"][batch], row["seconds"]
        row_of_paper, baseline = theirs["CUB-200", method], theirs["CUB-200", "baseline"]
        yield Beside(
            f"{contender}, as a share of {TRAIN}'s",
            (
                float(row_of_paper["memory_gb"]) / float(baseline["memory_gb"]),
                None if saved is None else saved / reference["bytes"][batch],
            ),
            (
                float(row_of_paper["time_s"]) / float(baseline["time_s"]),
                None if seconds is None else ratio(seconds, reference["seconds"]).median,
            ),
            (float(row_of_paper["accuracy"]) - float(baseline["accuracy"]), None),
        )


class Table(NamedTuple):
    """Which tables of the paper an experiment repeats, and what to know where it does less well.

    Attributes:
        tables: Their numbers.
        beside: Its rows, of the experiment's result.
        differs: What is not as in the paper, in sentences.
        why: Of `memory`, `time` or `accuracy`, why a share may be less good than the paper's.
    """

    tables: str
    beside: Callable[[Result], Iterator[Beside]]
    differs: str
    why: Mapping[str, str]


_SMALL: Final = (
    "the paper's are those of a V100 at its own sizes, those here of the machine and the sizes named below; a short "
    "step pays for the bookkeeping of each call, which a large one hides"
)

#: By the benchmark's name.
TABLES: Final[dict[str, Table]] = {
    "resnet50-grid": Table(
        "table 6",
        _of_grid,
        "Both are of the same model, batches and images.",
        {"memory": "a small batch's weights are larger than its outputs", "time": _SMALL},
    ),
    "classification": Table(
        "table 7",
        _of_classification,
        "The paper trains ResNet-50 on 48 photographs of 448x448 pixels, pre-trained on ImageNet. Here it is ResNet-18 "
        "on small images, pre-trained on half of their classes, because neither photographs nor weights are at hand: "
        "what is comparable is which mode gains, not by how much.",
        {
            "memory": "the network is another: ResNet-18 has no wide convolutions of 1x1, and images of 32x32 pixels "
            "leave outputs beside which weights and the smallest layers weigh more",
            "time": _SMALL,
            "accuracy": "Tune's gradients are Eval's, to rounding, and with the same seed so is its accuracy: where it "
            "differs in the paper, chance does. Train mode's statistics suit other data more or less",
        },
    ),
    "detection": Table(
        "tables 8 and 9",
        _of_detection,
        "Bytes here are of two images of 800x1333 pixels whatever the paper's batch, bfloat16 stands for FP16, and no "
        "detector is trained, so that there is no mAP: losses are compared instead.",
        {
            "memory": "heads and pyramids, which no mode changes, are counted, too, and weigh more beside a small "
            "backbone; which RepVGG was trained, the paper's table does not say",
            "time": _SMALL,
        },
    ),
    "adversarial": Table(
        "table 10",
        _of_adversarial,
        "Bytes here are of 8 images, with parameters left trainable; times are of PGD.",
        {
            "memory": "parameters are trainable here, so that pairs that fuse keep their inputs, and small pairs stay "
            "apart; with frozen parameters, which is how to attack, the table above has less",
            "time": _SMALL,
        },
    ),
    "alternatives": Table(
        "table 12",
        _of_alternatives,
        "The paper's are of CUB-200 with 48 images of 448x448 pixels, those here of the smaller batch counted above.",
        {"memory": "the batch is smaller", "time": _SMALL},
    ),
}


def beside(result: Result) -> Iterator[str]:
    """The paper's numbers beside an experiment's, and why some are less good; nothing where the paper has none.

    Args:
        result: The experiment's.

    Yields:
        Markdown.
    """
    told = TABLES.get(result.benchmark)
    found = list(told.beside(result)) if told is not None and "gpu" not in result.environment else []
    if told is None or not found:
        return
    yield f"**Beside the paper's {told.tables}.** {told.differs} " + _WHAT
    quantities = [
        name for name in ("memory", "time", "accuracy") if any(_is_there(row, name) for row in found)
    ]
    heads = [f"{_HEADS[name]}, {whose}" for name in quantities for whose in ("the paper", "here")]
    yield table(("", *heads), (_line(row, quantities) for row in found))
    yield from _less_good(found, told.why)


_WHAT: Final = (
    "Memory is a share of Eval's if nothing else is said: the paper's of the peak, which holds parameters and "
    "gradients, too, and ours of the bytes saved for the backward pass, counted exactly.\n"
)
_HEADS: Final = {"memory": "memory", "time": "time", "accuracy": "points of accuracy gained"}


def _is_there(row: Beside, name: str) -> bool:
    return any(value is not None for value in getattr(row, name))


def _line(row: Beside, quantities: Sequence[str]) -> list[Any]:
    cells: list[Any] = [row.label]
    for name in quantities:
        form = "{:+.2f}" if name == "accuracy" else "{:.3f}"
        cells += [NOTHING if value is None else form.format(value) for value in getattr(row, name)]
    return cells


def _less_good(found: Sequence[Beside], why: Mapping[str, str]) -> Iterator[str]:
    """The rows that are less good than the paper's, with the reason."""
    for name, reason in why.items():
        worse = [row for row in found if _is_worse(name, *getattr(row, name))]
        if worse:
            yield f"- Less good than the paper's in {name}: {'; '.join(row.label for row in worse)}. Why: {reason}."
    if any(any(_is_worse(name, *getattr(row, name)) for row in found) for name in why):
        yield ""


def _is_worse(name: str, theirs: float | None, ours: float | None) -> bool:
    if theirs is None or ours is None:
        return False
    return ours < theirs - WORSE if name == "accuracy" else ours > theirs + WORSE
