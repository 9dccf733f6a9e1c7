"""Do pictures show what their captions say? A judge for the built-in shapes set.

    python benchmarks/shapes_eval.py                       # check of the judge itself
    python benchmarks/shapes_eval.py --model runs/shapes --count 500
    python benchmarks/shapes_eval.py --samples out.jsonl   # from difftool sample --json

A picture is judged without knowledge of its caption: the ground is taken from the border, what
differs from it is parted into things by colour and connection, and each thing is compared with the
drawn outline of every shape at its best place and size. Then colour, shape and size of each thing,
their number, and the relation are compared with the caption's. Counted for single things, for pairs
that training shows, and for pairs that are held out of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from difftool.data import shapes
from difftool.data.shapes import COLOURS, RADII, RELATIONS, SHAPES, ShapePlace, Thing

PARTS = ("number", "colour", "shape", "size", "relation", "all")
CONTRAST = 0.35
"""A pixel belongs to a thing if it is at least this far on the way from the ground to a colour."""
CHANGES = ("steps", "guidance", "sampler", "deepcache", "tome")
"""Settings of the samples that may be others than the model's own."""
LEAST = 0.3
"""A thing covers at least this share of the area of the smallest thing that is ever drawn."""
SMALLEST = min(RADII["small"]) ** 2
FIT = 0.85
"""Least likeness to an outline (1 = exact) at which a thing counts as having that shape."""
BORDER = math.sqrt(max(RADII["small"]) * min(RADII["large"]))
"""Half extent between small and large."""


