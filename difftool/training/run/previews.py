"""What a run shows of its model: a sheet of samples or reconstructions, and what is measured of it.

All with the averaged weights, and of the same seeds, captions and pictures throughout the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from difftool.config.schema import Part
from difftool.data import Dataset
from difftool.images.sheets import Cell, enlarged, sheet
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.progress import Progress, silent
from difftool.training.run.evaluation import WITHOUT_SHEETS, Evaluation
from difftool.training.run.validation import Validation, channel_statistics
from difftool.training.step import rng
from difftool.training.step.batches import to_signal
from difftool.training.step.loop import Trainer

COLUMNS = range(3, 9)
"""Prompts asked for by the user, where they are so many, are a column of the sheets each."""
MEASURED = 256
"""Pictures by which the data's colours are measured."""


class Shown(NamedTuple):
    """What a sheet shows."""

    images: Tensor
    """Samples, or what the autoencoder gives back, [B,3,H,W] in [-1, 1]."""
    originals: Tensor | None = None
    """The pictures that were encoded; None for samples."""
    items: Sequence[SampleInput] = ()
    """What the samples were asked for."""

    def psnr(self) -> list[float]:
        """Of each reconstruction, in dB."""
        assert self.originals is not None
        errors = ((self.originals - self.images) ** 2).mean(dim=(1, 2, 3)).clamp(min=1e-12)
        return (10 * (4 / errors).log10()).tolist()  # the range of 2, squared


class Previews:
    """The samples and measures of a run."""

    def __init__(
        self,
        trainer: Trainer,
        held: Dataset | None,
        evaluation: Evaluation,
        *,
        prompts: Sequence[str] = (),
        cache: Path,
        likelihood: bool = False,
    ):
        """held: pictures that are never trained on. prompts: of the samples, in place of captions
        of the data. cache: a folder for the latents of held-out pictures. likelihood: whether bits
        of them are measured."""
        self.likelihood = likelihood
        self.trainer, self.model, self.prompts = trainer, trainer.model, list(prompts)
        self.pictures = 0 if trainer.part in WITHOUT_SHEETS else evaluation.pictures
        enough = held and len(held) >= max(self.pictures, 1)
        self.dataset = held if held and enough else trainer.dataset
        """Where the captions and pictures of the sheets come from."""
        samples = evaluation.samples
        self.validation = Validation(trainer, held, samples, cache) if held and samples else None

    def make(self, progress: Progress = silent) -> tuple[Image.Image | None, list[dict[str, Any]]]:
        """The sheet, if the part has one and its values are finite, and the measures, each a key
        of METRICS and its value."""
        part, measures = self.trainer.part, []
        with self.averaged():
            if self.validation:
                measures.append({"validation": self.validation.measure(progress)})
                if self.likelihood and (bits := self.validation.bits(progress)):
                    measures.append({"bits": bits})
            if not self.pictures:
                return None, measures
            shown = self.reconstructions() if part == "vae" else self.samples(progress=progress)
            if not shown.images.isfinite().all():
                return None, measures
            image = self._sheet(shown)
            return image, measures + [{k: f(self, shown)} for k, f in MEASURES[part].items()]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the model is in evaluation and computes with the averaged weights."""
        ema, parts = self.trainer.ema, self.model.parts()
        training = {name: network.training for name, network in parts.items()}
        for network in parts.values():
            network.eval()
        try:
            with ema.swapped() if ema else nullcontext(), self.trainer.eager():
                yield
        finally:
            for name, network in parts.items():
                network.train(training[name])

    # --- what is shown -----------------------------------------------------------------------

    def items(self) -> list[SampleInput]:
        """What the samples are asked for."""
        names, texts = len(self.model.preset.classes), [""]
        if self.model.text:
            shown = rng.permutation(0, 0, len(self.dataset))[: max(self.pictures, 1)].tolist()
            texts = self.prompts or self.dataset.captions(shown)
        number = max(self.pictures // len(texts), 1) * len(texts)
        return [
            SampleInput(texts[i % len(texts)], label=i % names if names else None, seed=i)
            for i in range(number)
        ]

    def samples(
        self, items: Sequence[SampleInput] | None = None, progress: Progress = silent
    ) -> Shown:
        """Samples with the preset's own settings, of `items` or the run's own; not more at a time
        than a training step has pictures, for which there is memory."""
        items = self.items() if items is None else items
        plan = plan_sampling(self.model, resolve_settings(self.model))
        images, size = [], self.trainer.config.batch_size or 1
        steps = plan.steps
        with progress("drawing samples", steps * math.ceil(len(items) / size)) as shown:
            for first in range(0, len(items), size):
                x0 = torch.empty(0)
                for step in generate(plan, items[first : first + size]):
                    x0 = step.x
                    shown.update(steps * len(images) + min(step.index + 1, steps))
                images.append(decode(self.model, x0))
        return Shown(torch.cat(images), items=items)

    @torch.no_grad()
    def reconstructions(self) -> Shown:
        """Pictures, held-out ones where there are, and what the autoencoder gives back."""
        codec, size = self.model.codec, self.trainer.config.size
        batch = self.trainer.config.batch_size
        assert size and batch
        number = max(self.pictures // 2, 1)
        shown = rng.permutation(0, 0, len(self.dataset))[:number].tolist()
        pictures = to_signal(self.dataset.images(shown, size), self.model.device)
        latents = torch.cat([codec.encode(some) for some in pictures.split(batch)])
        return Shown(decode(self.model, latents), pictures)

    def _sheet(self, shown: Shown) -> Image.Image:
        if shown.originals is not None:
            pairs = zip(shown.originals, shown.images, shown.psnr(), strict=True)
            cells = [Cell([enlarged(a), enlarged(b)], f"{psnr:.1f} dB") for a, b, psnr in pairs]
            return sheet(cells, min(4, len(cells)))
        pairs = zip(shown.images, shown.items, strict=True)
        cells = [Cell([enlarged(image)], self._caption(item)) for image, item in pairs]
        return sheet(cells, len(self.prompts) if len(self.prompts) in COLUMNS else None)

    def _caption(self, item: SampleInput) -> str:
        return item.prompt if item.label is None else self.model.preset.classes[item.label]

    # --- what is measured --------------------------------------------------------------------

    @cached_property
    def data_colours(self) -> dict[str, list[float]]:
        """The channels of the pictures that are trained on."""
        size = self.trainer.config.size
        assert size
        data = self.trainer.dataset
        some = rng.permutation(0, 0, len(data))[:MEASURED].tolist()
        return channel_statistics(to_signal(data.images(some, size), torch.device("cpu")))


def _colours(previews: Previews, shown: Shown) -> dict[str, Any]:
    made, data = channel_statistics(shown.images), previews.data_colours
    return {"samples": made, "data": data, "count": len(shown.images)}


def _psnr(previews: Previews, shown: Shown) -> float:
    psnr = shown.psnr()
    return sum(psnr) / len(psnr)


MEASURES: dict[Part, dict[str, Callable[[Previews, Shown], Any]]] = {
    "unet": {"colours": _colours},
    "vae": {"psnr": _psnr},
}
"""The metrics of what each part shows, by their key in METRICS."""
