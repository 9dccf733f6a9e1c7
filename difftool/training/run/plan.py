"""What to train when little is said: preset, picture size, batch and steps from data and device.

Every choice is a configuration layer whose origin says why it was made. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from difftool.config.families import OWN, family
from difftool.config.layers import Layer, preset_layers, resolve
from difftool.config.schema import DENOISING, RECIPES, Part, Preset
from difftool.data import Dataset
from difftool.devices import ByDevice
from difftool.diffusion.losses import LOSSES, TIMES, WEIGHTS
from difftool.errors import UsageError
from difftool.text.tokenizer import Tokenizer
from difftool.training.step.frames import step_of
from difftool.training.step.optim import OPTIMIZERS

FRESH_PRIOR = "prior-small"
FRESH_PRESET = {"text": "text-small", "class": "pixel-small", "none": "pixel-small"}
LARGEST = ByDevice(cpu=32, cuda=64, mps=64)
"""The largest side that networks over 2x2 blocks of pixels are trained at from nothing; over the
latents of an autoencoder sides are as much longer as it folds more pixels into one."""
BATCH = ByDevice(cpu=32, cuda=256, mps=64)
STEPS: dict[Part, ByDevice[int]] = {
    "unet": ByDevice(cpu=4000, cuda=40000, mps=10000),
    "vae": ByDevice(cpu=2000, cuda=20000, mps=4000),
    "clip": ByDevice(cpu=2000, cuda=10000, mps=4000),
    "prior": ByDevice(cpu=4000, cuda=40000, mps=10000),
}
"""Steps that each part is given at most; on two processor cores the U-Net of a small preset takes
about an hour for them."""
EPOCHS, FEWEST_STEPS = 200, 200
TUNED_BATCH, TUNED_EPOCHS = 4, 100
TUNED_STEPS = ByDevice(cpu=500, cuda=3000, mps=1500)
"""The same of published latent models, whose steps cost a thousand times as much and which need
few: as the scripts of diffusers and kohya have it."""
DISTILLED = 4
"""A student takes so many times fewer, of which each costs two to four times as much."""
MOST_DRAWN = 1024
"""Pictures that a teacher is to draw of captions alone, at most."""
WARMUP = 0.1
"""Of the steps, at most."""
WORTH_BUCKETS = 0.15
"""Pictures that lose more than this share of their area as squares are trained in buckets."""
HELD_OUT, MOST_HELD_OUT, HELD_OUT_FROM = 0.05, 256, 200
"""The share of pictures that are measured and never trained on, at most so many; none of sets with
fewer than the last."""


class TrainingPlan(NamedTuple):
    """What is said of a run, before the rest is chosen."""

    dataset: Dataset
    base: list[Layer]
    """The preset, or the model to fine-tune, and what the data says."""
    given: list[Layer]
    """What the user said, which goes before all."""
    preset: Preset
    """What they make together, checked against the data."""
    begun: bool = False
    """Whether the run goes on: then nothing is chosen but what it lacks."""
    tuned: bool = False
    """Whether it starts from a model."""

    def complete(
        self, device: str, tokenizer_json: str | None = None, fitted: Sequence[Layer] = ()
    ) -> tuple[Preset, str | None, list[Layer]]:
        """The resolved preset, the learned vocabulary (JSON) if it has one, and the layers behind
        it.

        What nobody said is chosen for the dataset and the device. A run that is resumed brings its
        vocabulary; else it is learned from the captions. fitted: what follows from the memory.
        """
        layers = [*self.base, *_chosen(self, device), *fitted, *self.given]
        return *_vocabulary(resolve(layers), self.dataset, tokenizer_json), layers

    def kept(self) -> dict[str, set[str]]:
        """The keys of each recipe that the user has said, or the data's own configuration."""
        said = [*(layer.values for layer in self.given), {"train": self.dataset.asked}]
        recipes = RECIPES.values()
        return {name: {key for v in said for key in v.get(name, ())} for name in recipes}


def plan(
    dataset: Dataset,
    preset: str | None,
    given: Sequence[Layer],
    part: Part | None = None,
    start: Sequence[Layer] = (),
    *,
    begun: bool = False,
) -> TrainingPlan:
    """What the user, the preset and the data say. `part` trains that part alone; None = those of
    the preset. `start` describes the model to fine-tune and takes the preset's place. begun: the
    preset is that of a run that goes on.

    UsageError where the preset and the data do not go together, or a name in a recipe is none.
    """
    fresh = FRESH_PRIOR if part == "prior" else FRESH_PRESET[dataset.kind]
    base = [*(preset_layers(preset or fresh) if not start else start)]
    if preset is None and not start:
        why = {"text": "captions", "class": "classes", "none": "no captions or classes"}
        last = base[-1]
        base[-1] = Layer(f"{last.origin}, chosen: the data has {why[dataset.kind]}", last.values)
    base += _class_layer(dataset, base)
    if dataset.asked:
        base.append(Layer(f"data: {dataset.audit.source}", {"train": dict(dataset.asked)}))
    if part is not None:
        given = [*given, Layer("--part", {"parts": [part]})]
    made = resolve([*base, *given])
    _check(made, dataset)
    return TrainingPlan(dataset, base, list(given), made, begun, bool(start))


