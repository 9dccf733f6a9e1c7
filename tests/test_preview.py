"""Pictures while they are made: tiny decoders, the fitted map, terminals, files and animations."""

from __future__ import annotations

import base64
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from difftool.cli import console
from difftool.cli.console import PlainProgress, RichProgress
from difftool.config.layers import preset_folder
from difftool.errors import InputError, UsageError
from difftool.images.animation import gif
from difftool.images.terminal import blocks, cells, escapes, protocol
from difftool.networks.tiny import TinyDecoder, tiny_decoder
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.sampling.preview import (
    Previewer,
    colours,
    linear,
    nearest,
    open_tiny,
    probe,
    shipped,
)
from difftool.storage.safetensors import save_tensors


def oracle(channels: int = 4, stages: int = 2, width: int = 16) -> Any:
    """diffusers' AutoencoderTiny of random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(width,) * (stages + 1),
        decoder_block_out_channels=(width,) * (stages + 1),
        num_encoder_blocks=(1,) * (stages + 1), num_decoder_blocks=(*(2,) * stages, 1),
    )  # fmt: skip
    return made.eval()


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as TAESD's own file of the decoder names it, which counts the clamp as a layer."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            found[f"{int(number) + 1}.{rest}"] = tensor
    return found


@pytest.mark.parametrize("stages", [2, 3])
def test_tiny_decoders_are_diffusers_and_the_published_ones(stages):
    theirs = oracle(stages=stages)
    x0 = 2 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs.decode(x0).sample
    for tensors in (theirs.state_dict(), published(theirs.state_dict())):
        ours = tiny_decoder(tensors, "it")
        assert (ours.channels, ours.factor) == (4, 2**stages)
        torch.testing.assert_close(ours(x0), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_no_tiny_decoder_is_refused():
    good = published(oracle().state_dict())
    cut = {n: t for n, t in good.items() if not n.startswith("3.conv.4")}
    grey = {n: t[:1] if n.startswith(f"{max(int(k.split('.')[0]) for k in good)}.") else t
            for n, t in good.items()}  # fmt: skip
    for tensors in ({}, {"weight": torch.zeros(3)}, {"1.weight": torch.zeros(3)}, cut, grey):
        with pytest.raises(InputError, match="no tiny decoder"):
            tiny_decoder(tensors, "it")


def latent_model(channels: int = 4) -> Any:
    codec = tiny.VAE | {"patch": 1, "latent_channels": channels}
    return tiny.model(tiny.preset(channels, codec=codec, sample={"size": [16, 16]}))


def test_a_decoder_is_opened_for_the_model_that_it_fits(tmp_path):
    theirs = oracle(stages=1)
    save_tensors(tmp_path / "taesd.safetensors", published(theirs.state_dict()), {})
    theirs.save_pretrained(tmp_path / "folder")
    torch.save(published(theirs.state_dict()), tmp_path / "taesd_decoder.pth")
    whole = {f"taesd_{name.replace('layers.', '')}": t for name, t in theirs.state_dict().items()}
    save_tensors(tmp_path / "both.safetensors", whole, {})
    model, x0 = latent_model(), torch.randn(2, 4, 3, 5)
    made = []
    for place in ("taesd.safetensors", "taesd_decoder.pth", "both.safetensors", "folder"):
        place = tmp_path / place
        previewer = Previewer(model, open_tiny(place, model))
        made.append(previewer.pictures(x0))
        assert made[-1].shape == (2, 3, 6, 10) and made[-1].equal(made[0])
        with pytest.raises(UsageError, match="does not fit"):
            open_tiny(place, latent_model(channels=2))


def test_the_map_is_the_nearest_linear_one_to_the_decoder():
    model = latent_model()
    weight, bias = colours(*probe(model))
    assert weight.shape == (3, 4) and bias.shape == (3,)
    again = colours(*probe(model))
    torch.testing.assert_close(weight, again[0])
    torch.testing.assert_close(bias, again[1])
    # a decoder that is linear is found as it is
    model.codec.decode = lambda x0: torch.einsum(
        "oc,bchw->bohw", 0.1 * torch.arange(12.0).reshape(3, 4) / 11, x0
    ).repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.2  # fmt: skip
    flat = torch.full((1, 4, 4, 4), 0.5)
    made = Previewer(model).pictures(flat)
    assert made.shape == (1, 3, 8, 8)
    torch.testing.assert_close(made[:, :, 0, 0], decode(model, flat)[:, :, 0, 0], atol=5e-2, rtol=0)


def psnr(made: Tensor, wanted: Tensor) -> float:
    return float((4 / (made - wanted).square().flatten(1).mean(1)).log10().mul(10).mean())


def test_the_bundled_model_has_a_tiny_decoder_that_is_nearer_than_the_map():
    model = load_model(None)
    plan = plan_sampling(model, resolve_settings(model, {"steps": 4}))
    inputs = [SampleInput("a smiling fox", seed=7), SampleInput("red heart, flat style", seed=8)]
    seen = Previewer(model, nearest(model))
    assert isinstance(seen.tiny, TinyDecoder)
    fitted = Previewer(model, partial(linear, *colours(*probe(model)), model.codec.factor))
    for step in generate(plan, inputs):
        wanted = decode(model, step.x0).cpu()
        assert psnr(seen.pictures(step.x0), wanted) > psnr(fitted.pictures(step.x0), wanted) + 3
    (path,) = preset_folder().glob("*/preview.safetensors")
    assert path.stat().st_size < 400_000


def test_it_is_of_no_use_to_other_latents_of_the_same_shape():
    codec = tiny.VAE | {"patch": 2, "latent_channels": 8, "widths": [8] * 3}
    other = tiny.model(tiny.preset(8, codec=codec, sample={"size": [16, 16]}))
    assert (other.codec.channels, other.codec.factor) == (8, 8) and len([*shipped(other)]) == 1
    assert not isinstance(nearest(other), TinyDecoder)
    assert not [*shipped(latent_model())]


def test_codecs_that_learn_nothing_decode():
    model = tiny.model(tiny.preset(12, codec=tiny.BLOCKS))
    x0 = torch.rand(2, 12, 4, 4) * 2 - 1
    assert torch.equal(Previewer(model).pictures(x0), decode(model, x0))


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x"}, "blocks"),
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "screen-256color"}, "blocks"),
    ],
)
def test_terminals_are_known_by_their_environment(environment, how):
    assert protocol(environment) == how


def test_pictures_fit_the_terminal():
    assert cells((64, 64), (79, 36)) == (56, 28)
    assert cells((128, 64), (40, 30)) == (40, 10)
    assert cells((64, 640), (79, 20)) == (4, 20)
    assert cells((1000, 1), (10, 10)) == (10, 1)


def test_half_blocks_are_two_pixels_each():
    picture = Image.new("RGB", (2, 4))
    for y, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]):
        picture.paste(colour, (0, y, 2, y + 1))
    assert blocks(picture, (2, 2)) == [[("#ff0000", "#00ff00")] * 2, [("#0000ff", "#090909")] * 2]


@pytest.mark.parametrize("how", ["kitty", "iterm"])
def test_escapes_hold_the_picture_and_ask_nothing(how):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    text = escapes(noise, (10, 5), how)
    parts = re.findall(r"\x1b_G[^;]*;([^\x1b]*)\x1b\\" if how == "kitty" else r":([^\a]*)\a", text)
    data = base64.b64decode("".join(parts))
    assert data.startswith(b"\x89PNG") and (how == "iterm" or (len(parts) > 1 and "q=2" in text))
    assert text.count("m=1") == len(parts) - 1 or how == "iterm"


def test_progress_shows_a_picture_above_its_line(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("KITTY_WINDOW_ID", raising=False)
    display = RichProgress("sampling", 4)
    display.show(Image.new("RGB", (16, 16), "red"))
    display.bar.console.print(display)
    lines = capsys.readouterr().err.rstrip("\n").splitlines()
    assert len(lines) > 5 and set(lines[0].strip()) == {"▀"} and "sampling" in lines[-1]
    PlainProgress("sampling", 4).show(Image.new("RGB", (16, 16)))
    assert capsys.readouterr().err == ""


def test_why_no_picture_is_shown_is_told(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(console, "interactive", lambda: False)
    assert "terminals alone" in console.blind()
    monkeypatch.setattr(console, "interactive", lambda: True)
    assert console.blind() == ""
    monkeypatch.setenv("NO_COLOR", "1")
    assert "NO_COLOR forbids" in console.blind()


def test_an_animation_ends_with_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = [Image.new("RGB", (8, 8), c) for c in ("black", "gray")]
    Path("x.gif").write_bytes(gif([*frames, Image.new("RGB", (64, 32), "red")]))
    with Image.open("x.gif") as made:
        assert (made.n_frames, made.size) == (3, (64, 32))  # type: ignore[attr-defined]
        made.seek(2)
        assert made.convert("RGB").getpixel((9, 9)) == (255, 0, 0) and made.info["duration"] > 1000


def test_files_of_what_is_made(difftool, tmp_path, monkeypatch):
    model = tiny.model(tiny.preset(12, codec=tiny.BLOCKS, sample={"size": [16, 16], "steps": 3}))
    model.save(tmp_path / "m.safetensors")
    seen = []
    write = "difftool.sampling.preview.write_whole"
    monkeypatch.setattr(write, lambda path, data, overwrite: seen.append((path, len(data))))
    common = ("sample", "-m", "m.safetensors", "--seed", "1-2")
    ran = difftool(*common, "--preview-path", "live.png", "--gif", "-o", "[seed].png", "--json")
    assert ran.code == 0 and [p["gif"] for p in ran.objects] == ["1.gif", "2.gif"], ran.err
    assert [str(path) for path, _ in seen] == ["live.png"] * 4
    with Image.open("1.gif") as made, Image.open("1.png") as last:
        assert made.size == last.size  # the last step is the picture, and so no frame of its own
        assert made.n_frames == 3  # type: ignore[attr-defined]
    assert "shows on terminals" in difftool(*common, "--preview").err
    for wrong in (("--preview-path", "live"), ("--gif", "--grid", "-o", "g.png"),
                  ("--preview-decoder", "m.safetensors")):  # fmt: skip
        assert difftool(*common, *wrong).code == 2
