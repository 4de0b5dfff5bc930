"""A sweep into a results file: begun or resumed, watched, and ended with a summary."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from convbn_fx.zoo import results
from convbn_fx.zoo.measuring import Settings
from convbn_fx.zoo.results import Level, Row, Status
from convbn_fx.zoo.sweeping import Cluster, Limits, sweep


class Unusable(ValueError):
    """What was asked for makes no sense; the message says why, and what does."""


def begin(out: Path, resume: bool, level: Level) -> set[str]:
    """Opens a results file.

    Args:
        out: The file; made if it is not there.
        resume: Whether to go on with what an earlier sweep has left.
        level: How much of each model is going to be measured.

    Returns:
        Names of the models that have a row already.

    Raises:
        Unusable: The file is there and is not to be resumed, or holds rows of another level.
        ResultsError: What is there is no results file.
    """
    if not resume and out.exists() and out.read_bytes() != results.HEADER.encode():
        raise Unusable(f"{out} is there already; go on with it (--resume), or name another file (--out)")
    rows = results.resume(out)
    levels = {row.level for row in rows}
    if (level is Level.STRUCTURE and Level.NUMERIC in levels) or (
        level is Level.NUMERIC and levels == {Level.STRUCTURE}
    ):
        other = next(row for row in rows if row.level is not level)
        raise Unusable(
            f"{out} holds rows of --level {other.level}, such as {other.name}'s; name another file (--out)"
        )
    return {row.name for row in rows}


def fill(
    out: Path, names: list[str], settings: Settings, limits: Limits, cluster: Cluster, console: Console
) -> list[Row]:
    """Measures models and appends their rows to a results file, which is sorted in the end.

    Args:
        out: The file, begun.
        names: The models that have no row yet.
        settings: How each is measured.
        limits: What each may take.
        cluster: Where they run.
        console: Where progress is shown; models that do not pass are named there.

    Returns:
        All rows of the file.
    """
    if names:
        with _progress(console, len(names)) as advance:
            for row in sweep(names, settings, limits, cluster):
                results.append(out, row)
                advance(row)
    rows = results.read(out)
    results.write(out, rows)
    return rows


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Row], None]]:
    """A bar with the time left; where there is no terminal, a line now and then."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def advance(row: Row) -> None:
            nonlocal done
            done += 1
            if row.status is not Status.PASS:
                console.print(f"{row.name}: {row.status}: {row.detail}", markup=False)
            if not console.is_terminal and (done % 25 == 0 or done == total):
                console.print(f"{done} of {total} models")
            progress.update(task, advance=1, description=row.name)

        yield advance


def part_of(names: Iterable[str], shard: str) -> list[str]:
    """Every n-th model: neighbours in a library are of a size, so that the parts take about as long.

    Args:
        names: All models; one that is named twice counts once.
        shard: Which part of how many, such as `3/16`.

    Returns:
        The part's models, in order.

    Raises:
        Unusable: There is no such part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise Unusable(f"--shard {shard} makes no sense; give PART/PARTS, such as 3/16, from 1/16 to 16/16")
    return list(dict.fromkeys(names))[part - 1 :: parts]


_UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def memory_of(text: str) -> int:
    """Bytes from words.

    Args:
        text: Such as `8GB`, `512MiB`, or `8` for GB.

    Returns:
        The number of bytes.

    Raises:
        Unusable: It is no amount of memory.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise Unusable(
            f"--memory-limit {text} makes no sense; give a number of GB, or one with MB, GB, MiB or GiB"
        )
    return int(float(found[1]) * unit)
