"""Names of pictures: templates, their words, and values as parts of names on any system.
Torch-free."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from difftool.errors import UsageError, suggestion
from difftool.sampling.settings import ALWAYS, SETTINGS, Values

STARTED = datetime.now()
"""When the program was."""
MAX_SLUG, MAX_SLUG_BYTES, MAX_PART_BYTES = 100, 150, 200
"""Of a value in a name, and of one part of a path: systems have room for 255 bytes."""
_KEPT = frozenset("Lu Ll Lt Lm Lo Mn Mc Nd Nl No So".split())
"""Unicode's categories of letters, marks, numbers and pictographs."""
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)}


def slug(value: object, empty: str = "none", size: int = MAX_SLUG_BYTES, space: str = "-") -> str:
    """A value as part of a file name: letters, digits and pictographs of every script, and ._-
    within, with `space` in place of all else; at most 100 characters, and bytes as said. No system
    takes it for a device."""
    plain = unicodedata.normalize("NFKC", str(value))
    kept = "".join(c if c in "._-" or unicodedata.category(c) in _KEPT else " " for c in plain)
    short = space.join(kept.split())[:MAX_SLUG].encode("utf-8", "ignore")[:size]
    named = short.decode("utf-8", "ignore").strip(".-_ ") or empty
    return f"_{named}" if is_reserved(named) else named


def is_reserved(part: str) -> bool:
    """Whether Windows takes a part of a path for a device, whatever its ending."""
    return part.split(".")[0].strip().lower() in _RESERVED


def is_too_long(part: str) -> bool:
    """Whether some system has no room for it."""
    return len(os.fsencode(part)) > MAX_PART_BYTES


# --- words ------------------------------------------------------------------------------------


class NameWord(NamedTuple):
    """A word of templates that is made of several values, or has arguments: [word<a><b>]."""

    value: Callable[[Values, Sequence[str]], Any]
    """UsageError for arguments that mean nothing."""
    about: str
    arguments: int = 0
    """How many it may have."""
    space: str = "-"
    """What is put between words of its value."""


def _datetime(_: Values, arguments: Sequence[str]) -> str:
    form, zone = (*arguments, "", "")[:2]
    try:
        now = datetime.now(ZoneInfo(zone) if zone else None)
    except (LookupError, ValueError, OSError):
        what = f'there is no time zone "{zone}"'
        raise UsageError(what, hint="such as Europe/Berlin or Asia/Tokyo") from None
    try:
        return re.sub(r"[/\\:]", "-", now.strftime(form or "%Y%m%d%H%M%S"))
    except ValueError as error:
        what = f'"{form}" is no format of dates'
        raise UsageError(what, str(error), "such as %Y-%m-%d") from None


def _words(values: Values, _: Sequence[str]) -> str:
    found = re.split(r"[\s,{}<>()\[\]!?;:|…]+", values["prompt"])
    return " ".join([word for word in found if word][:8]) or "empty"


def _hash(*names: str) -> Callable[[Values, Sequence[str]], str]:
    def value(values: Values, arguments: Sequence[str]) -> str:
        length = arguments[0] if arguments else "8"
        if not re.fullmatch(r"[1-9]|[1-5]\d|6[0-4]", length):
            raise UsageError(f"<{length}> is no length of a hash", hint="1 to 64")
        text = " ".join(values[name] for name in names)
        return hashlib.sha256(text.encode()).hexdigest()[: int(length)]

    return value


def _has_prompt(values: Values, arguments: Sequence[str]) -> str:
    found = []
    for argument in arguments:
        wanted, _, other = argument.partition("|")
        found.append(wanted if wanted.lower() in values["prompt"].lower() else other)
    return "".join(found)


