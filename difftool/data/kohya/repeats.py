"""Folders named REPEATS_WORDS, and regularisation pictures. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from difftool.data.captions import Caption
from difftool.data.listing import Listing
from difftool.data.phrases import count, named
from difftool.errors import InputError

REPEATS = re.compile(r"([0-9]{1,6})_(.+)")
REGULAR = re.compile(r"reg(ulari[sz]ation)?([ _-](images?|data|dir|imgs?))?", re.I)
"""Names of folders of regularisation pictures."""
MANY = 1000
"""As many repeats are rather a year, or a number of something else."""
MOST = 10_000_000
"""Samples in an epoch."""


@dataclass
class Tally:
    """How often pictures are repeated, and which are there for regularisation."""

    repeats: dict[str, int]
    regular: list[str]


def folders(listing: Listing, found: dict[str, Caption]) -> Tally:
    """Repeats from folders named 10_red fox; the words caption what has no caption."""
    places = {picture: _place(listing, picture) for picture in listing.pictures}
    if not any(places.values()):
        return Tally({}, [])
    repeats: dict[str, int] = {}
    regular: list[str] = []
    plain: set[str] = set()
    used: dict[str, int] = {}
    for picture, name in places.items():
        above = listing.folders(picture)
        match = REPEATS.fullmatch(name) if name else None
        if match:
            repeats[picture] = used[match[0]] = int(match[1])
            if picture not in found and int(match[1]):
                found[picture] = Caption((match[2].strip(),), "folder names")
        else:
            repeats[picture] = 1
            plain.add(f'"{above[0]}"' if above else "the top folder")
        if any(map(REGULAR.fullmatch, above)):
            regular.append(picture)
    shown = sorted(f'"{name}" x{n}' for name, n in used.items())
    listing.note(f"repeats by folder, as kohya's: {named(shown, 20)} (--labels folders: classes)")
    if plain:
        listing.note(f"no repeats in the name of {', '.join(sorted(plain))}: 1 is taken")
    if zero := [picture for picture, n in repeats.items() if n == 0]:
        listing.note(f"0 repeats: {count(len(zero), 'image')} not used")
    if high := [name for name, n in used.items() if n >= MANY]:
        listing.note(f'"{high[0]}" is read as {used[high[0]]} repeats: rename it if that is not so')
    return Tally(repeats, regular)


def _place(listing: Listing, picture: str) -> str | None:
    """The innermost folder of a picture whose name says how often it is repeated."""
    return next(filter(REPEATS.fullmatch, reversed(listing.folders(picture))), None)


def balance(tally: Tally, listing: Listing) -> None:
    """Repeat regularisation pictures until there are as many samples of them as of the others.

    As kohya does with a prior loss weight of 1, at which they are samples like any others.
    """
    if (total := sum(tally.repeats.values())) > MOST:
        why = f"{total:,} samples in an epoch, the limit is {MOST:,}"
        raise InputError(f"{listing.audit.source} repeats its pictures too often", why)
    chosen = set(tally.regular)
    wanted = sum(n for picture, n in tally.repeats.items() if picture not in chosen)
    if not chosen:
        return
    if not wanted:
        raise InputError(f"{listing.audit.source} has regularisation images alone")
    given = {picture: max(tally.repeats[picture], 1) for picture in sorted(chosen)}
    samples, first = 0, True
    used = dict.fromkeys(given, 0)
    while samples < wanted:
        for picture, n in given.items():
            more = min(n if first else 1, wanted - samples)
            used[picture] += more
            samples += more
        first = False
    tally.repeats |= used
    left = sum(n == 0 for n in used.values())
    listing.note(
        f"{count(len(chosen), 'regularisation image')} trained on like the others, repeated to "
        f"{count(wanted, 'sample')}, as many as there are of those"
        + (f"; {left} not used, as there are too many" if left else "")
    )
