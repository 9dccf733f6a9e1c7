"""Conversions of models that are opened already, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftool.conversion.ledger import Ledger
from difftool.conversion.model import WriteOptions, convert_model
from difftool.formats import ModelSource

WITH = ("expected", "loras", "progress")


def convert(source: ModelSource, target: Path, kind: str, **options: Any) -> Ledger:
    """Write a model in another format; options are those of WriteOptions and of `convert_model`."""
    given = {name: options.pop(name) for name in WITH if name in options}
    return convert_model(source, target, kind, WriteOptions(**options), **given)
