"""A limit on how long code of a model's may run while it is explored, whatever it does in that time."""

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from convbn_fx.fx.proxies import is_ours_or_torchs

T = TypeVar("T")


class OutOfTime(BaseException):  # not an Exception, which a forward may catch
    """Raised in code that ran out of time."""


def within(seconds: float, run: Callable[[], T]) -> T:
    """Calls a function, and raises `OutOfTime` in it once it has run for so long: where it is the model's own code.

    A loop that asks nothing of a guess gives nobody else a chance to end it, and a trace function would slow all code
    down: so a thread of its own watches.

    Args:
        seconds: How long it may run.
        run: What is called.

    Returns:
        What it returns.
    """
    watched, ended = threading.get_ident(), threading.Event()

    def watch() -> None:
        pause = seconds
        while not ended.wait(pause):
            pause = 0.05  # the code may catch it, and go on
            if _runs_code_of_a_model(watched):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(watched), ctypes.py_object(OutOfTime)
                )

    watcher = threading.Thread(target=watch, name="convbn_fx time limit", daemon=True)
    watcher.start()
    try:
        return run()
    finally:
        # What is still to be raised has to come here. Taking it back instead would, had it come already, leave CPython
        # 3.11 with a flag that it looks at for ever: whatever is traced after that, by a debugger say, never ends.
        while True:
            try:
                ended.set()
                watcher.join()
                for _ in range(4):
                    pass
                break
            except OutOfTime:
                continue


def _runs_code_of_a_model(thread: int) -> bool:
    """Whether a thread is in code that is neither ours nor PyTorch's, nor what these call of Python's own library."""
    frame = sys._current_frames().get(thread)  # kept for a moment alone: it keeps what is local to it
    while frame is not None:
        if is_ours_or_torchs(frame):
            return False
        name = str(frame.f_globals.get("__name__"))
        if name.partition(".")[0] not in sys.stdlib_module_names or name == "__main__":
            return True
        frame = frame.f_back
    return False
