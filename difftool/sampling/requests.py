"""What is asked for: prompts, seeds, sizes, and lines of them. Torch-free."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from difftool.config.layers import merge
from difftool.errors import DifftoolError, InputError, UsageError, suggestion
from difftool.sampling.settings import (
    KEYS,
    MAX_SEED,
    REQUEST,
    SHORT,
    read_path,
    read_text,
    settings_of,
)
from difftool.storage.strict_json import parse_json
from difftool.text.midjourney import MEANT, OTHERS

SIZE = frozenset(("size", "width", "height"))
"""Settings that a shape takes the place of."""
MIDJOURNEYS = OTHERS | frozenset(MEANT)
FACTS = (
    *("path", "existing", "index", "model", "seconds", "latents", "gif"),
    *("refiner", "prior"),
)
"""What a printed picture says beside its settings, which its line does not ask for."""


class NamedFile(NamedTuple):
    """A file that a picture's metadata name."""

    option: str
    """Name of the row that would give another: "lora"."""
    name: str
    """As it is written."""
    digest: str = ""
    """See `digest_of`; "" where it is not said."""
    weight: float = 1.0
    """Of a LoRA."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The images of one prompt; None, or a setting that is absent, is the model's own choice."""

    prompt: str | None = None
    negative: str | None = None
    template: str | None = None
    """What the prompt was chosen from; with one it is final, and nothing in it stands for anything
    else."""
    negative_template: str | None = None
    """The same of the negative prompt."""
    label: str | None = None
    """A class, by name or index."""
    seeds: tuple[int, ...] | None = None
    """One an image, or the first of `num` consecutive ones; empty = drawn."""
    num: int | None = None
    repeat: int | None = None
    """So many times as many images."""
    no: str | None = None
    """What is not to be drawn beside what the negative prompt says."""
    ar: tuple[float, float] | None = None
    """Width and height of the shape that the model's own number of pixels gets."""
    vary_seed: int | None = None
    """Of the first image's variation; -1 or None = drawn."""
    out: str | None = None
    """Name of the picture below the output folder."""
    id: str | int | None = None
    """A name of the user's, which is printed with each of its pictures."""
    init: str | None = None
    """Path of the picture to start from, to repaint or to edit."""
    mask: str | None = None
    """Path of the picture whose white is repainted."""
    depth_map: str | None = None
    """Path of the picture of how near what it shows is."""
    image_prompt: str | None = None
    """Path of the picture to vary (unCLIP)."""
    applied: Sequence[tuple[Path, float]] | None = None
    """Paths and strengths of the LoRAs that are applied for it; None: those of the model."""
    replaced: Sequence[tuple[str, str]] | None = None
    """Texts to replace in its prompts, and what takes their places."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SampleConfig, and `width`, `height`."""
    place: tuple[tuple[str, str], ...] = ()
    """Which combination of listed settings it is: the text of each one's value, by its name."""
    source: str = ""
    """Where it was read, for messages."""
    line: int | None = None
    """The line that it was read from."""
    model_hash: str = ""
    """Hash of the model that the request was made for; empty = any."""
    model: str = ""
    """Name of that model, as its picture says it."""
    made_by: str = ""
    """The tool that a picture says it was made by."""
    embeddings: tuple[str, ...] = ()
    """Paths of the learned words that it was made with."""
    loras: tuple[tuple[str, float], ...] = ()
    """Paths and strengths of the LoRAs that it was made with."""
    found: frozenset[str] = frozenset()
    """Names of the settings that a picture's metadata have, and nobody has typed."""
    plugins: tuple[tuple[str, str], ...] = ()
    """Names and hashes of the plugins that it was made with."""
    named: tuple[NamedFile, ...] = ()
    """Files that the picture names, which `locate` makes paths of: no other field has them yet."""
    sought: tuple[NamedFile, ...] = ()
    """LoRAs that another tool's picture names, by their bare names, and that were not found."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """What is known of the files that it named, by their paths."""
    opened: str = ""
    """What is said of the files that are opened because it named them."""
    changed: tuple[str, ...] = ()
    """What is to be warned of in them."""
    networks: Mapping[str, str] = field(default_factory=dict)
    """What is known of the LoRAs that its prompt named, by their names."""
    ignored: tuple[str, ...] = ()
    """What stands in its prompts and means nothing here."""
    missed: tuple[tuple[str, str], ...] = ()
    """What the picture that it is taken from was made by and it does not ask for, each with the
    option that would, or ""."""

    def __post_init__(self) -> None:
        for text in (self.prompt, self.negative):
            read_text(text or "")

    def images(self) -> Sequence[int]:
        """The seed of each image: image k of a request has seed + k, or, where their noise is
        turned to other seeds', they all have the first one."""
        if self.seeds and len(self.seeds) > 1:
            if (self.repeat or 1) > 1:
                what = f"{len(self.seeds)} seeds are not repeated"
                raise UsageError(what, hint="leave --repeat out, or give the first seed alone")
            if self.num not in (None, len(self.seeds)):
                why = f"{len(self.seeds)} seeds for {self.num} images"
                raise UsageError("seeds and number of images differ", why, "leave --num out")
            return self.seeds
        num = (1 if self.num is None else self.num) * (self.repeat or 1)
        if num < 1:
            raise UsageError(f"{num} images cannot be made", hint="give at least 1")
        first = self.seeds[0] if self.seeds else drawn_seed()
        if self.settings.get("vary"):
            return [first] * num
        if first + num - 1 > MAX_SEED:
            raise UsageError(f"seed {first} is too large for {num} images", f"limit {MAX_SEED}")
        return range(first, first + num)

    def variations(self, count: int) -> Sequence[int | None]:
        """The seed that the noise of each of so many images is turned to; None where it is not."""
        if not self.settings.get("vary"):
            return [None] * count
        drawn = self.vary_seed in (None, -1)
        first = drawn_seed() if drawn else self.vary_seed or 0
        return [(first + k) % (MAX_SEED + 1) for k in range(count)]

    def over(self, base: Request) -> Request:
        """This request, with what it leaves open taken from `base`."""
        names = [row.field for row in REQUEST if row.field]
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name in ("prompt", "negative"):  # a template belongs to its prompt
            if name in own:
                template = "template" if name == "prompt" else "negative_template"
                own[template] = getattr(self, template)
        settings = overlay(base.settings, self.settings)
        if "ar" in own:
            settings = {k: v for k, v in settings.items() if k in self.settings or k not in SIZE}
        elif not SIZE.isdisjoint(self.settings):
            own["ar"] = None
        return replace(base, **own, settings=settings)


