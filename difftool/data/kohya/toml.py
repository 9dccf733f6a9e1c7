"""TOML dataset files. Torch-free."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftool.config.schema import DataConfig
from difftool.data.beside import SIDECARS
from difftool.data.captions import Syntax
from difftool.data.listing import MAX_METADATA, sound_text
from difftool.errors import InputError, UsageError, unreadable
from difftool.storage.read import open_file

USED: dict[str, tuple[type, ...]] = {
    "image_dir": (str,),
    "metadata_file": (str,),
    "num_repeats": (int,),
    "is_reg": (bool,),
    "class_tokens": (str,),
    "caption_extension": (str,),
    "caption_extention": (str,),
    "caption_separator": (str,),
    "caption_prefix": (str,),
    "caption_suffix": (str,),
    "caption_dropout_rate": (int, float),
    "caption_tag_dropout_rate": (int, float),
    "shuffle_caption": (bool,),
    "keep_tokens": (int,),
    "keep_tokens_separator": (str,),
    "secondary_separator": (str,),
    "enable_wildcard": (bool,),
    "flip_aug": (bool,),
    "random_crop": (bool,),
    "resolution": (int, list),
    "batch_size": (int,),
}
"""What is read, and the types of its values."""
NAMES = {"image_dir", "metadata_file", "caption_extension", "caption_extention"}
"""What cannot be empty: an image_dir of "" would be the folder of the file."""
OFF: dict[str, tuple[Any, ...]] = {
    "alpha_mask": (False,),
    "color_aug": (False,),
    "face_crop_aug_range": ([], [1.0, 1.0]),
    "caption_dropout_every_n_epochs": (0,),
    "token_warmup_min": (0, 1),
    "token_warmup_step": (0,),
    "conditioning_data_dir": (),
    "control_directory": (),
    "video_directory": (),
    "image_jsonl_file": (),
    "skip_image_resolution": (),
    "network_multiplier": (1,),
    "validation_split": (0,),
}
"""What would change the training and is not built; fine with these values, at which it is off."""
BUCKETS = (
    *("enable_bucket", "min_bucket_reso", "max_bucket_reso"),
    *("bucket_reso_steps", "bucket_no_upscale"),
)
"""What is a matter of the training, not of the data."""
HARMLESS = {"cache_info", "cache_latents", "cache_latents_to_disk", "validation_seed"}


@dataclass(frozen=True)
class TomlFolder:
    """One [[datasets.subsets]], with what it inherits."""

    path: Path
    values: Mapping[str, Any]
    suffixes: tuple[str, ...]
    syntax: Syntax

    @property
    def repeats(self) -> int:
        """How often each picture is seen in an epoch, in all."""
        return int(self.values.get("num_repeats", 1))


@dataclass(frozen=True)
class TomlDataset:
    """A TOML dataset file."""

    folders: Sequence[TomlFolder]
    asked: Mapping[str, Any]
    """What it asks of the training."""
    random_crop: bool
    notes: Sequence[str]


def read_toml(path: Path, config: DataConfig) -> TomlDataset:
    """What is in a TOML dataset file; InputError if it is malformed or asks for what is not
    built."""
    try:
        with open_file(path) as file:
            text = sound_text(file.read(MAX_METADATA + 1)[:MAX_METADATA], str(path))
        content = tomllib.loads(text)
    except OSError as error:
        raise unreadable(path, error) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML", str(error)) from None
    unknown: dict[str, None] = {}
    general = _table(content.get("general", {}), "[general]", path, unknown)
    found: list[TomlFolder] = []
    every: list[dict[str, Any]] = []
    for dataset in _tables(content, "datasets", path):
        outer = general | _table(dataset, "[[datasets]]", path, unknown)
        for subset in _tables(dataset, "subsets", path):
            values = outer | _table(subset, "[[datasets.subsets]]", path, unknown)
            every.append(values)
            found.append(_folder(values, path, config))
    unknown |= dict.fromkeys(set(content) - {"general", "datasets"})
    notes = [f"{path.name}: keys not known and not used: {', '.join(unknown)}"] if unknown else []
    asked = {
        key: value
        for key, name in (
            ("size", "resolution"),
            ("batch_size", "batch_size"),
            ("flip", "flip_aug"),
        )
        if (value := _common(name, every, path)) is not None
    }
    if asked:
        said = ", ".join(f"{key} = {value}" for key, value in asked.items())
        notes.append(f"{path.name} asks the training for {said}")
    if bucketed := [key for key in BUCKETS if any(key in values for values in every)]:
        notes.append(f"{path.name}: {', '.join(bucketed)} are set for the training, not here")
    if any(values.get("caption_dropout_rate") for values in every):
        notes.append(f"{path.name}: caption_dropout_rate is applied on top of train.drop")
    return TomlDataset(found, asked, bool(_common("random_crop", every, path)), notes)


def _tables(content: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    tables = content.get(key)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{path} has no [[{'datasets.' * (key != 'datasets')}{key}]]")
    return tables


def _table(content: Any, where: str, path: Path, unknown: dict[str, None]) -> dict[str, Any]:
    """The keys of one table that are read, checked."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: {where} is not a table")
    values = {}
    for key, value in content.items():
        if key in OFF:
            if value not in OFF[key]:
                why = f"{key} = {str(value)[:60]} in {where}"
                hint = "take it out to train without it"
                raise InputError(f"{path} asks for what difftool cannot do", why, hint)
        elif key in USED:
            right = isinstance(value, USED[key])
            if not right or (isinstance(value, bool) and bool not in USED[key]):
                raise InputError(f"{path}: {key} is not valid", f"{str(value)[:60]} in {where}")
            if key in NAMES and not str(value).strip():
                raise InputError(f"{path}: {key} is empty", f"in {where}")
            if isinstance(value, int | float) and value < 0:
                raise InputError(f"{path}: {key} is negative", f"{value} in {where}")
            values[key] = value
        elif key in BUCKETS:
            values[key] = value
        elif key != "subsets" and key not in HARMLESS:
            unknown[key] = None
    return values


