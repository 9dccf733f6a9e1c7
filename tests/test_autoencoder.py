"""Autoencoders on their own give the pictures that they give within a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conversions import convert
from pipelines import build
from safetensors.torch import load_file, save_file

from difftool.config.networks import IdentityConfig, VaeConfig
from difftool.errors import InputError, UsageError
from difftool.formats import open_model
from difftool.formats.autoencoder import open_autoencoder
from difftool.pipeline.decode import decode
from difftool.pipeline.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers gives dozens, about itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quiet):
    """A model; and another of the same structure in single/, whose autoencoder is otherwise."""
    folder = tmp_path_factory.mktemp("pipelines")
    build("sd1", folder)
    weights = folder / "sd1/vae/diffusion_pytorch_model.safetensors"
    shutil.copytree(folder / "sd1", folder / "other")
    changed = {name: tensor * 1.1 for name, tensor in load_file(weights).items()}
    save_file(changed, folder / "other/vae/diffusion_pytorch_model.safetensors")
    convert(open_model(folder / "other"), folder / "other.safetensors", "ldm")
    return folder


def written(form: str, folder: Path, place: Path) -> Path:
    """The other model's autoencoder in a form that is published."""
    file = folder / "other/vae/diffusion_pytorch_model.safetensors"
    prefix = "first_stage_model."
    whole = load_file(folder / "other.safetensors")
    ldm = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
    path = place / "vae.safetensors"
    match form:
        case "model":
            return folder / "other"
        case "folder":
            return folder / "other/vae"
        case "diffusers":
            return Path(shutil.copy(file, path))
        case "diffusers pickled":
            torch.save(load_file(file), path.with_suffix(".bin"))
            return path.with_suffix(".bin")
        case "legacy diffusers":
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            tensors = load_file(file)
            for new, name in old.items():
                tensors = {n.replace(f".{new}.", f".{name}."): t for n, t in tensors.items()}
            save_file(tensors, path)
        case "ldm":
            save_file(ldm, path)
        case "ldm with prefix":
            save_file({prefix + name: tensor for name, tensor in ldm.items()}, path)
        case "ldm pickled":
            left = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
            torch.save({"state_dict": ldm | left, "epoch": 1}, path.with_suffix(".ckpt"))
            return path.with_suffix(".ckpt")
        case "ldm of old exports":
            moved = {
                "quant_conv": "encoder.quant_conv",
                "post_quant_conv": "decoder.post_quant_conv",
            }
            parts = ((name.partition("."), tensor) for name, tensor in ldm.items())
            save_file({f"{moved.get(a, a)}.{b}": t for (a, _, b), t in parts}, path)
    return path


FORMS = [
    *("model", "folder", "diffusers", "diffusers pickled", "legacy diffusers"),
    *("ldm", "ldm with prefix", "ldm pickled", "ldm of old exports"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes_alike(folder, form, tmp_path):
    path = written(form, folder, tmp_path)
    plain, other = (load_model(str(folder / name), device="cpu") for name in ("sd1", "other"))
    model = load_model(str(folder / "sd1"), device="cpu", vae=str(path))
    x0 = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert decode(model, x0).equal(decode(other, x0))
    assert not decode(model, x0).equal(decode(plain, x0))
    assert model.preset == plain.preset, "the scale is the model's, where a file does not say it"
    assert f"autoencoder of {path}" in model.notes


def test_what_is_none_is_refused(folder, tmp_path):
    path = tmp_path / "vae.safetensors"
    tensors = load_file(folder / "other/vae/diffusion_pytorch_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "conv_in" not in n}, path)
    with pytest.raises(InputError, match="is not an autoencoder"):
        open_autoencoder(path, VaeConfig())
    save_file(tensors | {"encoder.nobody.knows": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"unknown tensor vae.encoder.nobody.knows"):
        load_model(str(folder / "sd1"), device="cpu", vae=str(path))
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match="of a lora file"):
        open_autoencoder(path, VaeConfig())
    ldm = load_file(written("ldm", folder, tmp_path))
    save_file(ldm | {"encoder.nobody.knows": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"encoder.nobody.knows is not known"):
        open_autoencoder(path, VaeConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        open_autoencoder(tmp_path / "empty", VaeConfig())
    with pytest.raises(UsageError):
        open_autoencoder(tmp_path / "gone", VaeConfig())


def test_a_model_without_latents_takes_none(folder, tmp_path):
    codec, _ = open_autoencoder(written("ldm", folder, tmp_path), IdentityConfig())
    assert codec == VaeConfig(widths=(8, 16, 16), blocks=1, groups=8)


def test_the_command(folder, difftool, tmp_path):
    path = written("ldm", folder, tmp_path)
    common = ("sample", "a fox", "--size", "32x32", "--steps", 2, "--seed", 1, "--device", "cpu")
    for name, more in (("a", ("--vae", path)), ("b", ())):
        made = difftool(*common, "-m", folder / "sd1", "-o", f"{name}.png", *more)
        assert made.code == 0, made.err
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()
