"""What is said of a preset's keys is read from the configuration itself."""

from __future__ import annotations

from difftool.config.keys import Key, keys, values_of
from difftool.config.layers import load_preset
from difftool.config.validate import to_values
from difftool.diffusion import GRIDS, PATHS


def by_path() -> dict[str, Key]:
    return {key.path: key for key in keys()}


def test_every_key_has_a_meaning_in_one_line_and_is_there_once():
    assert all(key.about and "\n" not in key.about for key in keys()), keys()
    assert len(by_path()) == len(keys())


def test_types_and_defaults_are_a_user_s():
    found = by_path()
    assert found["train.lr"][1:3] == ("number", "0.001")
    assert found["sample.size"][1:3] == ("list of 2 integers", "[64, 64]")
    assert found["unet.depth"].type == "list of integers or lists of integers"
    assert found["train.ema"].about.startswith("Decay of the moving average")
    assert found["target"].default == ""
    assert found["data.buckets"].type == "true or false or null"


def test_values_are_those_of_registries_and_of_the_configuration():
    found = by_path()
    assert found["sample.schedule"].values == tuple(GRIDS) == values_of("sample.schedule")
    assert found["path.kind"].values == tuple(PATHS)
    assert found["train.decay"].values == ("none", "linear", "cosine") == values_of("train.decay")
    assert found["codec.kind"].values == ("identity", "space_to_depth", "vae", "embedding")
    assert values_of("train.lr") == values_of("train.nonsense") == ()


def test_what_a_preset_has_is_a_key():
    def paths(values, prefix=""):
        for name, value in values.items():
            if name.endswith("options") or name == "scheduler" or not isinstance(value, dict):
                yield prefix + name
            else:
                yield from paths(value, f"{prefix}{name}.")

    known = set(by_path()) | {"text"}
    for name in ("sd15", "pixel-edm", "emoji"):
        assert set(paths(to_values(load_preset(name)))) <= known
