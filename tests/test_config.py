"""Presets: strict reading, inheritance, overrides with their origins, errors that help."""

from __future__ import annotations

import pytest

from difftool.config import layers as config
from difftool.config.keys import keys
from difftool.config.layers import Layer, load_preset
from difftool.config.validate import build_preset, to_values, to_yaml
from difftool.errors import InputError, UsageError
from difftool.storage.yaml import parse_yaml


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_survives_its_own_values(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.about
    assert build_preset(to_values(preset)) == preset
    assert build_preset(parse_yaml(to_yaml(preset), "copy")) == preset


def test_yaml_reads_numbers_as_people_write_them():
    text = "a: 1e-4\nb: 010\nc: no\nd: 2026-11-22\ne: .5\nf: 1_000\ng: ~"
    values = parse_yaml(text, "test")
    assert values == {
        "a": 1e-4, "b": 10, "c": "no", "d": "2026-11-22", "e": 0.5, "f": "1_000", "g": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "duplicate key"),
        ("a: &x 1\nb: *x", "aliases"),
        ("1: a", "not text"),
        ("[" * 100, "deeper"),
        ("[" * 5000, "deeper|nesting"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: [" + "1, " * 40_000 + "1]", "more than 30000 values"),
        ("a: [1", "expected"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: 1" + " " * (1 << 20), "limit"),
    ],
)
def test_unsound_yaml_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        parse_yaml(text, "test")


def test_an_override_reaches_one_value_and_is_its_origin():
    layers = [*config.preset_layers("pixel-edm"), *config.override_layers(["train.lr=3e-4"])]
    preset = config.resolve(layers)
    assert preset.train.lr == 3e-4
    origins = {key: origin for key, _, origin in config.origins(preset, layers)}
    assert origins["train.lr"] == "--set train.lr"
    assert origins["train.weight"] == "preset pixel-edm"
    assert origins["unet.channels"] == "preset pixel-small"
    assert origins["unet.groups"] == "default"


def test_another_kind_replaces_what_it_is_laid_over():
    preset = load_preset("pixel-small", ["path={kind: edm, sigma_max: 40}"])
    assert preset.path == {"kind": "edm", "sigma_max": 40}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("unet.chanels=[32]", "channels"),
        ("trian.lr=1", "train"),
        ("train.lr=fast", "number"),
        ("unet.channels=64", "tuple|array|list"),
        ("codec={kind: space_to_depth, blok: 2}", "block"),
        ("codec.kind=zip", "codec"),
        ("target=epsillon", "eps"),
        ("sample.sampler=eulr", "euler"),
        ("sample.schedule=caras", "karras"),
        ("path={kind: flwo}", "flow"),
        ("path={kind: flow, shfit: 3}", "shift"),
        ("sample.sampler_options={solver_tpye: heun}", "solver_type"),
        ("train.lr", "key.path=value"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_near(override, says):
    with pytest.raises(UsageError, match=says):
        load_preset("pixel-small", [override])


NUMBERS = [key.path for key in keys() if "number" in key.type and "[]" not in key.path]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_no_number_of_a_preset_is_infinite_or_none(name, value):
    if name == "sample.guidance_interval":  # which may be open, but has no NaN
        value = "[.nan, 1.0]"
    with pytest.raises(UsageError):
        load_preset("ldm-small", [f"{name}={value}"])


@pytest.mark.parametrize(
    "override",
    [
        *("train.lr=-1", "train.lr=0", "train.betas=[0.9, 1.0]", "train.betas=[.nan, 0.9]"),
        *("train.warmup=-1", "train.ema=1.5", "train.drop=2.0", "train.weight_decay=-0.1"),
        *("train.lora_alpha=0.0", "train.batch_size=0", "train.seed=-1", "train_vae.kl=-1.0"),
        *("unet.norm_eps=-1.0", "unet.dropout=1.0", "unet.in_channels=0", "unet.blocks=-1"),
        *("unet.channels=[8, 100000000]", "codec.latent_channels=0", "sample.size=[0, 64]"),
        *("sample.steps=1000000000", "sample.guidance=-1.0", "sample.guidance_rescale=7.0"),
        *("sample.schedule_options={rho: .nan}", "sample.schedule_options={rho: [1, .inf]}"),
        *(
            "sample.sampler_options={eta: .nan}",
            "path.beta_end=.nan",
            "train.time_options={a: .inf}",
        ),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(override):
    key = override.split("=")[0]
    with pytest.raises(UsageError, match=key.replace(".", r"\.")) as refused:
        load_preset("ldm-small", [override])
    assert refused.value.code == 2


def test_an_interval_may_be_open_and_a_scheduler_infinite():
    overrides = ["sample.guidance_interval=[-.inf, 4.0]", "scheduler={lambda_min_clipped: -.inf}"]
    assert load_preset("ldm-small", overrides).sample.guidance_interval == (float("-inf"), 4.0)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match='did you mean "pixel-small"'):
        load_preset("pixel-smal")


def test_a_preset_file_may_extend_a_shipped_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: pixel-small\nabout: mine\ntrain: {lr: 0.5}\n")
    preset = load_preset(str(path))
    assert (preset.name, preset.train.lr) == ("mine", 0.5)
    assert preset.unet == load_preset("pixel-small").unet


def test_presets_that_extend_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml\n")
    with pytest.raises(InputError, match="extends itself"):
        load_preset(str(tmp_path / "a.yaml"))


def test_presets_are_found_in_the_package_or_in_the_checkout(tmp_path):
    package = tmp_path / "difftool"
    (package / "presets").mkdir(parents=True)
    assert config.preset_folder(package) == package / "presets"
    (package / "presets").rmdir()
    assert config.preset_folder(package) == tmp_path / "presets"
    assert config.preset_folder().is_dir()


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"name: \xff", "UTF-8"), (b"extends: 5", "no name of a preset"), (b"[]", "not a mapping")],
)
def test_an_unsound_preset_file_is_refused(tmp_path, data, says):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        load_preset(str(path))


def test_the_values_of_a_file_are_wrong_as_input_and_a_user_s_as_usage():
    values = to_values(load_preset("pixel-small")) | {"target": "epsillon"}
    for error in (UsageError, InputError):
        with pytest.raises(error, match="eps"):
            build_preset(values, "model.safetensors", error)


def test_a_part_is_trained_once():
    with pytest.raises(UsageError, match="named twice"):
        build_preset(to_values(load_preset("pixel-small")) | {"parts": ["unet", "unet"]})


@pytest.mark.parametrize("key", ["Config", "MyConfig", "]", "", "steps]"])
def test_a_key_that_is_named_as_a_type_is_unknown_as_any_other(key):
    with pytest.raises(UsageError, match="there is no key"):
        build_preset(to_values(load_preset("pixel-small")) | {key: 1})


def test_layers_name_the_missing_key():
    with pytest.raises(UsageError, match="unet"):
        config.resolve([Layer("test", {"name": "x", "about": "x"})])
