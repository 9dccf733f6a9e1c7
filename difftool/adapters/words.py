"""Textual inversion (Gal et al. 2022): files of learned words, in every form that tools write.

diffusers    {word: [d] or [n,d]}, any number of words
A1111        {"string_to_param": {"*": [n,d]}, "name": word, ...}, or the safetensors {"emb_params"}
SDXL         {"clip_l": [n,768], "clip_g": [n,1280]}: a tensor a text encoder

A tensor alone is a word without a name. Torch-free; nothing in a file is ever run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from difftool.config.families import PUBLISHED
from difftool.config.layers import load_preset
from difftool.errors import InputError
from difftool.storage.tensor_file import open_source
from difftool.storage.tensors import FLOATS, Located

ENCODERS = ("clip_l", "clip_g")
"""SDXL's tensors: of CLIP-L, and of OpenCLIP bigG."""
NAMELESS = ("", "emb_params")


class Embedding(NamedTuple):
    """A word that was learned: one or more vectors for each text encoder."""

    path: Path
    names: tuple[str, ...]
    """Words of a prompt that stand for it: its names in the file, and the file's."""
    tables: dict[str, Located]
    """[d] or [n,d], by "clip_l" and "clip_g", or one by "" for models of one text encoder."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of its vectors, one a text encoder."""
        return tuple(place.info.shape[-1] for place in self.tables.values())


def read_embeddings(path: Path) -> list[Embedding]:
    """The words in a file; UsageError if there is no such file, InputError if it is malformed or of
    another kind."""
    source = open_source(path)
    params = {
        name: place
        for name, place in (source.tensors | source.beside).items()
        if re.match(r"string_to_param\.(.*\.)?[^.]+$", name) and place.info.dtype in FLOATS
    }
    found: list[tuple[str | None, dict[str, Located]]]
    if params:  # a torch module, in old files: its tensor is further inside
        found = [(source.metadata.get("name"), {"": place}) for place in params.values()]
    elif source.tensors.keys() <= set(ENCODERS):
        found = [
            (None, {name: source.tensors[name] for name in ENCODERS if name in source.tensors})
        ]
    else:
        words = source.tensors.items()
        found = [(None if name in NAMELESS else name, {"": place}) for name, place in words]
    for _, tables in found:
        _check(path, tables)
    stem = path.stem if len(found) == 1 else None
    return [
        Embedding(path, tuple(dict.fromkeys(n for n in (name, stem) if n)), tables)
        for name, tables in found
    ]


def _check(path: Path, tables: dict[str, Located]) -> None:
    """InputError unless tensors are vectors, as many of each."""
    counts = set()
    for place in tables.values():
        dtype, shape = place.info.dtype, place.info.shape
        if dtype not in FLOATS or not 1 <= len(shape) <= 2 or 0 in shape:
            why = f"{place.name or 'its tensor'} is {dtype} {list(shape)}, not [d] or [n, d]"
            raise InputError(f"{path} is no textual inversion", why)
        counts.add(shape[0] if len(shape) == 2 else 1)
    if len(counts) > 1:
        why = "its text encoders have unlike numbers of vectors"
        raise InputError(f"{path} does not fit together", why)


def family_of_widths(widths: tuple[int, ...]) -> str:
    """What text encoders of those widths belong to, in words."""
    known = {tuple(t.width for t in load_preset(f.preset).text): f.id for f in PUBLISHED.values()}
    sizes = " and ".join(map(str, widths))
    return f"{known.get(widths, 'a model')} of {sizes} numbers a token"
