"""Class labels: one folder a class, a prefix of file names, or EDM's dataset.json. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

from difftool.data.listing import MAX_METADATA, Listing
from difftool.data.phrases import count
from difftool.errors import InputError

EDM = "dataset.json"
FEW = 100
"""Classes, at most, that file names have to suggest before it is mentioned."""


def classes(listing: Listing, known: Collection[str] = ()) -> dict[str, str]:
    """Class names by picture; empty where there are none. `known`: those of the pictures that are
    trained on, if these are held out."""
    how = listing.config.labels
    if how == "prefix":
        return _prefixes(listing)
    if how == "folders":
        return _folders(listing)
    if how != "auto":
        return {}
    if f"{listing.root}{EDM}" in listing.files.sizes:
        return _edm(listing)
    tops = {name: listing.top(name) for name in listing.pictures}
    found = {name: top for name, top in tops.items() if top is not None}
    if known:
        return found
    if len(set(found.values())) < 2:
        _suggest(listing)
        return {}
    if len(found) < len(tops):
        n = len(tops) - len(found)
        listing.note(f"{count(n, 'image')} beside the folders: these are not read as classes")
        return {}
    return found


def _folders(listing: Listing) -> dict[str, str]:
    found = {}
    for picture in listing.pictures:
        top = listing.top(picture)
        if top is None:
            raise InputError(f"{picture} lies in no folder", hint="one folder a class is needed")
        found[picture] = top
    return found


def _prefixes(listing: Listing) -> dict[str, str]:
    """What stands before the first "_" of each name, as in OpenAI's guided-diffusion."""
    names = {picture: PurePosixPath(picture).name for picture in listing.pictures}
    plain = [picture for picture, name in names.items() if "_" not in name]
    if plain:
        raise InputError(f"{plain[0]} has no label", 'a name like "label_0001.png" has one')
    return {picture: name.split("_")[0] for picture, name in names.items()}


def _suggest(listing: Listing) -> None:
    """Mention labels in the file names, which are not read unasked."""
    names = [PurePosixPath(picture).name for picture in listing.pictures]
    prefixes = {name.split("_")[0] for name in names}
    if all("_" in name for name in names) and 1 < len(prefixes) <= min(FEW, len(names) // 2):
        listing.note(
            f"all names begin with one of {len(prefixes)} words and a _: "
            "--labels prefix reads them as classes"
        )


def _edm(listing: Listing) -> dict[str, str]:
    """Labels as EDM's and StyleGAN's dataset tools write them: {"labels": [["a/b.png", 3], ..]}."""
    name = f"{listing.root}{EDM}"
    content = listing.json(listing.text(name, MAX_METADATA), name)
    entries = content.get("labels") if isinstance(content, dict) else None
    if not entries:
        listing.note(f"{name} has no labels")
        return {}
    try:
        labels = {f"{listing.root}{file}": str(_whole(label)) for file, label in entries}
        for file, label in entries:
            if labels[f"{listing.root}{file}"] != str(_whole(label)):
                raise ValueError(f"{file} has several labels")
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is not of the form {{'labels': ...}}", str(error)) from None
    missing = [picture for picture in listing.pictures if picture not in labels]
    if missing:
        raise InputError(f"{name} has no label for {missing[0]}", f"{len(missing)} lack one")
    listing.note(f"labels from {name}")
    return {picture: labels[picture] for picture in listing.pictures}


def _whole(label: object) -> int:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"a label is a whole number, not {label!r}")
    return int(label)


def natural(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts class2 before class10."""
    parts = re.split(r"([0-9]+)", text)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], text
