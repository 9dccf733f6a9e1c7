"""Files of latents: x0 [C,h,w] of one picture in fp32, with the chunk that the picture carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.errors import InputError, check_file
from difftool.pipeline.model import Model
from difftool.sampling.metadata.chunk import from_chunk
from difftool.sampling.requests import Request
from difftool.storage.safetensors import load_tensors, read_header, save_tensors
from difftool.storage.strict_json import to_json

if TYPE_CHECKING:
    from torch import Tensor

KEY = "difftool.image"
"""Metadata key of the chunk."""


def latents_path(picture: Path) -> Path:
    """Where the latents of a picture of that name go."""
    return picture.with_suffix(".latents.safetensors")


def write_latents(
    path: Path, x0: Tensor, chunk: Mapping[str, Any] | None, overwrite: bool = False
) -> None:
    """Write x0 [C,h,w] of a picture whole or not at all."""
    header = {KEY: to_json(chunk)} if chunk else {}
    save_tensors(path, {"latents": x0.contiguous()}, header, overwrite=overwrite)


def read_latents(path: Path, model: Model) -> tuple[Tensor, Request]:
    """x0 [C,h,w] of a file, and the request of its picture, as far as it says, at x0's size; the
    files that it names are yet to be found.

    UsageError if there is no such file, InputError for one that does not fit the model.
    """
    check_file("file of latents", path)
    header = read_header(path)
    if "latents" not in header.tensors:
        listed = ", ".join(list(header.tensors)[:5])
        raise InputError(f"{path} holds no latents", f"its tensors are {listed or 'none'}")
    x0 = load_tensors(path, ["latents"])["latents"].float()
    codec = model.codec
    if x0.ndim != 3 or x0.shape[0] != codec.channels:
        why = f"shape {list(x0.shape)}, the model {model.name} has [{codec.channels},H,W]"
        raise InputError(f"the latents {path} do not fit", why)
    if not x0.isfinite().all():
        raise InputError(f"the latents {path} have non-finite values")
    size = (x0.shape[2] * codec.factor, x0.shape[1] * codec.factor)
    text = header.metadata.get(KEY)
    asked = Request() if text is None else from_chunk(text, str(path))
    if asked.settings.get("hires", 1) != 1:  # x0 is the second pass's, the size the first's
        size = tuple(asked.settings["size"])
    return x0, replace(asked, settings={**asked.settings, "size": size})
