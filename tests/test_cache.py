"""What frozen networks made of a dataset is what they would make of it now."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from difftool.config.schema import DataConfig
from difftool.data import open_dataset
from difftool.data.buckets import Buckets
from difftool.networks.codecs import VaeCodec
from difftool.pipeline.condition import encode_prompts
from difftool.pipeline.model import Model
from difftool.training.step import cache
from difftool.training.step.cache import Embeddings, Latents

PRESET = tiny.preset(
    channels=2,
    codec=tiny.VAE | {"latent_channels": 2},
    unet={"depth": [0, 1], "attention": "transformer", "context_dim": 16, "vector_dim": 8},
    text=[{"width": 16, "layers": 1, "heads": 2, "mlp": 16, "projection": 8, "pooled": True}],
    path={"kind": "flow"},
    target="flow",
)


@pytest.fixture
def model() -> Model:
    model = Model.fresh(PRESET, seed=0)
    for part in model.parts().values():
        part.eval().requires_grad_(False)
    return model


def test_embeddings_are_the_encoders_and_survive_the_process(model, tmp_path: Path, monkeypatch):
    prompts = ["a red fox", "", "a red fox", "a blue dog"]
    context, pooled = encode_prompts(model, prompts)
    assert context is not None and pooled is not None
    first = Embeddings(model, tmp_path)
    made, _ = first(prompts)
    assert made is not None and torch.allclose(made, context, atol=2e-3)  # kept in half precision
    second = Embeddings(model, tmp_path)
    monkeypatch.setattr(model, "text", None)  # all is on disk
    again, pool = second(prompts)
    assert again is not None and torch.equal(again, made)
    assert pool is not None
    assert torch.allclose(pool, pooled, atol=2e-3)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_other_encoders_do_not_read_what_these_made(model, tmp_path: Path):
    Embeddings(model, tmp_path)(["a red fox"])
    other = Model.fresh(PRESET, seed=1)
    made = Embeddings(other, tmp_path)(["a red fox"])[0]
    assert made is not None
    assert torch.allclose(made, encode_prompts(other, ["a red fox"])[0], atol=2e-3)  # type: ignore[arg-type]


def test_latents_are_the_autoencoders_mirrored_and_kept(model, tmp_path: Path):
    data = open_dataset("shapes")
    codec = model.codec
    assert isinstance(codec, VaeCodec)
    made = Latents.make(model, data, 16, flip=True, folder=tmp_path, limit=70)
    pictures = data.images([3, 69], 16, [False, True]).float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = codec.vae.encode(pictures)
    kept_mean, kept_std = made.read([3, 69], [False, True], torch.device("cpu"))
    assert torch.allclose(kept_mean, mean, atol=5e-3)
    assert torch.allclose(kept_std, (0.5 * logvar).exp(), atol=5e-3)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = Latents.make(model, data, 16, flip=True, folder=tmp_path, limit=70)
    assert torch.equal(again.tables[16, 16], made.tables[16, 16])
    assert file.stat().st_mtime_ns == stamp
    Latents.make(Model.fresh(PRESET, seed=1), data, 16, flip=True, folder=tmp_path, limit=70)
    assert len(list(tmp_path.iterdir())) == 2  # another autoencoder has its own


def test_what_was_encoded_before_a_stop_is_not_encoded_again(model, tmp_path: Path, monkeypatch):
    data, seen = open_dataset("shapes"), []
    monkeypatch.setattr(cache, "PIECE_PIXELS", 16 * 16 * 10)
    monkeypatch.setattr(cache, "BATCH_PIXELS", 16 * 16 * 4)

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 24:
            raise KeyboardInterrupt

    options = {"flip": False, "folder": tmp_path, "limit": 30}
    with pytest.raises(KeyboardInterrupt):
        Latents.make(model, data, 16, progress=stop, **options)
    assert seen == [4, 8, 10, 14, 18, 20, 24]
    seen.clear()
    made = Latents.make(model, data, 16, progress=lambda done, _: seen.append(done), **options)
    assert seen == [24, 28, 30]
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-9])  # a damaged piece is made anew
    seen.clear()
    made = Latents.make(model, data, 16, progress=lambda done, _: seen.append(done), **options)
    assert len(seen) == 3
    whole = Latents.make(model, data, 16, flip=False, limit=30)
    assert torch.allclose(made.tables[16, 16], whole.tables[16, 16], atol=5e-3)


def test_large_pictures_are_encoded_one_by_one_and_repeats_once(model, tmp_path: Path, monkeypatch):
    folder = tmp_path / "10_sks fox"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 40), 80).convert("RGB").save(folder / f"{i}.png")
    data, batches = open_dataset(str(tmp_path)), []
    posterior = VaeCodec.posterior
    monkeypatch.setattr(
        VaeCodec, "posterior", lambda self, x: batches.append(len(x)) or posterior(self, x)
    )
    monkeypatch.setattr(cache, "BATCH_PIXELS", 40 * 40)
    made = Latents.make(model, data, 40, flip=False)
    assert (len(data), batches) == (30, [1, 1, 1])
    same = [i for i in range(30) if data.name(i) == data.name(0)]
    mean, _ = made.read(same, [False] * len(same), torch.device("cpu"))
    assert len(same) == 10 and torch.equal(mean, mean[:1].expand_as(mean))


def test_other_captions_leave_latents_as_they_are(model, tmp_path: Path):
    Image.new("RGBA", (16, 16), (200, 0, 0, 90)).save(tmp_path / "a.png")

    def made(**options) -> int:
        data = open_dataset(str(tmp_path), DataConfig(**options))
        Latents.make(model, data, 16, flip=False, folder=tmp_path / "cache")
        return len(list((tmp_path / "cache").iterdir()))

    (tmp_path / "a.txt").write_text("red, square", encoding="utf-8")
    assert made() == 1
    (tmp_path / "a.txt").write_text("a square, red", encoding="utf-8")
    assert made(shuffle_captions=True) == 1
    assert made(background="black") == 2


def test_moments_make_x0_of_unit_variance(model):
    data = open_dataset("shapes")
    made = Latents.make(model, data, 16, flip=False, limit=64)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in made.moments())
    centre, spread = made.read(range(64), [False] * 64, torch.device("cpu"))
    x0 = (centre + spread * torch.randn(centre.shape) - mean) / std
    assert torch.allclose(x0.mean(dim=(0, 2, 3)), torch.zeros(2), atol=0.05)
    assert torch.allclose(x0.std(dim=(0, 2, 3)), torch.ones(2), atol=0.05)


def test_latents_of_many_shapes(model, tmp_path: Path):
    for i, size in enumerate([(32, 16), (16, 32), (20, 20), (64, 30)]):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{i}.png")
    data = open_dataset(str(tmp_path))
    buckets = Buckets(16, step=4)
    made = Latents.make(model, data, buckets, flip=False, folder=tmp_path / "cache")
    again = Latents.make(model, data, buckets, flip=False, folder=tmp_path / "cache")
    assert len(made.tables) > 2
    for index in range(4):
        width, height = data.bucket(index, buckets)
        picture = data.images([index], (width, height)).float() / 127.5 - 1
        with torch.no_grad():
            mean, _ = model.codec.vae.encode(picture)  # type: ignore[attr-defined]
        for latents in (made, again):
            kept, _ = latents.read([index], [False], torch.device("cpu"))
            assert kept.shape[2:] == (height // 2, width // 2)
            assert torch.allclose(kept, mean, atol=5e-3)


def test_a_disk_that_takes_nothing_ends_no_run(model, tmp_path: Path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    made, _ = Embeddings(model, tmp_path)(["a red fox"])
    context, _ = encode_prompts(model, ["a red fox"])
    assert made is not None and context is not None
    assert torch.allclose(made, context, atol=2e-3)
    assert not list(tmp_path.rglob("*.*"))
