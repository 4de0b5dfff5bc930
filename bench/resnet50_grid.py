"""Memory and time of ResNet-50 over batches and image sizes (the paper's table 6 and figure 3), and the small end.

Memory of all sizes is counted, on tensors that hold no memory. Time is measured where a step fits the device and the
patience: the small end with ResNet-18 and MobileNetV2 beside ResNet-50, and a batch of 16. There the profiler tells
where it goes.
"""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, Final

import torch
from matplotlib.figure import Figure

from bench.contenders import COMPOSITE, DEPLOY, EVAL, TRAIN, TUNE, make
from bench.markdown import megabytes, spread, table
from bench.models import MODELS
from bench.profiles import BETWEEN, PARTS, where_time_goes
from bench.results import Options, Result
from bench.steps import count, images, peak, times, training_step
from bench.timing import ratio
from convbn_fx.testing import randomize_batchnorms

CONTENDERS: Final = (TRAIN, EVAL, TUNE, COMPOSITE, DEPLOY)

#: Batch and image size of what is counted alone: the paper's.
COUNTED: Final = (
    *((batch, 224) for batch in (16, 32, 64, 128, 256)),
    *((32, size) for size in range(256, 449, 32)),
)

#: Model, batch and image size of what is timed, too.
TIMED: Final = (
    *(
        (name, batch, size)
        for name in ("resnet18", "resnet50", "mobilenet_v2")
        for batch, size in ((1, 64), (2, 224))
    ),
    ("resnet50", 4, 224),
    ("resnet50", 16, 224),
    ("mobilenet_v2", 16, 224),
)
ON_CUDA: Final = tuple(("resnet50", batch, size) for batch, size in COUNTED)
#: What is aimed at: Tune's time at most so many times the other's, at these batches and image sizes.
AIMS: Final = {(1, 64): (EVAL, 1.03), (2, 224): (EVAL, 1.03), (16, 224): (DEPLOY, 1.03)}
#: And its bytes at most so many times Deploy's from this batch on, where outputs outweigh weights; never above Eval's.
AIM_BYTES: Final = 1.01
OUTWEIGHED: Final = 4
SMOKE: Final = (("resnet18", 2, 32),)  # in Train mode one value per channel is too few


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Counts and times.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    rows = list(_rows(options))
    settings = {"contenders": CONTENDERS, "seconds": options.seconds, "memory_format": "channels_last"}
    notes = [
        "Bytes are those that autograd saves for the backward pass, parameters and buffers apart, counted by storage.",
        "Ratios of times are medians over rounds in which the contenders take turns, quartiles in brackets.",
    ]
    return settings, rows, notes


def _rows(options: Options) -> Iterator[dict[str, Any]]:
    timed = SMOKE if options.smoke else TIMED + (ON_CUDA if options.device == "cuda" else ())
    for name, batch, size in timed:
        yield _row(name, batch, size, options, timed=True)
    for batch, size in () if options.smoke or options.device == "cuda" else COUNTED:
        yield _row("resnet50", batch, size, options, timed=False)


def _row(name: str, batch: int, size: int, options: Options, timed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = randomize_batchnorms(MODELS[name]().eval(), seed=0)
    contenders = make(model, CONTENDERS)
    shape = (batch, 3, size, size)
    row: dict[str, Any] = {"model": name, "batch": batch, "size": size}
    row["bytes"] = {contender: count(module, shape) for contender, module in contenders.items()}
    row["seconds"] = row["peak"] = row["profiles"] = None
    if timed:
        batch_of_images = images(shape, options.device)
        steps = {
            contender: training_step(module.to(options.device), batch_of_images)
            for contender, module in contenders.items()
        }
        row["seconds"] = times(steps, options.seconds if not options.smoke else 0.0, options.device)
        if options.device == "cuda":
            row["peak"] = {contender: peak(step) for contender, step in steps.items()}
        else:
            row["profiles"] = {
                contender: where_time_goes(steps[contender]) for contender in (EVAL, TUNE, DEPLOY)
            }
    return row


def tables(result: Result) -> Iterator[str]:
    """Memory, then time.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    yield table(
        ("MB saved for the backward pass", *CONTENDERS, "Tune / Eval", "Tune / Deploy"),
        ((_label(row), *_megabytes(row["bytes"]), *_ratios(row["bytes"])) for row in result.rows),
    )
    timed = [row for row in result.rows if row["seconds"]]
    yield table(
        ("time", "Eval, ms", "Tune / Eval", "Deploy / Eval", "composite Tune / Eval", "Tune / Deploy"),
        (
            (
                _label(row),
                f"{1e3 * median(row['seconds'][EVAL]):.0f}",
                *(
                    spread(ratio(row["seconds"][one], row["seconds"][other]))
                    for one, other in ((TUNE, EVAL), (DEPLOY, EVAL), (COMPOSITE, EVAL), (TUNE, DEPLOY))
                ),
            )
            for row in timed
        ),
    )
    yield table(("aim", "measured", "reached"), _aims(result))
    profiled = [row for row in timed if row["profiles"]]
    parts = [*(name for name, _ in PARTS), BETWEEN]
    yield table(
        ("ms of a step under the profiler", *parts),
        (
            (f"{_label(row)}, {name}", *(f"{1e3 * profile[part]:.1f}" for part in parts))
            for row in profiled
            for name, profile in row["profiles"].items()
        ),
    )


def _aims(result: Result) -> Iterator[tuple[str, str, str]]:
    for row in result.rows:
        aim = AIMS.get((row["batch"], row["size"]))
        if row["seconds"] and aim is not None:
            other, most = aim
            measured = ratio(row["seconds"][TUNE], row["seconds"][other])
            text = f"time, {_label(row)}: at most {most} of {other}'s"
            yield text, str(spread(measured)), "yes" if measured.median <= most else "no"
    for row in result.rows:
        if row["batch"] >= OUTWEIGHED:
            of_deploy = row["bytes"][TUNE] / row["bytes"][DEPLOY]
            text = f"bytes, {_label(row)}: at most {AIM_BYTES} of {DEPLOY}'s"
            yield text, f"{of_deploy:.3f}", "yes" if of_deploy <= AIM_BYTES else "no"
    of_eval = max(row["bytes"][TUNE] / row["bytes"][EVAL] for row in result.rows)
    yield f"bytes, everywhere: at most {EVAL}'s", f"{of_eval:.3f} at most", "yes" if of_eval <= 1 else "no"


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['batch']}x{row['size']}"


def _megabytes(counted: Mapping[str, int]) -> Iterator[str | None]:
    return (megabytes(counted[contender]) for contender in CONTENDERS)


def _ratios(counted: Mapping[str, int]) -> Iterator[str]:
    return (f"{counted[TUNE] / counted[other]:.3f}" for other in (EVAL, DEPLOY))


def plot(result: Result) -> Figure:
    """Memory over the batch and over the image size.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    rows = [row for row in result.rows if row["model"] == "resnet50"] or list(result.rows)
    for panel, fixed, along in ((panels[0], ("size", 224), "batch"), (panels[1], ("batch", 32), "size")):
        picked = sorted((row for row in rows if row[fixed[0]] == fixed[1]), key=lambda row: row[along])
        for contender in CONTENDERS:
            panel.plot(
                [row[along] for row in picked],
                [row["bytes"][contender] / 1e9 for row in picked],
                marker="o",
                label=contender,
            )
        panel.set(xlabel=along, ylabel="GB saved for the backward pass", ylim=(0, None))
    panels[0].legend()
    return figure
