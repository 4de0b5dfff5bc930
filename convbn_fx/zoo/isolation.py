"""One call in a process of its own, with limits on its time and its memory: nothing it does can harm the caller.

The process is forked from a server that has imported PyTorch, so that hundreds of them start in milliseconds each.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from convbn_fx.zoo.results import Status

#: Seconds between two looks at a running process's memory.
LOOK_EVERY = 0.1

#: What the server of forks imports; a library that is not installed is passed over.
PRELOADED = [
    "torch",
    "torchvision",
    "timm",
    "torch.fx",
    "torch._subclasses.fake_tensor",
    "convbn_fx.zoo.measuring",
]


@dataclass(frozen=True)
class Ending:
    """How a call ended.

    Attributes:
        value: What it returned, if `status` is `pass`.
        status: `pass`, or `crash`, `timeout`, `memory`.
        detail: What happened, in one line.
    """

    value: Any = None
    status: Status = Status.PASS
    detail: str = ""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float | None = None,
    memory_limit: int | None = None,
) -> Ending:
    """Calls a function in a process of its own.

    Args:
        function: A module's function; it and its arguments and result are pickled.
        *arguments: What it is called with.
        timeout: Seconds after which the process is killed.
        memory_limit: Bytes of resident memory beyond which it is killed, it and its own children together.

    Returns:
        How it ended. An exception that the function raises counts as a crash.
    """
    context = _context()
    # Dask's workers are daemons, which multiprocessing allows no children; but these never outlive their parent.
    multiprocessing.current_process().daemon = False
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="convbn_fx-") as folder, ours:
        log = Path(folder) / "output"
        process = context.Process(target=_run, args=(theirs, str(log), function, arguments))
        process.start()
        theirs.close()
        try:
            return _watch(process, ours, timeout, memory_limit, log)
        finally:
            _end(process)


@cache
def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        # Loky's workers carry a start method of Loky's own, which a new process would look for in vain.
        multiprocessing.set_start_method(methods[0], force=True)
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(PRELOADED)
    return context


@cache
def end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, however that came about; called again, it does nothing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(connection: Connection, log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What the process does."""
    with open(log, "wb", buffering=0) as output:  # noqa: PTH123 - one open file, for both streams
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    connection.send(function(*arguments))
    connection.close()


def _end_with(caller: BaseProcess | None) -> None:
    """Ends this process with its caller, which is not its parent: that is the server of forks."""
    if caller is not None:
        caller.join()
    os._exit(1)


def _watch(
    process: BaseProcess,
    connection: Connection,
    timeout: float | None,
    memory_limit: int | None,
    log: Path,
) -> Ending:
    end = time.monotonic() + timeout if timeout is not None else None
    while True:
        if wait([connection], LOOK_EVERY):
            try:
                return Ending(connection.recv())
            except EOFError:
                process.join()
                return Ending(status=Status.CRASH, detail=_how_it_died(process, log))
        if memory_limit is not None and (used := _resident(process)) > memory_limit:
            return Ending(
                status=Status.MEMORY,
                detail=f"{used / 1e9:.2f} GB resident, above {memory_limit / 1e9:.2f} GB",
            )
        if end is not None and time.monotonic() > end:
            return Ending(status=Status.TIMEOUT, detail=f"longer than {timeout:g} s")


def _how_it_died(process: BaseProcess, log: Path) -> str:
    code = process.exitcode or 0
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((text.strip() for text in reversed(lines) if text.strip()), "")
    if code >= 0:
        return f"exit status {code}: {last}"[:300]
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}"


def _resident(process: BaseProcess) -> int:
    try:
        root = psutil.Process(process.pid)
        return sum(each.memory_info().rss for each in (root, *root.children(recursive=True)))
    except psutil.Error:  # it has just ended
        return 0


def _end(process: BaseProcess) -> None:
    """Kills a process and all that it has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    if process.is_alive():
        process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue
    process.join()
