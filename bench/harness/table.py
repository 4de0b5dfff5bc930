"""The demo's measurements as a table for people, narrow enough for a terminal of 80 columns."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from bench.harness.contenders import DEPLOY, EVAL, TUNE
from bench.harness.measure import Measurement
from bench.harness.timing import Ratio, ratio


def render(measurements: list[Measurement]) -> Table:
    """Builds a table with one row per model."""
    table = Table(box=box.SIMPLE_HEAD, leading=1, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("pairs\nfused", justify="right")
    table.add_column("batch norms\nleft", min_width=11)
    table.add_column("error:\noutput\ngrads", justify="right", no_wrap=True)
    table.add_column("MB saved:\nEval Tune\nDeploy", justify="right", no_wrap=True)
    table.add_column("time:\nTune\n/ Eval", justify="right", no_wrap=True)
    table.add_column("time:\nTune\n/ Deploy", justify="right", no_wrap=True)
    for measurement in measurements:
        saved, seconds = measurement.saved_bytes, measurement.step_seconds
        megabytes = " ".join(f"{saved[variant] / 1e6:.0f}" for variant in (EVAL, TUNE, DEPLOY))
        table.add_row(
            measurement.model,
            str(measurement.fused),
            _reasons(measurement.left),
            f"{measurement.output_error:.1e}\n{measurement.gradient_error:.1e}",
            f"{megabytes}\n{saved[TUNE] / saved[EVAL]:.1%}",
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
    return f"{ratio.median:.2f}\n{ratio.lower:.2f}-{ratio.upper:.2f}"
