"""What each form of a pair costs, over sizes of weight and output: the constants of the cost rule come from here.

Pairs alone, forward and backward, all gradients asked for, in each of the forms of `convbn_fx.functional.cost_rule`, in
turns. By least squares the time that a form takes beyond Eval mode's two steps is a constant, plus so much for an
element of weight, less so much for an element of output, whose batch norm is not run.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from bench.harness.markdown import table
from bench.harness.results import Options, Result
from bench.harness.steps import images, times
from convbn_fx import functional
from convbn_fx.functional import conv_batch_norm
from convbn_fx.functional.cost_rule import Form
from convbn_fx.testing import randomize_batchnorms

#: Channels, size of the kernel, batch and size of the image.
SIZES: Final = tuple(itertools.product((16, 64, 256), (1, 3), (1, 8), (2, 8, 28)))
SMOKE: Final = ((16, 1, 1, 2), (16, 3, 1, 8))


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Times every size in every form.

    Args:
        options: The command line's; `seconds` is for all sizes together.

    Returns:
        Settings, rows and notes.
    """
    sizes = SMOKE if options.smoke else SIZES
    seconds = options.turns / len(sizes)
    rows = [_row(*size, seconds, options.device) for size in sizes]
    notes = ["The time of a form is its median over the rounds; the fit is over all sizes of the table."]
    return {"seconds": options.seconds, "memory_format": "channels_last"}, rows, notes


def _row(channels: int, kernel: int, batch: int, size: int, seconds: float, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    pair = nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels)
    )
    conv: nn.Module
    norm: nn.Module
    conv, norm = randomize_batchnorms(pair.eval()).to(device).to(memory_format=torch.channels_last)
    input = images((batch, channels, size, size), device).requires_grad_()
    grad_output = torch.randn_like(conv(input))

    def step(form: Form | None) -> Callable[[], None]:
        def run_in_form() -> None:
            with forced(form):
                output = norm(conv(input)) if form is None else conv_batch_norm(conv, norm, input)
            output.backward(grad_output)

        return run_in_form

    forms = {"Eval": None, **{form.name.lower(): form for form in Form}}
    return {
        "weight": sum(parameter.numel() for parameter in conv.parameters()),
        "output": grad_output.numel(),
        "channels": channels,
        "kernel": kernel,
        "seconds": times({name: step(form) for name, form in forms.items()}, seconds, device),
    }


def forced(form: Form | None) -> AbstractContextManager[Any]:
    """A context in which every pair runs in one form; in the cheapest one for None."""
    if form is None:
        return nullcontext()
    # A mock that returns the form would take longer than the rule.
    return mock.patch.object(functional, "cheapest_form", partial(_first, form))


def _first(form: Form, *_: object) -> Form:
    return form


def fit(rows: Sequence[Mapping[str, Any]], form: str) -> tuple[float, float, float]:
    """Where the time of a form beyond Eval's goes.

    Args:
        rows: The benchmark's.
        form: `folded`, `scaled` or `apart`.

    Returns:
        Seconds for a pair, for an element of weight, and (less than 0 where it is faster) for an element of output.
    """
    sizes = np.array([[1.0, row["weight"], row["output"]] for row in rows])
    extra = np.array([median(row["seconds"][form]) - median(row["seconds"]["Eval"]) for row in rows])
    # Small pairs tell the constant, large ones the slopes: each counts by its relative error.
    weights = 1 / np.array([median(row["seconds"]["Eval"]) for row in rows])
    solution, *_ = np.linalg.lstsq(sizes * weights[:, None], extra * weights, rcond=None)
    constant, weight, output = map(float, solution)
    return constant, weight, output


def tables(result: Result) -> Iterator[str]:
    """Times of every size, then the fit.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    forms = [form.name.lower() for form in Form]
    yield table(
        ("channels, kernel", "weight", "output", "Eval, us", *(f"{form} / Eval" for form in forms)),
        (
            (
                f"{row['channels']}, {row['kernel']}x{row['kernel']}",
                row["weight"],
                row["output"],
                f"{1e6 * median(row['seconds']['Eval']):.0f}",
                *(f"{median(row['seconds'][form]) / median(row['seconds']['Eval']):.2f}" for form in forms),
            )
            for row in result.rows
        ),
    )
    yield table(
        ("beyond Eval", "us for a pair", "ns for an element of weight", "ns for an element of output"),
        (
            (form, f"{1e6 * constant:.0f}", f"{1e9 * weight:.2f}", f"{1e9 * output:.2f}")
            for form in forms
            for constant, weight, output in (fit(result.rows, form),)
        ),
    )


def plot(result: Result) -> Figure:
    """Time of each form against Eval's, over the output's size.

    Args:
        result: The benchmark's.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for form in Form:
        name = form.name.lower()
        ratios = [median(row["seconds"][name]) / median(row["seconds"]["Eval"]) for row in result.rows]
        panel.scatter([row["output"] / row["weight"] for row in result.rows], ratios, label=name, s=12)
    panel.axhline(1, color="gray", linewidth=0.8)
    panel.set(
        xscale="log", xlabel="elements of output for one of weight", ylabel="time / Eval's", ylim=(0, None)
    )
    panel.legend()
    return figure