def _class_layer(dataset: Dataset, base: Sequence[Layer]) -> list[Layer]:
    """A label table of the dataset's classes and "none", unless the preset goes by text."""
    if dataset.kind != "class" or resolve(base).text:
        return []
    values = {
        "classes": list(dataset.classes),
        "unet": {"num_classes": len(dataset.classes) + 1},
    }
    return [Layer(f"data: {len(dataset.classes)} classes", values)]


def _chosen(plan: TrainingPlan, device: str) -> list[Layer]:
    """What presets leave open: size, buckets, and of each part batch, steps, warm-up, what is held
    out, flips."""
    layers: list[Layer] = []

    def choose(recipe: str, key: str, value: Any, why: str) -> Any:
        layers.append(Layer(f"chosen: {why}", {recipe: {key: value}}))
        return value

    preset, dataset = plan.preset, plan.dataset
    size = preset.train.size
    if size is None:
        size = choose("train", "size", *_size(plan, device))
    before = resolve(plan.base)
    for name in preset.parts:
        key, recipe = RECIPES[name], preset.recipe(name)
        if recipe.size is None and name not in DENOISING:
            choose(key, "size", size, "the size of train")
        batch = recipe.batch_size or choose(key, "batch_size", *_batch(plan, device))
        steps = recipe.steps
        if steps is None:
            steps = choose(key, "steps", *_steps(plan, name, device, batch * recipe.accumulate))
        if before.recipe(name).steps != steps and recipe.warmup > WARMUP * steps and not plan.begun:
            why = f"{WARMUP:.0%} of the steps, of which {recipe.warmup} would be {{:.0%}}"
            choose(key, "warmup", round(WARMUP * steps), why.format(recipe.warmup / steps))
        if name == "unet" and not dataset.pictured and not preset.train.distill.samples:
            seen = steps * batch * recipe.accumulate
            why = f"there are captions alone; {seen} are learned from, at most {MOST_DRAWN} drawn"
            choose(key, "distill", {"samples": min(seen, MOST_DRAWN)}, why)
        if not dataset.pictured:
            if recipe.validation is None:
                choose(key, "validation", 0.0, "there are captions alone")
        elif recipe.validation is None and not dataset.held_out and len(dataset) >= HELD_OUT_FROM:
            held = min(round(HELD_OUT * len(dataset)), MOST_HELD_OUT)
            why = f"measured and never trained on: {HELD_OUT:.0%}, at most {MOST_HELD_OUT}"
            choose(key, "validation", held, why)
        if recipe.flip is None:
            why = "mirroring is safe only where nothing is labelled"
            choose(key, "flip", dataset.kind == "none", why)
    if preset.data.buckets is None:
        lost = _lost(dataset)
        why = f"squares would lose {lost:.0%} of the pictures' area"
        choose("data", "buckets", lost > WORTH_BUCKETS, why)
    layers.append(Layer("train.size", {"sample": {"size": [size, size]}}))
    return layers


