"""Built-in captioned pictures: coloured shapes on a light ground, drawn on the fly at any size.

    a large red circle
    a small yellow star left of a large blue square

A picture is a function of its caption, its size and a key. One in ten of the pair captions never
occurs in training, so a trained model can be asked for combinations that it has not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import count, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from difftool.data.buckets import Size
from difftool.data.dataset import Audit, Dataset
from difftool.errors import UsageError, suggestion
from difftool.text.dice import coarse_uniforms

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray

COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 210, 20),
    "purple": (135, 40, 165),
    "orange": (245, 125, 15),
    "black": (20, 20, 20),
    "cyan": (20, 195, 215),
}
"""Fixed sRGB colours, far from each other and from the ground."""

RADII = {"small": (0.115, 0.130), "large": (0.195, 0.215)}
"""Range of a shape's half extent as a share of the picture's side; two large ones fit in a row."""

RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Direction (x right, y down) from the first thing to the second."""

TINT = 0.12
"""How far each channel of the ground may fall below white."""
MARGIN = 0.03
GAP = 0.08
DRIFT = 0.08
"""Least distance to the border; least gap between two things, and their largest offset across the
relation's axis, which is well under any distance along it. All as shares of the side."""
HELD_OUT = 10
"""One in this many pair captions is kept out of training."""
SINGLES = 0.25
"""Share of single things: they are learned long before pairs."""
LENGTH = 50_000
"""Samples in what counts as one epoch."""


class Thing(NamedTuple):
    """One shape of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


class Scene(NamedTuple):
    """What a caption says: one thing, or two and their relation."""

    first: Thing
    relation: str | None = None
    second: Thing | None = None

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}" if self.second else str(self.first)

    @property
    def things(self) -> tuple[Thing, ...]:
        """One or two things, in the caption's order."""
        return (self.first, self.second) if self.second else (self.first,)


# --- outlines --------------------------------------------------------------------------------
# Signed distances (negative inside) from an outline of half extent about 1, y downwards.


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.9


def _triangle(x: Array, y: Array) -> Array:
    # Equilateral, half width 1, centred by its height: the inradius is 0.58, the centroid at 0.29.
    y = y - 0.29
    return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.58


def _star(x: Array, y: Array) -> Array:
    # A pentagram (circumradius 1.1) is all that lies inside at least four of its five lines.
    angles = np.pi * (0.4 * np.arange(5) - 0.5)
    lines = np.stack([np.cos(a) * x + np.sin(a) * y for a in angles])
    return np.partition(lines, 3, axis=0)[3] - 1.1 * np.cos(0.4 * np.pi)


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.maximum(np.minimum(x, y) - 0.33, np.maximum(x, y) - 1)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
"""Outlines: (x, y) in units of the half extent to the signed distance in the same units."""


# --- captions --------------------------------------------------------------------------------


@cache
def things() -> tuple[Thing, ...]:
    """All 80 things."""
    return tuple(Thing(*words) for words in product(RADII, COLOURS, SHAPES))


def singles() -> list[str]:
    """The 80 captions of one thing."""
    return [str(thing) for thing in things()]


def pairs() -> Iterator[str]:
    """The 25,600 captions of two things, held-out ones included."""
    for first, relation, second in product(things(), RELATIONS, things()):
        yield str(Scene(first, relation, second))


def captions() -> Iterator[str]:
    """All captions: singles, then pairs."""
    yield from singles()
    yield from pairs()


@lru_cache(1 << 16)
def parse(caption: str) -> Scene:
    """The scene of a caption; UsageError if it is not in the set's language."""
    for relation in RELATIONS:
        first, found, second = caption.partition(f" {relation} ")
        if found:
            return Scene(_thing(first, caption), relation, _thing(second, caption))
    return Scene(_thing(caption, caption))


def _thing(text: str, caption: str) -> Thing:
    article, *words = text.split(" ")
    if article != "a" or len(words) != 3:
        hint = 'captions read like "a small red circle left of a large blue square"'
        raise UsageError(f'"{caption}" is not a shapes caption', hint=hint)
    for word, known in zip(words, (RADII, COLOURS, SHAPES), strict=True):
        if word not in known:
            raise UsageError(f'"{caption}" is not a shapes caption', hint=suggestion(word, known))
    return Thing(*words)


@lru_cache(1 << 16)
def held_out(caption: str) -> bool:
    """Whether training never shows this caption: one in ten of the pairs, by hash."""
    digest = hashlib.sha1(caption.encode(), usedforsecurity=False).digest()
    return parse(caption).second is not None and int.from_bytes(digest[:8]) % HELD_OUT == 0


# --- pictures --------------------------------------------------------------------------------


class ShapePlace(NamedTuple):
    """Where a thing lies: centre and half extent as shares of the picture's side."""

    x: float
    y: float
    radius: float


