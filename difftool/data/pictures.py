"""A dataset of picture files: held in memory if they fit, else read by a pool of threads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from difftool.config.schema import DataConfig
from difftool.data.archive import Files
from difftool.data.buckets import Buckets, Size
from difftool.data.captions import Caption, Syntax
from difftool.data.dataset import MEMORY_CAP, Audit, DataKind, Dataset, OnProgress, SkippedFile
from difftool.data.phrases import count, named
from difftool.errors import InputError, unreadable
from difftool.images.fit import Fit, fit, framed, scaled, to_uint8
from difftool.images.formats import SUFFIXES
from difftool.images.read import MAX_BYTES, probe, read_picture
from difftool.text.dice import Dice, uniforms

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(32, os.cpu_count() or 1)
AHEAD = 1024
"""Results that may wait to be used."""
SHARE, FEW = 0.1, 3
"""Training stops if more than this share, and more than this few, of the pictures are unusable, or
have no caption while others do."""
MANY = 1000
"""From so many unusable pictures on, no more are looked at than it takes to be sure of that."""


class _Held(NamedTuple):
    """Decoded pictures in memory."""

    size: int | Buckets
    frames: list[Size]
    """The frame that each row was made for."""
    pictures: list[Tensor]
    """uint8 [3,H,W] by row; more than the frame where the cut is random."""
    table: Tensor | None
    """The same as one tensor, where they are of one size."""


@dataclass(frozen=True)
class PictureRow:
    """One picture of the set."""

    name: str
    content: str
    """SHA-256 of the file."""
    size: Size
    caption: Caption | None = None
    label: int | None = None
    repeats: int = 1
    syntax: Syntax = Syntax()  # noqa: RUF009


class FolderDataset(Dataset):
    """Pictures in files. A sample is a picture, or one of its repeats."""

    def __init__(
        self,
        files: Files,
        rows: Sequence[PictureRow],
        kind: DataKind,
        classes: tuple[str, ...],
        audit: Audit,
        config: DataConfig,
        pool: Pool,
    ):
        self.files, self.rows, self.kind, self.classes = files, rows, kind, classes
        self.audit, self.config = audit, config
        self.fixed, self.background = config.crop == "centre", config.background
        self.native_size = median_low(min(row.size) for row in rows)
        self.pool = pool
        self._samples = [number for number, row in enumerate(rows) for _ in range(row.repeats)]
        self._held: _Held | None = None
        self._too_large: set[int | Buckets] = set()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def fingerprint(self) -> str:
        """Hash of names, contents, captions, labels and repeats, and of how they are read."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        how = [self.config.crop, self.config.background]
        digest = hashlib.sha256(json.dumps(how).encode() + b"\n")
        for row in self.rows:
            texts = row.caption.texts if row.caption else None
            syntax = asdict(row.syntax) if texts else None
            line = [row.name, row.content, texts, syntax, row.label, row.repeats]
            digest.update(json.dumps(line).encode() + b"\n")
        return digest.hexdigest()

    # --- pictures ----------------------------------------------------------------------------

    def prepare(self, size: int | Buckets, progress: OnProgress | None = None) -> None:
        """Hold all pictures at this size in memory if they fit; an epoch then decodes nothing."""
        import torch

        if size in self._too_large or (self._held and self._held.size == size):
            return
        self._held = None
        frames = [(size, size) if isinstance(size, int) else size.of(r.size) for r in self.rows]
        sizes = [self._stored(row.size, f) for row, f in zip(self.rows, frames, strict=True)]
        if sum(3 * width * height for width, height in sizes) > MEMORY_CAP:
            self._too_large.add(size)
            return
        table = None
        if len(set(sizes)) == 1:
            table = torch.empty(len(sizes), 3, *reversed(sizes[0]), dtype=torch.uint8)
        pictures: list[Tensor] = []
        for picture in self.pool.map(self._whole, list(zip(range(len(sizes)), sizes, strict=True))):
            if table is not None:
                picture = table[len(pictures)].copy_(picture)
            pictures.append(picture)
            if progress:
                progress(len(pictures), len(sizes))
        self._held = _Held(size, frames, pictures, table)

    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """Pictures scaled to cover the frame and cut to it, uint8 [B,3,height,width]."""
        import torch

        numbers = [self._samples[index] for index in indices]
        frame = (size, size) if isinstance(size, int) else size
        if self._held is None and isinstance(size, int):
            self.prepare(size)
        held = self._held
        if held is not None and any(held.frames[number] != frame for number in numbers):
            held = None
        if held is not None and held.table is not None and self.fixed:
            return held.table[torch.tensor(numbers)]
        at = [self._at(index, key) for index, key in zip(indices, keys, strict=True)]
        jobs = list(zip(numbers, at, strict=True))
        if held is None:
            return torch.stack(list(self.pool.map(lambda job: self._cut(*job, frame), jobs)))
        return torch.stack([self._cut(*job, frame, held.pictures[job[0]]) for job in jobs])

    def fit(self, index: int, size: int | Size, key: int = 0) -> Fit:
        """How a sample's picture fills the frame: what SDXL's size conditioning needs, too."""
        frame = (size, size) if isinstance(size, int) else size
        return fit(self.rows[self._samples[index]].size, frame, self._at(index, key))

    def _at(self, index: int, key: int) -> tuple[float, float] | None:
        """Where the frame lies in what stands out; None = in the middle."""
        if self.fixed:
            return None
        across, down, *_ = uniforms("crop", index, key)
        return across, down

    def _stored(self, picture: Size, frame: Size) -> Size:
        """The size at which a picture is held: the frame's, or as it is before a random cut."""
        return frame if self.fixed else fit(picture, frame)[:2]

    def _whole(self, job: tuple[int, Size]) -> Tensor:
        """A picture as it is held."""
        number, size = job
        image = self._decode(number)
        return to_uint8(framed(image, size) if self.fixed else scaled(image, size))

    def _cut(
        self,
        number: int,
        at: tuple[float, float] | None,
        frame: Size,
        held: Tensor | None = None,
    ) -> Tensor:
        """The frame's part of a picture."""
        if held is None:
            return to_uint8(framed(self._decode(number), frame, at))
        if self.fixed:
            return held
        left, top = fit(self.rows[number].size, frame, at)[2:]
        return held[:, top : top + frame[1], left : left + frame[0]]

    def _decode(self, number: int) -> Image.Image:
        name, background = self.rows[number].name, self.config.background
        try:
            return read_picture(read_file(self.files, name), background).image
        except InputError as error:
            hint = "it could be read when the run began; if it is gone for good, start again"
            raise InputError(f"cannot read {name} any more", error.why, hint) from None

    # --- what belongs to a picture -----------------------------------------------------------

    def caption(self, index: int, key: int) -> str:
        """The caption of a sample; the key decides whatever is drawn about it."""
        row = self.rows[self._samples[index]]
        dice = Dice("caption", index, key)
        return row.syntax.draw(row.caption.texts, dice) if row.caption else ""

    def label(self, index: int) -> int:
        """The class label of a sample, an index into `classes`."""
        label = self.rows[self._samples[index]].label
        return super().label(index) if label is None else label

    def name(self, index: int) -> str:
        """The picture's path below the root."""
        return self.rows[self._samples[index]].name

    def picture_size(self, index: int) -> Size:
        """Width and height of the picture as it lies in its file, upright."""
        return self.rows[self._samples[index]].size

    def content(self, index: int) -> str:
        """SHA-256 of the picture's file."""
        return self.rows[self._samples[index]].content


