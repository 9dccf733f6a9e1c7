"""Components of a user's own: files and installed packages that add to the registries. Torch-free.

A plugin is a Python file that adds samplers, schedules, noise paths, prediction targets, time
distributions, weightings, losses or optimisers where this package's own are added,

    from difftool.diffusion.samplers import SAMPLERS
    SAMPLERS.add("mine", Method(...))

and is loaded by --plugin FILE.py, by `load_plugins`, or, where an installed package names it in its
entry points, group "difftool.plugins", whenever a command runs. It runs with all rights of whoever
loads it: never is one loaded because a model, a picture or a preset names it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from difftool.errors import UsageError, check_file
from difftool.registry import ADDITIONS, Registry

GROUP = "difftool.plugins"
"""The entry points that name plugins of installed packages."""


class Plugin(NamedTuple):
    """A plugin that is loaded."""

    name: str
    """Of the file, or of the entry point."""
    sha256: str
    """Of the file; "" of an entry point."""
    adds: tuple[tuple[Registry[Any], str], ...]
    """What it has added: a registry and a name in it."""


_loaded: dict[str, Plugin] = {}


def loaded() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order of their loading."""
    return tuple(_loaded.values())


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Run the files, each once however often it is named; what they add is there at once.

    UsageError if one is missing, is no Python, or fails: then nothing of it is added.
    """
    for path in map(Path, paths):
        check_file("plugin", path)
        key = str(path.resolve())
        if key not in _loaded:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            _loaded[key] = Plugin(path.name, digest, _added(path, partial(_run, path, digest)))


def unload(plugin: Plugin) -> None:
    """Take back what a plugin has added; it can be loaded again."""
    for registry, name in plugin.adds:
        registry.remove(name)
        ADDITIONS.remove((registry, name))
    for key in [key for key, known in _loaded.items() if known is plugin]:
        del _loaded[key]


def load_entry_points() -> None:
    """Load the plugins that installed packages name. Raises as `load_plugins` does."""
    from importlib.metadata import entry_points  # slow to import

    for point in entry_points(group=GROUP):
        key = f"{GROUP}:{point.name}"
        if key not in _loaded:
            _loaded[key] = Plugin(point.name, "", _added(Path(point.value), point.load))


def _run(path: Path, digest: str) -> None:
    name = f"difftool_plugin_{path.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _added(path: Path, run: Callable[[], object]) -> tuple[tuple[Registry[Any], str], ...]:
    """What a plugin adds; nothing where it fails."""
    before = len(ADDITIONS)
    try:
        run()
    except Exception as error:
        for registry, name in ADDITIONS[before:]:
            registry.remove(name)
        del ADDITIONS[before:]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).name == path.name]  # fmt: skip
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f"line {line}: " if line else ""
        why = f"{where}{type(error).__name__}: {error}"
        hint = "mend the file, or leave it out"
        raise UsageError(f"the plugin {path} cannot be loaded", why, hint) from error
    return tuple(ADDITIONS[before:])


def used(names: Iterable[tuple[str, str]]) -> tuple[Plugin, ...]:
    """The plugins that any of the components, each a kind and a name, come from."""
    wanted = set(names)
    return tuple(
        plugin
        for plugin in loaded()
        if any((registry.kind, name) in wanted for registry, name in plugin.adds)
    )
