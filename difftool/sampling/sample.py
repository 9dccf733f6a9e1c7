"""One picture to make: what was asked for, and all that was decided of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from difftool.adapters.lora.algebra import Applied
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.settings import SamplePlan
from difftool.sampling.requests import Request
from difftool.sampling.settings import ALWAYS, SETTINGS, Values


def _changed(template: str | None, prompt: str | None) -> str | None:
    """A template, where the prompt is another."""
    return None if template == (prompt or "") else template


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture to make, or made, of what a request asks for."""

    index: int
    """Its number in the run."""
    request: Request
    plan: SamplePlan
    input: SampleInput
    seed: int | None = None
    """None where it is made of latents that do not say it."""
    seeds: Sequence[int] = ()
    """Of all pictures of its request."""
    number: int = 1
    """Among these; the first is 1."""
    path: Path | None = None
    """Where it goes; None if it is numbered when it is written, or is not written to a file."""
    loras: tuple[Applied, ...] = ()
    """That are applied to the model for it."""
    embeddings: tuple[str, ...] = ()
    """Paths of the learned words that its prompts have."""

    def values(self) -> Values:
        """All that is known of it, by the names of the rows of SETTINGS; and `index`, `model_hash`,
        `date`; `number` of `seeds`; `edits` and `enlarges`, whether it is another picture edited,
        or made larger by the model; and `reads`, whether it is drawn from words."""
        model, settings, request = self.plan.model, self.plan.settings, self.request
        refiner, prior = self.plan.refiner, self.plan.prior
        width, height = settings.size
        return {
            **{field.name: getattr(settings, field.name) for field in fields(settings)},
            "prompt": request.prompt or "",
            "negative": request.negative or "",
            "template": _changed(request.template, request.prompt),
            "negative_template": _changed(request.negative_template, request.negative),
            "label": request.label,
            "seed": self.seed,
            "vary_seed": request.vary_seed if self.seed is None else self.input.vary_seed,
            "width": width,
            "height": height,
            "init": request.init,
            "mask": request.mask,
            "depth_map": request.depth_map,
            "image_prompt": request.image_prompt,
            "model": model.name,
            "lora": list(self.loras) or None,
            "prior": None if prior is None else prior.model.name,
            "refiner": None if refiner is None else refiner.model.name,
            "index": self.index,
            "id": request.id,
            "number": self.number,
            "seeds": self.seeds or (self.seed,),
            "model_hash": model.hash,
            "date": date.today().isoformat(),
            "edits": model.concat == "edit",
            "enlarges": model.concat == "low_res",
            "reads": bool(model.preset.text),
        }

    def report(self, **facts: Any) -> dict[str, Any]:
        """Its settings as a JSON object, which as a line of --prompts asks for the same picture;
        with these facts beside them."""
        values, own = self.values(), self.plan.model.preset.sample
        facts = {name: values[name] for name in ("model", "model_hash")} | facts
        more = {}
        for row in SETTINGS:
            value = values.get(row.name)
            idle = row.effect is not None and not row.effect(values)
            if row.always or not row.json or idle or value is None:
                continue
            if row.key and (row.type is not dict or not value) and value == getattr(own, row.name):
                continue
            more[row.json[0]] = ",".join(map(str, value)) if isinstance(value, tuple) else value
        return {row.json[0]: values[row.name] for row in ALWAYS} | facts | more
