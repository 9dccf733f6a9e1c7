"""Signals that end work: which there are, who answers them, and the exit code. Torch-free."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal ends the work at once, as Ctrl-C does: what is half done is cleaned up."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__()
        self.signum = signum


def code_of(stop: BaseException | None) -> int:
    """The exit code after an interrupt."""
    return 128 + (stop.signum if isinstance(stop, Interrupted) else signal.SIGINT)


@contextmanager
def handling(answer: Callable[[int, Any], Any], names: Sequence[str]) -> Iterator[None]:
    """In the block the signals of those names are answered so, but for those that the system does
    not have and those that are ignored (nohup). They reach the main thread only: in another nothing
    changes."""
    there = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        there = []
    heard = [number for number in there if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """In the block SIGTERM and SIGHUP end the work as SIGINT does, and are put into the list."""
    received: list[int] = []

    def end(signum: int, _frame: Any) -> None:
        received.append(signum)
        raise Interrupted(signum)

    with handling(end, ("SIGTERM", "SIGHUP")):
        yield received
