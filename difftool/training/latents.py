"""Latents of a whole dataset, made once: training in them needs no pictures and no encoder.

A cache is one file, named by the hash of all that it depends on (pictures, size, autoencoder), so a
stale one is never read; it is written whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from difftool.data import Dataset
from difftool.formats.safetensors import load_tensors, save_tensors
from difftool.model import Model
from difftool.models.codecs import VaeCodec
from difftool.training.batches import to_signal

BATCH = 64


class Latents:
    """Mean and deviation of every picture's latent, fp16 [N,2,2c,h,w]: as it is, and mirrored."""

    def __init__(self, table: Tensor):
        self.table = table

    def read(
        self, indices: Sequence[int], flips: Sequence[bool], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Raw mean and deviation of those pictures, fp32 [B,c,h,w] each."""
        side = [int(f) if self.table.shape[1] > 1 else 0 for f in flips]
        chosen = self.table[list(indices), side].to(device, non_blocking=True).float()
        mean, std = chosen.chunk(2, dim=1)
        return mean, std

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the set, posterior noise included."""
        mean, std = self.table[:, 0].float().chunk(2, dim=1)
        centre = mean.mean(dim=(0, 2, 3))
        spread = (mean.var(dim=(0, 2, 3), correction=0) + (std**2).mean(dim=(0, 2, 3))).sqrt()
        return centre.tolist(), spread.tolist()

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        model: Model,
        dataset: Dataset,
        size: int,
        *,
        flip: bool,
        folder: Path | None = None,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Latents:
        """The latents of the set's first `limit` pictures, read from the folder or made into it."""
        count = min(limit or len(dataset), len(dataset))
        path = folder / f"{_key(model, dataset, size, flip, count)}.safetensors" if folder else None
        if path is not None and path.is_file():
            return cls(load_tensors(path)["latents"])
        assert isinstance(model.codec, VaeCodec)
        vae, rows = model.codec.vae, []
        for first in range(0, count, BATCH):
            indices = range(first, min(first + BATCH, count))
            sides = []
            for mirrored in (False, True)[: 2 if flip else 1]:
                pictures = dataset.images(indices, size, [mirrored] * len(indices))
                images = to_signal(pictures, model.device).to(vae.dtype)
                mean, logvar = vae.encode(images)
                sides.append(torch.cat([mean, (0.5 * logvar).exp()], dim=1))
            rows.append(torch.stack(sides, dim=1).half().cpu())
            if progress:
                progress(indices[-1] + 1, count)
        table = torch.cat(rows)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"latents": table}, {}, overwrite=True)
        return cls(table)


def _key(model: Model, dataset: Dataset, size: int, flip: bool, count: int) -> str:
    digest = hashlib.sha256(f"{dataset.fingerprint} {size} {flip} {count}".encode())
    for name, tensor in model.parts()["vae"].state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
