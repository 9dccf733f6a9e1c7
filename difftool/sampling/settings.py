"""SETTINGS: every setting of a picture, and every option of `difftool sample`, as a row.

A row gives the flag with its help, checks and completion, the keyword of the library, the keys of
JSON lines read and printed, the word in A1111's text, the word in names of files, and when it has
no effect. A setting is added by a row, and by its use. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from difftool.config.listed import names, numbers, replacements, sizes, weighted
from difftool.config.numbers import COUNT, NOT_NEGATIVE, SHARE, SIDE, Within
from difftool.config.options import (
    DEVICE,
    DTYPE,
    OFFLINE,
    OVERWRITE,
    RUN,
    SET,
    Option,
    assignments,
    option_layers,
)
from difftool.config.schema import FitName, MaskContent
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.noise import GENERATORS, STEP_NOISE
from difftool.diffusion.samplers import SAMPLERS, guides_apart, split_spelling
from difftool.errors import UsageError, suggestion
from difftool.images.formats import OUTPUT_FORMATS
from difftool.pipeline.matches import MATCHES
from difftool.pipeline.upscale import UPSCALERS, read_upscaler
from difftool.pipeline.weighting import WEIGHTINGS
from difftool.registry import canonical
from difftool.storage.strict_json import is_unicode
from difftool.text.syntax import SYNTAXES

PROMPT, PICTURE, SAMPLER, GUIDANCE = "Prompt", "Picture", "Sampler", "Guidance"
IMAGES, MODEL, ADAPTERS, OUTPUT = "Pictures in", "Model", "Adapters", "Output"

MAX_SEED = 2**64 - 1
MAX_SEEDS = 1_000_000
MAX_TEXT = 10_000
MAX_NAME = 1_000

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
    if any(c < " " and c not in "\t\n" for c in text) or not is_unicode(text):
        raise UsageError("the prompt has control characters", json.dumps(text)[:80])
    return text


def read_label(label: Any) -> str:
    """A class by name or index."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UsageError(f"{label!r} is neither the name nor the index of a class")
    return str(label)


def read_id(given: Any) -> str | int:
    """A number or a short text that tells a line from others."""
    if isinstance(given, bool) or not isinstance(given, int | str) or len(str(given)) > MAX_NAME:
        raise UsageError(f'"id" is not a number or a text of {MAX_NAME} characters')
    return given if isinstance(given, int) else read_text(given)


def read_seeds(given: Any) -> tuple[int, ...]:
    """Seeds of 7, "7", "1,2,5-10" or [1, 2, 5]; none, which is to say drawn, of "-1"."""
    hint = "give 7, or 1,2,5-10, or -1 to draw one"
    if isinstance(given, list | tuple | range):
        given = ",".join(map(str, given))
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise UsageError(f"{given!r} is not a list of seeds", hint=hint)
    text = str(given)
    if text.strip().lower() in ("-1", "random"):
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
        SIDE.check(side, "a side of the picture,")
    return width, height


def read_ratio(given: Any) -> tuple[float, float]:
    """(width, height) of a shape, "3:2", "1.85:1" or "1.5"."""
    text = ":".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(?:\s*[:xX/]\s*(\d+\.?\d*|\.\d+))?\s*", text)
    width, height = (float(match[1]), float(match[2] or 1)) if match else (0.0, 0.0)
    if not (width and height and 1 / 50 <= width / height <= 50):
        raise UsageError(f'"{text}" is not a shape', hint="give WIDTH:HEIGHT, such as 3:2")
    return width, height


def read_tile(given: Any) -> str:
    """Which way a picture repeats: both, if that is not said."""
    ways = {True: "both", "": "both", "xy": "both", "true": "both", False: "none", "false": "none"}
    ways |= {"horizontal": "x", "vertical": "y"}
    way = ways.get(given.lower() if isinstance(given, str) else given, given)
    if way not in TILES:
        raise UsageError(f"--tile {given!r} is not one of its values", hint=", ".join(TILES))
    return way


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


def read_scale(given: Any) -> float:
    """How much larger, of "2x", "1.5" or a number."""
    text = str(given).strip().lower().removesuffix("x")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1 <= scale <= 16:
        raise UsageError(f'"{given}" is not how much larger', hint="give 2x, or 1.5x; up to 16x")
    return scale


