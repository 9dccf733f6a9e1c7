"""From conditions and noise to x0: the core of sampling, the same for every family.

Everything random about a picture comes from its own seed, in the order of the reference pipelines:
an embedding's noise (unCLIP), image latents, start noise, masked-image latents, then the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.guidance import Denoise, guided
from difftool.diffusion.noise import BrownianNoise, ImageNoise
from difftool.diffusion.path import Level
from difftool.diffusion.samplers import SAMPLERS, Sampler, Step
from difftool.errors import UsageError

if TYPE_CHECKING:
    from difftool.pipeline.model import Model


class Item(NamedTuple):
    """One picture to make. The items of a batch have the same kinds of pictures to go by."""

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    seed: int = 0
    init: Tensor | None = None
    """The picture to start from, or to edit; [C,H,W] in [-1, 1]."""
    mask: Tensor | None = None
    """Where it is repainted; [H,W], 1 = wholly, 0 = not at all."""
    image: Tensor | None = None
    """The picture to vary, as CLIP sees it; [3,S,S]."""


class Second(NamedTuple):
    """A model that takes over for the last steps (SDXL's refiner)."""

    model: Model
    settings: SampleConfig
    start: float = 0.8
    """The share of the path after which it does."""


class Plan(NamedTuple):
    """The levels that are visited."""

    levels: list[Level]
    sampler: Sampler
    second: list[Level]
    """Of the second model; empty without one."""

    @property
    def steps(self) -> int:
        """How many steps are run."""
        return len(self.levels) - 1 + max(len(self.second) - 1, 0)


def check_items(model: Model, item: Item) -> None:
    """UsageError for pictures that the model does not go by, or lacks."""
    kind, name = model.concat, model.name
    if kind == "other":
        raise UsageError(f"the model {name} ({model.preset.family}) cannot be sampled yet")
    if kind == "inpaint" and (item.init is None or item.mask is None):
        raise UsageError(f"the model {name} repaints pictures", hint="give --init and --mask")
    if kind == "edit" and (item.init is None or item.mask is not None):
        raise UsageError(f"the model {name} edits pictures", hint="give --init, and no --mask")
    if item.mask is not None and item.init is None:
        raise UsageError("--mask has nothing to mask", hint="give --init")
    if model.vision is not None and item.image is None:
        raise UsageError(f"the model {name} varies a picture", hint="give --image-prompt")
    if model.preset.family == "sd2-unclip" and model.vision is None:
        raise UsageError(f"the model {name} has no picture encoder that difftool can read")


def plan(
    model: Model, settings: SampleConfig, *, init: bool = False, second: Second | None = None
) -> Plan:
    """The levels of a run. init: it starts from a picture, which leaves out the first of them."""
    path, steps = model.denoiser.path, settings.steps
    levels = GRIDS[settings.schedule](path, steps, **settings.schedule_options)
    sampler = SAMPLERS[settings.sampler](path, **settings.sampler_options)
    # Whether steps are few is meant of the whole grid, not of the part that is run.
    if steps >= 15 and getattr(sampler, "taper", None) == "short":
        sampler = replace(sampler, taper="never")  # type: ignore[call-arg]
    if init and model.concat != "edit":
        run = min(int(steps * settings.strength), steps)
        if run < 1:
            why = f"{steps} steps times strength {settings.strength:g} is less than one step"
            raise UsageError("no step would be run", why, "give more --steps or --strength")
        levels = levels[steps - run :] if len(levels) == steps + 1 else levels[-run - 1 :]
    if second is None:
        return Plan(levels, sampler, [])
    other = GRIDS[second.settings.schedule](
        second.model.denoiser.path, second.settings.steps, **second.settings.schedule_options
    )
    cut = round(path.steps * (1 - second.start))
    first = sum(level.t >= cut for level in levels[:-1])
    rest = sum(level.t < cut for level in other[:-1])
    if not first or not rest or path.continuous:
        why = f"{first} steps before it and {rest} after it"
        raise UsageError(f"--refiner-start {second.start:g} does not divide the steps", why)
    if getattr(sampler, "taper", None) in ("short", "always"):
        sampler = replace(sampler, taper="never")  # type: ignore[call-arg]
    return Plan(levels[: first + 1], sampler, other[-rest - 1 :])


@torch.no_grad()
def generate(
    model: Model, items: Sequence[Item], settings: SampleConfig, second: Second | None = None
) -> Iterator[Step]:
    """x_t of a batch step by step; the last step's `.x` is x0 [B,C,H,W]."""
    check_items(model, items[0])
    init = items[0].init is not None
    levels, sampler, rest = plan(model, settings, init=init, second=second)
    codec, factor = model.codec, model.codec.factor
    shape = (codec.channels, *(side // factor for side in reversed(settings.size)))
    seeds = [item.seed for item in items]
    source = ImageNoise(seeds, shape, device=model.device)
    told = _variation(model, items, settings, source)
    conds = _conds(model, items, settings, told)
    pictures = _Pictures(model, items, settings, levels, source)
    denoise = _guided(model, settings, pictures.joined(conds, settings))
    sampler = replace(sampler, paste=pictures.paste)
    model.need("unet")
    numbers = count()
    x = pictures.x
    noise = source
    if sampler.brownian:
        noise = BrownianNoise(seeds, shape, [*levels, *rest], device=model.device)
    for step in sampler(denoise, x, levels, noise):
        x = step.x
        yield step._replace(index=next(numbers))
    if second is None:
        return
    other, chosen, _ = second
    conds = _conds(other, items, chosen, None)
    denoise = _guided(other, chosen, pictures.joined(conds, chosen))
    model.give_back()
    other.need("unet")
    sampler = replace(plan(other, chosen).sampler, paste=pictures.paste)
    for step in sampler(denoise, x, rest, noise):
        yield step._replace(index=next(numbers))
    other.give_back()


def _conds(
    model: Model, items: Sequence[Item], settings: SampleConfig, told: Tensor | None
) -> list[Cond]:
    """The condition and, with guidance, what it is to keep away from."""
    model.need("text")
    labels = [item.label for item in items]
    prompts = [item.prompt for item in items]
    conds = [
        model.cond(prompts, labels, settings.size, settings.guidance,
                   settings=settings, vector=told)
    ]  # fmt: skip
    if settings.guidance > 1 and not model.preset.unet.guidance_dim:
        none: list[int | None] = [None] * len(items)
        nothing = None if told is None else torch.zeros_like(told)
        conds.append(
            model.cond([item.negative for item in items], none, settings.size,
                       settings=settings, negative=True, vector=nothing)
        )  # fmt: skip
    return conds


def _guided(model: Model, settings: SampleConfig, conds: list[Cond]) -> Denoise:
    """The guided network; with three conditions the second has the picture without the prompt."""
    scale, image = settings.guidance, settings.image_guidance
    weights = {1: [1.0], 2: [scale, 1 - scale], 3: [scale, image - scale, 1 - image]}[len(conds)]
    follows = settings.rederive_eps
    return guided(
        model.denoiser,
        list(zip(conds, weights, strict=True)),
        rescale=settings.guidance_rescale,
        clip=None if settings.clip == "none" else settings.clip,
        interval=settings.guidance_interval,
        rederive_eps=SAMPLERS.resolve(settings.sampler) != "ddim" if follows is None else follows,
    )


def _variation(
    model: Model, items: Sequence[Item], settings: SampleConfig, source: ImageNoise
) -> Tensor | None:
    """The conditioning vector of pictures to vary; [B,2P]."""
    if model.vision is None or model.normalizer is None or model.vision_path is None:
        return None
    model.need("vision")
    images = torch.stack([item.image for item in items if item.image is not None])
    embeddings = model.vision(images.to(model.device, model.dtype)).float()
    noise = source.draw(embeddings.shape[1:])
    level = model.vision_path.level(settings.noise_level)
    return model.normalizer(embeddings, noise, level.alpha, level.sigma, settings.noise_level)


class _Pictures:
    """What is taken from the pictures of a batch: where x starts, what is joined to it and what is
    laid over it."""

    def __init__(
        self,
        model: Model,
        items: Sequence[Item],
        settings: SampleConfig,
        levels: list[Level],
        source: ImageNoise,
    ):
        self.concat: Tensor | None = None
        self.levels, self.known, self.mask = levels, None, None
        kind, codec, device = model.concat, model.codec, model.device
        first = levels[0]
        images = [item.init.to(device) for item in items if item.init is not None]
        masks = [item.mask.to(device) for item in items if item.mask is not None]
        image = torch.stack(images) if images else None
        known = None
        if image is not None:
            model.need("vae")
            if kind == "none" or (kind == "inpaint" and settings.strength < 1):
                known = codec.encode(image, source.draw())
        self.noise = source.draw()
        amplitude = {
            "unit": 1.0,
            "sigma": first.sigma,
            "hypot": (first.alpha**2 + first.sigma**2) ** 0.5,
        }[settings.start_noise]
        self.x = amplitude * self.noise
        if known is not None and not (masks and settings.strength == 1):
            self.x = first.mix(known, self.noise)
        if kind == "edit" and image is not None:
            self.concat = model.raw(codec.encode(image))
        if masks and image is not None:
            noise = source.draw()  # of the masked picture's latents, which not every model sees
            mask = torch.stack(masks)[:, None]
            small = F.interpolate(mask, size=self.x.shape[2:])
            if kind == "inpaint":
                hidden = codec.encode(image * (mask < 0.5), noise)
                self.concat = torch.cat([(small >= 0.5).float(), hidden], dim=1)
            else:
                self.known, self.mask = known, small

    def joined(self, conds: list[Cond], settings: SampleConfig) -> list[Cond]:
        """The conditions with what is joined to x. A picture to edit makes three of two: with both,
        with the picture, with neither."""
        if self.concat is None:
            return conds
        joined = [cond._replace(concat=self.concat) for cond in conds]
        if self.concat.shape[1] == self.x.shape[1] and len(conds) == 2:
            nothing = torch.zeros_like(self.concat)
            joined.append(conds[1]._replace(concat=nothing))
        return joined

    @property
    def paste(self):
        """Lays what is known over x, at any level."""
        return None if self.mask is None else self._paste

    def _paste(self, x: Tensor, level: Level) -> Tensor:
        assert self.known is not None and self.mask is not None
        last = level == self.levels[-1]
        known = self.known if last else level.mix(self.known, self.noise)
        return (1 - self.mask) * known + self.mask * x
