"""Dataset folders in the layouts that other tools use, told apart by what is in them.

In this order: captions in metadata.jsonl or metadata.csv beside or above the pictures (Hugging
Face), folders named REPEATS_WORDS (kohya), a .txt or .caption beside a picture, labels in
dataset.json (EDM), one folder a class, and nothing, for unconditional training. Whatever is found,
assumed or left out is in the audit.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difftool.data.archive import Files, open_files
from difftool.data.dataset import MEMORY_CAP, Audit, Dataset, Kind, Skipped, count
from difftool.data.images import MAX_BYTES, SUFFIXES, read_picture, square, to_uint8
from difftool.errors import InputError, UsageError, suggestion

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Labels = Literal["auto", "none", "text", "folders", "prefix"]
"""Where labels come from: found out, nowhere, captions, folder names, or the part of a file name
before its first "_" (OpenAI's guided-diffusion)."""
LABELS: tuple[Labels, ...] = ("auto", "none", "text", "folders", "prefix")

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt", "additional_feature")
"""Columns of the metadata that captions are looked for in, in this order."""
SIDECARS = (".txt", ".caption")
SPLITS = {"train", "test", "val", "valid", "validation"}
MAX_CAPTION = 64 << 10
MAX_METADATA = 1 << 30
MISNAMED = re.compile(r"metadata\.(json|json1|jsonlines|ndjson|jsonl\.txt|csv\.txt|parquet)", re.I)
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".psd", ".svg", ".tga", ".ico", ".jp2", ".exr", ".hdr")
)
"""Pictures that are not read; files of other kinds (notes, scripts) go unmentioned."""
BAD_SHARE, BAD_FEW = 0.1, 3
"""Training stops if more than this share, and more than this few, of the pictures are unusable."""


class Caption(NamedTuple):
    """The captions of one picture, one of which is drawn each time, and where they come from."""

    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Row:
    """One picture of the set."""

    name: str
    bytes: int
    size: tuple[int, int]
    caption: Caption | None = None
    label: int | None = None
    repeats: int = 1


