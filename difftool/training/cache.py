"""What frozen networks make of a dataset, made once: latents of pictures, embeddings of captions.

A file is named by the hash of all that it depends on (the pictures and size or the caption, and the
weights), so a stale one is never read; it is written whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

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
        assert isinstance(model.codec, VaeCodec)
        vae, rows, path = model.codec.vae, [], None
        if folder is not None:
            facts = f"{dataset.fingerprint} {size} {flip} {count} {_digest({'vae': vae})}"
            name = hashlib.sha256(facts.encode()).hexdigest()[:32]
            path = folder / f"latents-{name}.safetensors"
            if path.is_file():
                return cls(load_tensors(path)["latents"])
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


class Embeddings:
    """The text encoders' outputs, fp16, a file a caption; called like Model.embed.

    What was used last is held in memory. A caption gives the same numbers whether it was cached or
    not, so that a resumed run is exact.
    """

    HELD = 4096

    def __init__(self, model: Model, folder: Path):
        encoders = {n: p for n, p in model.parts().items() if n.startswith("text.")}
        self.model, self.folder = model, folder / f"text-{_digest(encoders)}"
        self.held: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Context [B,L,D] and pooled [B,P] of prompts, fp32."""
        rows = [self._row(prompt) for prompt in prompts]
        columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        made = {k: t.to(self.model.device, non_blocking=True).float() for k, t in columns.items()}
        return made["context"], made.get("pooled")

    def _row(self, prompt: str) -> dict[str, Tensor]:
        row = self.held.pop(prompt, None)
        if row is None:
            path = self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"
            if path.is_file():
                row = load_tensors(path)
            else:
                parts = zip(("context", "pooled"), self.model.embed([prompt]), strict=True)
                row = {name: t[0].half().cpu() for name, t in parts if t is not None}
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(path, row, {}, overwrite=True)
        self.held[prompt] = row  # last in, last out
        if len(self.held) > self.HELD:
            del self.held[next(iter(self.held))]
        return row


def _digest(networks: Mapping[str, nn.Module]) -> str:
    """Hash of networks' weights, in hex."""
    digest = hashlib.sha256()
    for prefix, network in networks.items():
        for name, tensor in network.state_dict().items():
            digest.update(f"{prefix}.{name}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
