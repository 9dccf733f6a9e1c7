"""Where pictures go on a grid: what they differ in becomes its axes, if every combination is there.

The last axis makes the columns, the one before the rows, the two before these the tables of a page,
and any others the pages. Pictures that make no such product stand in turn, each with what it
differs in below it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil, log, prod
from typing import NamedTuple

from PIL import Image

from difftool.images.fit import zoom_of
from difftool.images.tables import Page, PictureTable, TableCell
from difftool.sampling.sample import Sample

MAX_SIDE = 8192
"""Of a page, in pixels, about."""
ONE_ROW = 5
"""So many values of a setting stand in one row."""
SHAPE = 1.25
"""Width over height that a page is to have, about."""
OWN = ("prompt", "negative", "label", "seed")
ASIDE = {*OWN, "index", "model", "model_hash", "seconds", "template", "negative_template"}
"""What pictures differ in without a setting."""


class Exhibit(NamedTuple):
    """A picture on the grid."""

    facts: Mapping[str, str]
    """What it is asked for, as text: `prompt`, `template`, `place.NAME` in a product, `of.NAME` of
    a setting, ..."""
    size: tuple[int, int]
    open: Callable[[], Image.Image]


def facts_of(sample: Sample) -> dict[str, str]:
    """What tells a picture from others."""
    report = sample.report()
    facts = {"model": str(report["model"]), "prompt": report["prompt"]}
    facts["template"] = sample.request.template or facts["prompt"]
    facts |= {name: _text(report.get(name)) for name in ("negative", "label", "seed")}
    facts |= {f"place.{name}": text for name, text in sample.request.place}
    settings = {n: v for n, v in report.items() if n not in ASIDE}
    facts["of.size"] = f"{settings.pop('width')}x{settings.pop('height')}"
    return facts | {f"of.{name}": _text(value) for name, value in settings.items()}


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


class GridAxis(NamedTuple):
    """What pictures differ in, and how, in the order that they came."""

    name: str
    texts: Sequence[str]

    @property
    def shown(self) -> str:
        """Its name for people."""
        return self.name.partition(".")[2].replace("_", " ") or NAMES.get(self.name, self.name)

    def said(self, text: str) -> str:
        """One of its texts for people: a prompt needs no name."""
        return text if self.name in (*PROMPTS, "label") else f"{self.shown} {text}"


NAMES = {"template": "prompt"}
PROMPTS = ("prompt", "template")


@dataclass(frozen=True)
class Arrangement:
    """Pictures on axes; without axes, in turn."""

    pictures: Sequence[Exhibit]
    axes: Sequence[GridAxis]
    captions: Sequence[str]
    """Of each picture, what the axes do not say."""

    def at(self, texts: Sequence[str]) -> int | None:
        """Which picture is there; None if there is none."""
        return self._places.get(tuple(texts))

    @cached_property
    def _places(self) -> dict[tuple[str, ...], int]:
        names = [axis.name for axis in self.axes]
        found = {tuple(p.facts[n] for n in names): i for i, p in enumerate(self.pictures)}
        return found

    @property
    def title(self) -> str:
        """The prompt that the pictures have in common, or what they were chosen from."""
        for name in ("prompt", "template"):
            texts = {picture.facts[name] for picture in self.pictures}
            if len(texts) == 1:
                return texts.pop()
        told = {axis.name for axis in self.axes}
        if any(name.startswith("place.") for name in told) and told.isdisjoint(PROMPTS):
            return self.pictures[0].facts["template"]  # the axes say in what others differ
        return ""

    @property
    def about(self) -> str:
        """What else they have in common."""
        common = dict(self.pictures[0].facts)
        for picture in self.pictures:
            common = {n: t for n, t in common.items() if picture.facts.get(n) == t}
        said = [common.get("model", "")]
        said += [common["label"]] if common.get("label") else []
        for name in ("size", "steps", "sampler", "schedule", "guidance"):
            text = common.pop(f"of.{name}", "")
            said.append(
                {"size": "{}", "steps": "{} steps"}.get(name, f"{name} {{}}").format(text)
                if text
                else ""
            )
        said += [f"{n[3:].replace('_', ' ')} {t}" for n, t in common.items() if n.startswith("of.")]
        said += [f"seed {common['seed']}"] if "seed" in common else []
        said += [f"not: {common['negative']}"] if common.get("negative") else []
        return "  ·  ".join(text for text in said if text)


def arranged(pictures: Sequence[Exhibit], missing: int = 0) -> Arrangement:
    """The pictures on the axes that they make; missing: how many of them failed."""
    numbered = _numbered(pictures)
    named = dict.fromkeys(name for picture in numbered for name in picture.facts)
    places = [name for name in named if name.startswith("place.")]
    others = [name for name in named if name.startswith("of.")]
    for more, drops in (((), False), ((), True), (others, True)):
        for prompt, last in product(PROMPTS, ("seed", "image")):
            names = [prompt, "negative", "label", *places, last, *more]
            axes = _axes(numbered, names, missing, drops)
            if axes is not None:
                told = {axis.name for axis in axes}
                says = len(told) == 1 and told <= {"seed", "image"}
                captions = [_caption(p, told, prompt, says) for p in numbered]
                return Arrangement(numbered, axes, captions)
    varied = [n for n in named if n not in ("template", "image") and _varies(numbered, n)]
    captions = ["\n".join(_captioned(p, varied)) for p in numbered]
    return Arrangement(numbered, (), captions)


def _numbered(pictures: Sequence[Exhibit]) -> list[Exhibit]:
    """With their numbers among those that are asked for alike, but for the seed."""
    counts: dict[tuple[str, ...], int] = {}
    made = []
    for picture in pictures:
        key = tuple(f"{n} {t}" for n, t in picture.facts.items() if n not in ("seed", "prompt"))
        counts[key] = number = counts.get(key, 0) + 1
        made.append(picture._replace(facts={**picture.facts, "image": str(number)}))
    return made


def _varies(pictures: Sequence[Exhibit], name: str) -> bool:
    return len({picture.facts.get(name, "") for picture in pictures}) > 1


def _axes(
    pictures: Sequence[Exhibit], names: Sequence[str], missing: int, drops: bool
) -> list[GridAxis] | None:
    """The axes of these names, if they are a product; drops: without those that others tell."""
    names = [name for name in names if _varies(pictures, name)]

    def places(names: Sequence[str]) -> int:
        return len({tuple(p.facts.get(n, "") for n in names) for p in pictures})

    if places(names) != len(pictures):
        return None
    if drops:
        for name in [n for n in reversed(names) if not n.startswith("place.")]:
            rest = [other for other in names if other != name]
            if places(rest) == len(pictures):
                names = rest
    axes = [
        GridAxis(name, list(dict.fromkeys(p.facts.get(name, "") for p in pictures)))
        for name in names
    ]
    count = prod(len(axis.texts) for axis in axes)
    return axes if len(pictures) <= count <= len(pictures) + missing else None


def _caption(picture: Exhibit, told: set[str], prompt: str, seed: bool) -> str:
    """What the axes do not say of a picture."""
    facts, said = picture.facts, []
    if prompt == "template" and facts["prompt"] != facts["template"]:
        said.append(facts["prompt"])
    if seed or "image" in told:
        said.append(f"seed {facts['seed']}")
    return "\n".join(said)


def _captioned(picture: Exhibit, names: Sequence[str]) -> Iterator[str]:
    """What it differs in, its prompt in lines of its own."""
    yield from (picture.facts[name] for name in names if name == "prompt")
    yield " · ".join(_said(picture, name) for name in names if name != "prompt")


def _said(picture: Exhibit, name: str) -> str:
    """A fact for people."""
    text = picture.facts.get(name, "")
    return text if name in (*PROMPTS, "label") else f"{name.rpartition('.')[2]} {text}"


# --- pages -----------------------------------------------------------------------------------


def pages(arrangement: Arrangement, side: int | None = None) -> list[Page]:
    """The pages of a grid, each within so many pixels as far as a picture is; None: MAX_SIDE."""
    side = side or MAX_SIDE
    sizes = [tuple(side * zoom_of(p.size) for side in p.size) for p in arrangement.pictures]
    cell = max(w for w, _ in sizes), max(h for _, h in sizes)
    room = max(1, int(side / 1.1 / cell[0])), max(1, int(side / 1.2 / cell[1]))
    axes = arrangement.axes
    one_row = len(axes) == 1 and axes[0].name not in ("seed", "image")
    if len(axes) < 2 and not (one_row and len(axes[0].texts) <= min(ONE_ROW, room[0])):
        made = list(_in_turn(arrangement, cell, room))
    else:
        made = list(_in_tables(arrangement, cell, room))
    about = arrangement.about
    return [
        Page(
            tables=tables,
            title=arrangement.title or prompt,
            about="  ·  ".join(
                filter(None, (fixed, about, f"page {i} of {len(made)}" if len(made) > 1 else ""))
            ),
            columns=axes[-1].shown if axes and tables[0][0].columns else "",
            rows=axes[-2].shown if len(axes) > 1 else "",
        )
        for i, (tables, prompt, fixed) in enumerate(made, 1)
    ]


Made = tuple[list[list[PictureTable]], str, str]
"""The tables of a page in rows; their prompt, and what else of the axes they have in common."""


def _cell(arrangement: Arrangement, index: int | None) -> TableCell | None:
    if index is None:
        return None
    picture = arrangement.pictures[index]
    return TableCell(picture.open, picture.size, arrangement.captions[index])


def _in_turn(
    arrangement: Arrangement, cell: tuple[int, int], room: tuple[int, int]
) -> Iterator[Made]:
    """Pictures in rows, each with its caption."""
    captions = list(arrangement.captions)
    if len(arrangement.axes) == 1 and arrangement.axes[0].name not in ("seed", "image"):
        (axis,) = arrangement.axes
        for i, picture in enumerate(arrangement.pictures):
            own = picture.facts[axis.name]
            captions[i] = "\n".join(filter(None, (axis.said(own), captions[i])))
    arrangement = Arrangement(arrangement.pictures, arrangement.axes, captions)
    count = len(arrangement.pictures)
    each = min(count, room[0] * room[1])
    columns = best_columns(each, cell, room)
    for first in range(0, count, each):
        cells = [_cell(arrangement, i) for i in range(first, min(first + each, count))]
        yield (
            [[PictureTable([cells[i : i + columns] for i in range(0, len(cells), columns)])]],
            "",
            "",
        )


def best_columns(count: int, cell: tuple[int, int], room: tuple[int, int]) -> int:
    """In how many columns so many cells of a size stand best: few places are empty, and the whole
    is a little wider than high."""

    def cost(columns: int) -> float:
        rows = ceil(count / columns)
        empty = (columns * rows - count) / count
        shape = abs(log(columns * cell[0] / (rows * cell[1]) / SHAPE))
        return 2 * empty + shape + 100 * (rows > room[1])

    return min(range(1, min(count, room[0]) + 1), key=cost)


def _in_tables(
    arrangement: Arrangement, cell: tuple[int, int], room: tuple[int, int]
) -> Iterator[Made]:
    """Tables with headings."""
    axes = list(arrangement.axes)
    columns, rows = axes.pop(), axes.pop() if axes else GridAxis("", [""])
    across = axes.pop() if axes else GridAxis("", [""])
    down = axes.pop() if axes else GridAxis("", [""])
    kept = [axis for axis in (*axes, down, across, rows, columns) if axis.name]

    def table(
        row_texts: Sequence[str], column_texts: Sequence[str], *at: tuple[GridAxis, str]
    ) -> PictureTable:
        known = {axis.name: text for axis, text in at}
        cells = []
        for row in row_texts:
            line = []
            for column in column_texts:
                places = {**known, rows.name: row, columns.name: column}
                index = arrangement.at([places[axis.name] for axis in kept])
                line.append(_cell(arrangement, index))
            cells.append(line)
        title = " · ".join(a.said(t) for a, t in at if a.name and a not in axes)
        return PictureTable(cells, column_texts, row_texts if rows.name else (), title)

    part = min(len(columns.texts), room[0]), min(len(rows.texts), room[1])
    beside, below = room[0] // part[0], room[1] // part[1]
    table_size = part[0] * cell[0], part[1] * cell[1]
    for outer in product(*(axis.texts for axis in axes)):
        at = list(zip(axes, outer, strict=True))
        prompt = next((text for axis, text in at if axis.name in PROMPTS), "")
        said = [axis.said(text) for axis, text in at if axis.name not in PROMPTS]
        fixed = prompt, "  ·  ".join(said)
        for row_texts, column_texts in product(
            _cut(rows.texts, part[1]), _cut(columns.texts, part[0])
        ):
            if down.name:
                for downs, acrosses in product(_cut(down.texts, below), _cut(across.texts, beside)):
                    yield (
                        [
                            [
                                table(row_texts, column_texts, *at, (down, d), (across, a))
                                for a in acrosses
                            ]
                            for d in downs
                        ],
                        *fixed,
                    )
                continue
            for some in _cut(across.texts, beside * below):
                made = [table(row_texts, column_texts, *at, (across, a)) for a in some]
                wide = best_columns(len(made), table_size, (beside, below))
                yield [made[i : i + wide] for i in range(0, len(made), wide)], *fixed


def _cut(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """The texts in parts of at most so many, about as many in each."""
    size = ceil(len(texts) / ceil(len(texts) / size))
    return [texts[i : i + size] for i in range(0, len(texts), size)]
