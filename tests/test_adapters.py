"""Training a LoRA: `sample --lora` applies what was learned, and the model stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from difftool.adapters.lora.train import Adapters
from difftool.config.networks import UNetConfig
from difftool.config.validate import build_preset, to_values
from difftool.data import shapes
from difftool.errors import UsageError
from difftool.networks.unet import UNet
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings

TINY = {
    "codec": tiny.BLOCKS,
    "unet": tiny.TEXT_UNET,
    "text": [tiny.TEXT],
    "sample": {"size": [16, 16], "steps": 3},
    "train": tiny.TRAIN | {"warmup": 0},
}


def preset():
    return tiny.small("text-small", TINY)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A captioned folder, and a model to train a LoRA of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    captions = [str(c) for c in shapes.captions()][::97][:12]
    with (tmp_path / "photos" / "metadata.jsonl").open("w") as file:
        for i, caption in enumerate(captions):
            Image.fromarray(shapes.draw(caption, 16, i)).save(tmp_path / "photos" / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": caption}) + "\n")
    from difftool.text.tokenizer import Tokenizer

    words = Tokenizer.learn(captions, 300)
    values = to_values(preset())
    values["text"][0]["vocab_size"] = words.vocab_size
    model = Model.fresh(build_preset(values), seed=3, tokenizer_json=words.to_json())
    network = model.network
    for parameter in network.parameters():  # it starts at zero, where there is nothing to see
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    model.save(tmp_path / "base.safetensors")
    return tmp_path


RUN = (
    "--steps",
    12,
    "--batch-size",
    4,
    "--save-every",
    5,
    "--keep",
    9,
    "--device",
    "cpu",
    "--lr",
    "0.05",
)


def test_what_is_learned_is_what_is_applied(place, difftool):
    before = (place / "base.safetensors").read_bytes()
    ran = difftool(
        "train", "photos", "--from", "base.safetensors", "--lora", "--rank", 3, "--out", "run", *RUN
    )
    assert ran.code == 0, ran.err
    assert ran.out.strip() == "run/lora.safetensors" and not Path("run/model.safetensors").exists()
    assert (place / "base.safetensors").read_bytes() == before
    assert "--lora run/lora.safetensors" in ran.err

    tensors = load_file("run/lora.safetensors")
    assert all(name.startswith("lora_unet_") for name in tensors)
    with safe_open("run/lora.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
    ups = [tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert len(ups) == len(tensors) / 3 >= 10 and all(up.shape[1] == 3 and up.any() for up in ups)

    # As in training, with the averaged weights beside the model's.
    model = load_model("base.safetensors", device="cpu")
    model.adapters = adapters = Adapters(model.network, 3, None)
    checkpoint = next(Path("run/checkpoints").glob("step-000012")) / "ema.safetensors"
    adapters.load_state_dict(
        {name.removeprefix("lora."): t for name, t in load_file(checkpoint).items()}
    )
    merged = load_model("base.safetensors", device="cpu", loras=[(Path("run/lora.safetensors"), 1)])
    plain = load_model("base.safetensors", device="cpu")
    pictures, inputs = [], [SampleInput("a large red circle", seed=1)]
    for each in (model, merged, plain):
        *_, last = generate(plan_sampling(each, resolve_settings(each)), inputs)
        pictures.append(last.x)
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4
    assert (pictures[0] - pictures[2]).abs().max() > 0.01

    assert difftool("convert", "run", "--inspect").code == 0
    made = [("run", "run.png"), ("run/lora.safetensors", "file.png")]  # the folder's is the file's
    for lora, name in made:
        ran = difftool(
            *("sample", "a large red circle", "-m", "base.safetensors", "--lora", lora),
            *("--seed", 1, "-o", name, "--no-metadata"),
        )
        assert ran.code == 0, ran.err
    assert Path("run.png").read_bytes() == Path("file.png").read_bytes()

    ran = difftool("sample", "a large red circle", "-m", "run")
    assert ran.code == 3 and "--lora run/lora.safetensors" in ran.err


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_from_another_folder(place, difftool, monkeypatch):
    common = ("train", "photos", "--from", "base.safetensors", "--lora", *RUN)
    assert difftool(*common, "--out", "whole").code == 0
    for step in sorted(Path("whole/checkpoints").iterdir()):
        if step.name == "step-000005":
            break
    else:
        pytest.fail("the run kept no checkpoint on the way")
    ran = difftool("train", "photos", "--out", "part", "--resume-from", step, *RUN)
    assert ran.code != 0  # there is no run there
    Path("part").mkdir()
    Path("part/config.yaml").write_text(
        Path("whole/config.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")  # the model that it adapts was named from the other
    ran = difftool(
        "train", place / "photos", "--out", place / "part", "--resume-from", place / step, *RUN
    )
    assert ran.code == 0, ran.err
    monkeypatch.chdir(place)
    first, second = load_file("whole/lora.safetensors"), load_file("part/lora.safetensors")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--lora",), "--from"),
        (("--rank", 4, "--from", "base.safetensors"), "--lora"),
        (("--lora", "--from", "base.safetensors", "--part", "vae"), "exclude"),
        (("--lora", "--from", "base.safetensors", "--rank", 0), "0"),
    ],
)
def test_misuse_is_told(place, difftool, arguments, says):
    ran = difftool("train", "photos", "--out", "run", *RUN, *arguments)
    assert ran.code == 2 and says in ran.err
    assert not Path("run").exists()


def test_a_network_without_attention_has_no_lora():
    plain = UNet(UNetConfig(in_channels=3, out_channels=3, channels=(32,), mid_depth=0))
    with pytest.raises(UsageError, match="no LoRA"):
        Adapters(plain, 4, None)
