"""The `difftool` chunk: what was asked for, and the settings as they were resolved, of which those
are left out that no preset changes. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.numbers import FINITE
from difftool.config.schema import Preset, SampleConfig
from difftool.config.validate import to_values
from difftool.errors import DifftoolError, InputError
from difftool.pipeline.upscale import UPSCALERS
from difftool.plugins import used
from difftool.sampling.expand import TEMPLATES, final
from difftool.sampling.files.content import components, content_of
from difftool.sampling.metadata.grids import EACH, unfolded
from difftool.sampling.metadata.named import digest_of, written
from difftool.sampling.requests import NamedFile, Request, from_json
from difftool.sampling.settings import PICTURES, read_path
from difftool.storage.strict_json import parse_json, to_json
from difftool.version import __version__

if TYPE_CHECKING:
    from difftool.sampling.sample import Sample

SCHEMA = 2
"""1 had the whole preset, with all the settings."""
MAX_BYTES = 1 << 20
MAX_GRID_BYTES, MAX_READ = 1 << 24, 1 << 28
"""Of what a grid says, and of that when each of its pictures says it."""
ASKED = ("prompt", "negative", "label", "seed")
"""What is asked for of any picture."""
ALSO = ("vary_seed", *TEMPLATES.values())
"""What is asked for of some, and a line of JSON can say."""
LISTS = {"embedding": "embeddings", "lora": "loras"}
"""Keys of files of which there may be several, by their options; any other is called as it is."""
MAX_FILES = 100
"""So many of a kind one picture names."""


def chunk(sample: Sample, folder: Path = Path()) -> dict[str, Any]:
    """Plain values for JSON, in which files are named as a picture in that folder names them."""
    model, values = sample.plan.model, sample.values()
    request = {name: values[name] for name in ASKED}
    others = ("refiner", "prior", *ALSO)
    request |= {name: values[name] for name in others if values[name] is not None}
    hashes: dict[str, Any] = {}
    for file in _files(sample):
        key, name = LISTS.get(file.option, file.option), written(file.name, folder)
        if key == file.option:
            request[key], hashes[key] = name, file.digest
        else:
            each = [name, file.weight] if file.option == "lora" else name
            request.setdefault(key, []).append(each)
            hashes.setdefault(key, []).append(file.digest)
    request |= {"hashes": hashes} if hashes else {}
    of_prompt = sample.loras[len(model.base_loras) :]
    if networks := {each.lora.path.stem: each.lora.hash for each in of_prompt}:
        request["networks"] = networks
    if plugins := used(components(sample)):
        request["plugins"] = [[plugin.name, plugin.sha256] for plugin in plugins]
    settings, usual = _settings(sample.plan.settings), to_values(SampleConfig())
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": model.name,
        "model_hash": model.hash,
        **({} if sample.seed is None else content_of(sample)._asdict()),
        "request": request,
        "preset": {
            "name": model.preset.name,
            "hash": preset_hash(model.preset),
            "sample": {k: v for k, v in settings.items() if v != usual[k]},
        },
    }


def preset_hash(preset: Preset) -> str:
    """12 hexadecimal digits of SHA-256 of a preset's JSON."""
    return sha256(to_json(to_values(preset), sort_keys=True).encode()).hexdigest()[:12]


def _settings(settings: SampleConfig) -> dict[str, Any]:
    """As they were resolved; an upscaler's file by its bare name."""
    return to_values(replace(settings, upscaler=Path(settings.upscaler).name))


def _files(sample: Sample) -> Iterator[NamedFile]:
    """The files that it goes by, by their paths."""
    values, request = sample.values(), sample.request
    paths = [(name, values[name]) for name in PICTURES if values[name] is not None]
    for option, path in (*paths, *(("embedding", path) for path in sample.embeddings)):
        known = request.hashes.get(path)
        yield NamedFile(option, path, digest_of(option, path) if known is None else known)
    base = sample.loras[: len(sample.plan.model.base_loras)]
    for each in base:
        yield NamedFile("lora", str(each.lora.path), each.lora.hash, each.strength)
    for path, weight in () if base else request.loras:  # of decoded latents
        yield NamedFile("lora", path, request.hashes.get(path, ""), weight)


def from_chunk(text: str, source: str) -> Request:
    """The request that a chunk holds, whose files are yet to be found; InputError if it is not
    sound."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} characters")
        values = parse_json(text, "it", infinite=True)
        if EACH in values:
            raise ValueError(f"it is of a grid of {len(values[EACH])} pictures")
        request, settings = values["request"], values["preset"]["sample"]
        if type(values.get("schema")) is int and values["schema"] > 1:
            settings = to_values(SampleConfig()) | settings
        asked = {name: request[name] for name in ASKED}
        asked |= {name: request[name] for name in ALSO if name in request}
        named = tuple(_named(request))
        networks = {str(n): str(digest) for n, digest in request.get("networks", {}).items()}
        plugins = tuple((str(name), str(digest)) for name, digest in request.get("plugins", []))
        if not isinstance(asked["label"], str | None) or not isinstance(settings, dict):
            raise ValueError("label or settings of the wrong type")
        found = from_json(asked)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            DifftoolError) as error:  # fmt: skip
        raise InputError(f"the difftool chunk of {source} cannot be read", repr(error)) from None
    told = {name: str(values.get(name) or "") for name in ("model", "model_hash")}
    missed: tuple[tuple[str, str], ...] = ()
    if str(settings.get("upscaler", "latent")) not in UPSCALERS:  # a file: not ours to open
        name = Path(str(settings["upscaler"])).name
        settings = {key: value for key, value in settings.items() if key != "upscaler"}
        missed = (("upscaler", f"the upscaler {name}: --upscaler"),)
    return replace(
        final(found), missed=missed, settings=settings, plugins=plugins, named=named,
        networks=networks, made_by=f"difftool {values.get('version') or ''}".strip(), **told,
    )  # fmt: skip


def each_chunk(text: str) -> list[str]:
    """The chunks of the pictures of a grid, or of the one picture."""
    if len(text) > MAX_GRID_BYTES or f'"{EACH}"' not in text:
        return [text]
    try:
        whole = parse_json(text, "it", infinite=True)
        common = to_json({name: value for name, value in whole.items() if name != EACH})
        if len(whole[EACH]) * len(common) > MAX_READ:
            return [text]
        return [to_json(each) for each in unfolded(whole)]
    except (LookupError, TypeError, ValueError, AttributeError, InputError):
        return [text]


def _named(request: Mapping[str, Any]) -> Iterator[NamedFile]:
    """The files that it names; ValueError and others if they are not sound."""
    image = request.get("image_prompt") or request.get("image")  # as it was called
    request, hashes = {**request, "image_prompt": image}, request.get("hashes", {})
    for option in (*PICTURES, *LISTS):
        key = LISTS.get(option, option)
        if (files := request.get(key)) is None:
            continue
        digests = hashes.get(key)
        if option not in LISTS:
            files, digests = [files], [digests or ""]
        elif not isinstance(files, list) or len(files) > MAX_FILES:
            raise ValueError(f"{key} of the wrong type, or too many")
        for file, digest in zip(files, digests or [""] * len(files), strict=True):
            name, weight = file if option == "lora" else (file, 1.0)
            if not isinstance(name, str) or not re.fullmatch("([0-9a-f]{12})?", digest):
                raise ValueError(f"{key} of the wrong type")
            FINITE.check(float(weight), f"{name}: the weight")
            yield NamedFile(option, read_path(name), digest, float(weight))
