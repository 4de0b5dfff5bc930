"""Makes the baselines of the project's own gate, in bench/expected, from the results of the whole zoo.

`make zoo` measures, `python -m bench.tools.baselines` picks: the structure of every architecture with batch norms, the
deepest apart; and in numbers one architecture of each family, the quickest apart, as the sample that CI has the time
for. Where little has changed, the command that `make gate` prints updates a baseline line by line.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import Level, Row, Status

ZOO = Path("bench/results/zoo.csv")
EXPECTED = Path("bench/expected")

#: Architectures with more batch norms than this take a quarter of all time, an eighth of them.
DEEP = 120

#: Processor seconds that the sample may take.
SAMPLE_SECONDS = 120.0


def structure(rows: Iterable[Row]) -> list[Row]:
    """Every row with a batch norm, without its numbers."""
    nothing = dict.fromkeys(results.ERRORS)
    return [
        replace(row, level=Level.STRUCTURE, **nothing)  # type: ignore[arg-type]
        for row in rows
        if row.batch_norms or row.fused
    ]


def one_of_each_family(rows: Iterable[Row]) -> list[Row]:
    """Of each family the row with the fewest parameters that has numbers; the quickest first."""
    smallest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.parameters or 0):
        toy = row.name.partition(":")[2].startswith("test_")
        if row.gradient_error is not None and not toy:
            smallest.setdefault(row.family, row)
    return sorted(smallest.values(), key=lambda row: row.seconds or 0.0)


def split(rows: list[Row], seconds: float) -> tuple[list[Row], list[Row]]:
    """The first rows, which together took no longer than so many seconds, and the others."""
    first: list[Row] = []
    for row in rows:
        seconds -= row.seconds or 0.0
        if seconds < 0:
            break
        first.append(row)
    return first, rows[len(first) :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the four baselines.

    Args:
        arguments: The command line's.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.tools.baselines", description=main.__doc__)
    parser.add_argument("--zoo", type=Path, default=ZOO, help=f"a numeric sweep's results; {ZOO} unless told")
    parser.add_argument("--expected", type=Path, default=EXPECTED, help=f"where to; {EXPECTED} unless told")
    options = parser.parse_args(arguments)
    rows = results.read(options.zoo)
    if unfit := [row.name for row in rows if row.status is not Status.PASS]:
        parser.error(f"no baseline is made of models that do not pass: {', '.join(unfit)}")
    sample, families = split(one_of_each_family(rows), SAMPLE_SECONDS)
    of_all = structure(rows)
    baselines = {
        "structure": [row for row in of_all if (row.batch_norms or 0) <= DEEP],
        "deep": [row for row in of_all if (row.batch_norms or 0) > DEEP],
        "sample": sample,
        "families": families,
    }
    for name, part in baselines.items():
        results.write(options.expected / f"{name}.csv", [replace(row, seconds=None) for row in part])
    return 0


if __name__ == "__main__":
    sys.exit(main())
