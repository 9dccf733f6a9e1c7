"""A model's own space, and the way back: x0 as the network sees it in x_t."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftool.config.families import family
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.likelihood import Likelihood, Measured, likelihood
from difftool.diffusion.path import Level
from difftool.diffusion.slack import slack_evaluations, tightened
from difftool.errors import ResourceError, UsageError
from difftool.forward.process import Pixels, Signal
from difftool.images.fit import framed, to_pixels, to_tensor
from difftool.pipeline.condition import build_cond, encode_prompts
from difftool.pipeline.decode import decode
from difftool.pipeline.model import Model
from difftool.progress import Progress, silent


class ModelSpace:
    """Where a model works: x0 [c,h,w] is its codec's encoding of the picture.

    That is cut and scaled to fill the model's own size or, if asked for, to a longest side.
    """

    def __init__(self, model: Model, image: Image.Image, side: int | None = None):
        self.model = model
        self.size = frame_size(model, image.size, side)
        self.picture = to_tensor(framed(image, self.size))[None].to(model.device)
        with torch.no_grad():
            self.x0: Signal = _array(model.codec.encode(self.picture))

    def to_pixels(self, x: Signal) -> Pixels:
        return to_pixels(self._decode(x))[0].permute(1, 2, 0).cpu().numpy()

    def error(self, x0: Signal) -> float:
        """Root of the mean squared difference to the picture, decoded, in [-1, 1]."""
        return float((self._decode(x0) - self.picture).square().mean().sqrt())

    def predictions(
        self, x_ts: Iterable[Signal], levels: Iterable[Level], cond: Cond
    ) -> Iterator[Signal]:
        """The network's x0 from each x_t. Without noise that is x_t, and the network is not asked.

        ResourceError if it is not finite.
        """
        for x_t, level in zip(x_ts, levels, strict=True):
            if level.sigma == 0:
                yield x_t / level.alpha
                continue
            with torch.no_grad():
                x0 = self.model.denoiser.predict(self._tensor(x_t), level, cond).x0
            if not x0.isfinite().all():
                why = f"at t = {level.t:g}"
                raise ResourceError("the model's prediction is not finite", why, "try --dtype fp32")
            yield _array(x0)

    def likelihood(
        self, cond: Cond, steps: int, seed: int, progress: Progress = silent
    ) -> Likelihood:
        """Of the picture, in about so many `steps`. ResourceError if it is not finite."""
        measured = self.measured(cond, steps, seed)
        with progress("measuring", measured.evaluations) as shown:
            found = likelihood(measured, shown.update)
        if not math.isfinite(found.bound.total + found.flow.total):
            what = "the likelihood under the model is not finite"
            raise ResourceError(what, hint="try --dtype fp32")
        apart, error = found.difference
        if apart <= 2 * error:
            return found
        with progress("measuring the slack of the bound", slack_evaluations(measured)) as shown:
            return found._replace(tight=tightened(measured, found, shown.update))

    def measured(self, cond: Cond, steps: int, seed: int) -> Measured:
        """The picture as its likelihood is measured."""
        return Measured(
            denoiser=self.model.denoiser,
            x0=self._tensor(self.x0),
            cond=cond,
            discrete=not self.model.codec.learned,
            steps=steps,
            seed=seed,
        )

    def _decode(self, x: Signal) -> Tensor:
        return decode(self.model, self._tensor(x))

    def _tensor(self, x: Signal) -> Tensor:
        return torch.from_numpy(x.astype(np.float32))[None].to(self.model.device)


def _array(x: Tensor) -> Signal:
    return x[0].float().cpu().numpy()


def frame_size(model: Model, picture: tuple[int, int], side: int | None = None) -> tuple[int, int]:
    """Width and height of a picture where a model works, in pixels."""
    if side is None:
        width, height = model.preset.sample.size
        return width, height
    factor = model.preset.side_multiple
    width, height = (
        max(1, round(length * side / max(picture) / factor)) * factor for length in picture
    )
    return width, height


def condition(
    model: Model, size: tuple[int, int], prompt: str | None = None, label: str | None = None
) -> Cond:
    """What the network is told; UsageError for what this model cannot be told, or is not shown."""
    if prompt is not None and not model.text:
        raise UsageError(f"the model {model.name} reads no prompt", hint="leave --prompt out")
    if family(model.preset.family).vision:
        why = "its network is told the embedding of a picture beside x_t"
        raise UsageError(f"the model {model.name} has no way back to show", why)
    if model.concat != "none":
        more = model.preset.unet.in_channels - model.codec.channels
        why = f"its network takes {more} channels more than x_t has"
        raise UsageError(f"the model {model.name} works from another picture", why)
    number = None if label is None else model.label(label)
    with torch.no_grad():
        return build_cond(model, encode_prompts(model, [prompt or ""]), [number], size)
