"""How a run is stopped by signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def graceful_stop(noticed: Callable[[], None]) -> Iterator[list[int]]:
    """In the block a first SIGINT or SIGTERM is put into the list, and `noticed` is called at once,
    within the signal's handler; a second one ends the process. Signals reach the main thread only:
    in another nothing changes."""
    received: list[int] = []

    def note(signum: int, _frame: Any) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        noticed()

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
