"""From plain values to configuration, checked key by key, and back. Torch-free.

A preset is checked where it comes in, from a user or a file; whatever works with it takes the
`Preset`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from difftool.config.families import FAMILIES, OWN, has_structure
from difftool.config.kinds import Kinds
from difftool.config.numbers import FINITE, Within, annotated
from difftool.config.schema import Preset, SampleConfig
from difftool.errors import DifftoolError, UsageError, suggestion
from difftool.storage.yaml import dump_yaml

T = TypeVar("T")


WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a text",
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    **dict.fromkeys(("dict_type", "dataclass_type"), "a mapping of keys to values"),
    "literal_error": "{expected}",
    "none_required": "null",
}
"""What a value is to be, in words, by pydantic's type of what is wrong with it."""


@cache
def _adapter(cls: type, kinds: tuple[type, ...]) -> Any:
    """What checks the values of a class while those kinds are registered."""
    from pydantic import ConfigDict, TypeAdapter

    for part in _dataclasses(cls):
        part.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return TypeAdapter(cls)


def _dataclasses(annotation: Any) -> set[Any]:
    """The dataclasses that a type is made of."""
    if isinstance(annotation, Kinds):
        return set().union(*map(_dataclasses, annotation.values()))
    if not dataclasses.is_dataclass(annotation):
        return set().union(*map(_dataclasses, get_args(annotation)))
    return {annotation}.union(*map(_dataclasses, type_hints(annotation).values()))


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, with the tables of the kinds that they may be of."""
    return get_type_hints(cls, include_extras=True)


def build_preset(
    values: Mapping[str, Any], source: str = "preset", error: type[DifftoolError] = UsageError
) -> Preset:
    """The Preset of plain values, as `to_values` gives them; an error that names a wrong key or
    value. error: InputError where the values are a file's and not the user's words."""
    try:
        preset = validate(Preset, values, source)
        check_names(preset)
        check_parts(preset, source)
    except UsageError as found:
        raise error(found.what, found.why, found.hint) from None
    return preset


def validate(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """An instance of a configuration dataclass from plain values, checked key by key."""
    from pydantic import ValidationError

    try:
        # Through JSON, where strict typing still reads a list as a tuple.
        made = _adapter(cls, Kinds.all()).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UsageError(*_explain(cls, error.errors()[0], source)) from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source} is not valid", str(error)) from None
    check_numbers(made, source)
    return made


def check_numbers(config: Any, source: str) -> None:
    """UsageError for a number of a configuration that is not in its range."""
    for where, number, within in _numbers(config, FINITE, ""):
        name = where if "." in where else where.replace("_", " ")
        within.check(number, f"{source}: {name}")


def within_of(key: str) -> Within:
    """What the numbers of a preset's key must be: "train.lr"."""
    hint: Any = Preset
    for name in key.split("."):
        hint = type_hints(hint)[name]
    return annotated(hint)


def _numbers(value: Any, within: Within, where: str) -> Iterator[tuple[str, int | float, Within]]:
    """Each number of a configuration, with the path of its key and what it must be."""
    if dataclasses.is_dataclass(value):
        for name, hint in type_hints(type(value)).items():
            path = f"{where}.{name}" if where else name
            yield from _numbers(getattr(value, name), annotated(hint), path)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, within, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each, within, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield where, value, within


def _explain(cls: type, error: Any, source: str) -> tuple[str, str | None, str | None]:
    """What is wrong with the values, why, and the nearest right key."""
    path = [str(part) for part in error["loc"] if not str(part).endswith(("Config", "]"))]
    where = ".".join(path) or source
    if error["type"] == "unknown_kind":
        kind, kinds = str(error["input"]["kind"]), error["ctx"]["kinds"].split()
        return f'{source}: there is no {where} of kind "{kind}"', None, suggestion(kind, kinds)
    if error["type"] == "unexpected_keyword_argument":
        known, last = _fields_at(cls, error["loc"][:-1]), str(error["loc"][-1])
        where = ".".join([*path[: -1 if path[-1:] == [last] else None], last])
        return f'{source}: there is no key "{where}"', None, suggestion(last, known)
    if error["type"].startswith("missing"):
        if isinstance(error["loc"][-1], int):
            where = ".".join(path[:-1])
            return f"{source}: {where} is not valid", "the list is too short", None
        return f'{source}: the key "{where}" is missing', None, None
    what, got = f"{source}: {where} is not valid", json.dumps(error["input"], default=str)[:60]
    if error["type"] in ("value_error", "assertion_error"):
        return what, str(error["ctx"]["error"]), None
    wanted = WANTED.get(error["type"], "something else").format(**error.get("ctx", {}))
    return what, f"it is to be {wanted}, not {got}", None


