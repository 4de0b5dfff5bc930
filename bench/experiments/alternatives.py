"""Tune mode beside whatever a user could pick instead: memory, time, and what still trains (the paper's tables 11, 12).

All contenders of a network run in one process and take turns. Eager ones are counted on tensors that hold no memory;
what a compiler or an extension makes runs on real tensors alone, and is counted there.
"""

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torchvision.models.resnet import Bottleneck, ResNet

import convbn_fx
from bench.harness.better import Case
from bench.harness.contenders import (
    CHECKPOINT,
    COMPILED,
    COMPILED_CONVBN,
    COMPILED_FLAG,
    COMPILERS,
    COMPOSITE,
    DEPLOY,
    EAGER,
    EVAL,
    FROZEN,
    HALF_BUDGET,
    INPLACE,
    MEANING,
    PAIRS,
    SELECTIVE,
    THIRD_BUDGET,
    TRAIN,
    TUNE,
    TUNE_CHECKPOINT,
    checkpointed,
    compiled,
    within_budget,
)
from bench.harness.inplace_abn import with_inplace_abn
from bench.harness.markdown import error, megabytes, spread, table
from bench.harness.models import MODELS
from bench.harness.results import Options, Result
from bench.harness.steps import count, counted_held, counted_peak, images, peak, times, total, training_step
from bench.harness.timing import ratio
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import randomize_batchnorms

Make = Callable[[nn.Module], nn.Module]

EAGER_CONTENDERS: Final = (
    *(TRAIN, EVAL, TUNE, PAIRS, COMPOSITE, DEPLOY, FROZEN),
    *(CHECKPOINT, SELECTIVE, TUNE_CHECKPOINT),
)
CONTENDERS: Final = (
    *EAGER_CONTENDERS,
    *(COMPILED, HALF_BUDGET, THIRD_BUDGET, COMPILED_FLAG, COMPILED_CONVBN, INPLACE),
)

#: Those that recompute their blocks, which hides what they save from whoever counts it.
RECOMPUTING: Final = (CHECKPOINT, SELECTIVE, TUNE_CHECKPOINT)

#: What a smoke test has in the place of inductor: it takes seconds, and has no flag.
SMOKE_COMPILERS: Final[dict[str, Make]] = {
    COMPILED: lambda model: compiled(model, "aot_eager"),
    HALF_BUDGET: lambda model: within_budget(model, 0.5, "aot_eager_decomp_partition"),
    THIRD_BUDGET: lambda model: within_budget(model, 0.3, "aot_eager_decomp_partition"),
    COMPILED_FLAG: lambda model: compiled(model, "aot_eager"),
    COMPILED_CONVBN: lambda model: compiled(model, "convbn", inner="aot_eager"),
}


class Sizes(NamedTuple):
    """Of the images, and of the batches that are counted; the first is timed, too."""

    image: int
    batches: tuple[int, ...]

    @property
    def timed(self) -> tuple[int, ...]:
        """Shape of the batch that is timed."""
        return self.shape(self.batches[0])

    def shape(self, batch: int) -> tuple[int, ...]:
        """Shape of a batch."""
        return (batch, 3, self.image, self.image)


#: The networks, of which the first is the paper's.
NETWORKS: Final = ("resnet50", "mobilenet_v2", "efficientnet_b0")
#: Their blocks, which checkpointing recomputes, by the names of their classes.
BLOCKS: Final = ("Bottleneck", "InvertedResidual", "DepthwiseSeparableConv")
TOYS: Final = ("toy",)
FULL: Final = Sizes(224, (4, 16))
SMOKE: Final = Sizes(32, (2, 4))

Rows = dict[str, dict[str, Any]]


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Counts, compares and times.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    sizes = SMOKE if options.smoke else FULL
    found = {name: _of_network(name, sizes, options) for name in (TOYS if options.smoke else NETWORKS)}
    settings = {
        "image": sizes.image,
        "batches": sizes.batches,
        "seconds": options.seconds,
        "memory_format": "channels_last",
        "compiler": "aot_eager" if options.smoke else "inductor",
        "allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    return (
        settings,
        [row for rows in found.values() for row in rows.values()],
        list(_notes(found, sizes, options)),
    )


