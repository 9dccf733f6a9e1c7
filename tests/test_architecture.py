"""The rooms of the package and what may import what, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from difftool.config.families import FAMILIES

PACKAGE = Path(__file__).parent.parent / "difftool"
ROOMS = (
    *(
        "version",
        "errors",
        "devices",
        "signals",
        "progress",
        "registry",
        "plugins",
        "storage",
        "diffusion",
        "config",
    ),
    *("text", "networks", "engine", "images", "formats", "adapters", "hub", "data", "pipeline"),
    "evaluation",
    *("conversion", "sampling", "training", "forward", "library", "cli", "__main__"),
)
"""In import order: each imports only itself and those before it."""
COMMANDS = {"conversion", "sampling", "training", "forward"}
"""The rooms of the four commands, none of which imports another."""
TORCH_FREE = (
    *(
        "errors",
        "devices",
        "signals",
        "progress",
        "registry",
        "config.layers",
        "config.options",
        "diffusion",
    ),
    *sorted(f"storage.{f.stem}" for f in PACKAGE.glob("storage/[a-z]*.py")),
    *sorted({f"forward.{f.stem}" for f in PACKAGE.glob("forward/[a-z]*.py")} - {"forward.reverse"}),
    *("formats", "images.read", "cli.app"),
    *(f"sampling.{name}" for name in ("settings", "requests", "output", "events", "command")),
    *(f"sampling.files.{name}" for name in ("inventory", "names", "prompts")),
    *(f"sampling.metadata.{name}" for name in ("a1111", "chunk", "files")),
    *(
        "training.options",
        "training.run.start",
        "training.prepared",
        "training.metrics",
        "cli.train",
    ),
)
TABLES = {
    "conversion.options",
    "forward.options",
    "sampling.settings",
    "sampling.events",
    "training.options",
    "evaluation.options",
}
"""Torch-free modules of rooms' own that commands may import at once: what they take and show."""
FAMILY_FILES = {"config.families", "diffusion.grids", "diffusion.path"}
"""Files that name families of models: the table, and schedules that were published by such names.
Those of formats/ say what other tools call them."""
KINDS = {"Vae", "VaeCodec", "VaeConfig"}
"""Classes of one kind of codec, which nobody asks for but its own files and `pipeline.decode`."""
ORACLES = {"diffusers", "transformers", "peft", "k_diffusion", "scipy"}


class Import(NamedTuple):
    name: str
    eager: bool
    """Whether it happens when the module itself is imported."""


def imports(node: ast.AST, eager: bool = True) -> Iterator[Import]:
    """Every module, or name in a module, that a source imports, for type checkers only too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", eager) for alias in child.names)
        else:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, eager and not (inside or typing))


def module(path: Path) -> str:
    """Dotted name of a file below the package, "" for its own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
IMPORTS = {name: list(imports(tree)) for name, tree in TREES.items()}


def nodes(name: str) -> Iterator[ast.AST]:
    """The syntax of a module."""
    path = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def own(name: str) -> str | None:
    """The module of the package that an imported name is or lies in; None for other packages."""
    root, _, name = name.partition(".")
    while name and name not in IMPORTS:
        name = name.rpartition(".")[0]
    return name if root == "difftool" else None


def room(name: str) -> str:
    return name.partition(".")[0]


def edges(name: str) -> set[str]:
    """The modules of the package that a module imports, at whatever moment."""
    found = {target for i in IMPORTS[name] if (target := own(i.name)) is not None}
    return found - {name}


@pytest.mark.parametrize("name", [name for name in IMPORTS if name])  # the root has all names
def test_a_room_imports_only_the_rooms_before_it(name):
    before = ROOMS[: ROOMS.index(room(name)) + 1]
    assert {room(target) for target in edges(name)} <= set(before)


def test_no_command_s_room_imports_another_s():
    for name in IMPORTS:
        if room(name) in COMMANDS:
            assert not {room(target) for target in edges(name)} & (COMMANDS - {room(name)}), name


def circles() -> list[set[str]]:
    """Sets of modules each of which reaches every other one."""
    reach = {name: edges(name) for name in IMPORTS}
    grown = True
    while grown:
        grown = False
        for name, reached in reach.items():
            more = reached.union(*(reach[target] for target in reached))
            grown, reach[name] = grown or more != reached, more
    found = [{other for other in reach[name] if name in reach[other]} for name in reach]
    return [circle for i, circle in enumerate(found) if circle and circle not in found[:i]]


