"""Many models measured side by side: on this machine, or on a cluster of Dask or Ray."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import TYPE_CHECKING, Final, NamedTuple

from convbn_fx.cli import Unusable
from convbn_fx.cli.zoo.isolation import call
from convbn_fx.cli.zoo.results import Row, Status, in_one_line

if TYPE_CHECKING:
    from convbn_fx.cli.zoo.measuring import Settings

#: How often in a row the workers may break down without a single new result.
PATIENCE: Final = 3


class Backend(StrEnum):
    """Where the jobs run."""

    LOCAL = "local"
    DASK = "dask"
    RAY = "ray"


class Limits(NamedTuple):
    """What one model may take: seconds of wall time, bytes of resident memory; None for no limit."""

    seconds: float | None = 900.0
    memory: int | None = None


class Cluster(NamedTuple):
    """Where the jobs run.

    Attributes:
        jobs: How many at a time; a cluster that is there already takes as many as it has threads.
        backend: On what.
        address: Of a cluster of Dask or Ray that is there; one is started on this machine by default.
    """

    jobs: int = 1
    backend: Backend = Backend.LOCAL
    address: str | None = None


class ClusterError(Unusable):
    """A cluster cannot be reached, or its workers break down; the message says which and why."""


def sweep(names: Iterable[str], settings: "Settings", limits: Limits, cluster: Cluster) -> Generator[Row]:
    """Measures models, each in a process of its own, and yields their rows as they come, whatever happens to them.

    Workers that are lost are replaced; the models that they were at are measured again.

    Raises:
        ClusterError: The cluster cannot be reached, or its workers break down three times in a row without a new row.
    """
    job = partial(_row, settings=settings, limits=limits)
    todo = dict.fromkeys(names)
    fruitless = 0
    with _ENGINES[cluster.backend](cluster) as run:
        while todo:
            try:
                for row in run(job, list(todo)):
                    fruitless = 0
                    del todo[row.name]
                    yield row
            except Exception as error:  # whatever the workers' engine raises when it loses one
                fruitless += 1
                if fruitless == PATIENCE:
                    message = f"the workers broke down {PATIENCE} times in a row: {in_one_line(error)}"
                    raise ClusterError(message) from error


def _row(name: str, *, settings: "Settings", limits: Limits, stop: Event | None = None) -> Row:
    """What a worker does for one model."""
    from convbn_fx.cli.zoo.measuring import measure  # and PyTorch

    began = time.monotonic()
    ending = call(measure, name, settings, timeout=limits.seconds, memory_limit=limits.memory, stop=stop)
    row: Row = ending.value
    if ending.status is not Status.PASS:
        row = Row(name=name, status=ending.status, level=settings.level, detail=ending.detail)
    return replace(row, seconds=time.monotonic() - began)


Job = Callable[..., Row]
Runner = Callable[[Job, Sequence[str]], Iterable[Row]]


@contextmanager
def _local(cluster: Cluster) -> Iterator[Runner]:
    """In threads, which wait for the models' own processes."""
    stop = Event()
    with ThreadPool(cluster.jobs) as pool:
        try:
            yield lambda job, names: pool.imap_unordered(partial(job, stop=stop), names)
        finally:
            stop.set()


@contextmanager
def _dask(cluster: Cluster) -> Iterator[Runner]:
    from distributed import Client, as_completed

    own = {"n_workers": cluster.jobs, "threads_per_worker": 1}
    there = {"address": cluster.address} if cluster.address else own
    try:
        client = Client(**there)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler at {cluster.address or 'hand'}: {error}") from error
    with client:

        def run(job: Job, names: Sequence[str]) -> Iterator[Row]:
            for future in as_completed(client.map(job, names, pure=False)):
                yield future.result()

        yield run


@contextmanager
def _ray(cluster: Cluster) -> Iterator[Runner]:
    import ray

    there = {"address": cluster.address} if cluster.address else {"num_cpus": cluster.jobs}
    try:
        ray.init(**there, log_to_driver=False)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {cluster.address}: {error}") from error

    def run(job: Job, names: Sequence[str]) -> Iterator[Row]:
        measured = ray.remote(lambda name: job(name))  # noqa: PLW0108 - Ray takes functions alone, no partial
        left = [measured.remote(name) for name in names]
        while left:
            (first,), left = ray.wait(left)
            yield ray.get(first)

    try:
        yield run
    finally:
        ray.shutdown()


_ENGINES = {Backend.LOCAL: _local, Backend.DASK: _dask, Backend.RAY: _ray}