def _folder(values: Mapping[str, Any], path: Path, config: DataConfig) -> TomlFolder:
    if "image_dir" not in values:
        hint = "a metadata_file needs one, too: its paths are looked for there"
        raise InputError(f"{path}: a subset has no image_dir", hint=hint)
    where = Path(values["image_dir"]).expanduser()
    # kohya takes it from the working folder; beside the TOML file is where a moved set is.
    beside = path.parent / where
    where = beside if beside.is_dir() or not where.is_dir() else where
    if not where.is_dir():
        raise UsageError(f"{path}: there is no folder {values['image_dir']}", f"as {where}")
    given = values.get("caption_extension", values.get("caption_extention", ".caption"))
    suffix = given if given.startswith(".") else f".{given}"
    syntax = Syntax(
        wildcards=values.get("enable_wildcard", False),
        shuffle=values.get("shuffle_caption", False) or config.shuffle_captions,
        keep=values.get("keep_tokens", config.keep_tokens),
        separator=values.get("caption_separator", ",").strip() or ",",
        keep_separator=values.get("keep_tokens_separator", ""),
        secondary=values.get("secondary_separator", ""),
        prefix=values.get("caption_prefix", ""),
        suffix=values.get("caption_suffix", ""),
        dropout=values.get("caption_dropout_rate", 0.0),
        tag_dropout=values.get("caption_tag_dropout_rate", 0.0),
    )
    return TomlFolder(where, values, (suffix, *(s for s in SIDECARS if s != suffix)), syntax)


def _common(key: str, every: Sequence[Mapping[str, Any]], path: Path) -> Any:
    """The value that all subsets share; InputError if they differ."""
    found = [values.get(key) for values in every]
    if any(value != found[0] for value in found):
        hint = "give all subsets the same, or train on them one after the other"
        raise InputError(f"{path}: {key} differs between subsets", str(found)[:80], hint)
    value = found[0]
    if isinstance(value, list):
        if len(value) not in (1, 2) or not all(isinstance(v, int) for v in value):
            raise InputError(f"{path}: {key} is not valid", str(value)[:60])
        if value[0] != value[-1]:
            why = f"{key} = {value}"
            hint = "give one side; buckets find other shapes"
            raise InputError(f"{path} asks for what difftool cannot do", why, hint)
        return value[0]
    return value
