"""Kernels that a pair launches, forward and backward: folding must not launch more than Eval's batch norm did.

Counted by PyTorch's profiler, on CUDA. On a CPU, which launches none, it counts the operators that were run instead.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.harness.contenders import COMPOSITE, DEPLOY, EVAL, TUNE, make
from bench.harness.markdown import table
from bench.harness.results import Options, Result
from bench.harness.steps import images
from convbn_fx.testing import randomize_batchnorms

CONTENDERS: Final = (EVAL, TUNE, COMPOSITE, DEPLOY)

#: How numbers are computed.
PRECISIONS: Final[dict[str, torch.dtype | None]] = {
    "float32": None,
    "bfloat16 autocast": torch.bfloat16,
    "float16 autocast": torch.float16,
}
LAYOUTS: Final = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCHES: Final = (1, 16, 256)
DIRECTIONS: Final = ("forward", "backward")


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Counts for every precision, layout and batch.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    batches = BATCHES[:1] if options.smoke else BATCHES
    precisions = list(PRECISIONS)[: 1 if options.device == "cpu" else None]
    rows = [
        _row(precision, layout, batch, options.device)
        for precision, layout, batch in product(precisions, LAYOUTS, batches)
    ]
    of = "kernels" if options.device == "cuda" else "operators"
    return {"counted": of}, rows, [f"One pair of 64 channels, 3x3, on images of 56x56; {of} of one call."]


def _row(precision: str, layout: str, batch: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)).eval()
    contenders = make(randomize_batchnorms(pair).to(device), CONTENDERS)
    input = images((batch, 64, 56, 56), device).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    counted: dict[str, dict[str, int]] = {direction: {} for direction in DIRECTIONS}
    for name, contender in contenders.items():
        contender.to(memory_format=LAYOUTS[layout])
        for direction, count in zip(DIRECTIONS, _counts(contender, input, precision, device), strict=True):
            counted[direction][name] = count
    return {"precision": precision, "layout": layout, "batch": batch, "counted": counted}


def _counts(pair: nn.Module, input: torch.Tensor, precision: str, device: str) -> tuple[int, int]:
    """What a forward and a backward pass launch."""
    dtype = PRECISIONS[precision]

    def forward() -> torch.Tensor:
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            output: torch.Tensor = pair(input)
            return output

    grad_output = torch.randn_like(forward())
    forward().backward(grad_output)  # what is done once: Triton compiles, cuDNN chooses
    output = forward()
    return _launched(forward, device), _launched(lambda: output.backward(grad_output), device)


def _launched(call: Callable[[], object], device: str) -> int:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return sum(event.device_type.name == "CUDA" for event in profiler.events())
    operators = [event for event in profiler.events() if event.name.startswith("aten::")]
    return sum(
        event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in operators
    )


def tables(result: Result) -> Iterator[str]:
    """A row for each setting, forward and backward.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    yield table(
        (result.settings["counted"], *(f"{name}, {way}" for way in DIRECTIONS for name in CONTENDERS)),
        (
            (
                f"{row['precision']}, {row['layout']}, batch {row['batch']}",
                *(row["counted"][way][name] for way in DIRECTIONS for name in CONTENDERS),
            )
            for row in result.rows
        ),
    )


def plot(result: Result) -> Figure:
    """How many each contender launches at most.

    Args:
        result: The benchmark's.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(6, 3), layout="constrained")
    panel = figure.subplots()
    most: Counter[str] = Counter()
    for row, name in product(result.rows, CONTENDERS):
        most[name] = max(most[name], sum(row["counted"][way][name] for way in DIRECTIONS))
    panel.barh([*most], [*most.values()])
    panel.invert_yaxis()
    panel.set(xlabel=f"{result.settings['counted']} of one call, forward and backward, at most")
    return figure
