"""Components of a user's own, from files that are named and from installed packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from difftool import plugins
from difftool.diffusion import GRIDS, SAMPLERS
from difftool.errors import UsageError

OWN = """
from difftool.diffusion.grids import GRIDS, Grid

GRIDS.add("half", Grid("half", "index", lambda T, n: [T // 2 - i for i in range(n)], "its half"))
"""


def write(folder: Path, text: str, name: str = "own.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.usefixtures("forget")
def test_what_a_file_adds_is_there_by_name(tmp_path):
    path = write(tmp_path, OWN)
    plugins.load_plugins([path, str(path)])
    assert "half" in GRIDS
    plugin = plugins.loaded()[-1]
    assert plugin.name == "own.py"
    assert [(registry.kind, name) for registry, name in plugin.adds] == [("schedule", "half")]
    assert plugins.used([("schedule", "half")]) == (plugin,)
    assert plugins.used([("sampler", "half"), ("schedule", "karras")]) == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = (", "line 1"),
        ("\n\nraise ValueError('so')", "line 3: ValueError: so"),
        (OWN + "1 / 0", "ZeroDivisionError"),
        ("from difftool.diffusion import GRIDS\nGRIDS.add('karras', None)", "registered twice"),
    ],
)
def test_a_file_that_fails_adds_nothing_and_says_where(tmp_path, text, why):
    before = list(GRIDS), list(SAMPLERS), plugins.loaded()
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        plugins.load_plugins([write(tmp_path, text)])
    assert why in str(caught.value)
    assert (list(GRIDS), list(SAMPLERS), plugins.loaded()) == before


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="plugin"):
        plugins.load_plugins([tmp_path / name])


@pytest.mark.usefixtures("forget")
def test_installed_packages_name_theirs_by_entry_points(tmp_path, monkeypatch):
    write(tmp_path, OWN.replace("half", "third"), "package_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "package_of_mine", plugins.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    plugins.load_entry_points()
    plugins.load_entry_points()
    assert "third" in GRIDS
    assert plugins.loaded()[-1].name == "mine"
