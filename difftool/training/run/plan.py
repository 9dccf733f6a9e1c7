"""What to train when little is said: preset, picture size, batch and steps from data and device.

Every choice is a configuration layer whose origin says why it was made. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from difftool.config.layers import Layer, preset_layers, resolve
from difftool.config.schema import RECIPES, Part, Preset
from difftool.data import Dataset
from difftool.diffusion.losses import LOSSES, TIMES, WEIGHTS
from difftool.errors import UsageError
from difftool.text.tokenizer import Tokenizer
from difftool.training.step.frames import step_of
from difftool.training.step.optim import OPTIMIZERS

FRESH_PRESET = {"text": "text-small", "class": "pixel-small", "none": "pixel-small"}
LARGEST = {"cpu": 32, "cuda": 64, "mps": 64}
BATCH = {"cpu": 32, "cuda": 256, "mps": 64}
STEPS: dict[Part, dict[str, int]] = {
    "unet": {"cpu": 4000, "cuda": 40000, "mps": 10000},
    "vae": {"cpu": 2000, "cuda": 20000, "mps": 4000},
    "clip": {"cpu": 2000, "cuda": 10000, "mps": 4000},
}
"""Steps that each part is given at most; on two processor cores the U-Net of a small preset takes
about an hour for them."""
EPOCHS = 200
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

    def complete(
        self, device: str, tokenizer_json: str | None = None
    ) -> tuple[Preset, str | None, list[Layer]]:
        """The resolved preset, the learned vocabulary (JSON) if it has one, and the layers behind
        it.

        What nobody said is chosen for the dataset and the device. A run that is resumed brings its
        vocabulary; else it is learned from the captions.
        """
        layers = [*self.base, *_recipes(self.preset, self.dataset, device), *self.given]
        return *_vocabulary(resolve(layers), self.dataset, tokenizer_json), layers


def plan(
    dataset: Dataset,
    preset: str | None,
    given: Sequence[Layer],
    part: Part | None = None,
    start: Sequence[Layer] = (),
) -> TrainingPlan:
    """What the user, the preset and the data say. `part` trains that part alone; None = those of
    the preset. `start` describes the model to fine-tune and takes the preset's place.

    UsageError where the preset and the data do not go together, or a name in a recipe is none.
    """
    base = [*(preset_layers(preset or FRESH_PRESET[dataset.kind]) if not start else start)]
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
    return TrainingPlan(dataset, base, list(given), made)


def _class_layer(dataset: Dataset, base: Sequence[Layer]) -> list[Layer]:
    """A label table of the dataset's classes and "none", unless the preset goes by text."""
    if dataset.kind != "class" or resolve(base).text:
        return []
    values = {
        "classes": list(dataset.classes),
        "unet": {"num_classes": len(dataset.classes) + 1},
    }
    return [Layer(f"data: {len(dataset.classes)} classes", values)]


def _recipes(preset: Preset, dataset: Dataset, device: str) -> list[Layer]:
    """Size, batch, steps and flips where the preset leaves them open, for each part."""
    layers: list[Layer] = []

    def choose(recipe: str, key: str, value: Any, why: str) -> Any:
        layers.append(Layer(f"chosen: {why}", {recipe: {key: value}}))
        return value

    size = preset.train.size
    if size is None:
        unit = step_of(preset)
        native = dataset.native_size or LARGEST[device]
        fits = max(unit, min(native, LARGEST[device]) // unit * unit)
        why = f"pictures are {native}, {device} affords {LARGEST[device]}, in multiples of {unit}"
        size = choose("train", "size", fits, why)
    for name in preset.parts:
        key, recipe = RECIPES[name], preset.recipe(name)
        if recipe.size is None and name != "unet":
            choose(key, "size", size, "the size of train")
        batch = recipe.batch_size
        if batch is None:
            batch = choose(key, "batch_size", BATCH[device], f"usual on {device}")
        if recipe.steps is None:
            longest = max(200, EPOCHS * len(dataset) // (batch * recipe.accumulate))
            most = STEPS[name][device]
            why = f"{device} affords {most}, {EPOCHS} epochs are {longest}"
            choose(key, "steps", min(most, longest), why)
        if recipe.validation is None and not dataset.held_out and len(dataset) >= HELD_OUT_FROM:
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
    if preset.unet.num_classes and dataset.kind != "class":
        why = f"the preset {preset.name} is class-conditional, and the data has no class folders"
        raise UsageError(
            "cannot train on this data", why, "lay the pictures out in one folder a class"
        )
    if "vae" in preset.parts and not preset.codec.learned:
        why = f"its codec is {preset.codec.kind}"
        hint = "--preset vae-small and ldm-small have one"
        raise UsageError(f"the preset {preset.name} has no autoencoder to train", why, hint)
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