def drawn_seed() -> int:
    """A seed where none is asked for."""
    return secrets.randbelow(2**32)


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others; options of a sampler or grid go with the one they belong to."""
    dropped = {f"{name}_options" for name in ("sampler", "schedule") if name in top}
    dropped |= {"width", "height"} if "size" in top else set()
    dropped |= {"size"} if {"width", "height"} <= top.keys() else set()
    return merge({name: value for name, value in base.items() if name not in dropped}, top)


def request_of(values: Mapping[str, Any], **more: Any) -> Request:
    """The request of read values by the names of rows; `more`: fields of Request."""
    given = {
        row.field: v for row in REQUEST if row.field and (v := values.get(row.name)) is not None
    }
    return Request(**given | more, settings=settings_of(values))


# --- lines -----------------------------------------------------------------------------------


def parse_line(line: str) -> Request | None:
    """The request of one line: a prompt, maybe with options, or a JSON object; None for a blank
    line and for a comment, which # opens."""
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    if not _JSON.match(line):
        return from_json(_with_options(line))
    try:
        values = parse_json(line, "the line")
    except InputError as error:
        raise UsageError("not a JSON object", error.why, _LINE) from None
    if not isinstance(values, dict):
        raise UsageError("not a JSON object", f"it is JSON, {line[:40]}", _LINE)
    return from_json(values)


