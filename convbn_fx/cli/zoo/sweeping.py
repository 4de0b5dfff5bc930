"""Many models measured side by side: on this machine, or through joblib on a cluster of Dask or Ray."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import TYPE_CHECKING, Final

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


@dataclass(frozen=True)
class Limits:
    """What one model may take.

    Attributes:
        seconds: Wall time.
        memory: Bytes of resident memory; None for no limit.
    """

    seconds: float | None = 900.0
    memory: int | None = None


@dataclass(frozen=True)
class Cluster:
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
    """Measures models, each in a process of its own.

    Whatever happens to a model is a row. Workers that are lost are replaced; the models that they were at are measured
    again.

    Args:
        names: The models.
        settings: How each is measured.
        limits: What each may take.
        cluster: Where they run.

    Yields:
        One row for each model, as they come.

    Raises:
        ClusterError: The cluster cannot be reached, or its workers break down three times in a row without a new row.
    """
    todo = dict.fromkeys(names)
    fruitless = 0
    with _ENGINES[cluster.backend](cluster) as run:
        while todo:
            try:
                for row in run(_Job(settings, limits), list(todo)):
                    fruitless = 0
                    del todo[row.name]
                    yield row
            except Exception as error:  # whatever the workers' engine raises when it loses one
                fruitless += 1
                if fruitless == PATIENCE:
                    message = f"the workers broke down {PATIENCE} times in a row: {in_one_line(error)}"
                    raise ClusterError(message) from error


@dataclass(frozen=True)
class _Job:
    """What a worker does for one model."""

    settings: "Settings"
    limits: Limits

    def __call__(self, name: str, stop: Event | None = None) -> Row:
        from convbn_fx.cli.zoo.measuring import measure  # and PyTorch

        began = time.monotonic()
        limits = self.limits
        ending = call(
            measure, name, self.settings, timeout=limits.seconds, memory_limit=limits.memory, stop=stop
        )
        row: Row = ending.value
        if ending.status is not Status.PASS:
            row = Row(name=name, status=ending.status, level=self.settings.level, detail=ending.detail)
        return replace(row, seconds=time.monotonic() - began)


Runner = Callable[[_Job, Sequence[str]], Iterable[Row]]


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
    import joblib
    from distributed import Client

    own = {"n_workers": cluster.jobs, "threads_per_worker": 1}
    there = {"address": cluster.address} if cluster.address else own
    try:
        client = Client(**there, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler at {cluster.address or 'hand'}: {error}") from error
    with client:

        def run(job: _Job, names: Sequence[str]) -> Iterator[Row]:
            with joblib.parallel_config(backend="dask", client=client):
                parallel = joblib.Parallel(n_jobs=-1, return_as="generator_unordered", batch_size=1)
                yield from parallel(joblib.delayed(job)(name) for name in names)

        yield run


@contextmanager
def _ray(cluster: Cluster) -> Iterator[Runner]:
    import joblib
    import ray
    from ray.util.joblib import register_ray

    there = {"address": cluster.address} if cluster.address else {"num_cpus": cluster.jobs}
    try:
        ray.init(**there, log_to_driver=False)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {cluster.address}: {error}") from error
    try:
        register_ray()
        jobs = int(ray.cluster_resources()["CPU"])

        def run(job: _Job, names: Sequence[str]) -> Iterator[Row]:
            with joblib.parallel_config(backend="ray", n_jobs=jobs):
                # Of Ray, the rows come all together or not at all.
                for first in range(0, len(names), 4 * jobs):
                    some = names[first : first + 4 * jobs]
                    yield from joblib.Parallel(batch_size=1)(joblib.delayed(job)(name) for name in some)

        yield run
    finally:
        ray.shutdown()


_ENGINES = {Backend.LOCAL: _local, Backend.DASK: _dask, Backend.RAY: _ray}
