"""Captions in files beside the pictures, and files that only look like some. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from difftool.data.captions import Caption, Syntax
from difftool.data.listing import MAX_CAPTION, Listing, stem
from difftool.data.phrases import count, named
from difftool.errors import InputError

SIDECARS = (".txt", ".caption")
"""Endings of files that hold the caption of the picture beside them; the first there is goes."""
FOLDERS = frozenset("caption captions text texts txt tag tags prompt prompts".split())
"""Folders of such files, in place of a folder of the pictures, or in it."""
TEXTS = (*SIDECARS, ".cap", ".tag", ".tags", ".prompt", ".json", ".yaml", ".yml", ".xml", ".text")
"""Endings of files that may say something about the picture of their name."""
TABLES = re.compile(
    r"(meta(_?data)?([_-]\w+)*|captions?|prompts?|texts?)"
    r"\.(json\d?|jsonl|jsonlines|ndjson|csv|tsv|parquet|xlsx|txt)(\.txt)?",
    re.I,
)
"""Names of files that hold captions, most likely."""
OTHER_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".xlsx")
PROSE = re.compile(r"(read.?me|licen[cs]e|notes?|requirements|change.?log|classes).*", re.I)
"""Names of texts about the whole set."""


def sidecars(
    listing: Listing,
    syntax: Syntax,
    taken: Mapping[str, Caption],
    suffixes: Sequence[str] = SIDECARS,
) -> dict[str, Caption]:
    """Captions from files beside the pictures, of the first suffix that there is: x.txt, x.TXT or
    x.png.txt for x.png, or one of these in a folder of captions."""
    found: dict[str, Caption] = {}
    both, beaten, cut, empty, apart = [], [], [], [], []
    texts_by_stem = _texts(listing, suffixes)
    folders = {part for name in texts_by_stem for part in name.split("/")[:-1]}
    folders = {part for part in folders if part.lower() in FOLDERS}
    for picture in listing.pictures:
        beside = _beside(picture, texts_by_stem)
        if not beside and (beside := _apart(picture, texts_by_stem, folders)):
            apart.append(beside[0])
        if not beside:
            continue
        beside.sort(key=lambda name: suffixes.index(PurePosixPath(name).suffix.lower()))
        listing.seen.update(beside)
        if len(beside) > 1:
            both.append(picture)
        if picture in taken:
            beaten.append(picture)
            continue
        lines = listing.text(beside[0], MAX_CAPTION).splitlines()
        texts = tuple(line for raw in lines if (line := raw.strip()))
        if len(texts) > 1 and not syntax.wildcards:
            cut.append(picture)
            texts = texts[:1]
        if texts:
            found[picture] = Caption(texts, PurePosixPath(beside[0]).suffix.lower())
        else:
            empty.append(beside[0])
    if both:
        listing.note(
            f"{count(len(both), 'image')} with {' and '.join(suffixes)}: {suffixes[0]} is used"
        )
    if beaten:
        listing.note(
            f"{count(len(beaten), 'image')} with a caption in metadata and beside it: "
            "the metadata is used"
        )
    if cut:
        listing.note(
            f"{count(len(cut), 'caption')} of several lines: the first is used, wildcards are off"
        )
    if empty:
        listing.note(f"{count(len(empty), 'caption file')} without text: {named(empty)}")
    if apart:
        listing.note(f"captions from a folder beside the pictures: {named(apart)}")
    return found


def _texts(listing: Listing, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """The files that may be captions by their names without the suffix, which may be in capitals
    where none is in small letters."""
    texts: dict[str, dict[str, str]] = {}
    for name in listing.files.sizes:
        suffix = PurePosixPath(name).suffix
        if suffix.lower() in suffixes:
            of_stem = texts.setdefault(stem(name), {})
            if suffix.islower() or suffix.lower() not in of_stem:
                of_stem[suffix.lower()] = name
    return {name: list(found.values()) for name, found in texts.items()}


def _beside(picture: str, texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts of a picture, x.txt before x.png.txt."""
    return list(texts.get(stem(picture)) or texts.get(picture) or ())