# --- reading ---------------------------------------------------------------------------------


class Pool:
    """Threads that read pictures: decoders let go of Python's lock."""

    def __init__(self, workers: int | None = None):
        self.workers = THREADS if workers is None else max(1, workers)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, "difftool-pictures")

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """map() on the threads, in order; nothing depends on how many there are."""
        if self.workers == 1 or len(items) < 2:
            yield from map(function, items)
            return
        for start in range(0, len(items), AHEAD):  # so that results do not pile up
            yield from self._threads.map(function, items[start : start + AHEAD])


def read_file(files: Files, name: str) -> bytes:
    """A picture file's bytes; InputError if they cannot be read."""
    try:
        return files.read(name, MAX_BYTES)
    except OSError as error:
        raise unreadable(name, error) from None


class Checked(NamedTuple):
    """What is known of a picture that can be decoded."""

    size: Size
    content: str
    """SHA-256 of the file."""
    own: bool
    """Whether difftool made it."""


def check(
    files: Files,
    names: Sequence[str],
    audit: Audit,
    config: DataConfig,
    pool: Pool,
    progress: OnProgress | None,
) -> dict[str, Checked]:
    """Those of the pictures that can be decoded; the others are added to the audit, and so is what
    is done to pictures that are not plain.

    InputError if more than a tenth, and more than three, are unusable, unless that is allowed; of
    many it is not waited for the last to be sure of it.
    """
    total = len(names) + len(audit.skipped)

    def one(name: str) -> tuple[Checked, tuple[str, ...]] | str:
        try:
            data = read_file(files, name)
            probed = probe(data, config.background)
        except InputError as error:
            return error.why or error.what
        content = hashlib.sha256(data).hexdigest()
        return Checked(probed.size, content, probed.own), probed.notes

    sound: dict[str, Checked] = {}
    changed: dict[str, list[str]] = {}
    for number, (name, result) in enumerate(zip(names, pool.map(one, names), strict=True)):
        if isinstance(result, str):
            audit.skipped.append(SkippedFile(name, result))
            if len(audit.skipped) > max(MANY, SHARE * total) and not config.allow_bad:
                break
        else:
            sound[name] = result[0]
            for note in result[1]:
                changed.setdefault(note, []).append(name)
        if progress:
            progress(number + 1, len(names))
    _refuse_bad(audit, len(sound), total, config)
    audit.notes += [
        f"{note}: {count(len(those), 'image')} ({named(those)})"
        for note, those in sorted(changed.items())
    ]
    return sound


def _refuse_bad(audit: Audit, good: int, total: int, config: DataConfig) -> None:
    bad = len(audit.skipped)
    if bad == total:
        raise no_usable(audit)
    if not config.allow_bad and bad > FEW and bad > SHARE * total:
        looked_at = f"{bad} of {'the first ' * (good + bad < total)}{good + bad} pictures"
        what = f"{looked_at} in {audit.source} are unusable"
        raise InputError(what, _few(audit), "repair or remove them, or give --allow-bad")


def no_usable(audit: Audit) -> InputError:
    """That there is nothing to train on."""
    why = _few(audit) or f"looked for {', '.join(sorted(SUFFIXES))}"
    return InputError(f"{audit.source} has no usable picture", why)


def _few(audit: Audit) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in audit.skipped[:FEW])