def parse_element(text: str) -> Request:
    """The request of an element of an array of JSON: an object, or a text, which is read as a line
    of text is."""
    try:
        values = parse_json(text, "the element")
    except InputError as error:
        raise UsageError("not JSON", error.why, _LINE.replace("line", "element")) from None
    if isinstance(values, str):
        return from_json(_with_options(values.strip()))
    if not isinstance(values, dict):
        why = f"it is JSON, {text[:40]}"
        raise UsageError("not a JSON object", why, _LINE.replace("line", "element"))
    return from_json(values)


_JSON = re.compile(
    r"""(?x)
    \{(?! [^{}"':]* [|{] | [^{}"':]+\}+\s*[^\s\]}] )  # and no {red|blue} fox, {{red}}, {red} fox
    | (\[\s*)+(["\]] | \{\s*(["}]|$) | $ | (-?[\d.]+|true|false|null)\s*[,\]])
    | "([^"\\]|\\.)*("\s*(:.*|,?)|$)$                  # and no "red" fox
    | (true|false|null|[\]}\[{,:\s]+)$
    """
)
"""How a line begins that is JSON, or was meant to be: brackets open prompts of other tools too."""
_LINE = 'a line is a prompt, or an object: {"prompt": "a fox", "seed": 7}'


def _with_options(line: str) -> dict[str, Any]:
    """The values of a line in the manner of sd-scripts, `a fox --n bad --s 30`, or of A1111,
    `--prompt "a fox" --steps 30`. Beside a parameter that Midjourney alone has, --s is its own."""
    first, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    values: dict[str, Any] = {"prompt": first.strip()} if first.strip() else {}
    names = {option.partition(" ")[0].lower() for option in options}
    own = names & SHORT.keys() - OTHERS - MEANT.keys()
    theirs = bool(names & OTHERS - SHORT.keys() - KEYS.keys()) and not own
    for option in options:
        name, _, text = option.partition(" ")
        key = name if theirs and name in OTHERS else SHORT.get(name, name)
        if key not in KEYS and key.lower() in MIDJOURNEYS:
            values["prompt"] = f"{values.get('prompt', '')} --{option}".strip()
            continue
        if key not in KEYS:
            known = [*SHORT, *KEYS]
            raise UsageError(f'there is no option "--{name}"', hint=suggestion(name, known))
        if key in values:
            raise UsageError(f'"{key}" is given twice')
        text = text.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        values[key] = as_written(key, text or KEYS[key].alone or "")
    return values


def as_written(key: str, text: str) -> Any:
    """The value that a text stands for: rows of numbers read no texts."""
    kind = KEYS[key].type
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def from_json(values: Mapping[str, Any]) -> Request:
    """The request of an object of JSON: keys of A1111's interface, and those that are printed with
    a picture, whose own object asks for the same picture again."""
    made_by = ""
    if "schema" in values:
        made_by = str(values.get("model_hash") or "")
        values = {k: v for k, v in values.items() if k not in (*FACTS, "schema", "model_hash")}
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in KEYS:
            raise UsageError(f'there is no key "{key}"', hint=suggestion(key, KEYS))
        if value is None:
            continue
        row = KEYS[key]
        if row.name in read:
            raise UsageError(f'"{key}" is given twice', f"it is {' or '.join(row.json)}")
        if isinstance(value, list) and row.read is not read_path:
            raise UsageError(f'"{key}" has one value a line', f"got {json.dumps(value)}"[:80])
        read[row.name] = row.one(value, f'"{key}"')
    return request_of(read, model_hash=made_by)


def located(error: DifftoolError, request: Request) -> DifftoolError:
    """The same error, saying where the request is that it is about."""
    where = f"{request.source}: " if request.source else ""
    if where and error.what.startswith(where):
        return error
    found = type(error)(f"{where}{error.what}", error.why, error.hint)
    found.line = request.line
    return found