WORDS: dict[str, NameWord] = {
    "index": NameWord(lambda v, _: v["index"], "number in the run, from 0"),
    "model": NameWord(lambda v, _: v["model"], "name of the model"),
    "model_hash": NameWord(lambda v, _: v["model_hash"], "10 digits of its file's SHA-256"),
    "init": NameWord(lambda v, _: Path(v["init"] or "").stem, "name of --init without its ending"),
    "id": NameWord(lambda v, _: v["id"], "`id` of the JSON line"),
    "date": NameWord(lambda v, _: v["date"], "2026-01-31"),
    "datetime": NameWord(
        _datetime, "now, `[datetime<%Y-%m-%d %H.%M><Asia/Tokyo>]`; both may be left out", 2, " "
    ),
    "job_timestamp": NameWord(lambda *_: STARTED.strftime("%Y%m%d%H%M%S"), "when the run began"),
    "prompt_spaces": NameWord(lambda v, _: v["prompt"], "prompt with its spaces", space=" "),
    "prompt_no_styles": NameWord(lambda v, _: v["prompt"], "the same", space=" "),
    "prompt_words": NameWord(_words, "first eight words of the prompt", space=" "),
    "prompt_hash": NameWord(_hash("prompt"), "8 digits of its SHA-256, or `[prompt_hash<12>]`", 1),
    "negative_prompt_hash": NameWord(_hash("negative"), "of the negative prompt", 1),
    "full_prompt_hash": NameWord(_hash("prompt", "negative"), "of both", 1),
    "hasprompt": NameWord(_has_prompt, "`[hasprompt<fox|none>]`: fox, if the prompt has it", 16),
    "clip_skip": NameWord(lambda v, _: v["clip_skip"], "`--clip-skip`"),
    "denoising": NameWord(lambda v, _: v["strength"], "`--strength`"),
    "batch_number": NameWord(lambda v, _: v["number"], "number among its prompt's images, from 1"),
    "batch_size": NameWord(lambda v, _: len(v["seeds"]), "images of its prompt"),
    "generation_number": NameWord(lambda v, _: v["index"] + 1, "number in the run, from 1"),
    "seed_first": NameWord(lambda v, _: v["seeds"][0], "first seed of its prompt"),
    "seed_last": NameWord(lambda v, _: v["seeds"][-1], "last seed of its prompt"),
    "user": NameWord(lambda *_: getpass.getuser(), "name of the user"),
    "styles": NameWord(lambda *_: "", "nothing"),
    "none": NameWord(lambda *_: "", "nothing"),
}
"""Beside those of settings."""
FIELDS = (*(row.name for row in ALWAYS), *WORDS)
"""The words of templates."""
NUMBERS = (
    *("seed", "index", *(row.name for row in ALWAYS if row.type is int)),
    *("batch_number", "batch_size", "generation_number", "seed_first", "seed_last"),
)
"""Those that can be padded with zeros."""
ALIASES = {word: row.name for row in SETTINGS for word in row.words}
EMPTY = ("styles", "none", "hasprompt")
"""Words that may come to nothing."""

_FIELD = re.compile(r"\[([A-Za-z_]+)(?::([0-9]{1,2}))?((?:<[^<>]*>)*)\]")


def fields(template: str) -> list[str]:
    """The words of a template, in today's spelling."""
    return [_today(match[1]) for match in _FIELD.finditer(template)]


def without_fields(template: str, filled: str = "") -> str:
    """A template with each of its words replaced by the same."""
    return _FIELD.sub(filled, template)


def split_fields(template: str) -> tuple[str, str]:
    """The folder of a template that no word is part of, and the rest."""
    first = _FIELD.search(template)
    fixed = template[: first.start()] if first else template
    cut = max(fixed.rfind("/"), fixed.rfind(os.sep)) + 1
    return template[:cut], template[cut:]


def _today(name: str) -> str:
    return ALIASES.get(name.lower(), name.lower())


def check_template(template: str) -> None:
    """UsageError for a word that there is not, that has no digits to pad, or whose arguments mean
    nothing."""
    _check_others(template)
    for match in _FIELD.finditer(template):
        name, digits, arguments = match[1].lower(), match[2], _arguments(match[3])
        if name not in (*FIELDS, *ALIASES):
            what = f'there is no field "[{match[1]}]" for names of pictures'
            raise UsageError(what, hint=suggestion(name, FIELDS))
        if digits and name not in NUMBERS:
            raise UsageError(f"[{name}:{digits}] pads what is not a whole number")
        word = WORDS.get(_today(name))
        if len(arguments) > (word.arguments if word else 0):
            raise UsageError(f"{match[0]} has arguments that mean nothing", hint=f"[{name}]")
        if word and word.arguments:
            word.value({"prompt": "", "negative": ""}, arguments)


_OTHERS = re.compile(r"\{(\w+)(?:[:!][^{}]*)?\}|%(?:\((\w+)\))?\d*[dis](?![a-z])")
"""Fields as other tools write them."""


def _check_others(template: str) -> None:
    """UsageError for a field that is written as Python, C or a shell has it."""
    for match in _OTHERS.finditer(template):
        word = match[1] or match[2] or "index"
        if word.lower() in FIELDS or not match[1]:
            what = f"{match[0]} stands for nothing in names of pictures"
            raise UsageError(what, hint=f"write [{word.lower()}]")


def _arguments(text: str) -> list[str]:
    return re.findall("<([^<>]*)>", text)


def expand(template: str, values: Values) -> str:
    """The template with each [field] and [field:05] replaced by its value's slug; shorter ones
    where several make a name too long."""

    def filled(size: int) -> str:
        def value(match: re.Match[str]) -> str:
            name = _today(match[1])
            word = WORDS.get(name)
            value = word.value(values, _arguments(match[3])) if word else values[name]
            if isinstance(value, int):
                return f"{value:0{int(match[2] or 1)}d}"
            text = f"{value:g}" if isinstance(value, float) else value or ""
            return slug(text, "" if name in EMPTY else name, size, word.space if word else "-")

        return _FIELD.sub(value, template)

    name = filled(MAX_SLUG_BYTES)
    for size in (90, 60, 40, 25):
        if not any(map(is_too_long, PurePath(name).parts)):
            break
        name = filled(size)
    return name


def patterns(template: str) -> Iterator[str]:
    """Globs of the names that a template may come to, with a number or without."""
    name = re.sub(r"[*?[]", "[\\g<0>]", without_fields(template, "\0")).replace("\0", "*")
    path = PurePath(name)
    yield name
    yield str(path.with_name(f"{path.stem}-*{path.suffix}"))