def _size(plan: TrainingPlan, device: str) -> tuple[int, str]:
    """Side of the pictures: the model's own where one is trained further, else theirs as far as the
    device affords; and why."""
    preset, native = plan.preset, plan.dataset.native_size
    unit = step_of(preset)
    if plan.tuned:
        width, height = preset.sample.size
        size = max(unit, round((width * height) ** 0.5 / unit) * unit)
        return size, "the model's own"
    largest = LARGEST[device] * max(1, preset.codec.factor // 2)
    native = native or largest
    size = max(unit, min(native, largest) // unit * unit)
    return size, f"pictures are {native}, {device} affords {largest}, in multiples of {unit}"


def _batch(plan: TrainingPlan, device: str) -> tuple[int, str]:
    """Pictures of a step, and why."""
    if _is_large(plan.preset):
        return TUNED_BATCH, "usual for a model of this size"
    batch, count = BATCH[device], len(plan.dataset)
    if count >= batch:
        return batch, f"usual on {device}"
    while batch > max(count, 4):
        batch //= 2
    return batch, f"there are {count} pictures"


def _steps(plan: TrainingPlan, part: Part, device: str, pictures: int) -> tuple[int, str]:
    """Steps of so many pictures each, and why."""
    most, epochs = STEPS[part][device], EPOCHS
    if _is_large(plan.preset):
        most, epochs = TUNED_STEPS[device], TUNED_EPOCHS
    if part == "unet" and plan.preset.train.distill.method != "none":
        most //= DISTILLED
    longest = max(FEWEST_STEPS, epochs * len(plan.dataset) // pictures)
    return min(most, longest), f"{device} affords {most}, {epochs} epochs are {longest}"


def _is_large(preset: Preset) -> bool:
    """Whether it is a published latent model's."""
    return preset.codec.learned and preset.family != OWN


def _lost(dataset: Dataset) -> float:
    """The share of its area that a picture loses as a square, in the mean."""
    sizes = [dataset.picture_size(i) for i in range(min(len(dataset), 1000))]
    kept = [min(size) / max(size) for size in sizes if size]
    return 1 - sum(kept) / len(kept) if kept else 0.0


def _check(preset: Preset, dataset: Dataset) -> None:
    if preset.text and dataset.kind != "text":
        why = f"the preset {preset.name} is conditioned on text, and the data has no captions"
        hint = (
            "add captions (a .txt beside each picture, or metadata.jsonl), or --preset pixel-small"
        )
        raise UsageError("cannot train on this data", why, hint)
    if not dataset.pictured and (
        preset.train.distill.method == "none" or preset.parts != ("unet",)
    ):
        why = f"{dataset.audit.source} has captions alone"
        hint = "--distill METHOD --from MODEL learns from what a model draws of them"
        raise UsageError("training needs pictures", why, hint)
    if preset.unet.num_classes and dataset.kind != "class":
        why = f"the preset {preset.name} is class-conditional, and the data has no class folders"
        raise UsageError(
            "cannot train on this data", why, "lay the pictures out in one folder a class"
        )
    if "vae" in preset.parts and not preset.codec.learned:
        why = f"its codec is {preset.codec.kind}"
        hint = "--preset vae-small and ldm-small have one"
        raise UsageError(f"the preset {preset.name} has no autoencoder to train", why, hint)
    _check_prior(preset)
    if "unet" in preset.parts and family(preset.family).vision:
        why = "its U-Net is told what a picture encoder says of pictures, which no data does"
        raise UsageError(f"the model {preset.name} cannot be trained further yet", why)
    if "clip" in preset.parts and not preset.text:
        raise UsageError(f"the preset {preset.name} has no text encoder to train")
    TIMES.resolve(preset.train.time)
    WEIGHTS.resolve(preset.train.weight)
    LOSSES.resolve(preset.train.loss)
    for name in preset.parts:
        recipe = preset.recipe(name)
        OPTIMIZERS.resolve(recipe.optimizer)
        for key in ("size", "steps", "batch_size", "accumulate"):
            value = getattr(recipe, key)
            if value is not None and value < 1:
                raise UsageError(f"{key.replace('_', ' ')} must be at least 1, got {value}")
        if recipe.size and recipe.size % preset.side_multiple:
            raise UsageError(f"size {recipe.size} is not a multiple of {preset.side_multiple}")


def _check_prior(preset: Preset) -> None:
    """UsageError where a prior is to be trained and is none, or has nothing to learn from."""
    prior = preset.unet.kind == "prior"
    if prior != ("prior" in preset.parts) or (prior and len(preset.parts) > 1):
        parts = ", ".join(preset.parts)
        what = f"the preset {preset.name} is {'a' if prior else 'no'} prior"
        hint = "--part prior trains it" if prior else f"--preset {FRESH_PRIOR} is one"
        raise UsageError(what, f"asked for: {parts}", hint)
    if prior and getattr(preset.codec, "encoder", None) is None:
        why = "it learns what a picture encoder says of the pictures"
        raise UsageError("the prior has nothing to learn", why, "give --vision MODEL, of unCLIP")
    side = preset.codec.factor
    if prior and (preset.train.size not in (None, side) or preset.data.buckets):
        why = f"its picture encoder sees squares of {side}"
        raise UsageError("the prior cannot be trained so", why, "leave --size and --buckets out")


def _vocabulary(
    preset: Preset, dataset: Dataset, tokenizer_json: str | None
) -> tuple[Preset, str | None]:
    """The preset with its text encoders fitted to the vocabulary of the captions."""
    learned = [t for t in preset.text if t.tokenizer == "learned"]
    if not learned:
        return preset, None
    if tokenizer_json is None:
        largest = max(t.vocab_size for t in learned)
        captions = dataset.captions(range(len(dataset)))
        tokenizer_json = Tokenizer.learn(captions, largest).to_json()
    size = Tokenizer.from_json(tokenizer_json).vocab_size
    text = tuple(
        replace(t, vocab_size=size) if t.tokenizer == "learned" else t for t in preset.text
    )
    return replace(preset, text=text), tokenizer_json
