"""Which part of the package may import which, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "difftool"
BASE = {"", "errors", "registry"}
CORE = BASE | {"files", "config", "configs", "tokenizer", "diffusion", "models", "formats", "model"}
MAY_IMPORT = {
    "": set(),
    "errors": set(),
    "registry": BASE,
    "files": {"errors"},
    "configs": BASE,
    "tokenizer": BASE | {"configs"},
    "config": BASE | {"configs", "diffusion"},
    "diffusion": BASE | {"diffusion"},
    "models": BASE | {"models", "configs", "tokenizer"},
    "formats": BASE | {"files", "formats", "configs", "config", "diffusion", "tokenizer"},
    "data": BASE | {"files", "data", "config"},
    "model": CORE,
    "forward": CORE | {"data", "forward"},
    "sampling": CORE | {"data", "sampling"},
    "training": CORE | {"data", "training"},
    "cli": CORE | {"data", "sampling", "training", "forward", "cli"},
    "__main__": {"cli"},
}
"""Parts of the package, "" its root, by the part that imports them."""
OWN_PARTS = {"models.configs": "configs", "models.tokenizer": "tokenizer"} | dict.fromkeys(
    ("conditioning", "embeddings", "generation", "decoding"), "model"
)
"""Modules with friends of their own: tables, and what file formats need of them."""
TORCH_FREE = (
    *("errors", "registry", "files", "config", "models.configs", "diffusion"),
    *sorted({f"forward.{f.stem}" for f in PACKAGE.glob("forward/[a-z]*.py")} - {"forward.reverse"}),
    *("formats.safetensors", "formats", "data.images", "cli.app"),
)
ORACLES = {"diffusers", "transformers", "peft", "k_diffusion", "scipy"}


class Import(NamedTuple):
    name: str
    eager: bool
    """Whether it happens when the module itself is imported."""


def imports(node: ast.AST, eager: bool = True) -> Iterator[Import]:
    """Every module, or name in a module, that a source imports; for type checkers only is not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", eager) for alias in child.names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, eager and not inside)


def module(path: Path) -> str:
    """Dotted name of a file below the package, "" for its own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORTS = {
    module(path): list(imports(ast.parse(path.read_text(encoding="utf-8"))))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def own(name: str) -> str | None:
    """The module of the package that an imported name is or lies in; None for other packages."""
    root, _, name = name.partition(".")
    while name and name not in IMPORTS:
        name = name.rpartition(".")[0]
    return name if root == "difftool" else None


def part(name: str) -> str:
    return OWN_PARTS.get(name, name.partition(".")[0])


@pytest.mark.parametrize("name", IMPORTS)
def test_a_part_imports_only_the_parts_below_it(name):
    found = {part(target) for i in IMPORTS[name] if (target := own(i.name)) is not None}
    assert found <= MAY_IMPORT[part(name)]


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


@pytest.mark.parametrize("name", [name for name in IMPORTS if part(name) == "cli"])
def test_commands_import_their_work_when_they_run(name):
    eager = [i.name for i in IMPORTS[name] if i.eager]
    outside = {i.partition(".")[0] for i in eager if own(i) is None}
    assert outside - sys.stdlib_module_names <= {"typer"}
    inside = {part(target) for i in eager if (target := own(i)) is not None}
    assert inside <= BASE | {"cli", "config", "diffusion"}