def read_outpaint(given: Any) -> tuple[int, int, int, int]:
    """Pixels on the left, at the top, on the right and at the bottom, of "left=64,top=32", of "64"
    for all sides, or of four numbers."""
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    parts = re.findall(r"[^,\s]+", text)
    if len(parts) in (1, 4) and all(map(str.isdecimal, parts)):
        parts = [f"{side}={n}" for side, n in zip(SIDES, parts * (4 // len(parts)), strict=True)]
    named = {side.lower(): number for side, _, number in (part.partition("=") for part in parts)}
    if named.keys() - set(SIDES) or len(named) < len(parts):
        named = {"": ""}
    if not all(map(str.isdecimal, named.values())) or not any(map(int, named.values())):
        hint = "give left=64,right=64, or 64 for all sides"
        raise UsageError(f'"{text}" does not say what is drawn on which side', hint=hint)
    left, top, right, bottom = (int(named.get(side, 0)) for side in SIDES)
    SIDE.check(left + top + right + bottom, "--outpaint, all sides together,")
    return left, top, right, bottom


def read_path(given: Any) -> str:
    """The path of a picture; A1111 has a list of one."""
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str | Path):
        raise UsageError(f"{given!r} is not the path of one picture")
    if not str(given).strip() or "\0" in str(given):
        raise UsageError(f"{str(given)!r} is not the path of a picture")
    return str(given)


def _sampler(name: str) -> str:
    split_spelling(name)
    return name  # with the schedule that it may name


def _lora(given: Any) -> tuple[Path, float]:
    from difftool.adapters.lora.file import parse_lora

    return parse_lora(str(given))


def _lora_hashes(loras: Iterable[Any]) -> str:
    return ", ".join(f"{applied.lora.path.stem}: {applied.lora.hash}" for applied in loras)


def _schedule(name: str) -> str:
    return name if canonical(name) == "automatic" else GRIDS.resolve(name)


def _known_sampler(name: str) -> str | None:
    try:
        return _sampler(name)
    except UsageError:
        return None


def _known_schedule(name: str) -> str | None:
    of_a1111 = {row.a1111: own for own, row in GRIDS.items()}
    name = of_a1111.get(name) or {"Uniform": "normal", "DDIM": "ddim_uniform"}.get(name, name)
    return name if name in GRIDS or name == "Automatic" else None


def _mask_content(given: Any) -> str:
    """What is below a mask, by A1111's words and its interface's numbers too."""
    names, word = get_args(MaskContent), canonical(given).removeprefix("latent")
    numbered = dict(zip(map(str, range(4)), ("fill", "original", "noise", "nothing"), strict=True))
    if (word := numbered.get(word, word)) not in names:
        hint = suggestion(str(given), names)
        raise UsageError(f'"{given}" is not what may be below a mask', hint=hint)
    return word


def _content_of_a1111(content: str) -> str | None:
    words = {"fill": "fill", "noise": "latent noise", "nothing": "latent nothing"}
    return words.get(content)


RNGS = {"cpu": "CPU", "gpu": "NV"}
"""A1111's words for generators: NV is the GPU's without one."""


def _known_rng(word: str) -> str | None:
    return {"cpu": "cpu", "gpu": "gpu", "nv": "gpu", "cuda": "gpu"}.get(word.lower())


def _rng(given: Any) -> str:
    if (word := _known_rng(str(given))) is None:
        hint = suggestion(str(given), GENERATORS)
        raise UsageError(f'there are no random numbers of "{given}"', hint=hint)
    return word


def _known_upscaler(name: str) -> str | None:
    try:
        return read_upscaler(name) if not Path(name).suffix else None
    except UsageError:
        return None


def upscaler_name(name: str) -> str:
    """A1111's name of an upscaler."""
    return UPSCALERS[name].a1111 if name in UPSCALERS else Path(name).stem


def _beyond_1(scale: float) -> str | None:
    return None if scale == 1 else f"{scale:g}"


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
        value = f"{value:g}" if isinstance(value, float) else value
        text = "x".join(map(str, value)) if isinstance(value, list | tuple) else value
        return f"{text} for {model}"

    return default


def _presets() -> Iterable[str]:
    from difftool.config.layers import preset_names

    return preset_names()


def _models() -> Iterable[str]:
    from difftool.hub.find import bundled_models

    return list(bundled_models())


# --- the rows ---------------------------------------------------------------------------------


def _starts(values: Values) -> bool:
    return values["init"] is not None and not (values["edits"] or values["enlarges"])


def _twice(values: Values) -> bool:
    return values["hires"] > 1


def _enlarges(values: Values) -> bool:
    return values["hires"] > 1 or (values["upscale"] > 1 and _starts(values))


def _starts_or_edits(values: Values) -> bool:
    return values["init"] is not None


def _masked(values: Values) -> bool:
    return values["mask"] is not None or values["outpaint"] is not None


def _region(values: Values) -> bool:
    return values["only_masked"] and values["mask"] is not None


def _edits(values: Values) -> bool:
    return values["edits"]


def _guided(values: Values) -> bool:
    return values["guidance"] not in (0, 1) or guides_apart(values["sampler"])


def _reads(values: Values) -> bool:
    return values["reads"]


def _varies(values: Values) -> bool:
    return values["image_prompt"] is not None or values["enlarges"] or _imagines(values)


def _turned(values: Values) -> bool:
    return values["vary"] > 0


def _imagines(values: Values) -> bool:
    return values["prior"] is not None


def _setting(name: str, help: str, panel: str, **more: Any) -> Setting:
    """A row; of numbers that a picture is made by there may be several."""
    if more.get("type") in (int, float) and (more.get("key") or more.get("field")):
        more = {"listed": numbers if more.get("option", True) else None} | more
    return Setting(name=name, help=help, panel=panel, **more)


def _of_request(
    name: str, help: str, panel: str, also: tuple[str, ...] = (), **more: Any
) -> Setting:
    """A field of Request of its name. also: further keys of JSON."""
    return _setting(name, help, panel, **{"field": name, "json": (name, *also)} | more)


def _of_model(
    name: str, help: str, panel: str, also: tuple[str, ...] = (), bundled: bool = False, **more: Any
) -> Setting:
    """A setting of the model, a field of SampleConfig of its name. also: further keys of JSON;
    bundled: help shows the bundled model's own."""
    more = {"json": (name, *also), "default": _of_bundled(name) if bundled else None} | more
    return _setting(name, help, panel, key=f"sample.{name}", **more)


ENGINES = ("auto", "plain", "quick")
SIDES = ("left", "top", "right", "bottom")
"""Of a picture, in the order in which their pixels are listed."""
TILES = ("both", "x", "y", "none")
"""Ways in which a picture repeats."""
PICTURES = ("init", "mask", "depth_map", "image_prompt")
"""Pictures that one goes by: options, and fields of a request."""
ALONE = ("prompt", "prompts", "from_image", "init", "image_prompt", "refiner", "save_latents")
"""What does not go with latents to decode."""


# fmt: off
SETTINGS: tuple[Setting, ...] = (
    _of_request("prompt", "What to draw", PROMPT, argument=True, many=True, read=read_text,
        always=True, blank=True),
    _setting("prompts", "A prompt or a JSON object a line; - is stdin", PROMPT, metavar="FILE|-",
        excludes=("prompt",)),
    _of_request("negative", "What not to draw; needs guidance above 1", PROMPT, read=read_text,
        always=True, short="n", effect=_guided, without="without guidance",
        also=("negative_prompt",), blank=True),
    _of_request("no", "Further things not to draw; repeatable", PROMPT, read=read_text, many=True),
    _of_request("template", "What the prompt was chosen from", PROMPT, option=False,
        read=read_text, a1111=A1111("Template", str)),
    _of_request("negative_template", "What the negative prompt was chosen from", PROMPT,
        option=False, read=read_text, a1111=A1111("Negative Template", str)),
    _of_request("replace", "Pictures with each in place of the first: red,blue,green; repeatable",
        PROMPT, field="replaced", json=(), many=True, metavar="TEXT,TEXT", listed=replacements,
        read=lambda pair: pair),
    _setting("wildcard_dir", "Files of __wildcards__; wildcards/, where it is there", PROMPT,
        type=Path, metavar="DIR", file="folder of wildcards", folder=True),
    _setting("combinatorial", "Every prompt that {a|b} and __wildcards__ come to", PROMPT,
        type=bool),
    _of_request("label", "Class, by name or index; repeatable, or a,b,c", PROMPT, many=True,
        read=read_label, always=True, a1111=A1111("Class", str)),
    _of_model("prompt_syntax", "Weights, breaks and schedules in prompts as in", PROMPT,
        listed=names,
        read=SYNTAXES.resolve, choices=lambda: SYNTAXES, default="a1111"),
    _of_model("prompt_weighting", "Arithmetic of weights; the syntax's own", PROMPT, listed=names,
        read=WEIGHTINGS.resolve, choices=lambda: WEIGHTINGS),
    _of_model("clip_skip", "Text encoder's layer from the end; 1 = the last", PROMPT, type=int,
        a1111=A1111("Clip skip", int, lambda skip: None if skip == 1 else skip)),
    _setting("strict_prompt", "Refuse prompts longer than a text encoder reads at once", PROMPT,
        type=bool),
    _setting("tokens", "Print how prompts are read, and stop", PROMPT, type=bool),
    _of_request("num", "Images of each prompt", PICTURE, listed=None, type=int, flags=("--num",
        "-n"),
        within=Within(low=1, high=MAX_SEEDS), default="1", also=("batch_size",)),
    _of_request("repeat", "So many times as many, with the seeds that follow", PICTURE,
        listed=None, type=int,
        within=Within(low=1, high=MAX_SEEDS), default="1", also=("n_iter",)),
    _setting("seed", "7, or 1,2,5-10, or -1 to draw one", PICTURE, read=read_seeds, field="seeds",
        json=("seed",), always=True, short="d", a1111=A1111("Seed", lambda text: (int(text),)),
        default="drawn and printed"),
    _of_model("rng", "Whose random numbers: a CPU's, or a GPU's, as A1111's are", PICTURE,
        listed=names, read=_rng, choices=lambda: GENERATORS, default="cpu",
        a1111=A1111("RNG", _known_rng, RNGS.get)),
    _of_model("vary", "How far the start noise is turned to another seed's, 0 to 1", PICTURE,
        type=float, effect=_turned, without="without its strength", also=("subseed_strength",),
        a1111=A1111("Variation seed strength", float)),
    _of_request("vary_seed", "That seed; image k has the same seed and the variation seed + k",
        PICTURE, type=int, within=Within(low=-1, high=MAX_SEED), needs=("vary",),
        also=("subseed",), why="is the seed of a variation", a1111=A1111("Variation seed", int),
        default="drawn and printed"),
    _of_model("size", "Width and height in pixels", PICTURE, listed=sizes, metavar="WxH",
        read=read_size,
        a1111=A1111("Size", _size_of_text, lambda size: "x".join(map(str, size))), json=(),
        bundled=True),
    _of_request("ar", "Shape, such as 3:2, of as many pixels as the model's own", PICTURE,
        also=("aspect_ratio",),
        listed=sizes,
        metavar="W:H", read=read_ratio, excludes=("size",)),
    _of_model("tile", "Repeats without a seam: both ways, or x, or y alone", PICTURE,
        read=read_tile, choices=lambda: TILES, alone="both", also=("tiling",),
        a1111=A1111("Tiling", {"True": "both"}.get, lambda way: None if way == "none" else "True")),
    _of_model("chaos", "How unlike the pictures of a prompt are, 0 to 100", PICTURE, type=float,
        effect=_reads, without="without a prompt"),
    _of_model("stop", "Percent of the steps that are run, for a picture that is not finished",
        PICTURE, type=int),
    _of_model("deepcache", "Compute deep levels at every Nth step alone: faster, nearly the same",
        SAMPLER, type=int, metavar="N", also=("cache_interval",), default="1"),
    _of_model("tome", "Share of the tokens that join others alike, to 0.75: faster, less detail",
        SAMPLER, type=float, metavar="SHARE", also=("token_merging_ratio", "tome_ratio"),
        a1111=A1111("Token merging ratio", float, lambda share: share or None), default="0"),
    _of_request("out", "Name of the picture below the output folder", PICTURE, short="f",
        option=False),
    _of_request("id", "A name of one's own, which is printed with the picture", PICTURE,
        option=False, read=read_id),
    _of_model("sampler", "Sampler", SAMPLER, listed=names, read=_sampler, choices=lambda: SAMPLERS,
        always=True,
        short="ss", also=("sampler_name", "sampler_index"), bundled=True,
        a1111=A1111("Sampler", _known_sampler, lambda name: SAMPLERS[name].a1111 or name)),
    _of_model("schedule", "Grid of levels", SAMPLER, listed=names, read=_schedule,
        choices=lambda: GRIDS,
        always=True,
        a1111=A1111("Schedule type", _known_schedule, lambda name: GRIDS[name].a1111 or name),
        also=("scheduler",), bundled=True),
    _of_model("steps", "Sampler steps", SAMPLER, type=int, within=Within(low=1,
        high=100_000),
        always=True, short="s", a1111=A1111("Steps", int), also=("num_inference_steps",),
        bundled=True),
    _of_model("prior_steps", "Steps of the prior", SAMPLER, type=int,
        within=Within(low=1, high=100_000), effect=_imagines, without="without a prior",
        default="the prior's"),
    _setting("eta", "Fresh noise of samplers that have it", SAMPLER, type=float,
        within=NOT_NEGATIVE, key="sample.sampler_options.eta", json=("eta",)),
    _of_model("step_noise", "What ancestral samplers draw, as in", SAMPLER, listed=names,
        choices=lambda: STEP_NOISE, default="continued"),
    _of_model("ensd", "A1111's eta noise seed delta", SAMPLER, type=int,
        a1111=A1111("ENSD", int, lambda delta: delta or None)),
    _of_model("sampler_options", "Options of the sampler", SAMPLER, type=dict, option=False),
    _of_model("schedule_options", "Options of the schedule", SAMPLER, type=dict, option=False),
    _of_model("start_noise", "Amplitude of the start noise", SAMPLER, option=False),
    _of_model("guidance", "Classifier-free guidance scale; 1 = off", GUIDANCE, type=float,
        always=True, words=("cfg",), short="l", a1111=A1111("CFG scale", float),
        also=("cfg_scale", "guidance_scale", "cfg"), bundled=True),
    _of_model("prior_guidance", "Guidance scale of the prior", GUIDANCE, type=float,
        within=NOT_NEGATIVE, effect=_imagines, without="without a prior", default="the prior's"),
    _of_model("guidance_rescale", "Share of rescaled guidance, 0 to 1; 0 = off", GUIDANCE,
        type=float, effect=_guided, without="without guidance"),
    _of_model("guidance_interval", "Guidance only at these log SNRs", GUIDANCE, metavar="LOW,HIGH",
        read=read_interval, effect=_guided, without="without guidance"),
    _of_model("rounding", "Which shade a pixel becomes: nearest, or down", GUIDANCE,
        option=False),
    _of_model("clip", "Thresholding of the predicted x0", GUIDANCE, option=False),
    _of_model("clip_range", "Bound of the predicted x0", GUIDANCE, type=float, option=False),
    _of_model("clip_quantile", "Share of x0 that dynamic thresholding keeps", GUIDANCE, type=float,
        option=False),
    _of_model("rederive_eps", "Whether eps follows a thresholded x0", GUIDANCE, type=bool,
        option=False),
    _of_model("width", "Width in pixels", PICTURE, type=int, within=SIDE, always=True,
        short="w", option=False),
    _of_model("height", "Height in pixels", PICTURE, type=int, within=SIDE, always=True,
        short="h", option=False),
    _of_request("init", "Picture to start from; to repaint with --mask; to edit; a folder: each",
        IMAGES, read=read_path, file="picture", folder=True, metavar="PICTURE",
        also=("init_images",)),
    _of_model("image_guidance", "How closely an edit follows --init", IMAGES, type=float,
        a1111=A1111("Image CFG scale", float), effect=_edits, default="1.5"),
    _of_model("strength", "Share of the steps run on --init, above 0 to 1", IMAGES, type=float,
        short="t", a1111=A1111("Denoising strength", float), effect=_starts,
        default="0.75", also=("denoising_strength",)),
    _of_model("strength_rule", "How many steps a strength is, as in", IMAGES, option=False),
    _of_model("posterior", "Whether a picture's latent is drawn, or the mean", IMAGES,
        option=False),
    _of_model("fit", "How --init of another size is fitted: its shape not kept, cut, or filled up",
        IMAGES, listed=names, choices=lambda: get_args(FitName), effect=_starts_or_edits,
        without="without --init", default="stretch"),
    _of_request("mask", "White is repainted, grey is soft; the rest of --init stays", IMAGES,
        read=read_path, file="picture", folder=True, metavar="PICTURE"),
    _of_model("mask_invert", "Black is repainted in place of white", IMAGES, type=bool,
        also=("inpainting_mask_invert",),
        effect=_masked, without="without --mask", a1111=A1111("Mask mode",
        {"Inpaint not masked": True, "Inpaint masked": False}.get,
        lambda turned: "Inpaint not masked" if turned else None)),
    _of_model("mask_grow", "Pixels that the mask reaches further; below 0: less far", IMAGES,
        type=int, effect=_masked, without="without --mask", default="0"),
    _of_model("mask_blur", "Pixels over which the mask's edges are softened", IMAGES, type=float,
        effect=_masked, without="without --mask", default="0",
        a1111=A1111("Mask blur", float, lambda blur: f"{blur:g}" if blur else None)),
    _of_model("mask_content", "What is below the mask to start from: the picture, its "
        "surroundings, noise, or nothing", IMAGES, listed=names, read=_mask_content,
        choices=lambda: get_args(MaskContent), effect=_masked, without="without --mask",
        default="original", also=("inpainting_fill",),
        a1111=A1111("Masked content", _mask_content, _content_of_a1111)),
    _of_model("only_masked", "Draw the masked region alone, enlarged to the size", IMAGES,
        type=bool, effect=_masked, without="without --mask", a1111=A1111("Inpaint area",
        {"Only masked": True, "Whole picture": False}.get,
        lambda only: "Only masked" if only else None)),
    _of_model("mask_padding", "Pixels around it that are drawn too", IMAGES, type=int,
        effect=_region, without="without --only-masked", default="32",
        a1111=A1111("Masked area padding", int)),
    _of_model("upscale", "Draw --init so much larger than it is", IMAGES, metavar="2x",
        read=read_scale, effect=_starts, without="without --init"),
    _of_model("hires", "Draw so much larger in a second pass, from what the first made", PICTURE,
        metavar="2x", read=read_scale, a1111=A1111("Hires upscale", float, _beyond_1)),
    _of_model("hires_strength", "Share of the steps that are run in it", PICTURE, type=float,
        effect=_twice, without="without --hires", default="0.7"),
    _of_model("hires_steps", "Its steps, of which that share is run; as many as the first's",
        PICTURE, type=int, effect=_twice, without="without --hires",
        a1111=A1111("Hires steps", lambda text: int(text) or None)),
    _of_model("upscaler", "What makes pictures larger: a name, or a file of ESRGAN's kind",
        PICTURE, read=read_upscaler, complete=lambda: UPSCALERS, metavar="NAME|FILE",
        effect=_enlarges, without="without --hires or --upscale", default="latent",
        a1111=A1111("Hires upscaler", _known_upscaler, upscaler_name)),
    _of_model("window", "Side of the windows in which the network sees what is larger", PICTURE,
        type=int, listed=numbers),
    _of_model("outpaint", "Draw so many pixels beyond --init, on any of its sides", IMAGES,
        metavar="left=64,top=...", read=read_outpaint, effect=_starts, without="without --init"),
    _of_request("depth_map", "How near what is drawn is, white the nearest (models of depth)",
        IMAGES, read=read_path, file="picture", metavar="PICTURE"),
    _of_request("image_prompt", "Picture to vary (unCLIP models); a folder: each", IMAGES,
        read=read_path, file="picture", folder=True, metavar="PICTURE"),
    _of_model("noise_level", "How freely the picture is varied, 0 to 999", IMAGES, type=int,
        effect=_varies),
    _setting("from_image", "Start from what a picture's metadata say", IMAGES, type=Path,
        file="picture", metavar="PICTURE"),
    _setting("trust_image", "Open what it names outside of its folder: LoRAs, pictures, words",
        IMAGES, type=bool, needs=("from_image", "from_latents"), why="is about a picture's files"),
    _setting("from_latents", "Decode a file of --save-latents; repeatable", IMAGES, type=Path,
        many=True, file="file of latents", metavar="FILE", excludes=ALONE),
    _setting("model", "Model file, run folder, diffusers folder or name", MODEL, listed=names,
        flags=("--model", "-m"), metavar="MODEL", complete=_models, words=("model_name",),
        a1111=A1111("Model"), default=lambda: _bundled()[1]),
    _setting("preset", "Sample as this preset does: sdxl-turbo, lcm, ...", MODEL, listed=names,
        metavar="NAME",
        complete=_presets),
    _setting("vae", "Autoencoder, or a model whose is taken", MODEL, listed=names, metavar="MODEL",
        complete=_models),
    _setting("prior", "Says to the prompt what picture is varied (unCLIP models)", MODEL,
        metavar="MODEL", json=("prior",), complete=_models, excludes=("image_prompt",)),
    _setting("refiner", "Takes over for the last steps", MODEL, listed=names, metavar="MODEL",
        json=("refiner",),
        complete=_models, a1111=A1111("Refiner")),
    _setting("refiner_start", "Share of the path before it", MODEL, type=float, within=SHARE,
        needs=("refiner",), why="has no model to start", default="0.8"),
    _setting("match", "Noise, weighting, schedules, rounding and more as in", MODEL, listed=names,
        metavar="TOOL", read=MATCHES.resolve, choices=lambda: MATCHES),
    _of_request("lora", "Apply a LoRA, at several weights in turn with FILE:0.4,0.8; repeatable",
        ADAPTERS, field="applied", json=(), listed=weighted, metavar="FILE[:WEIGHT]", many=True,
        read=_lora, file="LoRA", folder=True, default="1",
        a1111=A1111("Lora hashes", write=_lora_hashes)),
    _setting("lora_dir", "Where the LoRAs are that prompts name, <lora:NAME:0.8>", ADAPTERS,
        type=Path, metavar="DIR", file="folder of LoRAs", folder=True,
        default="lora, loras, models/Lora"),
    _setting("embedding_dir", "Where words are that prompts have, each as its file is called",
        ADAPTERS, type=Path, metavar="DIR", file="folder of embeddings", folder=True),
    _setting("allow_unused", "Though the model lacks layers of a --lora", ADAPTERS, type=bool,
        needs=("lora",), why="is about a LoRA"),
    _setting("embedding", "Textual inversion: a word, as its file is called; repeatable", ADAPTERS,
        type=Path, metavar="FILE", many=True, file="embedding"),
    _setting("output", "File, folder/, name with [seed] [prompt]..., page.html, or - for stdout",
        OUTPUT, flags=("--output", "-o"), metavar="PATH", default="outputs/NNNNN-SEED.png"),
    _setting("format", "Pictures", OUTPUT, read=OUTPUT_FORMATS.resolve,
        choices=lambda: OUTPUT_FORMATS, default="png"),
    _setting("grid", "One sheet of all pictures, what they differ in at its edges", OUTPUT,
        type=bool),
    _setting("save_latents", "Also PICTURE.latents.safetensors", OUTPUT, type=bool),
    _setting("preview", "Show pictures in the terminal while they are made", OUTPUT, type=bool),
    _setting("preview_path", "Renew a file with them at each step", OUTPUT, type=Path,
        metavar="FILE"),
    _setting("gif", "Also PICTURE.gif, from noise to the picture", OUTPUT, type=bool),
    _setting("preview_decoder", "Tiny decoder of these: TAESD's file, or diffusers' folder", OUTPUT,
        type=Path, metavar="FILE", file="tiny decoder", folder=True,
        needs=("preview", "preview_path", "gif"), why="is about previews",
        default="the bundled one, or a linear map"),
    _setting("no_metadata", "Pictures say nothing about themselves", OUTPUT, type=bool),
    _setting("skip_existing", "Leave out pictures that are there already, by content", OUTPUT,
        type=bool, excludes=("overwrite",)),
    _setting("batch_size", "Images made together", RUN, type=int, within=COUNT, default="by size"),
    _setting("exact", "One image at a time: the same bits in any company", RUN, type=bool),
    _setting("low_memory", "Hold one network at a time; slower", RUN, type=bool),
    _setting("engine", "How networks are computed on a CPU: quick tries what is fastest on this "
        "machine, auto does for large ones", RUN, choices=lambda: ENGINES, default="auto"),
)
# fmt: on


OPTIONS: tuple[Option, ...] = (
    *(row for row in SETTINGS if row.option),
    *(OVERWRITE, DEVICE, DTYPE),
    replace(SET, complete=lambda: assignments(prefix="sample.")),
    OFFLINE,
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
