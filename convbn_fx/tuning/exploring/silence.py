"""What a forward prints and logs while it is explored is swallowed: in the thread that explores, and in no other."""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_LOCK: Final = threading.Lock()
_silent: Final[Counter[int]] = Counter()  # threads
_replaced: Final[list[tuple[Any, str, Any, Any]]] = []  # of what, which attribute, what it was, what it is


class _Stream:
    """A stream on which silent threads write in vain."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes, if the thread is not silent."""
        return len(text) if _silent[threading.get_ident()] else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _unless_silent(handle: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: None if _silent[threading.get_ident()] else handle(*args)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    found = getattr(owner, name)
    _replaced.append((owner, name, found, wrap(found)))
    setattr(owner, name, _replaced[-1][-1])


@contextmanager
def silence() -> Iterator[None]:
    """Swallows what this thread prints and logs."""
    thread = threading.get_ident()
    with _LOCK:
        if not _silent.total():
            _replace(sys, "stdout", _Stream)
            _replace(sys, "stderr", _Stream)
            _replace(logging.Logger, "handle", _unless_silent)
        _silent[thread] += 1
    try:
        yield
    finally:
        with _LOCK:
            _silent[thread] -= 1
            if not _silent.total():
                _silent.clear()
                while _replaced:
                    owner, name, found, replacement = _replaced.pop()
                    if getattr(owner, name) is replacement:  # else somebody has put another in its place
                        setattr(owner, name, found)
