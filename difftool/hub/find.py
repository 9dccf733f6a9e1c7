"""What a MODEL argument names: a place here, a model that ships with difftool, or one at the hub.
Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from difftool.config.layers import preset_folder
from difftool.errors import UsageError, suggestion
from difftool.hub.hub import cached, download, parse_name
from difftool.storage.shards import written_at

DEFAULT_MODEL = "emoji"


def find_model(where: str | None, *, half: bool = False) -> Path:
    """The file or folder behind a MODEL argument; what is here always wins.

    A name that is nowhere here is looked up in the hub's cache and then at the hub; half: there,
    weights of half precision are preferred. None is DIFFTOOL_MODEL, else the bundled default model,
    whatever lies here under its name.
    """
    where = where or os.environ.get("DIFFTOOL_MODEL")
    if not where:
        return _bundled()[DEFAULT_MODEL]
    path = Path(where)
    if written_at(path) is not None:
        return path
    bundled = _bundled()
    if where in bundled:
        return bundled[where]
    name = parse_name(where)
    if name and (found := cached(name)):
        return found
    if name and not path.parent.is_dir():
        return download(name, half=half)
    why = f"{where} does not exist"
    if name:
        why += f", and as the folder {path.parent} does, it is no name at the hub"
    hint = "give a model file, a run folder, a diffusers folder, ORG/NAME, or a bundled model: "
    raise UsageError(f'there is no model "{where}"', why, hint + suggestion(where, bundled))


def _bundled() -> dict[str, Path]:
    """The models that ship, by name."""
    return {
        folder.name: file
        for folder in sorted(preset_folder().iterdir())
        if (file := written_at(folder / "model.safetensors"))
    }
