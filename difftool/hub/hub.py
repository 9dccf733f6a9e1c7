"""Models of the Hugging Face hub by their names there, ORG/NAME[@REVISION][:FILE]. Torch-free.

The hub's cache on this machine is read as it lies; only what is not in it is asked for over the
network, with the package huggingface_hub, and only the files that a model needs: no code, no second
copy in another format, and no pickle where there is anything else.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from difftool.errors import ResourceError, UsageError
from difftool.formats.diffusers.components import (
    EXTRA_JSON,
    EXTRA_TENSORS,
    FOREIGN,
    INDEX,
    PLAIN_FILES,
    TOKENIZERS,
    WEIGHTS,
    stem_of,
    weight_names,
)
from difftool.storage.places import user_cache
from difftool.storage.strict_json import read_json

NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+))?"
)
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of models in one file, the safe one first."""
COMPONENTS = {*WEIGHTS, *FOREIGN, *TOKENIZERS, *PLAIN_FILES} - {"unet_ema"}
SHARD = re.compile(r"-\d{5}-of-\d{5}")
OFFLINE, TRUE = "HF_HUB_OFFLINE", ("1", "on", "yes", "true")
INSTALL = "pip install 'difftool[hub]'"


class HubName(NamedTuple):
    """What a MODEL argument says of the hub."""

    repo: str
    revision: str
    file: str | None
    """A file in it, where not the whole is meant."""

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


class Choice(NamedTuple):
    """The files of a repository that make a model."""

    target: str
    """The one to be opened; "" for the folder."""
    files: list[str]


def parse_name(where: str) -> HubName | None:
    """What an argument names at the hub; None if it can only be a file here."""
    found = NAME.fullmatch(where)
    if not found or ".." in re.split(r"[/\\]", where.replace("@", "/").replace(":", "/")):
        return None
    if not found["file"] and found["repo"].endswith((*FILES, ".json", ".yaml", ".png")):
        return None
    return HubName(found["repo"], found["revision"] or "main", found["file"])


def is_offline() -> bool:
    """Whether the network is not to be used: --offline, or HF_HUB_OFFLINE."""
    return os.environ.get(OFFLINE, "").lower() in TRUE


# --- what a model needs -----------------------------------------------------------------------


def choose(names: Sequence[str], file: str | None, *, half: bool = False) -> Choice:
    """The files of a repository that are needed; UsageError if it holds no model, or several.

    half: weights of half precision are preferred, where there are both.
    """
    there = set(names)
    if file is not None:
        if file not in there:
            raise UsageError(f"it has no file {file}", hint=_listed(_models(there)))
        beside = {f"{file.rpartition('.')[0]}.yaml"} & there
        return Choice(file, [file, *beside, *_shards(there, file)])
    if INDEX in there:
        files = [name for name in (INDEX, EXTRA_JSON, EXTRA_TENSORS) if name in there]
        for component in sorted(COMPONENTS):
            files += _described(there, f"{component}/")
            if component in (*WEIGHTS, *FOREIGN):
                files += _weights(there, f"{component}/", stem_of(component), half)
        return Choice("", files)
    if "config.json" in there and (found := _weights(there, "", WEIGHTS["vae"], half)):
        return Choice("", ["config.json", *found])
    models = _models(there)
    if len(models) != 1:
        if not models:
            raise UsageError("it holds no model that difftool reads", f"no {INDEX}, no checkpoint")
        raise UsageError("it holds several models", hint=_listed(models))
    return Choice(models[0], [models[0], *_shards(there, models[0])])


def _described(there: Iterable[str], folder: str) -> Iterator[str]:
    """Configuration files and vocabularies of a component."""
    for name in sorted(there):
        rest = name.removeprefix(folder)
        if rest != name and "/" not in rest and rest.endswith((".json", ".txt")):
            if ".index." not in rest:
                yield name


def _weights(there: set[str], folder: str, stem: str, half: bool) -> list[str]:
    """The one set of weights of a component that is preferred; nothing if there is none."""
    names = list(weight_names(stem))
    if half:
        names.sort(key=lambda name: (".bin" in name, ".fp16" not in name))
    for name in names:
        if folder + name in there:
            return [folder + name, *_shards(there, folder + name)]
    return []


