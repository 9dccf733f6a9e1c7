"""What a run goes on with: how that differs from what it was begun with, and the models that it
started from. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difftool.config.layers import leaves
from difftool.config.schema import RECIPES, Part, Preset
from difftool.config.validate import to_values
from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.hub.find import place_of_model
from difftool.storage.runs import FACTS, MODEL
from difftool.storage.strict_json import read_json
from difftool.training.run.stages import Stage, with_codec_of

WHOLE = ("path", "target", "unet", "codec", "text", "classes", "size_numbers", "zero_negative")
"""Keys of what a model is: of another one there is no checkpoint."""
STATE = (
    *("seed", "batch_size", "accumulate", "size", "optimizer", "ema", "ema_profile", "ema_lengths"),
    *("lora_rank", "lora_alpha", "lora_base", "method", "teacher", "samples"),
    "augment",
)
"""Keys of a recipe that the state of a run is made by."""
FREE = ("checkpointing", "allow_bad", "allow_uncaptioned")
"""Keys that do not change what is learned."""
START = "start"
"""The key of run.json under which the models are that parts started from."""


class SettingChange(NamedTuple):
    """A setting that is not the one that a run was begun with."""

    key: str
    before: Any
    now: Any

    @property
    def possible(self) -> bool:
        """Whether the checkpoint can be gone on from."""
        top, name = self.key.partition(".")[0], self.key.rpartition(".")[2]
        return self.key == "unet.dropout" or (top not in WHOLE and name not in STATE)

    def __str__(self) -> str:
        return f"{self.key} was {self.before}, now {self.now}"


def changes(before: Preset, now: Preset, part: Part) -> list[SettingChange]:
    """What of two configurations differs in how, and what, a part learns."""
    keys = (*WHOLE, RECIPES[part], "data")
    then, here = (
        {".".join(path): value for path, value in leaves({key: values[key] for key in keys})}
        for values in (to_values(before), to_values(now))
    )
    return [
        SettingChange(key, then.get(key), here.get(key))
        for key in here | then
        if then.get(key) != here.get(key) and key.rpartition(".")[2] not in FREE
    ]


def changes_of(stages: Sequence[Stage], preset: Preset, *, allowed: bool) -> list[SettingChange]:
    """What the parts that go on from a checkpoint do otherwise than until now; UsageError if the
    checkpoint is of no use to that, or if it changes what is learned and is not allowed."""
    found: list[SettingChange] = []
    for stage in stages:
        if stage.done and stage.part == "vae":
            preset = with_codec_of(preset, stage.done)
        if stage.checkpoint is None:
            continue
        before = open_model(stage.checkpoint / MODEL).preset
        found += changes(before, preset, stage.part)
        if wrong := [change for change in found if not change.possible]:
            names = ", ".join(change.key.rpartition(".")[2] for change in wrong)
            what = f"cannot resume {stage.checkpoint} with another {names}"
            hint = "give the same value, or start a new run"
            raise UsageError(what, "; ".join(map(str, wrong)), hint)
        steps = f"{RECIPES[stage.part]}.steps"
        constant = preset.recipe(stage.part).decay == "none"  # then no step depends on their number
        told = [change for change in found if not (constant and change.key == steps)]
        if told and not allowed:
            what = f"resuming {stage.checkpoint} so would change what is learned"
            hint = "--allow-change goes on with the new values, which the run then keeps"
            raise UsageError(what, "; ".join(map(str, told)), hint)
    return found


def check_start(run: Path, given: Mapping[str, str | None]) -> None:
    """UsageError if a run is to start from other models than it did; given: by part."""
    before = recorded_start(run)
    for part, where in given.items():
        place = place_of_model(where) if where else None
        if place is not None and part in before and place.absolute() != before[part]:
            what = f"cannot resume {run} from another model"
            hint = "give the same model, or start a new run"
            raise UsageError(what, f"it was {before[part]}, now {where}", hint)


def recorded_start(run: Path) -> dict[str, Path]:
    """The models that parts of a run started from, by part."""
    path = run / FACTS
    facts = read_json(path) if path.is_file() else {}
    start = facts.get(START, {}) if isinstance(facts, Mapping) else {}
    return {part: Path(where) for part, where in start.items()}
