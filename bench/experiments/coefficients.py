"""How the coefficients `gamma / sqrt(var + eps)` of trained batch norms are spread (the paper's figure 2a).

They tell why Deploy mode is unstable. With a coefficient s it holds s W where Eval mode holds W. If a step of Deploy
mode changes s W by d, one of Eval mode, whose gradient is s times as large, changes W by s d and s W by s² d.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.harness.markdown import table
from bench.harness.results import Options, Result
from bench.harness.transfer import pretrained
from convbn_fx.cli.report.coefficients import Coefficients, coefficients_of
from convbn_fx.functional.arithmetic import inverse_deviation, scale_of

#: Beyond these Deploy's step is more than a hundred times Eval's, or less than a hundredth.
SMALL: Final = 0.1
LARGE: Final = 10.0

STATISTICS: Final = "running_var"
BINS: Final = 60


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Trains a model, or reads a checkpoint, and computes its coefficients.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.

    Raises:
        ValueError: The checkpoint holds no batch norm.
    """
    settings: dict[str, Any]
    if options.checkpoint is None:
        model, name, accuracy = pretrained(options.device, smoke=options.smoke)
        found = {module: coefficients_of(each) for module, each in model.named_modules()}
        settings = {"model": name, "accuracy": accuracy, "eps": "each batch norm's own"}
        notes = [f"{name}; {accuracy:.1%} of its test images are told right."]
    else:
        found = dict(_of_checkpoint(read_tensors(options.checkpoint), options.eps))
        if not found:
            raise ValueError(
                f"{options.checkpoint} has no {STATISTICS} with a weight of the same shape beside it"
            )
        settings = {"model": options.checkpoint.name, "accuracy": None, "eps": options.eps}
        notes = [
            f"{options.checkpoint.name}: every {STATISTICS} that has a weight beside it.",
            f"A checkpoint does not tell eps; it is taken to be {options.eps:g} (`--eps`).",
        ]
    rows = [_row(name, coefficients) for name, coefficients in found.items() if coefficients is not None]
    settings |= {"small": SMALL, "large": LARGE}
    notes += [
        "Smallest to largest are magnitudes, computed in float64.",
        "With a coefficient s, Deploy mode's step changes the folded weight 1 / s² times as much as Eval mode's does.",
        f"That is more than {SMALL**-2:.0f} times below {SMALL:g}, and less than {LARGE**-2:.2f} above {LARGE:g}.",
    ]
    return settings, rows, notes


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Reads a checkpoint.

    Args:
        path: A `.safetensors` file, or what `torch.save` wrote of a `state_dict`, or of a dictionary that holds one.

    Returns:
        What lies beside the first `running_var` in it; empty if there is none.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    candidates = [loaded, *loaded.values()] if isinstance(loaded, Mapping) else []
    for candidate in candidates:
        if isinstance(candidate, Mapping) and any(_is_statistics(key) for key in candidate):
            return candidate
    return {}


def _is_statistics(key: object) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] == STATISTICS


def _of_checkpoint(tensors: Mapping[str, Any], eps: float) -> Iterator[tuple[str, Coefficients]]:
    for key, var in tensors.items():
        gamma = tensors.get(f"{key.removesuffix(STATISTICS)}weight") if _is_statistics(key) else None
        if isinstance(gamma, Tensor) and gamma.shape == var.shape:
            scale = scale_of(gamma.double(), inverse_deviation(var.double(), eps))
            yield key.removesuffix(STATISTICS).removesuffix("."), Coefficients(tuple(scale.tolist()))


def _row(name: str, coefficients: Coefficients) -> dict[str, Any]:
    finite = np.isfinite(coefficients.values)
    values = [value if keep else None for value, keep in zip(coefficients.values, finite, strict=True)]
    return {"batch_norm": name, **_summary(coefficients), "values": values}


def _summary(coefficients: Coefficients) -> dict[str, Any]:
    magnitudes = coefficients.magnitudes
    lower, upper = np.quantile(magnitudes, (0.25, 0.75)).tolist() if magnitudes else (None, None)
    return coefficients.to_json() | {
        "lower": lower,
        "upper": upper,
        "below": sum(magnitude < SMALL for magnitude in magnitudes),
        "above": sum(magnitude > LARGE for magnitude in magnitudes),
    }


def tables(result: Result) -> Iterator[str]:
    """A line for each batch norm, and one for all of them.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    everything = _summary(Coefficients(tuple(_values(result)))) | {"batch_norm": "all"}
    everything["not_finite"] = sum(row["not_finite"] for row in result.rows)
    everything["channels"] = sum(row["channels"] for row in result.rows)
    columns = {
        "batch norm": "batch_norm",
        "channels": "channels",
        "smallest": "smallest",
        "1st quartile": "lower",
        "median": "median",
        "3rd quartile": "upper",
        "largest": "largest",
        f"below {SMALL:g}": "below",
        f"above {LARGE:g}": "above",
        "negative": "negative",
        "zero": "zero",
        "not finite": "not_finite",
    }
    yield table(
        tuple(columns),
        ([_cell(row[key]) for key in columns.values()] for row in (*result.rows, everything)),
    )


def _cell(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def _values(result: Result) -> list[float]:
    """All that are finite."""
    return [value for row in result.rows for value in row["values"] if value is not None]


def plot(result: Result) -> Figure:
    """The histogram of all magnitudes.

    Args:
        result: The benchmark's.

    Returns:
        A figure of one panel.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    values = np.array(_values(result))
    signs = {"positive": values[values > 0], "negative": -values[values < 0]}
    magnitudes = np.concatenate([*signs.values(), (SMALL, LARGE)])  # both thresholds are in the picture
    edges = np.geomspace(magnitudes.min() / 1.1, magnitudes.max() * 1.1, BINS + 1)
    labels = [f"{len(part)} {sign}" for sign, part in signs.items()]
    axes.hist(list(signs.values()), edges.tolist(), stacked=True, label=labels)
    for threshold in (SMALL, LARGE):
        axes.axvline(threshold, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="|gamma| / sqrt(var + eps)", ylabel="channels", ylim=(0, None))
    axes.legend(title=f"{np.count_nonzero(values == 0)} zero, not shown")
    return figure
