"""How a run is stopped by signals: after a step, or within work that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from difftool.progress import Progress
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


class Abandoned(Exception):
    """A signal came in work that is no step; the work is left as it is."""


def heeding(progress: Progress, signals: Sequence[int]) -> Progress:
    """Progress that raises Abandoned at the first piece of work after a signal."""

    class Display:
        def __init__(self, shown: Any):
            self.shown = shown

        def update(self, done: float) -> None:
            self.shown.update(done)
            if signals:
                raise Abandoned

    @contextmanager
    def shown(name: str, total: int | None) -> Iterator[Display]:
        with progress(name, total) as display:
            yield Display(display)

    return shown
