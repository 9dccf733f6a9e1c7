"""The teacher's own pictures as data: drawn once of a dataset's captions or classes, a piece after
the other, into files that a run which goes on finds again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from difftool.config.schema import Preset
from difftool.data import Audit, Dataset, Size
from difftool.errors import InputError, ResourceError, UsageError
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.progress import Progress
from difftool.storage.safetensors import load_tensors, save_tensors
from difftool.training.step import parallel

FOLDER = "teacher"
"""Of a run, where they are kept."""
PIECE = 64
"""Pictures of one file: what a run that is killed draws again, at most."""


class TeacherPictures(Dataset):
    """Pictures that a teacher has drawn of another set's captions or classes, one after the other
    and again from the first."""

    def __init__(self, asked: Dataset, pictures: Tensor, fingerprint: str):
        """pictures: uint8 [N,3,S,S]."""
        self.asked_for, self.pictures, self._fingerprint = asked, pictures, fingerprint
        self.kind, self.classes, self.asked = asked.kind, asked.classes, asked.asked
        self.native_size = pictures.shape[-1]
        words = f"{len(pictures)} pictures that the teacher drew, of {asked.audit.source}"
        self.audit = Audit(words, len(pictures))

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def fingerprint(self) -> str:
        """Hash of what they were drawn of."""
        return self._fingerprint

    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """The pictures, enlarged or reduced where they are of another size."""
        some = self.pictures[list(indices)]
        width, height = (size, size) if isinstance(size, int) else size
        if some.shape[2:] == (height, width):
            return some
        scaled = F.interpolate(some.float(), (height, width), mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)

    def caption(self, index: int, key: int) -> str:
        """What the picture was drawn of, whatever the key."""
        return self.asked_for.captions(*_place(self.asked_for, index))[0]

    def label(self, index: int) -> int:
        """The class that it was drawn of."""
        return self.asked_for.label(index % len(self.asked_for))


def _place(asked: Dataset, number: int) -> tuple[list[int], list[int]]:
    """Sample and key that the picture of that number is drawn of."""
    again, index = divmod(number, len(asked))
    return [index], [again]


def drawn(
    preset: Preset, dataset: Dataset, folder: Path, device: torch.device, progress: Progress
) -> Dataset:
    """As many pictures as the recipe asks for, in the folder or drawn into it; the set itself
    where it asks for none.

    UsageError or InputError where the teacher cannot be sampled.
    """
    settings, size, batch = preset.train.distill, preset.train.size, preset.train.batch_size
    if not settings.samples:
        return dataset
    assert size and batch and settings.teacher
    words = (
        f"{dataset.fingerprint} {settings.teacher} {size} {preset.train.seed} {settings.samples}"
    )
    name = hashlib.sha256(words.encode()).hexdigest()[:16]
    firsts = range(0, settings.samples, PIECE)
    paths = {first: folder / FOLDER / f"{name}-{first:06d}.safetensors" for first in firsts}
    with parallel.first_before_others():
        _draw(preset, dataset, paths, device, progress)
        pieces = [_read(path) for path in paths.values()]
    if any(piece is None for piece in pieces):
        where = folder / FOLDER
        raise ResourceError(f"the teacher's pictures are not in {where}", hint="run again")
    return TeacherPictures(
        dataset, torch.cat([piece for piece in pieces if piece is not None]), name
    )


def _draw(
    preset: Preset,
    dataset: Dataset,
    paths: dict[int, Path],
    device: torch.device,
    progress: Progress,
) -> None:
    """Make the files that are not there, of PIECE pictures each."""
    missing = [first for first, path in paths.items() if _read(path) is None]
    if not missing:
        return
    recipe = preset.train
    assert recipe.size and recipe.batch_size
    model = load_model(recipe.distill.teacher, device=str(device))
    asked = {"width": recipe.size, "height": recipe.size}
    plan = plan_sampling(model, resolve_settings(model, asked))
    pieces = {first: range(first, min(first + PIECE, recipe.distill.samples)) for first in missing}
    with progress("the teacher draws", sum(map(len, pieces.values()))) as shown:
        done = 0
        for first, numbers in pieces.items():
            pictures: list[Tensor] = []
            for start in range(0, len(numbers), recipe.batch_size):
                some = numbers[start : start + recipe.batch_size]
                *_, last = generate(plan, [_input(dataset, each, recipe.seed) for each in some])
                pictures.append(_bytes(decode(model, last.x)))
                done += len(some)
                shown.update(done)
            paths[first].parent.mkdir(parents=True, exist_ok=True)
            save_tensors(paths[first], {"pictures": torch.cat(pictures)}, {}, overwrite=True)


def _input(dataset: Dataset, number: int, seed: int) -> SampleInput:
    sample, key = _place(dataset, number)
    prompt = dataset.captions(sample, key)[0] if dataset.kind == "text" else ""
    label = dataset.label(sample[0]) if dataset.kind == "class" else None
    return SampleInput(prompt, label=label, seed=seed + number)


def _bytes(images: Tensor) -> Tensor:
    """uint8 [B,3,H,W] of pictures in [-1, 1]; InputError for values that are not finite."""
    if not images.isfinite().all():
        raise InputError("the teacher's pictures are not finite")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _read(path: Path) -> Tensor | None:
    """The pictures of a file; None where there is none, or none that can be read."""
    if path.is_file():
        with suppress(InputError, UsageError):
            return load_tensors(path).get("pictures")
    return None
