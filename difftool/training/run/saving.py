"""Checkpoints of a run: when they are written, and what becomes of a run where one cannot be.

A disk that fails once does not end a run: what could not be written is told and dropped, and comes
again at the next interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from difftool.errors import DifftoolError
from difftool.storage import runs
from difftool.training.options import RunOptions
from difftool.training.step import parallel
from difftool.training.step.loop import Trainer
from difftool.training.step.state import check_finite, save_state

FIRST = 60.0
"""Seconds of training after which the first checkpoint is written, at the latest: whether the disk
takes one is better known early."""
TRIES = 3
"""As often is tried what cannot wait for the next interval."""


class Saves:
    """The checkpoints of a run at work."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        options: RunOptions,
        notes: list[str],
        clock: Callable[[], float] = time.monotonic,
    ):
        """folder: of the run. notes: where it is told what could not be written."""
        self.trainer, self.folder, self.options, self.notes = trainer, folder, options, notes
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self._clock, self._told = clock, set[str]()
        self._since = self._seen = clock()  # what was done since then is lost in a kill
        self._seconds, self._first = 0.0, True  # that writing a checkpoint takes

    def due(self) -> bool:
        """Whether a checkpoint is to be written now; asked once a step.

        By steps, and by time: one begins while there is still time for it, should the next step
        take as long as the last.
        """
        now = self._clock()
        step, self._seen = now - self._seen, now
        limit = 60 * self.options.save_minutes
        if self._first and now - self._since >= min(FIRST, limit):
            return True
        late = now - self._since + step + self._seconds > limit
        return late or self.trainer.step % self.options.save_every == 0

    def save(self, tries: int = 1) -> bool:
        """Write a checkpoint of this step, unless there is one; False if the disk does not take it.

        ResourceError if there is a number that is not finite: nothing is saved over a good one.
        """
        if self.saved == self.trainer.step:
            return True
        check_finite(self.trainer)
        self._since, self._first = self._clock(), False
        trainer, keep = self.trainer, self.options.keep
        for _ in range(tries):
            made = self.attempt(
                f"the checkpoint of step {trainer.step}",
                lambda: save_state(trainer, self.folder, keep=keep),
            )
            if not parallel.max_over_ranks(not made):
                self.saved = trainer.step
                break
        self._seconds = self._clock() - self._since
        return self.saved == trainer.step

    @property
    def path(self) -> Path:
        """Of the checkpoint of this step."""
        return self.folder / runs.CHECKPOINTS / runs.step_name(self.trainer.step)

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Let `write` write something; whether it did. That it did not is told, and no reason to
        stop."""
        try:
            write()
            return True
        except OSError as error:
            reason = error.strerror or str(error)
        except DifftoolError as error:
            reason = error.why or error.what
        if (words := f"{what} could not be written: {reason}; going on") not in self._told:
            self._told.add(words)
            self.notes.append(words)
        return False