def _of_network(network: str, sizes: Sizes, options: Options) -> Rows:
    torch.manual_seed(0)
    model = randomize_batchnorms((_toy() if options.smoke else MODELS[network]()).eval(), seed=0)
    rows: Rows = {name: _empty_row(network, name, sizes) for name in CONTENDERS}
    eager = _eager(model)
    _count(rows, eager, sizes)
    _compare_in_float64(rows, model, sizes, options.device)
    _measure(rows, model, eager, sizes, options)
    return rows


def _toy() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(8, 16, kernel_size=1, bias=False), nn.BatchNorm2d(16))
    stem = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(stem, Bottleneck(8, 4, downsample=shortcut), Bottleneck(16, 4))


def _empty_row(network: str, name: str, sizes: Sizes) -> dict[str, Any]:
    """What a contender that cannot be measured has.

    `bytes` and `counted_peak` are by batch, `peak` that of the timed step; `float32` and `float64` the largest
    difference from Eval's output, relative to its largest value; `trains` whether gamma and beta get gradients.
    """
    by_batch = dict.fromkeys(map(str, sizes.batches))
    return {
        "model": network,
        "contender": name,
        "bytes": by_batch,
        "counted_peak": by_batch,
        "peak": None,
        "seconds": None,
        "compile_seconds": None,
        "float32": None,
        "float64": None,
        "trains": None,
        "pairs": None,
        "reason": "",
    }


#: What selective checkpointing keeps the outputs of.
CONVOLUTIONS: Final = (torch.ops.aten.convolution.default,)


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__ in BLOCKS


def _eager(model: nn.Module) -> dict[str, nn.Module]:
    recomputed, selective = (checkpointed(model, _is_block, kept) for kept in ((), CONVOLUTIONS))
    made: dict[str, nn.Module] = {name: EAGER[name](model) for name in EAGER_CONTENDERS if name in EAGER}
    return made | {CHECKPOINT: recomputed, SELECTIVE: selective, TUNE_CHECKPOINT: convbn_fx.tune(recomputed)}


# --- Counted on tensors that hold no memory -----------------------------------------------------------------------


def _count(rows: Rows, eager: Mapping[str, nn.Module], sizes: Sizes) -> None:
    for name, module in eager.items():
        shapes = {str(batch): sizes.shape(batch) for batch in sizes.batches}
        counted = counted_held if name in RECOMPUTING else count
        rows[name]["bytes"] = {batch: counted(module, shape) for batch, shape in shapes.items()}
        rows[name]["counted_peak"] = {batch: counted_peak(module, shape) for batch, shape in shapes.items()}


# --- Compared -----------------------------------------------------------------------------------------------------


def _compare_in_float64(rows: Rows, model: nn.Module, sizes: Sizes, device: str) -> None:
    model = copy.deepcopy(model).double().to(device)
    batch = images(sizes.timed, device).double()
    expected = model(batch).detach()
    for name, module in _eager(model).items():
        rows[name]["float64"] = _difference(expected, module(batch))