def open_folder(
    where: Path,
    *,
    labels: Labels = "auto",
    caption_column: str | None = None,
    allow_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FolderDataset:
    """The dataset in a folder, .zip or .tar, every picture decoded once to know that it can be.

    UsageError if it is missing; InputError if it holds no usable picture, if more than a tenth (and
    more than three) of them are unusable, unless `allow_bad`, and if captions cannot be read.
    """
    if labels not in LABELS:
        raise UsageError(f'there are no labels by "{labels}"', hint=suggestion(labels, LABELS))
    files = open_files(where)
    audit = Audit(str(where), skipped=list(files.skipped))
    names = _pictures(files, audit)
    sizes = _decode_all(files, names, audit, progress)
    _check_bad(audit, len(sizes), allow_bad)

    listing = _Listing(files, list(sizes), audit)
    found = _captions(listing, caption_column) if labels in ("auto", "text") else {}
    repeats = {}
    if labels in ("auto", "text"):
        repeats = _kohya(listing, found)
    classes: dict[str, str] = {}
    if found:
        kind: Kind = "text"
    elif labels == "text":
        raise InputError(f"{where} has no captions", hint="put a .txt beside each picture")
    else:
        _check_misnamed(listing, ignore=labels != "auto")
        classes = _classes(listing, labels)
        kind = "class" if classes else "none"
    order = sorted(set(classes.values()), key=_natural)
    rows = [
        Row(
            name,
            files.sizes[name],
            size,
            found.get(name),
            order.index(classes[name]) if classes else None,
            repeats.get(name, 1),
        )
        for name, size in sizes.items()
    ]
    _describe(audit, rows, kind, order)
    return FolderDataset(files, rows, kind, tuple(order), audit)


class FolderDataset(Dataset):
    """Pictures in files. A sample is a picture, or one of its repeats."""

    def __init__(
        self, files: Files, rows: Sequence[Row], kind: Kind, classes: tuple[str, ...], audit: Audit
    ):
        self.files, self.rows, self.kind, self.classes, self.audit = (
            files, rows, kind, classes, audit,
        )  # fmt: skip
        self.native_size = median_low(min(row.size) for row in rows)
        self._samples = [number for number, row in enumerate(rows) for _ in range(row.repeats)]
        self._held: Tensor | None = None

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def fingerprint(self) -> str:
        """Hash of names, file sizes, captions, labels and repeats."""
        digest = hashlib.sha256()
        for row in self.rows:
            texts = row.caption.texts if row.caption else None
            line = [row.name, row.bytes, row.size, texts, row.label, row.repeats]
            digest.update(json.dumps(line).encode() + b"\n")
        return digest.hexdigest()

    def prepare(self, size: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Hold all pictures at this size in memory if they fit; an epoch then decodes nothing."""
        import torch

        if self._held is not None and self._held.shape[-1] == size:
            return
        self._held = None
        if len(self.rows) * 3 * size * size > MEMORY_CAP:
            return
        held = torch.empty(len(self.rows), 3, size, size, dtype=torch.uint8)
        numbers = range(len(self.rows))
        for number, picture in enumerate(_parallel(lambda n: self._read(n, size), numbers)):
            held[number] = picture
            if progress:
                progress(number + 1, len(self.rows))
        self._held = held

    def images(
        self,
        indices: Sequence[int],
        size: int,
        flips: Sequence[bool] | None = None,
        keys: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures, short side resized and centre cut out, uint8 [B,3,size,size]."""
        import torch

        numbers = [self._samples[index] for index in indices]
        if self._held is None or self._held.shape[-1] != size:
            self.prepare(size)
        if self._held is not None:
            batch = self._held[torch.tensor(numbers)]
        else:
            batch = torch.stack(list(_parallel(lambda n: self._read(n, size), numbers)))
        if flips is not None:
            chosen = torch.tensor(list(flips), dtype=torch.bool)
            batch[chosen] = batch[chosen].flip(-1)
        return batch

    def captions(self, indices: Sequence[int], keys: Sequence[int] | None = None) -> list[str]:
        """Captions; of several for one picture the key decides."""
        keys = [0] * len(indices) if keys is None else keys
        texts = []
        for index, key in zip(indices, keys, strict=True):
            caption = self.rows[self._samples[index]].caption
            choices = caption.texts if caption else ("",)
            digest = hashlib.blake2b(f"{index}/{int(key)}".encode(), digest_size=8).digest()
            texts.append(choices[int.from_bytes(digest) % len(choices)])
        return texts

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The class labels, indices into `classes`."""
        if self.kind != "class":
            return super().labels(indices)
        return [label for i in indices if (label := self.rows[self._samples[i]].label) is not None]

    def _read(self, number: int, size: int) -> Tensor:
        name = self.rows[number].name
        try:
            image = _read(self.files, name)[0]
        except InputError as error:
            hint = "it could be read when the run began; if it is gone for good, start again"
            raise InputError(f"cannot read {name} any more", error.why, hint) from None
        return to_uint8(square(image, size))


# --- pictures --------------------------------------------------------------------------------


def _pictures(files: Files, audit: Audit) -> list[str]:
    """Names that look like pictures to train on."""
    names = [name for name in files.sizes if PurePosixPath(name).suffix.lower() in SUFFIXES]
    top = {name.split("/")[0] for name in names}
    if "train" in top and top <= SPLITS and all("/" in name for name in names):
        if others := sorted(top - {"train"}):
            audit.notes.append(f"train/ is used, {', '.join(f'{t}/' for t in others)} left alone")
        names = [name for name in names if name.startswith("train/")]
    masks = [n for n in names if PurePosixPath(n).stem.endswith("-masklabel")]
    if masks:
        audit.notes.append(f"{count(len(masks), 'mask')} (-masklabel) left out")
    foreign = (n for n in files.sizes if PurePosixPath(n).suffix.lower() in FOREIGN)
    audit.skipped += [Skipped(name, "unsupported format") for name in foreign]
    return sorted(set(names) - set(masks))


def _read(files: Files, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    try:
        data = files.read(name, MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {name}", error.strerror or str(error)) from None
    return read_picture(data)


def _decode_all(
    files: Files,
    names: Sequence[str],
    audit: Audit,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[int, int]]:
    """Sizes of the pictures that can be decoded; the others are added to the audit."""

    def decode(name: str) -> tuple[tuple[int, int], tuple[str, ...]] | str:
        try:
            image, notes = _read(files, name)
        except InputError as error:
            return error.why or error.what
        return image.size, notes

    sizes: dict[str, tuple[int, int]] = {}
    changes: Counter[str] = Counter()
    for number, (name, result) in enumerate(zip(names, _parallel(decode, names), strict=True)):
        if isinstance(result, str):
            audit.skipped.append(Skipped(name, result))
        else:
            sizes[name] = result[0]
            changes.update(result[1])
        if progress:
            progress(number + 1, len(names))
    audit.notes += [f"{what}: {count(n, 'image')}" for what, n in sorted(changes.items())]
    return sizes


def _parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """map() on all cores, in order; decoders let go of Python's lock."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 1024):  # so that results do not pile up
            yield from pool.map(function, items[start : start + 1024])


def _check_bad(audit: Audit, good: int, allow_bad: bool) -> None:
    bad = len(audit.skipped)
    few = "; ".join(f"{name}: {reason}" for name, reason in audit.skipped[:BAD_FEW])
    if not good:
        why = few or f"looked for {', '.join(sorted(SUFFIXES))}"
        raise InputError(f"{audit.source} has no usable picture", why)
    if not allow_bad and bad > BAD_FEW and bad > BAD_SHARE * (good + bad):
        what = f"{bad} of {good + bad} pictures in {audit.source} are unusable"
        raise InputError(what, few, "repair or remove them")


# --- captions --------------------------------------------------------------------------------


class _Listing:
    """The usable pictures among the files."""

    def __init__(self, files: Files, pictures: list[str], audit: Audit):
        self.files, self.pictures, self.audit = files, pictures, audit
        self.root = "train/" if all(name.startswith("train/") for name in pictures) else ""

    def text(self, name: str, limit: int) -> str:
        """A text file's contents; InputError if it is not sound text within the limit."""
        try:
            data = self.files.read(name, limit)
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"cannot read {name}", error.strerror) from None
        except UnicodeDecodeError as error:
            hint = "save it as UTF-8"
            raise InputError(f"{name} is not UTF-8 text", f"byte {error.start}", hint) from None
        if len(data) > limit:
            raise InputError(f"{name} is too large", f"the limit is {limit} bytes")
        if "\0" in text:
            raise InputError(f"{name} is not text", "it has a NUL character")
        return text

    def top(self, name: str) -> str | None:
        """The first folder of a picture's path; None for one that lies in no folder."""
        first, slash, _ = name.removeprefix(self.root).partition("/")
        return first if slash else None


def _captions(listing: _Listing, column: str | None) -> dict[str, Caption]:
    """Captions by picture, from metadata files, else from files beside the pictures."""
    found = {}
    for name in listing.files.sizes:
        if PurePosixPath(name).name in METADATA and name.startswith(listing.root):
            found |= _metadata(listing, name, column)
    both = 0
    for picture in listing.pictures:
        stem = str(PurePosixPath(picture).with_suffix(""))
        beside = [stem + s for s in SIDECARS if stem + s in listing.files.sizes]
        both += len(beside) > 1
        if beside and picture not in found:
            text = listing.text(beside[0], MAX_CAPTION)
            lines = tuple(line.strip() for line in text.splitlines() if line.strip())
            if lines:
                found[picture] = Caption(lines, PurePosixPath(beside[0]).suffix)
    if both:
        listing.audit.notes.append(f"{count(both, 'image')} with .txt and .caption: .txt is used")
    several = sum(len(caption.texts) > 1 for caption in found.values())
    if several:
        listing.audit.notes.append(
            f"{count(several, 'image')} with several captions: one is drawn each time"
        )
    return found


def _metadata(listing: _Listing, name: str, column: str | None) -> dict[str, Caption]:
    """Captions from one metadata file; its file names are relative to the file itself."""
    text = listing.text(name, MAX_METADATA)
    read = _jsonl if name.endswith(".jsonl") else _csv
    folder = PurePosixPath(name).parent
    pictures = set(listing.pictures)
    skipped = {s.name for s in listing.audit.skipped}
    found: dict[str, Caption] = {}
    absent: list[str] = []
    wanted = (column,) if column else COLUMNS
    for line, entry in read(text, name):
        if "file_name" not in entry:
            raise InputError(
                f'{name} line {line} has no "file_name"', hint=suggestion("file_name", entry)
            )
        used = next((c for c in wanted if c in entry), None)
        if used is None:
            keys = [key for key in entry if key != "file_name"]
            why = f"its columns are {', '.join(keys) or 'none'}"
            raise InputError(f"{name} line {line} has no caption", why, _wanted_hint(wanted))
        value = entry[used]
        texts = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(t, str) for t in texts):
            raise InputError(f"{name} line {line}: {used} is not text", json.dumps(value)[:60])
        if any("\0" in t or len(t.encode()) > MAX_CAPTION for t in texts):
            raise InputError(f"{name} line {line}: {used} is too long or has a NUL character")
        texts = tuple(t.strip() for t in texts if t.strip())
        picture = (folder / str(entry["file_name"])).as_posix()
        if picture in pictures and texts:
            found[picture] = Caption(texts, PurePosixPath(name).name)
        elif picture not in pictures and picture not in skipped:
            absent.append(str(entry["file_name"]))
    if absent:
        prefix = f"{folder.name}/"
        if not found:
            hint = "file names are relative to the metadata file"
            if folder.name and absent[0].startswith(prefix):
                hint += f': write "{absent[0].removeprefix(prefix)}"'
            raise InputError(f"{name} names no picture that is there", f'"{absent[0]}"', hint)
        listing.audit.notes.append(
            f'{name} names {count(len(absent), "picture")} that are not there: "{absent[0]}", ...'
        )
    return found


