"""How long work is shown while it goes on. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Progress = Callable[[str, int | None], AbstractContextManager[Any]]
"""(name of the work, how much it is) -> a context whose `update(done)` is called."""


class _Silent:
    def update(self, done: int) -> None:
        """Show nothing."""


def silent(name: str, total: int | None) -> AbstractContextManager[Any]:
    """Progress that is not shown."""
    return nullcontext(_Silent())
