"""What to train when little is said: preset, picture size, batch and steps from data and device.

Every choice is a configuration layer whose origin says why it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from difftool.config import Layer, Preset, merge, preset_layers, resolve
from difftool.data import Dataset
from difftool.errors import UsageError
from difftool.models.tokenizer import Tokenizer

FRESH_PRESET = {"text": "text-small", "class": "pixel-small", "none": "pixel-small"}
LARGEST = {"cpu": 32, "cuda": 64, "mps": 64}
BATCH = {"cpu": 64, "cuda": 256, "mps": 64}
STEPS = {"cpu": 4000, "cuda": 40000, "mps": 8000}
EPOCHS = 200


def plan(
    dataset: Dataset,
    device: str,
    preset: str | None,
    given: Sequence[Layer],
    tokenizer_json: str | None = None,
) -> tuple[Preset, str | None, list[Layer]]:
    """The resolved preset, the learned vocabulary (JSON) if it has one, and the layers behind it.

    `given` holds what the user said; the rest is chosen for the dataset and the device. A run that
    is resumed brings its vocabulary; else it is learned from the captions.
    UsageError where the preset and the data do not go together.
    """
    base = preset_layers(preset or FRESH_PRESET[dataset.kind])
    if preset is None:
        why = {"text": "captions", "class": "classes", "none": "no captions or classes"}
        last = base[-1]
        base[-1] = Layer(f"{last.origin}, chosen: the data has {why[dataset.kind]}", last.values)
    base += _class_layer(dataset, base)
    layers = [*base, *_recipe(resolve([*base, *given]), dataset, device), *given]
    result = resolve(layers)
    _check(result, dataset)
    return *_vocabulary(result, dataset, tokenizer_json), layers


def _values(layers: Sequence[Layer]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    return values


def _class_layer(dataset: Dataset, base: Sequence[Layer]) -> list[Layer]:
    """A label table of the dataset's classes and "none", unless the preset goes by text."""
    if dataset.kind != "class" or _values(base).get("text"):
        return []
    values = {
        "classes": list(dataset.classes),
        "unet": {"num_classes": len(dataset.classes) + 1},
    }
    return [Layer(f"data: {len(dataset.classes)} classes", values)]


def _recipe(preset: Preset, dataset: Dataset, device: str) -> list[Layer]:
    """Size, batch, steps and flips where the preset leaves them open."""
    train, layers = preset.train, []

    def choose(key: str, value: Any, why: str) -> Any:
        layers.append(Layer(f"chosen: {why}", {"train": {key: value}}))
        return value

    size = train.size
    if size is None:
        codec = getattr(preset.codec, "block", 1)
        unit = codec * 2 ** (len(preset.unet.channels) - 1)
        native = dataset.native_size or LARGEST[device]
        fits = max(unit, min(native, LARGEST[device]) // unit * unit)
        why = f"pictures are {native}, {device} affords {LARGEST[device]}, in multiples of {unit}"
        size = choose("size", fits, why)
    batch = train.batch_size
    if batch is None:
        batch = choose("batch_size", BATCH[device], f"usual on {device}")
    if train.steps is None:
        longest = max(200, EPOCHS * len(dataset) // (batch * train.accumulate))
        why = f"{device} affords {STEPS[device]}, {EPOCHS} epochs are {longest}"
        choose("steps", min(STEPS[device], longest), why)
    if train.flip is None:
        choose("flip", dataset.kind == "none", "mirroring is safe only where nothing is labelled")
    layers.append(Layer("train.size", {"sample": {"size": [size, size]}}))
    return layers


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
    train = preset.train
    assert train.size and train.steps and train.batch_size
    for key in ("size", "steps", "batch_size", "accumulate"):
        if getattr(train, key) < 1:
            raise UsageError(
                f"{key.replace('_', ' ')} must be at least 1, got {getattr(train, key)}"
            )
    factor = getattr(preset.codec, "block", 1)
    if train.size % factor:
        raise UsageError(f"size {train.size} is not a multiple of {factor}")


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