def _apart(picture: str, texts: Mapping[str, Sequence[str]], folders: Collection[str]) -> list[str]:
    """The same in a folder of captions: images/a/x.png has captions/a/x.txt, images/captions/..."""
    *above, file = picture.split("/")
    for folder in sorted(folders):
        places = [[*above[:i], folder, *above[i + 1 :], file] for i in range(len(above))]
        for place in ([*above, folder, file], *reversed(places)):
            if found := _beside("/".join(place), texts):
                return found
    return []


def overlooked(
    listing: Listing, every: Collection[str], captioned: bool, refuse: bool = False
) -> None:
    """Say which files look like captions and are not read, and why; and which pictures share a
    caption. every: pictures of any kind, unusable ones included. refuse: InputError for a table
    that could be meant, where there are no captions at all."""
    stems: dict[str, list[str]] = {}
    for name in every:
        stems.setdefault(stem(name), []).append(name)
    bases = {PurePosixPath(name).name for name in stems}
    folders = {name[: name.rfind("/") + 1] for name in listing.pictures}
    lone, beside, elsewhere = [], [], []
    wanted, every = listing.config.labels in ("auto", "text"), {*every}
    for name in listing.around:
        suffix = PurePosixPath(name).suffix.lower()
        base = PurePosixPath(name).name
        if name in listing.seen or name in every:
            continue
        if TABLES.fullmatch(base):
            if not wanted:
                listing.note(f"{name} is ignored: --labels {listing.config.labels}")
                continue
            if refuse and not captioned:
                hint = "call it metadata.jsonl or metadata.csv, or give --labels none"
                raise InputError(f"{name} is not read, and there are no other captions", hint=hint)
            listing.note(f"{name} is ignored: metadata.jsonl, .csv, .tsv and .parquet are read")
        elif not wanted:
            continue
        elif suffix in OTHER_TABLES:
            listing.note(f"{name} is not read: only tables called metadata are")
        elif suffix not in TEXTS or PROSE.fullmatch(base):
            continue
        elif stem(name) in stems or stem(stem(name)) in stems:
            beside.append(name)
        elif PurePosixPath(stem(name)).name in bases:
            elsewhere.append(name)
        elif suffix in SIDECARS and name[: name.rfind("/") + 1] in folders:
            lone.append(name)
    if lone:
        listing.note(f"{count(len(lone), 'caption file')} without a picture: {named(lone)}")
    if beside:
        what = f"{count(len(beside), 'file')} called like pictures, not read: {named(beside)}"
        listing.note(f"{what} ({' and '.join(SIDECARS)} are)")
    if elsewhere:
        what = f"{count(len(elsewhere), 'file')} called like pictures of other folders"
        listing.note(f"{what}, not read: {named(elsewhere)} (put them beside the pictures)")
    shared = [name for names in stems.values() if len(names) > 1 for name in names]
    if shared and captioned:
        listing.note(
            f"{count(len(shared), 'image')} share a name but for its suffix: {named(shared)}"
        )


def describe_syntax(listing: Listing, found: dict[str, Caption], syntax: Syntax) -> None:
    """Say what is drawn anew each time."""
    several = sum(len(caption.texts) > 1 for caption in found.values())
    if several:
        listing.note(f"{count(several, 'image')} with several captions: one is drawn each time")
    if syntax.wildcards:
        varied = sum(any(map(Syntax.varied, caption.texts)) for caption in found.values())
        if varied:
            listing.note(
                f"{count(varied, 'image')} with {{a|b}} in the caption: one is drawn each time"
            )
    if syntax.shuffle:
        kept = f", the first {syntax.keep} stay" if syntax.keep else ""
        listing.note(f"tags between commas are shuffled each time{kept}")
