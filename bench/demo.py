"""Seven real architectures, fused: are outputs and gradients the same, how much memory and time does it save?

Run as `python -m bench.demo`; `--help` lists the options. The exit status is 1 if any output or gradient differs.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness.environment import describe
from bench.harness.measure import FULL, PHASES, SMOKE, Measurement, Sizes, measure
from bench.harness.models import MODELS
from bench.harness.table import render

#: The architectures that it fuses.
DEMO = ("resnet50", "mobilenet_v2", "googlenet", "densenet121", "efficientnet_b0", "regnety_002", "unet")

#: The table's width where no terminal tells how much there is.
WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the models and prints the table.

    Args:
        arguments: Of the command line; those of this process by default.

    Returns:
        The exit status: 1 if any output or gradient differs.
    """
    options = _parse(arguments)
    sizes = SMOKE if options.smoke else FULL
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    start = time.monotonic()
    measurements = _measure_all(options.only or DEMO, sizes, console)
    console.print(render(measurements))
    _explain(sizes, time.monotonic() - start, console)
    if options.json:
        record = {
            "environment": describe(),
            "sizes": asdict(sizes),
            "models": [asdict(m) for m in measurements],
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    failures = [f"{row.model}: {failure}" for row in measurements for failure in row.failures]
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument(
        "--only", action="append", choices=MODELS, metavar="NAME", help="this model alone; may be repeated"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all samples and the environment here"
    )
    return parser.parse_args(arguments)


def _measure_all(names: Sequence[str], sizes: Sizes, console: Console) -> list[Measurement]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        # A phase is counted when the next one begins, so the first announcement leads from -1 to 0.
        task = progress.add_task("", total=len(names) * len(PHASES), completed=-1)

        def announce(name: str, phase: str) -> None:
            progress.update(task, advance=1, description=f"{name}: {phase}")

        return [measure(name, MODELS[name](), sizes, announce) for name in names]


def _explain(sizes: Sizes, seconds: float, console: Console) -> None:
    def by(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))

    environment = describe()
    console.print(
        "Eval: convolution, then batch norm. Tune: fused at every call, by this library. Deploy: baked in once.\n"
        f"error: Tune against Eval, worst relative error in float64 at {by(sizes.comparing)}; of the output, and of any"
        " gradient by the input or a parameter.\n"
        f"MB saved: for the backward pass at {by(sizes.counting)}, float32; below, Tune's share of Eval's.\n"
        f"time: of forward and backward at {by(sizes.timing)}, float32, channels_last, in alternation; "
        "median ratio, and its quartiles.\n"
        f"Torch {environment['torch']}, {environment['threads']} threads of {environment['cpu']}; "
        f"{seconds:.0f} s in all.",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
