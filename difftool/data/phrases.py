"""Counts and lists as words of messages. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence


def count(n: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def named(names: Sequence[str], most: int = 3) -> str:
    """ "a.png, b.png, c.png, ..." """
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
