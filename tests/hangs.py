"""Work that would never end is found; how long work takes is not measured here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 30
"""Of the processor. What is tested so takes milliseconds where it is linear, and hours where it is
not, so that a machine which is slow or busy fails no test."""


@contextmanager
def ends() -> Iterator[None]:
    start = time.process_time()
    yield
    used = time.process_time() - start
    assert used < SECONDS, f"{used:.0f} s of the processor"
