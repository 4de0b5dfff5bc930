"""The demo's measurements as a table for people."""

from collections.abc import Mapping

from rich.table import Table

from bench.measure import Measurement
from bench.timing import Ratio, ratio
from bench.variants import DEPLOY, EVAL, TUNE


def render(measurements: list[Measurement]) -> Table:
    """Builds a table with one row per model."""
    table = Table(title="One model, three ways: Eval, Tune (this library), Deploy", title_style="bold")
    table.add_column("model")
    table.add_column("pairs\nfused", justify="right")
    table.add_column("batch norms left")
    table.add_column("output\nerror", justify="right")
    table.add_column("gradient\nerror", justify="right")
    table.add_column("saved for backward, MB\nEval -> Tune (Deploy)", justify="right")
    table.add_column("Tune saves\nof Eval", justify="right")
    table.add_column("step time Tune/Eval\nmedian (quartiles)", justify="right")
    table.add_column("step time Tune/Deploy\nmedian (quartiles)", justify="right")
    for measurement in measurements:
        saved, seconds = measurement.saved_bytes, measurement.step_seconds
        table.add_row(
            measurement.model,
            str(measurement.fused),
            _reasons(measurement.left),
            f"{measurement.output_error:.1e}",
            f"{measurement.gradient_error:.1e}",
            f"{saved[EVAL] / 1e6:.0f} -> {saved[TUNE] / 1e6:.0f} ({saved[DEPLOY] / 1e6:.0f})",
            f"{saved[TUNE] / saved[EVAL]:.1%}",
            _spread(ratio(seconds[TUNE], seconds[EVAL])),
            _spread(ratio(seconds[TUNE], seconds[DEPLOY])),
            style="bold red" if measurement.failures else None,
        )
    return table


def _reasons(left: Mapping[str, int]) -> str:
    return (
        "\n".join(f"{count} {reason.lower().replace('_', ' ')}" for reason, count in left.items()) or "none"
    )


def _spread(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
