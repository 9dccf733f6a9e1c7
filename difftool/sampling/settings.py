"""SETTINGS: every setting of a picture, and every option of `difftool sample`, as a row.

A row gives the flag with its help, checks and completion, the keyword of the library, the keys of
JSON lines read and printed, the word in A1111's text, the word in names of files, and when it has
no effect. A setting is added by a row, and by its use. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from difftool.config.options import (
    DEVICE,
    DTYPE,
    OFFLINE,
    OVERWRITE,
    RUN,
    SET,
    Option,
    option_layers,
)
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS, split_spelling
from difftool.errors import UsageError
from difftool.images.formats import OUTPUT_FORMATS

PROMPT, PICTURE, SAMPLER, GUIDANCE = "Prompt", "Picture", "Sampler", "Guidance"
IMAGES, MODEL, ADAPTERS, OUTPUT = "Pictures in", "Model", "Adapters", "Output"

MAX_SEED = 2**64 - 1
MAX_SEEDS = 1_000_000
MAX_SIDE = 16_384
MAX_TEXT = 10_000

Values = Mapping[str, Any]
"""Everything that is known of a picture, by the names of the rows, and a few facts beside it."""


class A1111(NamedTuple):
    """A setting in A1111's `parameters` text."""

    word: str
    read: Callable[[str], Any] | None = None
    """From the text to what the row's `read` gives; ValueError if it is not sound, None where it
    says nothing here. None: it is not read."""
    write: Callable[[Any], Any] = str
    """To the text; None where it is left out."""


@dataclass(frozen=True, kw_only=True)
class Setting(Option):
    """A row of SETTINGS. One with a `key` is a field of SampleConfig, one with a `field` is a field
    of Request; any other is an option of the whole run."""

    option: bool = True
    """Whether it is an option of the command; else lines of JSON alone have it."""
    field: str | None = None
    """The field of Request that it fills."""
    json: tuple[str, ...] = ()
    """Keys of a line of JSON that mean it, the one that is printed first."""
    always: bool = False
    """Whether it is printed with every picture and can be part of file names; other settings are
    printed where they are not the model's own."""
    words: tuple[str, ...] = ()
    """Further words for it in names of files."""
    short: str | None = None
    """sd-scripts' option on a line of prompts."""
    a1111: A1111 | None = None
    effect: Callable[[Values], bool] | None = None
    """Whether it changes a picture of these values; None = always."""
    without: str = "here"
    """What is said where it has no effect: "without guidance"."""


# --- readers: from what was typed, passed or found to the value that is meant -----------------


def read_text(text: Any) -> str:
    """A prompt; UsageError for one that is too long, or has control characters."""
    if not isinstance(text, str):
        raise UsageError(f"{text!r} is not a text")
    if len(text) > MAX_TEXT:
        raise UsageError(f"a prompt of {len(text)} characters", f"the limit is {MAX_TEXT}")
    if any(c < " " and c not in "\t\n" for c in text) or not _encodes(text):
        raise UsageError("the prompt has control characters", json.dumps(text)[:80])
    return text


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or undecodable arguments
        return False
    return True


