"""What a MODEL argument names: a place here, a model that ships with difftool, or one at the hub.
Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from difftool.config.layers import DEFAULT_MODEL, preset_folder
from difftool.errors import UsageError, suggestion
from difftool.storage.shards import written_at


def model_name(where: str | None) -> str:
    """What a MODEL argument says: DIFFTOOL_MODEL, else the bundled default model, where there is
    none."""
    return where or os.environ.get("DIFFTOOL_MODEL") or DEFAULT_MODEL


def find_model(where: str | None, *, half: bool = False) -> Path:
    """The file or folder behind a MODEL argument; what is here always wins.

    A name that is nowhere here is looked up in the hub's cache and then at the hub; half: there,
    weights of half precision are preferred. None is DIFFTOOL_MODEL, else the bundled default model,
    whatever lies here under its name.
    """
    place = place_of_model(where)
    if place is not None:
        return place
    from difftool.hub.hub import download, parse_name

    name = parse_name(model_name(where))
    assert name is not None
    return download(name, half=half)


def place_of_model(where: str | None) -> Path | None:
    """The same without asking the hub: None where it would be. UsageError if there can be none."""
    bundled = bundled_models()
    named = where or os.environ.get("DIFFTOOL_MODEL")
    if not named:
        return bundled[DEFAULT_MODEL]
    path = Path(named)
    if written_at(path) is not None:
        return path
    if named in bundled:
        return bundled[named]
    from difftool.hub.hub import cached, parse_name  # not before it is known to be needed

    name = parse_name(named)
    if name and (place := cached(name)):
        return place
    if name and not path.parent.is_dir():
        return None
    why = f"{named} does not exist"
    if name:
        why += f", and as the folder {path.parent} does, it is no name at the hub"
    hint = "give a model file, a run folder, a diffusers folder, ORG/NAME, or a bundled model: "
    raise UsageError(f'there is no model "{named}"', why, hint + suggestion(named, bundled))


def bundled_models() -> dict[str, Path]:
    """The models that ship, by name."""
    return {
        folder.name: file
        for folder in sorted(preset_folder().iterdir())
        if (file := written_at(folder / "model.safetensors"))
    }
