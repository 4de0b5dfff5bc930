"""A sweep into a results file: begun or resumed, held against other sweeps, watched while it runs."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from convbn_fx.cli import Unusable
from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.measuring import Settings
from convbn_fx.cli.zoo.results import Row, Status
from convbn_fx.cli.zoo.sweeping import Cluster, Limits, sweep

#: What a larger limit, or a quieter machine, may change.
RETRIED = frozenset({Status.CRASH, Status.TIMEOUT, Status.MEMORY})


def begin(out: Path, settings: Settings, *, resume: bool = False, retry: bool = False) -> set[str]:
    """Opens a results file, and beside it one that says how its models are measured and with which versions.

    Args:
        out: The results file; made if it is not there.
        settings: How models are going to be measured.
        resume: Whether to go on with what an earlier sweep has left.
        retry: Whether models that crashed or were stopped at a limit then are to be measured again.

    Returns:
        Names of the models that have a row already.

    Raises:
        Unusable: The file is there and is not to be resumed, or its models were measured differently.
    """
    if not resume and out.exists() and out.read_bytes() != results.HEADER.encode():
        raise Unusable(f"{out} is there already; go on with it (--resume), or name another file (--out)")
    rows = results.resume(out)
    beside, record = out.with_name(f"{out.name}.json"), _record(settings)
    before = record
    if rows:
        with suppress(OSError, ValueError):  # lost, or of a hand-made file: nothing to compare with
            before = json.loads(beside.read_text(encoding="utf-8"))
    for key in record.keys() | before.keys():
        if record.get(key) != before.get(key):
            raise Unusable(
                f"{out} was begun with {key} {before.get(key)}, not {record.get(key)}; name another file (--out)"
            )
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if retry and any(row.status in RETRIED for row in rows):
        rows = [row for row in rows if row.status not in RETRIED]
        results.write(out, rows)
    return {row.name for row in rows}


def _record(settings: Settings) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "torchvision", "timm", "convbn-fx"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    # JSON has no infinity, and a number of parameters that no model has will do.
    largest = settings.max_parameters if math.isfinite(settings.max_parameters) else None
    return {**asdict(settings), "max_parameters": largest, **versions}


@contextmanager
def alone_with(out: Path) -> Iterator[None]:
    """Holds a results file for one sweep; raises `Unusable` if another one does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Unusable(f"another sweep is writing {out}; name another file (--out)") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def fill(
    out: Path, names: list[str], settings: Settings, limits: Limits, cluster: Cluster, console: Console
) -> list[Row]:
    """Measures the models that a file has no row of yet, each into it as it comes; returns all rows, sorted in the end.

    Models that do not pass are named on the console.
    """
    if names:
        measured = sweep(names, settings, limits, cluster)
        with _progress(console, len(names)) as advance, closing(measured):
            for row in measured:
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
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, count = progress.add_task("", total=total), itertools.count(1)

        def advance(row: Row) -> None:
            done = next(count)
            if row.status is not Status.PASS:
                console.print(f"{row.name}: {row.status}: {row.detail}", markup=False)
            if not console.is_terminal and (done % 25 == 0 or done == total):
                console.print(f"{done} of {total} models")
            progress.update(task, advance=1, description=row.name)

        yield advance


def part_of(names: Iterable[str], shard: str) -> list[str]:
    """The models of a part, such as `3/16`; one that is named twice counts once."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise Unusable(f"--shard {shard} makes no sense; give PART/PARTS, such as 3/16, from 1/16 to 16/16")
    # Neighbours in a library are of a size, so that with every n-th of them the parts take about as long.
    return list(dict.fromkeys(names))[part - 1 :: parts]


def memory_share(jobs: int) -> int:
    """Bytes that each of several jobs may take, so that the machine, or the container, keeps a tenth for itself."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no container, or one without a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(0.9 * total / jobs)


def processors() -> int:
    """How many processors the machine, or the container, gives this process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or one without a limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, math.ceil(quota / period)))
    return count


_UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def memory_of(text: str) -> int:
    """Bytes from words, such as `8GB`, `512MiB`, or `8` for GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise Unusable(
            f"--memory-limit {text} makes no sense; give a number of GB, or one with MB, GB, MiB or GiB"
        )
    return int(float(found[1]) * unit)
