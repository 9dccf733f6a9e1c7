"""How a run is stopped by signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Stopping = Callable[[int, bool], None]
"""Called within a signal's handler, at once, with its number and whether it is the first."""


def interrupt_again(signum: int, first: bool) -> None:
    """After a first signal the step is finished and saved; a second one interrupts."""
    if not first:
        raise KeyboardInterrupt


@contextmanager
def graceful_stop(stopping: Stopping) -> Iterator[list[int]]:
    """In the block SIGINT and SIGTERM are put into the list. They reach the main thread only: in
    another nothing changes."""
    received: list[int] = []

    def note(signum: int, _frame: Any) -> None:
        received.append(signum)
        stopping(signum, len(received) == 1)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
