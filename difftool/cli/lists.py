"""`--list KIND`: what there is of a kind, a line each, from the tables that the rest goes by."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from difftool.cli import console
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry


class ListEntry(NamedTuple):
    """A line of a list."""

    name: str
    about: str
    also: list[str]
    """Its other names."""
    more: dict[str, Any]
    """What else programs are told."""
    note: str = ""
    """What else people are."""


def _registry(module: str, name: str) -> Callable[[], Iterator[ListEntry]]:
    """The components of a registry; those of plugins say which file they are from."""

    def entries() -> Iterator[ListEntry]:
        from difftool.plugins import loaded

        registry: Registry[Any] = getattr(import_module(f"difftool.{module}"), name)
        origins = {n: p.name for p in loaded() for where, n in p.adds if where is registry}
        for key in registry:
            # InvokeAI writes k_ before any sampler.
            also = [alias for alias in registry.aliases(key) if not alias.startswith("k_")]
            plugin = origins.get(key)
            note = f"from {plugin}" if plugin else ", ".join(also)
            more: dict[str, Any] = {"plugin": plugin} if plugin else {}
            if options := getattr(registry[key], "defaults", None):
                more["options"] = {n: "inf" if v == math.inf else v for n, v in options.items()}
            yield ListEntry(key, registry.about(key), also, more, note)

    return entries


def _presets() -> Iterator[ListEntry]:
    from difftool.config.layers import load_preset, preset_names
    from difftool.hub.find import bundled_models

    models = bundled_models()
    for name in preset_names():
        preset, ships = load_preset(name), name in models
        note = f"family {preset.family}{', a model of it ships' if ships else ''}"
        yield ListEntry(name, preset.about, [], {"family": preset.family, "ships": ships}, note)


def _models() -> Iterator[ListEntry]:
    from difftool.formats import open_model
    from difftool.hub.find import DEFAULT_MODEL, bundled_models

    for name, path in bundled_models().items():
        note = "where no model is named" if name == DEFAULT_MODEL else ""
        yield ListEntry(name, str(open_model(path).values["about"]), [], {"path": str(path)}, note)


def _matches() -> Iterator[ListEntry]:
    from difftool.pipeline.matches import MATCHES

    for name, row in MATCHES.items():
        more = {"settings": dict(row.settings), "on_gpu": dict(row.on_gpu)}
        note = row.listed({}, gpu=False)
        note += "".join(f"; on a GPU {key.replace('_', ' ')} {v}" for key, v in row.on_gpu.items())
        yield ListEntry(name, row.about, MATCHES.aliases(name), more, note)


def _formats() -> Iterator[ListEntry]:
    from difftool.conversion.options import DIALECTS, FORMATS

    for name, about in (FORMATS | DIALECTS).items():
        yield ListEntry(name, about, [], {})


def _settings() -> Iterator[ListEntry]:
    from difftool.sampling.settings import KEYS

    for row in dict.fromkeys(KEYS.values()):
        name, *also = row.json
        word = row.a1111.word if row.a1111 else None
        more = {"flag": row.flag if row.option else None, "a1111": word}
        flag = f"{row.flag}; " if row.option else ""
        yield ListEntry(name, row.help, also, more, f"{flag}{', '.join(also)}".removesuffix("; "))


def _keys() -> Iterator[ListEntry]:
    from difftool.config.keys import keys

    import_module("difftool.training.options")  # knows which values are its registries' names
    for key in keys():
        more: dict[str, Any] = {"type": key.type, "values": list(key.values)}
        if key.default:  # else a preset must say it
            more["default"] = json.loads(key.default)
        default = f"default {key.default}" if key.default else "has no default"
        note = f"{', '.join(key.values) or key.type}; {default}"
        yield ListEntry(key.path, key.about, [], more, note)


KINDS: dict[str, Callable[[], Iterator[ListEntry]]] = {
    "samplers": _registry("diffusion.samplers", "SAMPLERS"),
    "schedules": _registry("diffusion.grids", "GRIDS"),
    "paths": _registry("diffusion.path", "PATHS"),
    "targets": _registry("diffusion.prediction", "TARGETS"),
    "times": _registry("diffusion.losses", "TIMES"),
    "weights": _registry("diffusion.losses", "WEIGHTS"),
    "losses": _registry("diffusion.losses", "LOSSES"),
    "optimizers": _registry("training.step.optim", "OPTIMIZERS"),
    "datasets": _registry("data", "BUILTIN"),
    "matches": _matches,
    "presets": _presets,
    "models": _models,
    "keys": _keys,
    "settings": _settings,
    "formats": _formats,
    "pictures": _registry("images.formats", "OUTPUT_FORMATS"),
}
"""What can be listed."""


def show(kind: str) -> None:
    """Print the list of a kind: a table, or a JSON object under --json."""
    if kind not in KINDS:
        what = f'there is no list of "{kind}"' if kind else "--list needs to be told of what"
        raise UsageError(what, hint=suggestion(kind, KINDS))
    entries = list(KINDS[kind]())
    if console.mode.json:
        items = [{"name": e.name, "about": e.about, "also": e.also} | e.more for e in entries]
        console.emit({"schema": console.SCHEMA, "list": kind, "items": items})
        return
    if sys.stdout.isatty():
        _print(kind, entries)
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        console.emit(f"{entry.name:<{width}}  {'  '.join(filter(None, (entry.about, entry.note)))}")


def _print(kind: str, entries: Sequence[ListEntry]) -> None:
    """A table on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(kind, style="bold cyan", no_wrap=True)
    table.add_column()
    for entry in entries:
        about, note = Text(console.plain(entry.about)), console.plain(entry.note)
        if note:
            about.append(f"\n{note}", "dim")
        table.add_row(Text(console.plain(entry.name)), about)
    Console(highlight=False).print(table)
