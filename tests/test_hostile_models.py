"""Models with damaged or malicious headers, through the whole of a conversion: refused, or written
whole where they were to be written, and nowhere else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import ldm_models as ldms
import pytest
import tiny
from conversions import convert
from hangs import ends
from test_safetensors import mutated

from difftool.conversion.inspect import inspect
from difftool.errors import DifftoolError, InputError
from difftool.formats import open_model
from difftool.pipeline.model import Model

KINDS = ("difftool", "diffusers", "ldm")


def good(folder: Path, kind: str) -> bytes:
    path = folder / "good"
    if kind == "ldm":
        ldms.write(path, "sd1")
    else:
        Model.fresh(tiny.small("pixel-small", {"unet": tiny.UNET}), seed=0).save(path)
    data = path.read_bytes()
    path.unlink()
    return data


def check(place: Path, data: bytes, kind: str) -> str:
    """What becomes of a file that is converted in an empty folder; nothing else may be there."""
    path, target = place / "bad", place / "out"
    path.write_bytes(data)
    with ends():
        try:
            inspect(path)
            convert(open_model(path), target, kind)
            outcome = "written"
        except DifftoolError as error:
            assert "\n" not in error.what
            outcome = "refused"
    assert {file.name for file in place.iterdir()} == {"bad", *["out"] * (outcome == "written")}
    if target.is_dir():
        assert all(file.resolve().is_relative_to(target) for file in target.rglob("*"))
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    return outcome


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Mutated headers of two kinds of models to every format; how many were refused, and written.
    The bytes around the folder are watched too."""
    rng, outcomes = random.Random(seed), {"refused": 0, "written": 0}
    place = folder / "in" / "here"
    place.mkdir(parents=True)
    for source in ("difftool", "ldm"):
        data = good(folder, source)
        for turn in range(count):
            outcomes[check(place, mutated(data, rng), KINDS[turn % 3])] += 1
    assert [file.name for file in folder.iterdir()] == ["in"]
    assert [file.name for file in (folder / "in").iterdir()] == ["here"]
    return outcomes


def test_mutated_models_write_nothing_outside(tmp_path):
    outcomes = fuzz(tmp_path, 60, 0)
    assert outcomes["refused"] > 60


@pytest.mark.slow
def test_many_mutated_models_write_nothing_outside(tmp_path):
    fuzz(tmp_path, 2_000, 1)


NAMES = [
    *("../../evil", "/evil", "unet/../../evil", "unet.../../evil", r"..\evil", "C:evil", "~/evil"),
    *("a\0b", "a\nb", "\x1b]0;evil\x07", "[red]evil", "", ".", "vae.", "extra.diffusers.../evil"),
    *("extra.../../../evil", "ema.unet.../evil", "difftool.extra.../evil", "text.0.../../evil"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["difftool", "ldm"])
def test_names_of_tensors_lead_nowhere(source, kind, tmp_path):
    data = good(tmp_path, source)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    place = tmp_path / "in"
    place.mkdir()
    for name in NAMES:
        changed = {(name if key == last else key): value for key, value in header.items()}
        text = json.dumps(changed).encode()
        check(place, len(text).to_bytes(8, "little") + text + data[8 + length :], kind)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("place", ["../m.safetensors", "/m.safetensors", "a/m.safetensors", ".."])
def test_shards_lead_nowhere(place, tmp_path):
    index = {"metadata": {}, "weight_map": {"unet.conv_in.weight": place}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not safe"):
        open_model(tmp_path / "m.safetensors")
