"""How a run is stopped by signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from difftool.signals import Interrupted, handling

Stopping = Callable[[int, bool], None]
"""Called within a signal's handler, at once, with its number and whether it is the first."""


def interrupt_again(signum: int, first: bool) -> None:
    """After a first signal the step is finished and saved; a second one interrupts."""
    if not first:
        raise Interrupted(signum)


@contextmanager
def graceful_stop(stopping: Stopping) -> Iterator[list[int]]:
    """In the block SIGINT, SIGTERM and SIGHUP are put into the list."""
    received: list[int] = []

    def note(signum: int, _frame: Any) -> None:
        received.append(signum)
        stopping(signum, len(received) == 1)

    with handling(note, ("SIGINT", "SIGTERM", "SIGHUP")):
        yield received
