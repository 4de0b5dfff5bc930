"""One call in a process of its own, with limits on its time and its memory: nothing it does can harm the caller.

The process is forked from a server that has imported PyTorch, so that hundreds of them start in milliseconds each.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, NamedTuple

import psutil

from convbn_fx.cli.zoo.results import Status, in_one_line

#: Seconds between two looks at the clock, and at a running process's memory.
LOOK_EVERY: Final = 0.3

#: To start a process looks at how all others ended, which can be read only once.
_ONE_AT_A_TIME: Final = threading.Lock()


class Ending(NamedTuple):
    """How a call ended: with a value if its status is `pass`; else in `detail` is what happened, in one line."""

    value: Any = None
    status: Status = Status.PASS
    detail: str = ""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float | None = None,
    memory_limit: int | None = None,
    stop: threading.Event | None = None,
) -> Ending:
    """Calls a function in a process of its own; what it prints is lost.

    An exception that the function raises counts as a crash, and so does a process that cannot be started.

    Args:
        function: A module's function; it and its arguments and result are pickled.
        *arguments: What it is called with.
        timeout: Seconds after which the process is killed.
        memory_limit: Bytes of resident memory beyond which it is killed, it and its own children together.
        stop: Once this is set, it is killed, too.

    Returns:
        How it ended.
    """
    ours: Connection
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process: BaseProcess = _context().Process(target=_run, args=(theirs, function, arguments))
    try:
        with _ONE_AT_A_TIME:
            process.start()
        theirs.close()
        return _watch(process, ours, timeout, memory_limit, stop)
    except (OSError, EOFError) as error:
        return Ending(status=Status.CRASH, detail=in_one_line(error))
    finally:
        _end(process)
        ours.close()
        theirs.close()


@cache
def _context() -> Any:
    # Dask's workers are daemons, which multiprocessing allows no children; but these never outlive their parent.
    multiprocessing.current_process().daemon = False
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(["convbn_fx.cli.zoo.preloaded"])
    return context


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What the process does."""
    os.setsid()  # it and all that it starts are one group, which ends together
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    threading.Thread(target=_end_with_caller, args=(multiprocessing.parent_process(),), daemon=True).start()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    faulthandler.disable()
    try:
        ending = Ending(function(*arguments))
    except Exception as error:  # noqa: BLE001 - it is the function's, and told as such
        ending = Ending(status=Status.CRASH, detail=in_one_line(error))
    connection.send(ending)
    connection.close()


def _end_with_caller(caller: BaseProcess | None) -> None:
    """Ends this process's group with its caller, which is not its parent: that is the server of forks."""
    if caller is not None:
        caller.join()
    os.killpg(0, signal.SIGKILL)


def _watch(
    process: BaseProcess,
    connection: Connection,
    timeout: float | None,
    memory_limit: int | None,
    stop: threading.Event | None,
) -> Ending:
    end = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        wait([connection, process.sentinel], LOOK_EVERY)
        with _ONE_AT_A_TIME:
            code = process.exitcode  # read first: what a process that has ended did send is there by then
        if connection.poll():
            try:
                ending: Ending = connection.recv()
                return ending
            except EOFError:
                wait([process.sentinel], LOOK_EVERY)
        if code is not None:
            return Ending(status=Status.CRASH, detail=_how_it_died(code))
        if stop is not None and stop.is_set():
            return Ending(status=Status.CRASH, detail="stopped")
        if memory_limit is not None and (used := _resident(process)) > memory_limit:
            detail = f"{used / 1e9:.2f} GB resident, above {memory_limit / 1e9:.2f} GB"
            return Ending(status=Status.MEMORY, detail=detail)
        if time.monotonic() > end:
            return Ending(status=Status.TIMEOUT, detail=f"longer than {timeout:g} s")


def _how_it_died(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def _resident(process: BaseProcess) -> int:
    used = 0
    with contextlib.suppress(psutil.Error):  # it, or one of its children, has just ended
        root = psutil.Process(process.pid)
        for each in (root, *root.children(recursive=True)):
            used += each.memory_info().rss
    return used


def _end(process: BaseProcess) -> None:
    """Kills a process, and all that it has started, unless it never was."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there is no such group, or not yet
        os.killpg(process.pid, signal.SIGKILL)
    with _ONE_AT_A_TIME:
        process.kill()
        process.join()
