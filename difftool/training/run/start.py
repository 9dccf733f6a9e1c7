"""`train`, whole and without talk: from its options to a run that is under way.

Torch-free until the data is read and all that can be refused without torch is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.config.layers import (
    Layer,
    data_config,
    load_preset,
    origins,
    override_layers,
    preset_layers,
    resolve,
)
from difftool.config.schema import RECIPES, Part, Preset
from difftool.config.validate import check_conditioned
from difftool.data import BUILTIN, Audit, Dataset, open_dataset
from difftool.diffusion.path import build_path
from difftool.errors import UsageError, clash
from difftool.formats.model_source import ModelSource
from difftool.hub.find import find_model, place_of_model
from difftool.progress import Progress, silent
from difftool.storage import runs
from difftool.storage.places import check_ending, check_place
from difftool.storage.runs import checkpoints
from difftool.training.options import option_layers
from difftool.training.prepared import Training
from difftool.training.run import stages as staged
from difftool.training.run.plan import TrainingPlan, plan
from difftool.training.run.resume import (
    changes_of,
    check_start,
    recorded_start,
)

if TYPE_CHECKING:
    import torch

    from difftool.training.run.costs import Costs

LORA_RANK = 16
PARTS = ("unet", "text", "vae")
"""What a model gives another to start from."""


class Sources(NamedTuple):
    """What a run is made from, beside its data."""

    layers: list[Layer]
    """What the preset says, if one is named."""
    preset: str | None
    base: str | None
    """The model to fine-tune."""
    overrides: list[Layer]
    """What --set says."""
    resumes: bool
    """Whether a run goes on."""


def find_sources(values: Mapping[str, Any]) -> Sources:
    """What the options of `train` name, as `read_options` gives them; UsageError for what is not
    there, and for a run folder that is not the one to begin or to go on with. Downloads nothing.
    """
    preset, base, out = values["preset"], values["from_"], values["out"] or Path()
    data, resumes = values["data"], bool(values["resume"] or values["resume_from"])
    if not Path(data).exists() and data not in BUILTIN:
        open_dataset(data)  # which refuses it
    for name in ("lora", "distill"):
        if values[name] and values["part"] not in (None, "unet"):
            raise clash(f"--{name}", f"--part {values['part']}")
    if values["out"]:
        check_ending(out, "a run folder")
    check_place((out if values["out"] else Path("runs")) / runs.CONFIG)
    if not resumes and values["out"] and staged.is_used(out):
        hint = "give --resume to continue it, or another --out"
        raise UsageError(f"the run folder {out} is not empty", hint=hint)
    if values["resume"] and not staged.has_begun(out):
        resumes = False  # it was killed at once: all that it was to be is given again
    if resumes:
        check_start(out, {"unet": base, "vae": values["vae"], "vision": values["vision"]})
        begun = staged.preset_of_run(out)  # with all that was chosen for it
        if preset and load_preset(preset).name != (was := load_preset(begun).name):
            what, hint = f"cannot resume {out} with another preset", "start a new run"
            raise UsageError(what, f"it was {was}, now {preset}", hint)
        preset, base = begun, None
    for model in (base, values["vae"], values["vision"]):
        if model is not None:
            place_of_model(model)
    layers = preset_layers(preset) if preset is not None else []
    return Sources(layers, preset, base, override_layers(values["set"] or []), resumes)


def prepare(
    values: Mapping[str, Any],
    progress: Progress = silent,
    audited: Callable[[Audit], None] = lambda audit: None,
) -> Training:
    """Check the options of `train`, as `read_options` gives them, read the data, choose the rest.

    audited: called with what the data is found to be, before anything is made of it. Raises
    UsageError for what is wrong with the options or does not go together, InputError for data or
    models that cannot be used.
    """
    sources, out = find_sources(values), values["out"] or Path()
    part: Part | None = values["part"] or ("prior" if values["vision"] else None)
    if values["vision"] and part != "prior":
        raise clash("--vision", f"--part {part}")
    given = option_layers(values, part or "unet")
    config = data_config([*sources.layers, *given, *sources.overrides])
    with progress("looking at files", None) as shown:
        dataset = open_dataset(values["data"], config, progress=lambda done, _: shown.update(done))
    audited(dataset.audit)
    if values["ema"] is not None:
        given.append(_ema_layer(values["ema"], sources.preset, RECIPES[part or "unet"]))
    opened = cache(staged.open_start)  # a run folder's checkpoint is hashed each time
    before = [*given, *sources.overrides]
    begun = _beginnings(values, sources, before, opened, part == "prior")
    adopt, tokenizer = begun.adopt, begun.tokenizer
    given = [*begun.encoder, *given, *begun.given]
    part = part or ("unet" if values["vae"] is not None else None)
    planned = plan(
        dataset,
        sources.preset,
        [*given, *sources.overrides],
        part,
        begun.layers,
        begun=sources.resumes,
    )
    newest = sources.resumes and bool(values["resume"])
    stages, notes = staged.survey(
        out, planned.preset.parts, resume=newest, resume_from=values["resume_from"]
    )
    seen = [checkpoints(stage.folder) for stage in stages]
    if sources.resumes:
        whole = all(stage.checkpoint or stage.done for stage in stages)
        start = {p: path for p, path in recorded_start(out).items() if not whole or p == "vision"}
        adopt = {p: find_model(str(path)) for p, path in start.items()} | adopt
    if base := planned.preset.train.lora_base:
        adopt = {part: find_model(base) for part in PARTS}

    from difftool.pipeline.load import pick_device
    from difftool.training.run.rehearsal import rehearse
    from difftool.training.step import parallel
    from difftool.training.step.objectives import times_and_weight

    asked = planned.preset
    check_conditioned(asked)
    times_and_weight(asked.train, build_path(asked.path), asked.target)
    device = parallel.join(pick_device(values["device"] or "auto"))
    tokenizer = staged.vocabulary(stages) or tokenizer
    preset, tokenizer, layers, costs = _fitted(planned, device, tokenizer)
    _check_measures(values, dataset, preset)
    changes = changes_of(stages, preset, allowed=bool(values["allow_change"]))
    starts = {p: opened(path, staged.is_of_prior(p, preset)) for p, path in adopt.items()}
    rehearse(preset, dataset, tokenizer, starts)
    return Training(
        values=values,
        dataset=dataset,
        device=device,
        preset=preset,
        tokenizer_json=tokenizer,
        origins=list(origins(preset, layers)),
        stages=stages,
        adopt=adopt,
        costs=costs,
        notes=[*begun.odd, *notes],
        resumes=sources.resumes,
        seen=seen,
        changes=changes,
    )


def _start_layers(
    values: Mapping[str, Any], base: Path, source: ModelSource, given: Sequence[Layer]
) -> list[Layer]:
    """What --from says, and what is to be made of the model; `given` goes before it."""
    base = base.absolute()  # the run is resumed from anywhere
    layers = staged.start_layers(base, source)
    if values["lora"]:
        layers += staged.lora_layers(base, source, values["rank"] or LORA_RANK)
    if values["distill"]:
        layers += staged.distill_layers(base, source, resolve([*layers, *given]))
    return layers


class Beginnings(NamedTuple):
    """What the models that a run is made from say."""

    adopt: dict[str, Path]
    """Them, by part."""
    layers: list[Layer]
    """What the model to fine-tune says of the run."""
    encoder: list[Layer]
    """What the picture encoder says, before the user."""
    given: list[Layer]
    """What follows from the options about them."""
    tokenizer: str | None
    odd: tuple[str, ...]
    """What is odd about their files."""


def _beginnings(
    values: Mapping[str, Any],
    sources: Sources,
    given: Sequence[Layer],
    opened: Callable[[Path, bool], ModelSource],
    prior: bool,
) -> Beginnings:
    """See there. given: what goes before the model to fine-tune. opened: see `open_start`. prior:
    whether one is trained."""
    made = Beginnings({}, [], [], [], None, ())
    if sources.base is not None:
        base = find_model(sources.base)
        source = opened(base, prior)
        layers = _start_layers(values, base, source, given)
        made.adopt.update(dict.fromkeys(PARTS, base))
        made = made._replace(layers=layers, tokenizer=source.tokenizer_json, odd=source.warnings)
    elif values["rank"]:  # of a run that goes on
        made.given.append(Layer("--rank", {"train": {"lora_rank": values["rank"]}}))
    if values["vae"] is not None:
        vae = made.adopt["vae"] = find_model(values["vae"])
        source = opened(vae, False)
        made = made._replace(odd=(*made.odd, *source.warnings))
        made.given.append(staged.vae_layer(f"--vae {values['vae']}", vae, source))
    if values["vision"] is not None:
        vision = made.adopt["vision"] = find_model(values["vision"])
        source = opened(vision, False)
        made.encoder.append(staged.vision_layer(f"--vision {values['vision']}", vision, source))
    return made


def _fitted(
    planned: TrainingPlan, device: torch.device, tokenizer: str | None
) -> tuple[Preset, str | None, list[Layer], Costs]:
    """The plan, completed for a device and the memory that is free on it; a run that goes on stays
    as it is."""
    from difftool.training.run.costs import costs_of
    from difftool.training.run.estimate import fit, room_for
    from difftool.training.step import parallel

    preset, tokenizer, layers = planned.complete(device.type, tokenizer)
    free = parallel.from_first(lambda: room_for(planned.dataset, preset, device))
    if planned.begun or free is None:
        return preset, tokenizer, layers, costs_of(preset, tokenizer)
    fitted, costs = fit(preset, tokenizer, planned.kept(), free, device, parallel.size())
    if fitted:
        preset, tokenizer, layers = planned.complete(device.type, tokenizer, fitted)
    return preset, tokenizer, layers, costs


def _check_measures(values: Mapping[str, Any], dataset: Dataset, preset: Preset) -> None:
    """UsageError if a likelihood or a comparison is wanted that cannot be made."""
    from difftool.evaluation.options import check_evaluation
    from difftool.training.run.validation import count_held_out

    train = preset.train
    if train.augment and train.distill.method != "none":
        raise clash(
            "--augment", f"--distill {train.distill.method}", "its teacher was told nothing"
        )
    _check_stop(values, dataset, preset)
    for flag in ("likelihood", "evaluate"):
        if values[flag] and "unet" not in preset.parts:
            raise UsageError(f"--{flag} is the U-Net's", f"--part {preset.parts[0]} has none")
    if values["evaluate"]:
        check_evaluation(values["evaluate"], values["features"])
        if preset.train.lora_rank:
            hint = "sample with it: sample --lora FILE --evaluate REFERENCE"
            raise UsageError("--evaluate is of whole models, not of a LoRA", hint=hint)
    if values["likelihood"] and not count_held_out(dataset, preset.train.validation):
        what, why = "--likelihood has nothing to measure", "no pictures are held out"
        raise UsageError(what, why, "add --validation 0.05, or more pictures")


def _check_stop(values: Mapping[str, Any], dataset: Dataset, preset: Preset) -> None:
    """UsageError if a run is to stop by what is never measured."""
    from difftool.training.run.validation import count_held_out

    recipes = [preset.recipe(part) for part in preset.parts]
    recipes = [recipe for recipe in recipes if recipe.stop_when_worse]
    if recipes and values["sample_every"] == 0:
        raise clash("--stop-when-worse", "--sample-every 0", "nothing would be measured")
    if not all(count_held_out(dataset, recipe.validation) for recipe in recipes):
        what, why = "--stop-when-worse has nothing to go by", "no pictures are held out"
        raise UsageError(what, why, "add --validation 0.1, or more pictures")


def _ema_layer(wanted: bool, preset: str | None, recipe: str) -> Layer:
    """What --ema and --no-ema say: the preset's average, or one, or none."""
    decay = getattr(load_preset(preset), recipe).ema if preset else 0.999
    return Layer("--ema/--no-ema", {recipe: {"ema": (decay or 0.999) if wanted else 0.0}})


def train(values: Mapping[str, Any]) -> Training:
    """Train to the end by the options of `train`, as `read_options` gives them; see `prepare` and
    `Training.run` for what is raised."""
    return prepare(values).run()