def _difference(expected: Tensor, actual: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def _trains(model: nn.Module, module: nn.Module, batch: Tensor) -> bool:
    """Whether a backward pass of a contender reaches gamma and beta of the model that it is made of."""
    total(module(batch)).backward()
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    gradients = [parameter.grad for norm in norms for parameter in (norm.weight, norm.bias)]
    for parameter in (*model.parameters(), *module.parameters()):
        parameter.grad = None
    return all(gradient is not None and bool(gradient.any()) for gradient in gradients)


# --- Run on real tensors ------------------------------------------------------------------------------------------


def _measure(
    rows: Rows, model: nn.Module, eager: Mapping[str, nn.Module], sizes: Sizes, options: Options
) -> None:
    device = options.device
    batch = images(sizes.timed, device)
    modules = {name: module.to(device) for name, module in eager.items()}
    modules |= _compiled_and_extended(rows, model, batch, options)
    expected = model(batch).detach()
    for name, module in modules.items():
        rows[name]["float32"] = _difference(expected, module(batch))
        rows[name]["trains"] = _trains(model, module, batch)
        if name not in eager:
            rows[name]["bytes"] = rows[name]["bytes"] | {str(sizes.batches[0]): saved_bytes(module, batch)}
        if name in (TUNE, PAIRS, COMPOSITE, TUNE_CHECKPOINT, COMPILED_CONVBN):
            rows[name]["pairs"] = len(convbn_fx.report(module).fused)
    steps = {name: training_step(module, batch) for name, module in modules.items()}
    for name, seconds in times(steps, options.turns, device).items():
        rows[name]["seconds"] = seconds
        rows[name]["peak"] = peak(steps[name], device)


def _compiled_and_extended(
    rows: Rows, model: nn.Module, batch: Tensor, options: Options
) -> dict[str, nn.Module]:
    """What a compiler or an extension makes of the model, after its first step; without those that fail."""
    makers = {**(SMOKE_COMPILERS if options.smoke else COMPILERS), INPLACE: _inplace_abn}
    modules = {}
    for name, make in makers.items():
        matches = counters["inductor"]["efficient_conv_bn_eval"]
        try:
            if name == COMPILED:
                # A process's first compilation pays for imports and for a look at the processor.
                _first_step(make(_tiny().to(options.device)), batch)
            module = make(model).to(options.device)
            seconds = _first_step(module, batch)
        except Exception as problem:  # noqa: BLE001 - compilers and extensions may raise anything
            rows[name]["reason"] = _first_line(problem)
            continue
        modules[name] = module
        if name in COMPILERS:
            rows[name]["compile_seconds"] = seconds
        if name == COMPILED_FLAG:
            rows[name]["pairs"] = counters["inductor"]["efficient_conv_bn_eval"] - matches
    return modules


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, kernel_size=1), nn.BatchNorm2d(3)).eval()


def _first_step(module: nn.Module, batch: Tensor) -> float:
    """Seconds of the step that compiles both passes, with nothing left of earlier compilations."""
    step = training_step(module, batch)
    with fresh_cache():
        start = time.perf_counter()
        step()
        if batch.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _inplace_abn(model: nn.Module) -> nn.Module:
    try:
        package = importlib.import_module("inplace_abn")
    except ImportError as problem:
        reason = (
            "the package inplace_abn, an extension that is built for one's own PyTorch and CUDA, is not there"
        )
        raise ImportError(f"{reason} ({problem})") from problem
    if not isinstance(model, ResNet):
        raise TypeError(f"a ResNet was expected, not a {type(model).__name__}")
    return with_inplace_abn(model, package.InPlaceABN)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


# --- Shown --------------------------------------------------------------------------------------------------------


def _notes(found: Mapping[str, Rows], sizes: Sizes, options: Options) -> Iterator[str]:
    timed = f"{sizes.batches[0]}x{sizes.image}"
    yield (
        "Bytes are those that autograd saves for the backward pass, parameters and buffers apart, counted by storage. "
        f"What compilers and extensions make is counted on real tensors, at {timed}."
    )
    yield (
        f"{', '.join(RECOMPUTING)} keep what they recompute out of that count's sight: theirs are the bytes of all "
        "tensors that live between forward and backward."
    )
    yield (
        "The counted peak follows every tensor of a whole step, but not what an operator allocates inside of itself; "
        f"the measured one, at {timed}, does. Both are above parameters, buffers and images, gradients included."
    )
    yield "Ratios of times are medians over rounds in which the contenders take turns, quartiles in brackets."
    yield "Compiling is the first step, with empty caches; it is not part of the times."
    yield (
        "Differences are the largest of the output from Eval's, relative to its largest value. What compilers and "
        f"extensions make is compared in float32 alone. {TRAIN} is meant to differ: it normalises by other statistics."
    )
    if any(rows[INPLACE]["seconds"] is not None for rows in found.values()):
        yield f"{INPLACE} computes another function: its ReLUs are leaky, its gammas positive."
    if options.smoke:
        yield (
            "A toy network, compiled by aot_eager in the place of inductor: it has no flag, and recomputes nothing, so "
            "that it saves fused weights."
        )
    for network, rows in found.items():
        for row in rows.values():
            if row["reason"]:
                yield f"{row['contender']} of {network} was not measured: {row['reason']}"


