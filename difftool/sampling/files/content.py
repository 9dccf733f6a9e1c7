"""What decides a picture, as a hash: two pictures of one hash are the same, to rounding."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from difftool.config.validate import to_values
from difftool.diffusion import GRIDS, PATHS, SAMPLERS, TARGETS
from difftool.plugins import used
from difftool.sampling.expand import TEMPLATES
from difftool.sampling.settings import PICTURES, SETTINGS
from difftool.storage.commit import known_sha256
from difftool.version import ENGINE

if TYPE_CHECKING:
    from torch import Tensor

    from difftool.pipeline.backdrop import Backdrop
    from difftool.pipeline.model import Model
    from difftool.pipeline.settings import SamplePlan
    from difftool.sampling.sample import Sample

DIGITS = 32
"""Of a hash, hexadecimal."""
BESIDE = frozenset((*PICTURES, *TEMPLATES.values(), "lora", "label", "id"))
"""Settings that decide nothing, or are hashed by what they stand for."""
SEEDS = ("seed", "vary_seed")


class Content(NamedTuple):
    """Hashes of a picture."""

    content: str
    """Of everything that decides its pixels."""
    series: str
    """Of all that but its seeds, and with what its prompts were chosen from in their place: the
    same of all pictures that a request with drawn seeds may come to."""


def content_of(sample: Sample) -> Content:
    """What decides a picture: its prompts, seeds and settings that have an effect, and by their own
    contents the models, LoRAs, words, plugins and pictures that it goes by."""
    values, plan, given = sample.values(), sample.plan, sample.input
    decides = {
        row.name: values[row.name]
        for row in SETTINGS
        if (row.key or row.field) and row.name in values and row.name not in BESIDE
        and (row.effect is None or row.effect(values))
    }  # fmt: skip
    decides |= {
        "engine": ENGINE,
        "models": _models(plan),
        "padding": [t.reads_padding for t in plan.model.tokenizers],
        "loras": [(each.lora.hash, each.strength, each.text) for each in sample.loras],
        "words": [known_sha256(Path(path)) for path in sample.embeddings],
        "class": given.label,
        "pictures": {n: _pixels(each) for n, each in given._asdict().items() if _is_tensor(each)},
        "backdrop": _around(given.backdrop),
        "upscaler": _of_file(decides.get("upscaler")),
        "plugins": [plugin.sha256 for plugin in used(components(sample))],
    }
    chosen_from = {n: values[t] for n, t in TEMPLATES.items() if n in decides and values[t]}
    series = {name: value for name, value in decides.items() if name not in SEEDS} | chosen_from
    return Content(_hash(decides), _hash(series))


def components(sample: Sample) -> list[tuple[str, str]]:
    """The kinds and names of what a picture is made by, and plugins may have added."""
    preset, settings = sample.plan.model.preset, sample.plan.settings
    return [
        (SAMPLERS.kind, SAMPLERS.resolve(settings.sampler)),
        (GRIDS.kind, GRIDS.resolve(settings.schedule)),
        (PATHS.kind, PATHS.resolve(preset.path["kind"])),
        (TARGETS.kind, TARGETS.resolve(preset.target)),
    ]


def _models(plan: SamplePlan) -> list[Any]:
    """The model, and how long it is at work; and those that work with it, with how they do."""
    others = [each for each in (plan.refiner, plan.prior) if each is not None]
    return [
        (_model(plan.model), len(plan.levels)),
        *((_model(each.model), len(each.levels), to_values(each.settings)) for each in others),
    ]


def _model(model: Model) -> tuple[Any, ...]:
    return model.content, str(model.dtype), model.single_steps


def _hash(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def _of_file(name: str | None) -> str | None:
    """A name, or in place of a file's its hash."""
    return known_sha256(Path(name)) if name and Path(name).is_file() else name


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return hasattr(value, "numpy")


@lru_cache(maxsize=8)
def _pixels(image: Tensor) -> str:
    """A picture as the model is given it."""
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def _around(backdrop: Backdrop | None) -> list[Any]:
    """What a picture is put into."""
    if backdrop is None:
        return []
    data = backdrop.picture.tobytes(), backdrop.mask.tobytes()
    return [
        *(hashlib.sha256(each).hexdigest() for each in data),
        backdrop.picture.size,
        backdrop.box,
    ]