def read_label(label: Any) -> str:
    """A class by name or index."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UsageError(f"{label!r} is neither the name nor the index of a class")
    return str(label)


def read_seeds(given: Any) -> tuple[int, ...]:
    """Seeds of 7, "7", "1,2,5-10" or [1, 2, 5]; none, which is to say drawn, of "-1"."""
    hint = "give 7, or 1,2,5-10, or -1 to draw one"
    if isinstance(given, list | tuple | range):
        given = ",".join(map(str, given))
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise UsageError(f"{given!r} is not a list of seeds", hint=hint)
    text = str(given)
    if text.strip() == "-1":
        return ()
    ranges: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*(?:-\s*([0-9]{1,20})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(f'"{text}" is not a list of seeds', hint=hint)
        if last > MAX_SEED:
            raise UsageError(f"seed {last} is too large", f"the limit is {MAX_SEED}")
        ranges.append(range(first, last + 1))
    count = sum(part.stop - part.start for part in ranges)
    if count > MAX_SEEDS:
        raise UsageError(f"{count} seeds are too many", f"the limit is {MAX_SEEDS} at once")
    return tuple(seed for part in ranges for seed in part)


def read_size(given: Any) -> tuple[int, int]:
    """(width, height) of "512x768", of "512", a square, or of a pair."""
    text = "x".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*[xX×*]\s*([0-9]{1,9}))?\s*", text)
    if not match:
        raise UsageError(f'"{text}" is not a size', hint="give WIDTHxHEIGHT, such as 512x768")
    width, height = int(match[1]), int(match[2] or match[1])
    for side in (width, height):
        if not 0 < side <= MAX_SIDE:
            raise UsageError(f"a side of {side} pixels is not usable", f"1 to {MAX_SIDE} are")
    return width, height


def read_interval(given: Any) -> tuple[float, float]:
    """(low, high) in log SNR of "LOW,HIGH" or of a pair; either may be -inf or inf."""
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not low < high:
        hint = "give LOW,HIGH in log SNR, such as -2,4"
        raise UsageError(f'"{text}" is not an interval', hint=hint)
    return low, high


def read_guidance(scale: float) -> float:
    """A guidance scale; UsageError between 0 and 1, where it would guide away from the prompt."""
    if scale != 0 and scale < 1:
        hint = "1 is off; 2 to 8 are usual"
        raise UsageError(f"guidance {scale:g} is not usable", hint=hint)
    return float(scale)


def read_path(given: Any) -> str:
    """The path of a picture; A1111 has a list of one."""
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str | Path):
        raise UsageError(f"{given!r} is not the path of one picture")
    return str(given)


def _sampler(name: str) -> str:
    split_spelling(name)
    return name  # with the schedule that it may name


def _lora(given: Any) -> tuple[Path, float]:
    from difftool.adapters.lora.file import parse_lora

    return parse_lora(str(given))


def _lora_hashes(loras: Iterable[Any]) -> str:
    return ", ".join(f"{applied.lora.path.stem}: {applied.lora.hash}" for applied in loras)


def _size_of_text(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


# --- what help shows --------------------------------------------------------------------------


@cache
def _bundled() -> tuple[dict[str, Any], str]:
    """How the bundled model is sampled, and its name."""
    from difftool.config.layers import DEFAULT_MODEL, merged, preset_layers

    layers = preset_layers(DEFAULT_MODEL)
    return merged(layer.values for layer in layers).get("sample", {}), DEFAULT_MODEL


def _of_bundled(name: str) -> Callable[[], str]:
    """The bundled model's own value as help's default."""

    def default() -> str:
        from difftool.config.schema import SampleConfig

        values, model = _bundled()
        value = values.get(name, getattr(SampleConfig(), name))
        text = "x".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"
        return f"{text} for {model}"

    return default


def _syntaxes() -> Iterable[str]:
    from difftool.config.schema import SampleConfig

    return get_args(get_type_hints(SampleConfig)["prompt_syntax"])


# --- the rows ---------------------------------------------------------------------------------


def _starts(values: Values) -> bool:
    return values["init"] is not None and not values["edits"]


def _edits(values: Values) -> bool:
    return values["edits"]


def _guided(values: Values) -> bool:
    return values["guidance"] not in (0, 1)


def _varies(values: Values) -> bool:
    return values["image_prompt"] is not None


def _hidden(name: str, key: str, help: str, panel: str, **more: Any) -> Setting:
    """A setting that lines of JSON have, and the command by --set."""
    return Setting(name=name, help=help, panel=panel, key=key, json=(name,), option=False, **more)


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="prompt", argument=True, many=True, read=read_text, panel=PROMPT,
        field="prompt", json=("prompt",), always=True,
        help="What to draw",
    ),
    Setting(
        name="prompts", metavar="FILE|-", panel=PROMPT, excludes=("prompt",),
        help="A prompt or a JSON object a line; - is stdin",
    ),
    Setting(
        name="negative", read=read_text, panel=PROMPT,
        field="negative", json=("negative", "negative_prompt"), always=True, short="n",
        effect=_guided, without="without guidance",
        help="What not to draw; needs guidance above 1",
    ),
    Setting(
        name="label", many=True, read=read_label, panel=PROMPT,
        field="label", json=("label",), always=True, a1111=A1111("Class", str),
        help="Class, by name or index; repeatable, or a,b,c",
    ),
    Setting(
        name="prompt_syntax", key="sample.prompt_syntax", panel=PROMPT, choices=_syntaxes,
        json=("prompt_syntax",),
        help="Weights and long prompts as in",
    ),
    Setting(
        name="clip_skip", type=int, low=1, key="sample.clip_skip", panel=PROMPT,
        json=("clip_skip",),
        a1111=A1111("Clip skip", int, lambda skip: None if skip == 1 else skip),
        help="Text encoder's layer from the end; 1 = the last",
    ),
    Setting(
        name="strict_prompt", type=bool, panel=PROMPT,
        help="Refuse prompts longer than the model reads",
    ),
    Setting(
        name="num", type=int, low=1, flags=("--num", "-n"), panel=PICTURE, field="num",
        help="Images of each prompt", default="1",
    ),
    Setting(
        name="seed", read=read_seeds, panel=PICTURE,
        field="seeds", json=("seed",), always=True, short="d",
        a1111=A1111("Seed", lambda text: (int(text),)),
        help="7, or 1,2,5-10, or -1 to draw one", default="drawn and printed",
    ),
    Setting(
        name="size", metavar="WxH", read=read_size, key="sample.size", panel=PICTURE,
        a1111=A1111("Size", _size_of_text, lambda size: "x".join(map(str, size))),
        help="Width and height in pixels", default=_of_bundled("size"),
    ),
    Setting(
        name="out", field="out", json=("out",), short="f", panel=PICTURE, option=False,
        help="Name of the picture below the output folder",
    ),
    Setting(
        name="sampler", read=_sampler, choices=lambda: SAMPLERS, key="sample.sampler",
        panel=SAMPLER, json=("sampler", "sampler_name"), always=True, short="ss",
        a1111=A1111("Sampler", str, lambda name: SAMPLERS[name].a1111 or name),
        help="Sampler", default=_of_bundled("sampler"),
    ),
    Setting(
        name="schedule", read=GRIDS.resolve, choices=lambda: GRIDS, key="sample.schedule",
        panel=SAMPLER, json=("schedule", "scheduler"), always=True,
        a1111=A1111(
            "Schedule type", lambda name: name if name in GRIDS else None,
            lambda name: GRIDS[name].a1111 or name,
        ),
        help="Grid of levels", default=_of_bundled("schedule"),
    ),
    Setting(
        name="steps", type=int, low=1, key="sample.steps", panel=SAMPLER,
        json=("steps",), always=True, short="s", a1111=A1111("Steps", int),
        help="Sampler steps", default=_of_bundled("steps"),
    ),
    Setting(
        name="eta", type=float, low=0, key="sample.sampler_options.eta", panel=SAMPLER,
        json=("eta",),
        help="Fresh noise of samplers that have it",
    ),
    _hidden("sampler_options", "sample.sampler_options", "Options of the sampler", SAMPLER,
            type=dict),
    _hidden("schedule_options", "sample.schedule_options", "Options of the schedule", SAMPLER,
            type=dict),
    _hidden("start_noise", "sample.start_noise", "Amplitude of the start noise", SAMPLER),
    Setting(
        name="guidance", type=float, read=read_guidance, key="sample.guidance", panel=GUIDANCE,
        json=("guidance", "cfg_scale"), always=True, words=("cfg",), short="l",
        a1111=A1111("CFG scale", float),
        help="Classifier-free guidance scale; 1 = off", default=_of_bundled("guidance"),
    ),
    Setting(
        name="guidance_rescale", type=float, low=0, high=1, key="sample.guidance_rescale",
        panel=GUIDANCE, json=("guidance_rescale",), effect=_guided, without="without guidance",
        help="Share of rescaled guidance, 0 to 1; 0 = off",
    ),
    Setting(
        name="guidance_interval", metavar="LOW,HIGH", read=read_interval,
        key="sample.guidance_interval", panel=GUIDANCE, json=("guidance_interval",),
        effect=_guided, without="without guidance",
        help="Guidance only at these log SNRs",
    ),
    _hidden("clip", "sample.clip", "Thresholding of the predicted x0", GUIDANCE),
    _hidden("rederive_eps", "sample.rederive_eps", "Whether eps follows a thresholded x0",
            GUIDANCE, type=bool),
    Setting(
        name="width", type=int, low=1, high=MAX_SIDE, key="sample.width", panel=PICTURE,
        json=("width",), always=True, short="w", option=False, help="Width in pixels",
    ),
    Setting(
        name="height", type=int, low=1, high=MAX_SIDE, key="sample.height", panel=PICTURE,
        json=("height",), always=True, short="h", option=False, help="Height in pixels",
    ),
    Setting(
        name="init", read=read_path, file="picture", metavar="PICTURE", panel=IMAGES,
        field="init", json=("init", "init_images"),
        help="Picture to start from; to repaint with --mask; to edit",
    ),
    Setting(
        name="image_guidance", type=float, low=1, key="sample.image_guidance", panel=IMAGES,
        json=("image_guidance",), a1111=A1111("Image CFG scale", float), effect=_edits,
        help="How closely an edit follows --init", default="1.5",
    ),
    Setting(
        name="strength", type=float, above=0, high=1, key="sample.strength", panel=IMAGES,
        json=("strength", "denoising_strength"), short="t",
        a1111=A1111("Denoising strength", float), effect=_starts,
        help="Share of the steps run on --init, above 0 to 1", default="0.75",
    ),
    Setting(
        name="mask", read=read_path, file="picture", metavar="PICTURE", panel=IMAGES,
        field="mask", json=("mask",),
        help="White is repainted, grey is soft; the rest of --init stays",
    ),
    Setting(
        name="image_prompt", read=read_path, file="picture", metavar="PICTURE", panel=IMAGES,
        field="image_prompt", json=("image_prompt",),
        help="Picture to vary (unCLIP models)",
    ),
    Setting(
        name="noise_level", type=int, low=0, high=999, key="sample.noise_level", panel=IMAGES,
        json=("noise_level",), effect=_varies,
        help="How freely --image-prompt is varied, 0 to 999",
    ),
    Setting(
        name="from_image", type=Path, file="picture", metavar="PICTURE", panel=IMAGES,
        help="Start from what a picture's metadata say",
    ),
    Setting(
        name="from_latents", type=Path, many=True, file="file of latents", metavar="FILE",
        panel=IMAGES,
        excludes=(
            "prompt", "prompts", "from_image", "init", "image_prompt", "refiner", "save_latents",
        ),
        help="Decode a file of --save-latents; repeatable",
    ),
    Setting(
        name="model", flags=("--model", "-m"), metavar="MODEL", panel=MODEL, words=("model_name",),
        a1111=A1111("Model"),
        help="Model file, run folder, diffusers folder or name", default=lambda: _bundled()[1],
    ),
    Setting(
        name="preset", metavar="NAME", panel=MODEL, complete=lambda: _presets(),
        help="Sample as this preset does: sdxl-turbo, lcm, ...",
    ),
    Setting(
        name="vae", metavar="MODEL", panel=MODEL,
        help="Autoencoder, or a model whose is taken",
    ),
    Setting(
        name="refiner", metavar="MODEL", panel=MODEL, json=("refiner",), a1111=A1111("Refiner"),
        help="Takes over for the last steps",
    ),
    Setting(
        name="refiner_start", type=float, low=0, high=1, panel=MODEL, needs=("refiner",),
        why="has no model to start",
        help="Share of the path before it", default="0.8",
    ),
    Setting(
        name="match", metavar="TOOL", choices=lambda: ("diffusers",), panel=MODEL,
        help="Numbers exactly as in",
    ),
    Setting(
        name="lora", metavar="FILE[:WEIGHT]", many=True, read=_lora, file="LoRA", panel=ADAPTERS,
        a1111=A1111("Lora hashes", write=_lora_hashes),
        help="Apply a LoRA; repeatable", default="1",
    ),
    Setting(
        name="allow_unused", type=bool, panel=ADAPTERS, needs=("lora",),
        why="is about a LoRA",
        help="Though the model lacks layers of a --lora",
    ),
    Setting(
        name="embedding", type=Path, metavar="FILE", many=True, file="embedding", panel=ADAPTERS,
        help="Textual inversion: a word, as its file is called; repeatable",
    ),
    Setting(
        name="output", flags=("--output", "-o"), metavar="PATH", panel=OUTPUT,
        help="File, folder/, name with [seed] [index] [prompt]..., or - for stdout",
        default="outputs/NNNNN-SEED.png",
    ),
    Setting(
        name="format", choices=lambda: OUTPUT_FORMATS, panel=OUTPUT,
        help="Pictures", default="png",
    ),
    Setting(
        name="grid", type=bool, panel=OUTPUT, help="Also one sheet of all images",
    ),
    Setting(
        name="save_latents", type=bool, panel=OUTPUT, help="Also PICTURE.latents.safetensors",
    ),
    Setting(
        name="no_metadata", type=bool, panel=OUTPUT,
        help="Pictures say nothing about themselves",
    ),
    Setting(
        name="skip_existing", type=bool, panel=OUTPUT, excludes=("overwrite",),
        help="Leave out pictures that are there already",
    ),
    Setting(
        name="batch_size", type=int, low=1, panel=RUN,
        help="Images made together", default="by size",
    ),
    Setting(
        name="exact", type=bool, panel=RUN,
        help="One image at a time: the same bits in any company",
    ),
    Setting(
        name="low_memory", type=bool, panel=RUN, help="Hold one network at a time; slower",
    ),
)
# fmt: on


def _presets() -> Iterable[str]:
    from difftool.config.layers import preset_names

    return preset_names()


OPTIONS: tuple[Option, ...] = (
    *(row for row in SETTINGS if row.option),
    *(OVERWRITE, DEVICE, DTYPE, SET, OFFLINE),
)
"""What `difftool sample`, and the library, take."""
ALWAYS = tuple(row for row in SETTINGS if row.always)
"""What is printed with every picture, and can be part of its name."""
REQUEST = tuple(row for row in SETTINGS if row.field is not None)
"""What a request has beside settings of the model."""
KEYS: dict[str, Setting] = {
    key: row for row in SETTINGS if row.key is not None or row.field is not None for key in row.json
}
"""The keys of a line of JSON."""
SHORT = {row.short: row.json[0] for row in SETTINGS if row.short is not None}
"""sd-scripts' options on a line of text, by the keys that they stand for."""
A1111_WORDS = {row.a1111.word: (row, row.a1111) for row in SETTINGS if row.a1111 is not None}
"""The words of A1111's text."""


def settings_of(values: Values) -> dict[str, Any]:
    """The settings of the model among read values by the names of rows: fields of SampleConfig, and
    `width`, `height`."""
    from difftool.config.layers import merged

    layers = (layer["sample"] for _, layer in option_layers(SETTINGS, values))
    return merged(layers)


def spelled(settings: Values) -> dict[str, Any]:
    """Settings with a sampler's name, such as "DPM++ 2M Karras", taken apart; a schedule that is
    given beside it wins."""
    if settings.get("sampler") is None:
        return dict(settings)
    name, schedule = split_spelling(settings["sampler"])
    implied = {} if schedule is None else {"schedule": schedule}
    return implied | dict(settings) | {"sampler": name}