def _shards(there: Iterable[str], index: str) -> Iterator[str]:
    """The shards of an index, by their names: both places of a variant are in use."""
    if not (parts := re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json", index)):
        return
    stem, suffix, variant = parts[1], parts[2], parts[3] or ""
    for name in sorted(there):
        if SHARD.sub("", name) == f"{stem}{variant}.{suffix}" and SHARD.search(name):
            yield name


def _models(there: Iterable[str]) -> list[str]:
    """Files at the top that may be models each, those of the safest kind."""
    top = [name for name in sorted(there) if "/" not in name and not SHARD.search(name)]
    for suffix in FILES:
        endings = (suffix, f"{suffix}.index.json")
        if found := [name for name in top if name.endswith(endings)]:
            return found
    return []


def _listed(models: Sequence[str]) -> str:
    more = f" or {len(models) - 5} more" if len(models) > 5 else ""
    return "name a file of it, ORG/NAME:FILE: " + (", ".join(models[:5]) + more or "it has none")


# --- the cache --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the hub's packages keep what they have downloaded."""
    where = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if where:
        return Path(where).expanduser()
    return Path(os.environ.get("HF_HOME") or user_cache() / "huggingface").expanduser() / "hub"


def cached(name: HubName) -> Path | None:
    """A model that is whole in the cache; None if it is not there.

    UsageError if what is there holds no model, or several.
    """
    folder = cache_folder() / f"models--{name.repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / name.revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = name.revision
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[\w-]+", commit) or not snapshot.is_dir():
        return None
    names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
    if name.file is not None and name.file not in names:
        return None
    try:
        chosen = choose(names, name.file)
    except UsageError as error:
        if is_offline():
            raise _about(name, error) from None
        return None
    lacking = not chosen.target and INDEX in names and any(_lacking(snapshot, chosen.files))
    return None if lacking else snapshot / chosen.target


def _lacking(snapshot: Path, files: Sequence[str]) -> Iterator[str]:
    """Components that a pipeline names and whose files are not there."""
    for component, kind in read_json(snapshot / INDEX).items():
        if component in COMPONENTS and isinstance(kind, list) and kind != [None, None]:
            own = [name for name in files if name.startswith(f"{component}/")]
            weights = component in (*WEIGHTS, *FOREIGN)
            if not own or (weights and not any(_is_weights(name) for name in own)):
                yield component


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


# --- the network ------------------------------------------------------------------------------


def download(name: HubName, *, half: bool = False) -> Path:
    """The model of that name, brought into the cache; UsageError if that cannot be done."""
    what = f'there is no model "{name}"'
    if is_offline():
        why = f"it is neither here nor in the hub's cache {cache_folder()}"
        raise UsageError(what, why, "without --offline (HF_HUB_OFFLINE) it can be downloaded")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        why = "it is not in the hub's cache, and what downloads, huggingface_hub, is not installed"
        raise UsageError(what, why, INSTALL) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        found = HfApi().model_info(name.repo, revision=name.revision)
        names = [sibling.rfilename for sibling in found.siblings or ()]
        chosen = choose(names, name.file, half=half)
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=[glob.escape(file) for file in chosen.files],
            cache_dir=str(cache_folder()),
        )
    except UsageError as error:
        raise _about(name, error) from None
    except Exception as error:  # of whatever package speaks to the network, in any version
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"while downloading {name} to {cache_folder()}"
            raise ResourceError("the disk is full", why) from None
        raise UsageError(what, _reason(error), "give a file or a folder that is here") from None
    return Path(folder) / chosen.target


def _about(name: HubName, error: UsageError) -> UsageError:
    return UsageError(f"{name} at the hub cannot be used: {error.what}", error.why, error.hint)


def _reason(error: Exception) -> str:
    """What went wrong at the hub, in one line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"GatedRepoError"}:
        return "it is at the hub for those who accept its terms: hf auth login"
    if kinds & {"RevisionNotFoundError"}:
        return "it has no such revision at the hub"
    if kinds & {"RepositoryNotFoundError"}:
        return "it is neither a file or folder here, nor at the hub (or it is private)"
    told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"it is neither here nor in the hub's cache, and the hub did not give it: {told:.200}"