def test_no_modules_import_each_other_in_a_circle():
    assert circles() == []


def sources_with(text: str) -> set[str]:
    """The modules whose source holds a text."""
    return {module(p) for p in PACKAGE.rglob("*.py") if text in p.read_text(encoding="utf-8")}


def test_pictures_are_opened_in_one_place():
    assert sources_with("Image.open") == {"images.read"}


@pytest.mark.parametrize(
    "call", ["os.replace", "os.rename", "os.link", ".rename(", "shutil.move", "fsync", "flock"]
)
def test_files_are_committed_and_locked_in_one_room(call):
    assert {room(name) for name in sources_with(call)} <= {"storage"}


@pytest.mark.parametrize("call", [".read_bytes()", '.open("rb")', '"rb")'])
def test_files_of_others_are_opened_in_one_place(call):
    assert sources_with(call) <= {"storage.read", "storage.commit", "plugins"}


def test_the_folders_stay_small():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len([f for f in folder.glob("*.py") if f.name != "__init__.py"]) <= 16, folder


@pytest.mark.parametrize("name", IMPORTS)
def test_the_package_never_imports_its_oracles(name):
    assert not {i.name.partition(".")[0] for i in IMPORTS[name]} & ORACLES


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free_modules_reach_no_module_that_imports_torch(name):
    reached, ahead = set(), [name]
    while ahead:
        here = ahead.pop()
        if here in reached:
            continue
        reached.add(here)
        ahead.append(here.rpartition(".")[0])  # importing a module imports its packages first
        eager = [i.name for i in IMPORTS[here] if i.eager]
        ahead += [target for i in eager if (target := own(i)) is not None]
        assert not [i for i in eager if i.partition(".")[0] in ("torch", "safetensors")], here
    assert reached > {name}


@pytest.mark.parametrize("name", [name for name in IMPORTS if room(name) == "cli"])
def test_commands_import_their_work_when_they_run(name):
    eager = [i.name for i in IMPORTS[name] if i.eager]
    outside = {i.partition(".")[0] for i in eager if own(i) is None}
    assert outside - sys.stdlib_module_names <= {"typer"}
    targets = {target for i in eager if (target := own(i)) is not None}
    inside = {room(target) for target in targets - TABLES}
    light = {"version", "errors", "signals", "registry", "config", "diffusion", "images"}
    assert inside <= light | {"cli"}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_is_known_of_a_family_stands_in_its_row(name):
    ids = FAMILIES.keys() - {"difftool", "unet"}  # which are other names as well
    if name not in FAMILY_FILES and room(name) != "formats":
        said = {node.value for node in nodes(name) if isinstance(node, ast.Constant)}
        assert not said & ids


@pytest.mark.parametrize("name", IMPORTS)
def test_nobody_asks_which_kind_a_codec_is(name):
    if room(name) == "networks" or name == "pipeline.decode":
        return
    for node in nodes(name):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            assert not {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & KINDS
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            assert "'vae'" not in map(ast.unparse, node.args)
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith("codec.kind"):
            assert not any(isinstance(c, ast.Constant) for c in node.comparators)


LONG = {("storage.pickles", "step")}
"""A match over the opcodes of pickles, which reads best in one piece."""


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", IMPORTS)
def test_functions_fit_a_screen_and_take_what_one_can_remember(name):
    for function in functions(name):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= 80 or (name, function.name) in LONG, function.name
        given = function.args
        parameters = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        assert len([p for p in parameters if p not in ("self", "cls")]) <= 8, function.name


def test_a_type_s_name_means_one_thing():
    homes: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in tree.body:
            match node:
                case ast.ClassDef(name=bound):
                    pass
                case ast.Assign(targets=[ast.Name(id=bound)]):
                    pass
                case ast.AnnAssign(target=ast.Name(id=bound)):
                    pass
                case _:
                    continue
            if len(bound) > 1 and bound[0].isupper() and not bound.isupper():
                homes.setdefault(bound, []).append(name)
    assert {bound: found for bound, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", [name for name in IMPORTS if room(name) == "cli"])
def test_commands_hold_no_model(name):
    assert not any(i.name.endswith("pipeline.model.Model") for i in IMPORTS[name])
