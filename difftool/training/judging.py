"""A finished model compared with a reference: samples of it, by the preset's own settings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from difftool.data import Dataset
from difftool.evaluation.features import open_describer
from difftool.evaluation.judge import (
    CHUNK,
    Judgement,
    Kept,
    judge,
    reference_features,
)
from difftool.evaluation.options import MADE
from difftool.images.fit import to_pixels
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.progress import Progress
from difftool.storage.commit import sha256_of
from difftool.training.step import rng


def judge_model(
    path: Path,
    reference: Dataset,
    data: Dataset,
    *,
    count: int | None,
    weights: Path | None,
    device: str,
    folder: Path,
    progress: Progress,
) -> Judgement:
    """Compare samples of the model in a file with a reference. count: of samples; None = as many as
    the reference has, at most MADE. weights: see `open_describer`.

    Sample i has seed i, the caption of a picture of the reference, or of the data where that has
    none, or the classes in turn. What is described is kept in the folder: a comparison that was
    stopped goes on where it was.
    """
    model, describer = load_model(str(path), device=device), open_describer(weights, device)
    count = count or min(len(reference), MADE)
    batch = min(model.preset.train.batch_size or CHUNK, CHUNK)
    items = _items(model, reference if reference.kind == "text" else data, count)
    settings = resolve_settings(model)
    kept = Kept(folder, sha256_of(path), items, settings, describer.name, describer.digest)
    with progress("making pictures to compare", count) as shown:
        made = kept.features(
            count,
            lambda some: describer.describe(_pictures(model, [items[i] for i in some], batch)),
            shown.update,
        )
    known = reference_features(reference, settings.size, describer, folder, progress)
    return judge(made, known, describer)


def _items(model: Model, captioned: Dataset, count: int) -> list[SampleInput]:
    """What samples are asked for."""
    names, texts = len(model.preset.classes), [""]
    if model.text:
        order = rng.permutation(0, 0, len(captioned))[:count].tolist()
        texts = captioned.captions(order)
    return [
        SampleInput(texts[i % len(texts)], label=i % names if names else None, seed=i)
        for i in range(count)
    ]


def _pictures(model: Model, items: list[SampleInput], batch: int) -> Tensor:
    """Samples, uint8 [B,3,H,W]."""
    plan, found = plan_sampling(model, resolve_settings(model)), []
    for first in range(0, len(items), batch):
        x0 = torch.empty(0)
        for step in generate(plan, items[first : first + batch]):
            x0 = step.x
        found.append(to_pixels(decode(model, x0)).cpu())
    return torch.cat(found)