def _wanted_hint(wanted: Sequence[str]) -> str:
    return "captions are looked for in: " + ", ".join(wanted)


def _jsonl(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} line {number} is not JSON", str(error)) from None
        if not isinstance(entry, dict):
            raise InputError(f"{name} line {number} is not a JSON object", line[:60])
        yield number, entry


def _csv(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for entry in reader:
            yield reader.line_num, {k: v for k, v in entry.items() if k and v is not None}
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num} is not CSV", str(error)) from None


def _check_misnamed(listing: _Listing, ignore: bool) -> None:
    """Captions that would be overlooked for their file's name."""
    for name in listing.files.sizes:
        base = PurePosixPath(name).name
        if MISNAMED.fullmatch(base):
            what = f"{name} is not read, and there are no other captions"
            if not ignore:
                hint = "call it metadata.jsonl or metadata.csv, or move it away"
                raise InputError(what, hint=hint)
            listing.audit.notes.append(f"{name} is ignored")


# --- kohya, classes --------------------------------------------------------------------------

_REPEATS = re.compile(r"([0-9]{1,6})_(.+)")


def _kohya(listing: _Listing, found: dict[str, Caption]) -> dict[str, int]:
    """Repeats by picture from folders named 10_red fox; the words caption what has no caption."""
    tops = {top: _REPEATS.fullmatch(top) for n in listing.pictures if (top := listing.top(n))}
    if not any(tops.values()):
        return {}
    repeats = {}
    for picture in listing.pictures:
        match = tops.get(listing.top(picture) or "")
        if match:
            repeats[picture] = int(match[1])
            if picture not in found and int(match[1]):
                found[picture] = Caption((match[2].strip(),), "folder names")
    named = sorted(f'"{top}" x{match[1]}' for top, match in tops.items() if match)
    listing.audit.notes.append(f"repeats by folder: {', '.join(named)}")
    plain = sorted(top for top, match in tops.items() if not match)
    if plain or any(listing.top(n) is None for n in listing.pictures):
        where = ", ".join(f'"{top}"' for top in plain) or "the top folder"
        listing.audit.notes.append(f"no repeats in the name of {where}: 1 is taken")
    if zero := [picture for picture, n in repeats.items() if n == 0]:
        listing.audit.notes.append(f"0 repeats: {count(len(zero), 'image')} not used")
    return repeats


