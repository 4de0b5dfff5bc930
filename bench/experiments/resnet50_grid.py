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

from bench.harness.better import Case
from bench.harness.contenders import COMPOSITE, DEPLOY, EVAL, TRAIN, TUNE, make
from bench.harness.markdown import megabytes, spread, table
from bench.harness.models import MODELS
from bench.harness.results import Options, Result
from bench.harness.steps import count, images, peak, times, training_step
from bench.harness.timing import ratio
from bench.tools.profiles import BETWEEN, PARTS, where_time_goes
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
    for batch, size in () if options.smoke else COUNTED:
        if ("resnet50", batch, size) not in timed:
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
        row["seconds"] = times(steps, options.turns, options.device)
        if options.device == "cuda":
            row["peak"] = {contender: peak(step, options.device) for contender, step in steps.items()}
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
    yield table(("ResNet-50, 64x224", "GB, Eval", "GB, Tune", "Tune / Eval"), _published(result))
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


#: GB at the peak of a training step of a torchvision ResNet-50 on 64 images of 224x224 pixels, on a GPU, as PyTorch's
#: pull request 108757 has it, which brought the paper's formula into its compiler: run eagerly, and with the pass.
PUBLISHED: Final = (5.18, 2.88)


def _published(result: Result) -> Iterator[tuple[str, ...]]:
    """What was measured beside what PyTorch's developers did."""
    eager, with_pass = PUBLISHED
    yield "peak, PyTorch's pull request 108757", str(eager), str(with_pass), f"{with_pass / eager:.3f}"
    for row in result.rows:
        if (row["model"], row["batch"], row["size"]) == ("resnet50", 64, 224):
            saved = [row["bytes"][contender] for contender in (EVAL, TUNE)]
            yield "saved, here", *(f"{count / 1e9:.2f}" for count in saved), f"{saved[1] / saved[0]:.3f}"


def cases(result: Result) -> Iterator[Case]:
    """The comparisons in which another contender may be better.

    Args:
        result: The benchmark's.

    Yields:
        One for each row.
    """
    for row in result.rows:
        yield Case(_label(row), row["bytes"], row["seconds"] or {})


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['batch']}x{row['size']}"


def _megabytes(counted: Mapping[str, int]) -> Iterator[str | None]:
    return (megabytes(counted[contender]) for contender in CONTENDERS)


def _ratios(counted: Mapping[str, int]) -> Iterator[str]:
    return (f"{counted[TUNE] / counted[other]:.3f}" for other in (EVAL, DEPLOY))


def plot(result: Result) -> Figure:
    """Memory over the batch and over the image size; below, times beside Eval's.

    Args:
        result: The benchmark's.

    Returns:
        A figure of three panels.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _plot_memory(figure.add_subplot(grid[0, 0]), result, ("size", 224), "batch")
    _plot_memory(figure.add_subplot(grid[0, 1]), result, ("batch", 32), "size")
    _plot_times(figure.add_subplot(grid[1, :]), result)
    return figure


#: Lines lie upon each other: Train on Eval, Tune on Deploy. The wide one is drawn first, the narrow one on top.
_LINES: Final[dict[str, dict[str, Any]]] = {
    TRAIN: {"linewidth": 6, "alpha": 0.4},
    EVAL: {"linewidth": 2, "marker": "o"},
    DEPLOY: {"linewidth": 6, "alpha": 0.4},
    COMPOSITE: {"linestyle": "--", "marker": "^"},
    TUNE: {"linewidth": 2, "marker": "o"},
}


def _plot_memory(panel: Any, result: Result, fixed: tuple[str, int], along: str) -> None:
    name, value = fixed
    rows = [row for row in result.rows if row["model"] == "resnet50" and row[name] == value]
    rows.sort(key=lambda row: row[along])
    for contender, style in _LINES.items():
        gigabytes = [row["bytes"][contender] / 1e9 for row in rows]
        panel.plot(
            [row[along] for row in rows], gigabytes, label=contender, color=_COLOURS[contender], **style
        )
    panel.set(
        title=f"ResNet-50, {name} {value}",
        xlabel=along,
        ylabel="GB saved for the backward pass",
        ylim=(0, None),
    )
    panel.legend()


_COLOURS: Final = {contender: f"C{index}" for index, contender in enumerate(CONTENDERS)}


def _plot_times(panel: Any, result: Result) -> None:
    """A group of bars a row, the quartiles on top of each."""
    rows = [row for row in result.rows if row["seconds"]]
    shown = (TUNE, COMPOSITE, DEPLOY)
    for offset, contender in enumerate(shown):
        ratios = [ratio(row["seconds"][contender], row["seconds"][EVAL]) for row in rows]
        panel.bar(
            [position + 0.25 * (offset - 1) for position in range(len(rows))],
            [each.median for each in ratios],
            width=0.24,
            yerr=[
                [each.median - each.lower for each in ratios],
                [each.upper - each.median for each in ratios],
            ],
            label=contender,
            color=_COLOURS[contender],
        )
    panel.axhline(1, color="black", linewidth=1)
    panel.set_xticks(range(len(rows)), [_label(row).replace(", ", "\n") for row in rows], fontsize="small")
    panel.set(title="Time of a training step", ylabel="in parts of Eval's")
    panel.legend()
