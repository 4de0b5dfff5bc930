"""A sweep into a results file: begun or resumed, held against other sweeps, watched while it runs."""

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
        ResultsError: What is there is no results file.
    """
    if not resume and out.exists() and out.read_bytes() != results.HEADER.encode():
        raise Unusable(f"{out} is there already; go on with it (--resume), or name another file (--out)")
    rows = results.resume(out)
    record = _record(settings)
    if rows and (before := _read_record(out)) is not None:
        for key in record.keys() | before.keys():
            if record.get(key) != before.get(key):
                raise Unusable(
                    f"{out} was begun with {key} {before.get(key)}, not {record.get(key)}; name another file (--out)"
                )
    _record_of(out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if retry and any(row.status in RETRIED for row in rows):
        rows = [row for row in rows if row.status not in RETRIED]
        results.write(out, rows)
    return {row.name for row in rows}


def _record_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _record(settings: Settings) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "torchvision", "timm", "convbn-fx"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    # JSON has no infinity, and a number of parameters that no model has will do.
    largest = settings.max_parameters if math.isfinite(settings.max_parameters) else None
    return {**asdict(settings), "max_parameters": largest, **versions}


def _read_record(out: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(_record_of(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # lost, or of a hand-made file: nothing to compare with
        return None
    return record


@contextmanager
def alone_with(out: Path) -> Iterator[None]:
    """Holds a results file for one sweep.

    Args:
        out: The file.

    Yields:
        While no other sweep can hold it.

    Raises:
        Unusable: Another sweep holds it.
    """
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


def memory_share(jobs: int) -> int:
    """Bytes that each of several jobs may take, so that the machine, or the container, keeps a tenth for itself.

    Args:
        jobs: How many run side by side.

    Returns:
        The share.
    """
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        total = min(total, int(limit.read_text()))
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
