"""What frozen networks make of a dataset, made once: latents of pictures, embeddings of captions.

A file is named by the hash of all that it depends on (the pictures and size or the caption, and the
weights), so a stale one is never read, and other captions leave latents as they are; it is written
whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from difftool.data import Dataset
from difftool.data.buckets import Buckets, Size
from difftool.devices import on_device
from difftool.errors import InputError, ResourceError, UsageError
from difftool.pipeline.condition import EncodedPrompts, encode_prompts
from difftool.pipeline.model import Model
from difftool.storage.safetensors import load_tensors, save_tensors
from difftool.training.step.batches import to_signal

BATCH, BATCH_PIXELS = 64, 1 << 18
"""Pictures that are encoded at a time: at most so many, and so many pixels of them."""
PIECE_PIXELS = 1 << 22
"""Pixels of the pictures in one file: what a run that is killed while it encodes does again."""


class Latents:
    """Mean and deviation of every picture's latent, fp16: as it is, and mirrored.

    tables: by size, [n,1 or 2,2c,h,w] of the pictures of that size. rows: of every sample, the size
    and the row of its picture, which samples that repeat it share.
    """

    def __init__(self, tables: dict[Size, Tensor], rows: Sequence[tuple[Size, int]]):
        self.tables, self.rows = tables, rows

    def read(
        self, indices: Sequence[int], flips: Sequence[bool], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Raw mean and deviation of those pictures, of one size, fp32 [B,c,h,w] each."""
        table = self.tables[self.rows[indices[0]][0]]
        side = [int(flip) if table.shape[1] > 1 else 0 for flip in flips]
        chosen = table[[self.rows[i][1] for i in indices], side]
        mean, std = on_device(chosen, device).float().chunk(2, dim=1)
        return mean, std

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the set, posterior noise included."""
        pixels = [table[:, 0].float().transpose(0, 1).flatten(1) for table in self.tables.values()]
        mean, std = torch.cat(pixels, dim=1).chunk(2)
        spread = (mean.var(dim=1, correction=0) + (std**2).mean(dim=1)).sqrt()
        return mean.mean(dim=1).tolist(), spread.tolist()

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        model: Model,
        dataset: Dataset,
        frame: int | Buckets,
        *,
        flip: bool,
        folder: Path | None = None,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Latents:
        """The latents of the set's first `limit` samples, in squares of a side or in buckets; read
        from the folder or made into it, a piece after the other."""
        pictures: dict[Size, list[int]] = {}
        row_of: dict[str, int] = {}
        rows: list[tuple[Size, int]] = []
        for index in range(min(limit or len(dataset), len(dataset))):
            size = (frame, frame) if isinstance(frame, int) else dataset.bucket(index, frame)
            name = dataset.name(index)
            if name not in row_of:
                row_of[name] = len(pictures.setdefault(size, []))
                pictures[size].append(index)
            rows.append((size, row_of[name]))
        digest = _digest(model.codec.encoders()) if folder is not None else ""
        tables, done = {}, 0
        for size, indices in pictures.items():
            table, each = [], max(1, PIECE_PIXELS // (size[0] * size[1]))
            for first in range(0, len(indices), each):
                piece, path, made = indices[first : first + each], None, []
                if folder is not None:
                    seen = [dataset.content(index) for index in piece]
                    facts = f"{seen} {dataset.background} {size} {flip} {digest}"
                    name = hashlib.sha256(facts.encode()).hexdigest()[:32]
                    path = folder / f"latents-{name}.safetensors"
                if (kept := _read(path)) is not None:
                    table.append(kept)
                    done += len(piece)
                    continue
                for some in _cut(piece, size):
                    made.append(_encode(model, dataset, some, size, flip))
                    done += len(some)
                    if progress:
                        progress(done, len(row_of))
                table.append(torch.cat(made))
                if path is not None:
                    _keep(path, {"latents": table[-1]})
            tables[size] = torch.cat(table)
        return cls(tables, rows)


def _read(path: Path | None) -> Tensor | None:
    """The latents in a file; None where there is none, or none that can be read."""
    if path is not None and path.is_file():
        with suppress(InputError):
            return load_tensors(path).get("latents")
    return None


def _cut(indices: Sequence[int], size: Size) -> Iterator[Sequence[int]]:
    """Samples of a size, as many at a time as are encoded together."""
    each = max(1, min(BATCH, BATCH_PIXELS // (size[0] * size[1])))
    for first in range(0, len(indices), each):
        yield indices[first : first + each]


def _encode(
    model: Model, dataset: Dataset, indices: Sequence[int], size: Size, flip: bool
) -> Tensor:
    """Mean and deviation of their latents, fp16 [n,1 or 2,2c,h,w]."""
    sides = []
    for mirrored in (False, True)[: 2 if flip else 1]:
        pictures = dataset.images(indices, size, [mirrored] * len(indices))
        mean, logvar = model.codec.posterior(to_signal(pictures, model.device))
        sides.append(torch.cat([mean, (0.5 * logvar).exp()], dim=1))
    return torch.stack(sides, dim=1).half().cpu()


class Embeddings:
    """The text encoders' outputs, fp16, a file a caption; called like `encode_prompts`.

    What was used last is held in memory. A caption gives the same numbers whether it was cached or
    not, so that a resumed run is exact.
    """

    HELD = 4096

    def __init__(self, model: Model, folder: Path):
        encoders = {n: p for n, p in model.parts().items() if n.startswith("text.")}
        self.model, self.folder = model, folder / f"text-{_digest(encoders)}"
        self.held: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Context [B,L,D] and pooled [B,P] of prompts, fp32."""
        rows = [self._row(prompt) for prompt in prompts]
        # As fp32 first: autocast to bf16 on a CPU has no way to stack fp16.
        columns = {key: torch.stack([row[key].float() for row in rows]) for key in rows[0]}
        made = {k: t.to(self.model.device, non_blocking=True) for k, t in columns.items()}
        return EncodedPrompts(made["context"], made.get("pooled"))

    def _row(self, prompt: str) -> dict[str, Tensor]:
        row = self.held.pop(prompt, None)
        if row is None:
            path = self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"
            if path.is_file():
                row = load_tensors(path)
            else:
                texts = encode_prompts(self.model, [prompt])._asdict().items()
                row = {name: t[0].half().cpu() for name, t in texts if t is not None}
                _keep(path, row)
        self.held[prompt] = row  # last in, last out
        if len(self.held) > self.HELD:
            del self.held[next(iter(self.held))]
        return row


def _keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file if the disk takes it: a run does without, and makes it anew when it goes on."""
    with suppress(OSError, ResourceError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, {}, overwrite=True)


def _digest(networks: Mapping[str, nn.Module]) -> str:
    """Hash of networks' weights, in hex."""
    digest = hashlib.sha256()
    for prefix, network in networks.items():
        for name, tensor in network.state_dict().items():
            digest.update(f"{prefix}.{name}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