def _fields_at(cls: Any, loc: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass that an error's location leads to."""
    for part in loc:
        parts = {c.__name__: c for c in _dataclasses(cls)}
        if part in parts:
            cls = parts[part]
        elif dataclasses.is_dataclass(cls) and part in (hints := type_hints(cls)):
            inner = _dataclasses(hints[part])
            cls = next(iter(inner)) if len(inner) == 1 else hints[part]
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def check_names(preset: Preset) -> None:
    """UsageError for a name or an option that its registry does not have: of paths, targets,
    samplers and grids. For whoever replaces one of them in a preset that was checked.

    Names of how it is trained are checked where it is trained: a model that a plugin's loss was
    trained by is sampled without the plugin.
    """
    from difftool.diffusion import GRIDS, SAMPLERS, TARGETS
    from difftool.diffusion.path import build_path

    TARGETS.resolve(preset.target)
    GRIDS.resolve(preset.sample.schedule)
    SAMPLERS[preset.sample.sampler](build_path(preset.path), **preset.sample.sampler_options)


def check_parts(preset: Preset, source: str) -> None:
    """UsageError for networks that do not fit together, or are not of the family that is named."""
    what, unet, text = f"{source} does not fit together", preset.unet, preset.text
    if len({*preset.parts}) < len(preset.parts):
        raise UsageError(f"{source}: a part is named twice in parts", ", ".join(preset.parts))
    width, context = sum(encoder.width for encoder in text), getattr(unet, "context_dim", None)
    if text and context and context != width:
        raise UsageError(what, f"the text is {width} wide, and the network reads {context}")
    if text and getattr(unet, "masks_context", False):
        length, (encoder, *others) = getattr(unet, "length", 0), text
        if others or length != encoder.length:
            lengths = " and ".join(str(each.length) for each in text)
            raise UsageError(what, f"the text is {lengths} tokens, and the network reads {length}")
    pooled = sum(t.projection or t.width for t in text if t.pooled)
    numbers = pooled + 256 * preset.size_numbers
    if (
        text
        and getattr(unet, "vector_name", "") == "add_embedding"
        and unet.vector_dim != (numbers or None)
    ):
        why = (
            f"its vector is of {unet.vector_dim or 'no'} numbers, and the network is told {numbers}"
        )
        raise UsageError(what, why)
    row = FAMILIES.get(preset.family)
    if row and row.id != OWN and not has_structure(row, unet, preset.codec, text):
        hint = f"family: {OWN} is any model that is of no published family"
        raise UsageError(f"{source} is not of family {row.id}, which it names", hint=hint)


def check_conditioned(preset: Preset) -> None:
    """UsageError for a network that reads a text where there is no text encoder: a component may be
    converted so, and not be trained."""
    unet = preset.unet
    reads = [f"unet.{n}" for n in ("context_dim", "vector_dim") if getattr(unet, n, None)]
    if reads and not preset.text:
        hint = f"add text: to the preset, or leave {' and '.join(reads)} out"
        raise UsageError(f"{preset.name} reads a text and has no text encoder", hint=hint)


def check_sampling(settings: SampleConfig) -> None:
    """UsageError for values of sampling settings that no model can be sampled with."""
    from difftool.diffusion.samplers import guides_apart

    if settings.steps < 1:
        raise UsageError(f"--steps {settings.steps} is too few", hint="give at least 1")
    if settings.guidance != 0 and settings.guidance < 1 and not guides_apart(settings.sampler):
        hint = "1 is off; 2 to 8 are usual"
        raise UsageError(f"guidance {settings.guidance:g} is not usable", hint=hint)


def to_values(config: Any) -> dict[str, Any]:
    """Plain values (JSON, YAML) of a configuration; `build_preset` gives the same one back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The same as YAML text."""
    return dump_yaml(to_values(config))