class Seen(NamedTuple):
    """A thing found in a picture, and how well the outline fits (1 = exactly)."""

    thing: Thing
    place: ShapePlace
    fit: float


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The 4-connected parts of a mask, each as a mask."""
    left = mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part.flat[left.argmax()] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= mask
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        yield part


def look(picture: np.ndarray) -> list[Seen]:
    """The things in a picture uint8 [S,S,3], largest first."""
    size = len(picture)
    pixels = picture.astype(np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    palette = np.array(list(COLOURS.values()), np.float64)

    # The colour whose line from the ground passes nearest, and how far along it each pixel lies.
    lines = palette - ground
    offset = pixels - ground
    along = np.clip(offset @ lines.T / (lines**2).sum(1), 0, 1.2)
    rest = ((offset[:, :, None] - along[..., None] * lines) ** 2).sum(-1)
    chosen = rest.argmin(-1)
    cover = np.take_along_axis(along, chosen[..., None], -1)[..., 0]
    inside = cover > CONTRAST

    # Pixels well inside name a thing's colour; the rest of its pixels join it by connection.
    found = []
    for part in components(inside):
        if cover[part].sum() < LEAST * SMALLEST * size**2:
            continue
        sure = part & (cover >= 0.8 * cover[part].max())
        names, votes = np.unique(chosen[sure], return_counts=True)
        strong = [name for name, n in zip(names, votes, strict=True) if n > 0.25 * votes.sum()]
        for name in strong:  # more than one: things of different colours that touch
            own = part if len(strong) == 1 else part & (chosen == name)
            share = np.where(own | (~inside & _near(own)), along[..., name], 0).clip(0, 1)
            found.append(match(share, list(COLOURS)[name]))
    return sorted(found, key=lambda seen: -seen.place.radius)


def _near(mask: np.ndarray) -> np.ndarray:
    """The pixels next to a mask, where its antialiased rim lies."""
    rim = np.zeros_like(mask)
    rim[1:] |= mask[:-1]
    rim[:-1] |= mask[1:]
    rim[:, 1:] |= mask[:, :-1]
    rim[:, :-1] |= mask[:, 1:]
    return rim


def match(share: np.ndarray, colour: str) -> Seen:
    """The shape, place and size whose drawn outline is nearest to a soft mask [S,S]."""
    size = len(share)
    grid = (np.arange(size) + 0.5) / size
    mass = share.sum()
    x, y = (share.sum(0) * grid).sum() / mass, (share.sum(1) * grid).sum() / mass
    best: tuple[float, str, ShapePlace] | None = None
    for shape in SHAPES:
        # Area and centroid give the outline's size and place; then both are refined.
        area, down = _moments(shape)
        radius = math.sqrt(mass / area) / size
        place = ShapePlace(x, y - down * radius, radius)
        error = _error(share, shape, place)
        for step in (0.5 / size, 0.25 / size, 0.12 / size):
            moved = True
            while moved:
                moved = False
                for change in ((step, 0, 0), (0, step, 0), (0, 0, step)):
                    for sign in (1, -1):
                        other = ShapePlace(
                            *(p + sign * c for p, c in zip(place, change, strict=True))
                        )
                        worse = _error(share, shape, other)
                        if worse < error - 1e-9:
                            place, error, moved = other, worse, True
        if best is None or error < best[0]:
            best = (error, shape, place)
    assert best is not None
    error, shape, place = best
    kind = "small" if place.radius < BORDER else "large"
    return Seen(Thing(kind, colour, shape), place, 1 - error / float((share**2).sum()))


def _error(share: np.ndarray, shape: str, place: ShapePlace) -> float:
    if not 0.02 < place.radius < 0.6:
        return math.inf
    rows, columns, cover = shapes.coverage(shape, place, len(share))
    if 0 in cover.shape:
        return math.inf
    part = share[rows, columns]
    return float((share**2).sum() - (part**2).sum() + ((cover - part) ** 2).sum())


_MOMENTS: dict[str, tuple[float, float]] = {}


def _moments(shape: str) -> tuple[float, float]:
    """Area and vertical centroid of an outline of half extent 1, from a fine drawing."""
    if shape not in _MOMENTS:
        place = ShapePlace(0.5, 0.5, 0.25)
        rows, _, cover = shapes.coverage(shape, place, 512)
        grid = (np.arange(512)[rows] + 0.5) / 512 - 0.5
        down = float((cover.sum(1) * grid).sum() / cover.sum()) / 0.25
        _MOMENTS[shape] = float(cover.sum()) / (512 * 0.25) ** 2, down
    return _MOMENTS[shape]


def judge(picture: np.ndarray, caption: str) -> dict[str, bool]:
    """Which of PARTS of the caption the picture shows; things are assigned as is best for it."""
    scene = shapes.parse(caption)
    seen = look(picture)
    wanted = scene.things
    result = {"number": len(seen) == len(wanted)}
    attributes = ("colour", "shape", "size")
    if len(seen) < len(wanted):
        return dict.fromkeys(PARTS, False)

    def verdict(chosen: tuple[Seen, ...]) -> dict[str, bool]:
        verdict = {
            name: all(
                getattr(s.thing, name) == getattr(w, name)
                for s, w in zip(chosen, wanted, strict=True)
            )
            for name in attributes
        }
        verdict["shape"] &= all(s.fit >= FIT for s in chosen)
        if scene.relation:
            first, second = (s.place for s in chosen)
            dx, dy = RELATIONS[scene.relation]
            ahead = (second.x - first.x) * dx + (second.y - first.y) * dy
            across = abs((second.x - first.x) * dy) + abs((second.y - first.y) * dx)
            verdict["relation"] = bool(ahead > across)
        return verdict

    best = max(map(verdict, permutations(seen[:4], len(wanted))), key=lambda v: sum(v.values()))
    result |= {"relation": True} | best
    return result | {"all": all(result.values())}


# --- reports ---------------------------------------------------------------------------------


def group(caption: str) -> str:
    """Which of the three counts a caption belongs to."""
    if shapes.held_out(caption):
        return "held-out pairs"
    return "pairs" if shapes.parse(caption).second else "singles"


def prompts(count: int, seed: int) -> list[str]:
    """`count` captions for each of the three groups, drawn without repetition where possible."""
    generator = random.Random(seed)
    groups: dict[str, list[str]] = {"singles": [], "pairs": [], "held-out pairs": []}
    for caption in shapes.captions():
        groups[group(caption)].append(caption)
    chosen = []
    for captions in groups.values():
        some = generator.sample(captions, min(count, len(captions)))
        chosen += (some * math.ceil(count / len(some)))[:count]
    return chosen


def report(results: Iterable[tuple[str, dict[str, bool]]]) -> dict[str, dict[str, float]]:
    """Shares of what is right, by group, from (caption, verdict)."""
    groups: dict[str, list[dict[str, bool]]] = {}
    for caption, verdict in results:
        groups.setdefault(group(caption), []).append(verdict)
    return {
        name: {"n": len(verdicts)}
        | {
            part: round(sum(v[part] for v in verdicts) / len(verdicts), 4)
            for part in PARTS
            if part != "relation" or name != "singles"
        }
        for name, verdicts in groups.items()
    }


def generate(where: str, captions: list[str], batch: int, **changes: Any) -> Iterator[np.ndarray]:
    """A model's pictures of captions, seeds 0, 1, ..."""
    from difftool.images.fit import to_pil
    from difftool.pipeline.decode import decode
    from difftool.pipeline.generate import generate as sampled
    from difftool.pipeline.inputs import SampleInput
    from difftool.pipeline.load import load_model
    from difftool.pipeline.settings import plan_sampling, resolve_settings

    model = load_model(where, device="auto")
    settings = resolve_settings(model, changes)
    plan = plan_sampling(model, settings)
    print(f"{settings.steps} steps of {settings.sampler}, guidance {settings.guidance:g}")
    start = time.perf_counter()
    for first in range(0, len(captions), batch):
        some = captions[first : first + batch]
        items = [SampleInput(caption, seed=first + i) for i, caption in enumerate(some)]
        *_, last = sampled(plan, items)
        for image in decode(model, last.x).cpu():
            yield np.asarray(to_pil(image))
        done = first + len(some)
        speed = done / (time.perf_counter() - start)
        print(f"\r{done} of {len(captions)}, {speed:.1f}/s", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", help="a model to draw samples from")
    parser.add_argument("--samples", type=Path, help="JSON lines with path and prompt")
    parser.add_argument("--count", type=int, default=300, help="captions of each group")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    parser.add_argument("--size", type=int, default=32, help="side, for the check of the judge")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--deepcache", type=int)
    parser.add_argument("--tome", type=float)
    options = parser.parse_args()

    if options.samples:
        entries = [
            json.loads(line) for line in options.samples.read_text(encoding="utf-8").splitlines()
        ]
        made = [e for e in entries if "path" in e]
        captions = [e["prompt"] for e in made]
        pictures = (np.asarray(Image.open(e["path"]).convert("RGB")) for e in made)
    else:
        captions = prompts(options.count, options.seed)
        if options.model:
            settings = {k: getattr(options, k) for k in CHANGES}
            pictures = generate(options.model, captions, options.batch, **settings)
        else:
            pictures = (shapes.draw(c, options.size, i) for i, c in enumerate(captions))
    pictures = list(pictures)
    verdicts = [judge(p, c) for p, c in zip(pictures, captions, strict=True)]
    result: dict[str, Any] = report(zip(captions, verdicts, strict=True))
    if not (options.samples or options.model):
        wrong = random.Random(1).sample(captions, len(captions))
        verdicts = [judge(p, c) for p, c in zip(pictures, wrong, strict=True)]
        shuffled = report(zip(wrong, verdicts, strict=True))
        result = {"right captions": result, "shuffled captions": shuffled}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
