"""Time and peak of a training step on a GPU: networks over batches, in every precision, layout and way to run them.

A grid is too large for one sitting: each row is measured until the minutes that it was given are over, the rows at
which most is to be learned first; `make gpu` goes on with the parts. On a CPU, where nothing of this is of interest,
one small row shows that everything runs.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from statistics import median
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.harness.better import Case
from bench.harness.contenders import COMPILED_CONVBN, COMPILED_FLAG, DEPLOY, EVAL, TUNE, make
from bench.harness.markdown import megabytes, spread, table
from bench.harness.models import MODELS
from bench.harness.results import Options, Result
from bench.harness.steps import images, peak, times, total
from bench.harness.timing import ratio
from convbn_fx.testing import randomize_batchnorms

NETWORKS: Final = ("resnet50", "mobilenet_v2", "efficientnet_b0")
BATCHES: Final = (16, 1, 64, 256, 4)
SIZE: Final = 224
LAYOUTS: Final = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
EAGER: Final = (EVAL, TUNE, DEPLOY)
#: How a step is run, and which contenders there are for it.
WAYS: Final[dict[str, tuple[str, ...]]] = {
    "eager": EAGER,
    "CUDA graph": EAGER,
    "compiled": ("compile", COMPILED_FLAG, COMPILED_CONVBN),
}
#: How numbers are computed: whether TensorFloat-32 may be used, and what autocast casts to.
PRECISIONS: Final[dict[str, tuple[bool, torch.dtype | None]]] = {
    "float32": (False, None),
    "TF32": (True, None),
    "bfloat16": (True, torch.bfloat16),
}
#: Parts that fit a sitting: which ways and precisions each has.
SETTINGS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "eager": (("eager",), ("float32", "bfloat16", "TF32")),
    "graphs": (("CUDA graph",), ("float32", "bfloat16", "TF32")),
    "compiled": (("compiled",), ("bfloat16", "TF32", "float32")),
}
#: Minutes for a part, so that a machine that is lent for ten can be given back in time.
MINUTES: Final = 8.0


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Measures the rows of a part, or of all, for as long as there is time.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    chosen = [SETTINGS[options.part]] if options.part else list(SETTINGS.values())
    grid = [
        (network, batch, way, precision, layout)
        for ways, precisions in chosen
        for way, precision, layout, batch, network in product(ways, precisions, LAYOUTS, BATCHES, NETWORKS)
    ]
    if options.device == "cpu":
        grid = [("resnet18", 2, "eager", "float32", "channels_last")]
    deadline = time.monotonic() + 60 * MINUTES * len(chosen)
    rows = []
    for place in grid:
        if time.monotonic() > deadline:
            break
        rows.append(_row(*place, options))
    notes = [f"{len(rows)} of {len(grid)} rows were measured: then the time was over."]
    return {"seconds": options.seconds}, rows, notes if len(rows) < len(grid) else []


def _row(network: str, batch: int, way: str, precision: str, layout: str, options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    model = randomize_batchnorms(MODELS[network]().eval(), seed=0).to(options.device)
    model = model.to(memory_format=LAYOUTS[layout])
    size = 32 if options.device == "cpu" else SIZE
    batch_of_images = images((batch, 3, size, size), options.device)
    batch_of_images = batch_of_images.contiguous(memory_format=LAYOUTS[layout])
    row: dict[str, Any] = {
        "model": network,
        "batch": batch,
        "size": size,
        "way": way,
        "precision": precision,
        "layout": layout,
        "seconds": None,
        "peak": None,
        "error": None,
    }
    try:
        with _computing(precision, options.device) as autocast:
            steps = {
                name: _step(contender, batch_of_images, way, autocast)
                for name, contender in _contenders(model, way).items()
            }
            row["seconds"] = times(steps, options.turns / len(NETWORKS), options.device)
            if way != "CUDA graph":  # whose memory is set aside
                row["peak"] = {name: peak(step, options.device) for name, step in steps.items()}
    except RuntimeError as error:  # out of memory, or nothing that a compiler takes: a row says so
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if options.device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return row


def _contenders(model: nn.Module, way: str) -> Mapping[str, nn.Module]:
    return make(model, WAYS[way])


@contextmanager
def _computing(precision: str, device: str) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Sets what TensorFloat-32 may be used for; yields what makes the autocast of one step."""
    may_use_tf32, dtype = PRECISIONS[precision]
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = may_use_tf32
    try:
        yield nullcontext if dtype is None else lambda: torch.autocast(device, dtype)
    finally:
        for backend, found in zip(backends, before, strict=True):
            backend.allow_tf32 = found


def _step(
    model: nn.Module, batch: Tensor, way: str, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], None]:
    parameters = list(model.parameters())

    def forward_and_backward() -> None:
        with autocast():
            loss = total(model(batch))
        loss.backward()

    if way == "CUDA graph":
        return _replayed(forward_and_backward, parameters)

    def step() -> None:
        forward_and_backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def _replayed(forward_and_backward: Callable[[], None], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Both passes, captured once as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is done once: libraries load, cuDNN chooses
            forward_and_backward()
            for parameter in parameters:
                parameter.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_and_backward()
    for (
        parameter
    ) in parameters:  # the graph writes to these; the next contender's parameters are the same ones
        parameter.grad = None
    return graph.replay


def tables(result: Result) -> Iterator[str]:
    """A table for each way to run a step.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    for way, (reference, *others) in WAYS.items():
        rows = [row for row in result.rows if row["way"] == way]
        if rows:
            yield table(
                (way, f"{reference}, ms", *(f"{other} / {reference}" for other in others), "peak, MB"),
                (
                    (_label(row), *_times(row, reference, others), *_peaks(row, (reference, *others)))
                    for row in rows
                ),
            )


def _times(row: Mapping[str, Any], reference: str, others: list[str]) -> Iterator[str | None]:
    seconds = row["seconds"]
    if seconds is None:
        yield from [row["error"], *(None for _ in others)]
        return
    yield f"{1e3 * median(seconds[reference]):.2f}"
    yield from (spread(ratio(seconds[other], seconds[reference])) for other in others)


def _peaks(row: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str | None]:
    peaks = row["peak"]
    yield None if peaks is None else ", ".join(str(megabytes(peaks[name])) for name in names)


def cases(result: Result) -> Iterator[Case]:
    """The comparisons in which another contender may be better than Tune.

    Args:
        result: The benchmark's.

    Yields:
        One for each row that has Tune.
    """
    for row in result.rows:
        if row["seconds"] and TUNE in row["seconds"]:
            yield Case(_label(row), row["peak"] or {}, row["seconds"])


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['batch']}x{row['size']}, {row['precision']}, {row['layout']}"


def plot(result: Result) -> Figure:
    """Tune's time beside Eval's, over the batch.

    Args:
        result: The benchmark's.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    measured = [row for row in result.rows if row["seconds"] and TUNE in row["seconds"]]
    for network, precision in dict.fromkeys((row["model"], row["precision"]) for row in measured):
        points = sorted(
            (row["batch"], ratio(row["seconds"][TUNE], row["seconds"][EVAL]).median)
            for row in measured
            if (row["model"], row["precision"], row["way"]) == (network, precision, "eager")
            and row["layout"] == "channels_last"
        )
        panel.plot(*zip(*points, strict=True), marker="o", label=f"{network}, {precision}")
    panel.axhline(1, color="black", linewidth=1)
    panel.set(title="Time of a training step, eager", xlabel="batch", ylabel="Tune / Eval")
    panel.legend()
    return figure
