"""The frames that pictures are trained in. Torch-free."""

from __future__ import annotations

from difftool.config.schema import Preset
from difftool.data.buckets import Buckets


def buckets_of(preset: Preset, size: int) -> Buckets | None:
    """The aspect buckets that a preset asks for, for pictures of about that size."""
    data = preset.data
    if not data.buckets:
        return None
    return Buckets(size, data.bucket_step or step_of(preset))


def step_of(preset: Preset) -> int:
    """What the sides of a model's pictures are multiples of: below it no level halves evenly."""
    return preset.codec.factor * preset.unet.multiple