def _classes(listing: _Listing, labels: Labels) -> dict[str, str]:
    """Class names by picture; empty where there are none."""
    pictures = listing.pictures
    if labels == "none":
        return {}
    if labels == "prefix":
        plain = [name for name in pictures if "_" not in PurePosixPath(name).name]
        if plain:
            raise InputError(f"{plain[0]} has no label", 'a name like "label_0001.png" has one')
        return {name: PurePosixPath(name).name.split("_")[0] for name in pictures}
    if labels == "auto" and f"{listing.root}dataset.json" in listing.files.sizes:
        return _edm(listing)
    tops = {name: listing.top(name) for name in pictures}
    classes = {name: top for name, top in tops.items() if top is not None}
    if labels == "folders":
        if len(classes) < len(pictures):
            loose = next(name for name in pictures if name not in classes)
            raise InputError(f"{loose} lies in no folder", hint="one folder a class is needed")
        return classes
    if len(set(classes.values())) < 2:
        return {}
    if len(classes) < len(pictures):
        n = len(pictures) - len(classes)
        listing.audit.notes.append(
            f"{count(n, 'image')} beside the folders: these are not read as classes"
        )
        return {}
    return classes


def _edm(listing: _Listing) -> dict[str, str]:
    """Labels as EDM's and StyleGAN's dataset tools write them: {"labels": [["a/b.png", 3], ..]}."""
    name = f"{listing.root}dataset.json"
    try:
        content = json.loads(listing.text(name, MAX_METADATA))
        entries = content["labels"] if isinstance(content, dict) else None
        labels = {f"{listing.root}{file}": str(int(label)) for file, label in entries or []}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{name} is not of the form {{'labels': ...}}", str(error)) from None
    missing = [picture for picture in listing.pictures if picture not in labels]
    if labels and missing:
        raise InputError(f"{name} has no label for {missing[0]}", f"{len(missing)} lack one")
    listing.audit.notes.append(f"labels from {name}" if labels else f"{name} has no labels")
    return {picture: labels[picture] for picture in listing.pictures} if labels else {}


def _natural(text: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts class2 before class10."""
    parts = re.split(r"([0-9]+)", text)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], text


def _describe(audit: Audit, rows: list[Row], kind: Kind, classes: Sequence[str]) -> None:
    audit.images = len(rows)
    by_area = sorted((row.size for row in rows), key=lambda size: (size[0] * size[1], size))
    audit.sizes = (by_area[0], by_area[(len(rows) - 1) // 2], by_area[-1])
    if kind == "text":
        sources = Counter(row.caption.source if row.caption else "" for row in rows)
        audit.captions = dict(sorted(sources.items()))
    elif kind == "class":
        members = Counter(row.label for row in rows).values()
        span = f"{min(members)}" + (f" to {max(members)}" if min(members) < max(members) else "")
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        audit.notes.insert(0, f"{len(classes)} classes of {span} images: {shown}")
    else:
        audit.notes.insert(0, "no captions and no classes: unconditional")