def layout(scene: Scene, u: Sequence[float]) -> list[ShapePlace]:
    """Places of the scene's things from at least six uniform numbers; nothing overlaps."""
    radii = [_between(*RADII[thing.size], v) for thing, v in zip(scene.things, u, strict=False)]
    if scene.relation is None:
        low, high = MARGIN + radii[0], 1 - MARGIN - radii[0]
        return [ShapePlace(_between(low, high, u[2]), _between(low, high, u[3]), radii[0])]

    # Along the axis: margin, the nearer thing, a gap, the other, margin; the rest is spread freely.
    spare = 1 - 2 * MARGIN - GAP - 2 * sum(radii)
    before = spare * u[2]
    gap = GAP + (spare - before) * u[3]
    across = MARGIN + max(radii)
    middle = _between(across, 1 - across, u[4])
    drift = DRIFT * (2 * u[5] - 1)
    dx, dy = RELATIONS[scene.relation]
    forward = dx + dy > 0
    near, far = radii if forward else radii[::-1]
    start = MARGIN + before + near
    along = [start, start + near + gap + far]
    sideways = [middle, min(max(middle + drift, across), 1 - across)]
    if not forward:
        along.reverse()
    if dx:
        return [ShapePlace(a, s, r) for a, s, r in zip(along, sideways, radii, strict=True)]
    return [ShapePlace(s, a, r) for a, s, r in zip(along, sideways, radii, strict=True)]


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


@lru_cache(16)
def _centres(size: int) -> Array:
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def coverage(shape: str, place: ShapePlace, size: int) -> tuple[slice, slice, Array]:
    """Antialiased share of each pixel that a shape covers, as (rows, columns, [h,w] in 0..1)."""
    reach = 1.25 * place.radius + 1 / size  # no outline reaches further
    rows, columns = (
        slice(max(0, int((c - reach) * size)), min(size, int((c + reach) * size) + 1))
        for c in (place.y, place.x)
    )
    x = (_centres(size)[columns][None, :] - place.x) / place.radius
    y = (_centres(size)[rows][:, None] - place.y) / place.radius
    distance = SHAPES[shape](x, y) * (place.radius * size)
    return rows, columns, np.clip(0.5 - distance, 0, 1)


def draw(caption: str, size: int, key: int) -> Array:
    """The picture of a caption, uint8 [size,size,3]; another key gives another picture of it."""
    scene = parse(caption)
    u = coarse_uniforms(caption, key)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = [255 * (1 - TINT * v) for v in u[:3]]
    for thing, place in zip(scene.things, layout(scene, u[3:]), strict=True):
        rows, columns, cover = coverage(thing.shape, place, size)
        part = canvas[rows, columns]
        part += cover[..., None] * (np.array(COLOURS[thing.colour], np.float32) - part)
    return (canvas + 0.5).astype(np.uint8)


@lru_cache(1 << 12)
def caption_of(index: int, key: int) -> str:
    """The caption of a sample; none that is held out."""
    names = list(RELATIONS)
    for attempt in count():
        pair, first, relation, second, *_ = coarse_uniforms("caption", index, key, attempt)
        thing = things()[int(first * len(things()))]
        if pair < SINGLES:
            return str(thing)
        other = things()[int(second * len(things()))]
        caption = str(Scene(thing, names[int(relation * len(names))], other))
        if not held_out(caption):
            return caption
    raise AssertionError("unreachable")


class ShapesDataset(Dataset):
    """The built-in set "shapes": a quarter single things, the rest pairs, endlessly varied."""

    kind = "text"
    fixed = False

    def __init__(self) -> None:
        self.audit = Audit("shapes (built in)", LENGTH, {"the drawing": LENGTH})
        self.audit.notes.append(
            f"drawn on the fly at any size; one in {HELD_OUT} pair captions is held out"
        )

    def __len__(self) -> int:
        return LENGTH

    @property
    def fingerprint(self) -> str:
        """Hash of a few pictures, which changes when the drawing does."""
        digest = hashlib.sha256()
        for index in range(32):
            caption = self.caption(index, 0)
            digest.update(caption.encode() + draw(caption, 16, 0).tobytes())
        return digest.hexdigest()

    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """Square pictures drawn for (index, key), uint8 [B,3,size,size]."""
        import torch

        if not isinstance(size, int):
            assert size[0] == size[1], "the one bucket of a set that fits any size is a square"
            size = size[0]
        batch = np.empty((len(indices), size, size, 3), np.uint8)
        for row, (index, key) in enumerate(zip(indices, keys, strict=True)):
            batch[row] = draw(self.caption(index, key), size, key)
        return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()

    def caption(self, index: int, key: int) -> str:
        """The caption of the picture that `draw` draws."""
        return caption_of(index, key)