def tables(result: Result) -> Iterator[str]:
    """What the contenders are, memory, then time and what comes with it.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    image, batches = result.settings["image"], result.settings["batches"]
    labels = [f"{batch}x{image}" for batch in batches]
    contenders = dict.fromkeys(row["contender"] for row in result.rows)
    yield "".join(f"- **{name}**: {MEANING[name]}\n" for name in contenders)
    for rows in by_network(result).values():
        yield from _tables_of(rows, labels, batches)


def by_network(result: Result) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each network."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in result.rows:
        rows.setdefault(row["model"], []).append(row)
    return rows


def _tables_of(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], batches: Sequence[int]
) -> Iterator[str]:
    network = rows[0]["model"]
    yield table(
        (
            f"{network}, MB",
            *(f"saved, {label}" for label in labels),
            *(f"counted peak, {label}" for label in labels),
            f"measured peak, {labels[0]}",
        ),
        (
            (
                row["contender"],
                *(megabytes(row[key][str(batch)]) for key in ("bytes", "counted_peak") for batch in batches),
                megabytes(row["peak"]),
            )
            for row in rows
        ),
    )
    yield table(
        (
            f"{network}, time, {labels[0]}",
            "ms a step",
            "/ Eval",
            "compiling, s",
            "pairs fused",
            "gamma and beta train",
            "difference, float32",
            "difference, float64",
        ),
        _timed_lines(rows),
    )


def _timed_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    (reference,) = (row["seconds"] for row in rows if row["contender"] == EVAL)
    for row in rows:
        seconds, compile_seconds = row["seconds"], row["compile_seconds"]
        yield (
            row["contender"],
            None if seconds is None else f"{1e3 * statistics.median(seconds):.0f}",
            None if seconds is None else spread(ratio(seconds, reference)),
            None if compile_seconds is None else f"{compile_seconds:.1f}",
            row["pairs"],
            {None: None, True: "yes", False: "no"}[row["trains"]],
            error(row["float32"]),
            error(row["float64"]),
        )


def cases(result: Result) -> Iterator[Case]:
    """The comparisons in which another contender may be better; memory is that at the peak of a step.

    Args:
        result: The benchmark's.

    Yields:
        The one that was measured, and those that were counted.
    """
    batches, image = result.settings["batches"], result.settings["image"]
    for network, rows in by_network(result).items():
        peaks = {row["contender"]: row["peak"] for row in rows}
        seconds = {row["contender"]: row["seconds"] for row in rows}
        yield Case(f"{network}, {batches[0]}x{image}", peaks, seconds)
        for batch in batches:
            counted = {row["contender"]: row["counted_peak"][str(batch)] for row in rows}
            yield Case(f"{network}, {batch}x{image}, counted", counted, {})


def plot(result: Result) -> Figure:
    """Memory against time: what is saved for the backward pass, and the peak.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    networks = by_network(result)
    figure = Figure(figsize=(9, 4.2 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 2, squeeze=False)
    image, batch = result.settings["image"], str(result.settings["batches"][0])
    for panels, (network, rows) in zip(grid, networks.items(), strict=True):
        for row, marker in zip(rows, MARKERS, strict=False):
            if row["seconds"] is None:
                continue
            milliseconds = 1e3 * statistics.median(row["seconds"])
            for panel, size in zip(panels, (row["bytes"][batch], row["peak"]), strict=True):
                # A contender without this size keeps its place in the legend and its colour.
                points = ([], []) if size is None else ([milliseconds], [size / 1e6])
                panel.plot(*points, marker, markersize=8, label=row["contender"])
        for panel, memory in zip(
            panels, ("held for the backward pass", "at the peak of a step"), strict=True
        ):
            panel.margins(0.1)
            panel.set(title=network, xlabel=f"ms a step, {batch}x{image}", ylabel=f"MB {memory}")
            panel.set(xlim=(0, None), ylim=(0, None))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


#: One for each contender.
MARKERS: Final = "osD^v<>pP*Xhd8H4"
