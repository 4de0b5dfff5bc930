"""A limit on how long code of a model's may run while it is explored, whatever it does in that time."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from convbn_fx.proxies import is_ours_or_torchs


class OutOfTime(BaseException):  # not an Exception, which a forward may catch
    """Raised in code that ran out of time."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the code inside, once it has run for so long: where it is the model's own.

    A loop that asks nothing of a guess gives nobody else a chance to end it, and a trace function would slow all code
    down: so a thread of its own watches.

    Args:
        seconds: How long it may run.

    Yields:
        Nothing.
    """
    watched, ended, lock = threading.get_ident(), threading.Event(), threading.Lock()
    has_raised = threading.Event()

    def watch() -> None:
        pause = seconds
        while not ended.wait(pause):
            pause = 0.05  # the code may catch it, and go on
            if _runs_what_is_ours_or_torchs(watched):
                continue
            with lock:
                if not ended.is_set():
                    has_raised.set()
                    _raise_in(watched, OutOfTime)

    threading.Thread(target=watch, name="convbn_fx time limit", daemon=True).start()
    try:
        yield
    finally:
        with lock:
            ended.set()
            if has_raised.is_set():  # taking back what never was would have Python look for it from then on
                _raise_in(watched, None)


def _runs_what_is_ours_or_torchs(thread: int) -> bool:
    frame = sys._current_frames().get(thread)  # kept for a moment alone: it keeps what is local to it
    return frame is not None and is_ours_or_torchs(frame)


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Raises in another thread as soon as it runs Python; None takes back what has not been raised yet."""
    raised = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
