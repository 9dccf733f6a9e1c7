"""From conditions and noise to x0: the core of sampling, the same for every family.

Everything random about a picture comes from its own seed, in the order of the reference pipelines:
an embedding's noise (unCLIP), image latents, start noise, masked-image latents, then the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from difftool.config.families import LOW_RES_PATH
from difftool.config.schema import SampleConfig
from difftool.devices import on_device
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.guidance import Denoise, guided
from difftool.diffusion.noise import BrownianNoise, ImageNoise, step_noise
from difftool.diffusion.path import Level, build_path
from difftool.diffusion.prediction import Prediction
from difftool.diffusion.samplers import Step
from difftool.engine.approximate import DeepFeatures, deep_features_kept, tokens_joined
from difftool.engine.tiles import enlarged_round, tiled
from difftool.errors import UsageError
from difftool.images.fit import to_pil, to_tensor
from difftool.networks.codecs import Codec
from difftool.pipeline.condition import Term, shape_of, terms_of
from difftool.pipeline.decode import decode
from difftool.pipeline.inputs import SampleInput, check_input
from difftool.pipeline.model import Model
from difftool.pipeline.prior import imagined
from difftool.pipeline.settings import SamplePlan, clip_of, rederives_eps, start_amplitude
from difftool.pipeline.upscale import UPSCALERS, upscaled
from difftool.pipeline.windows import in_windows

UNLIKE = 0x9E3779B97F4A7C15
"""By which the seed of a picture's other noise is made of its own."""


@torch.no_grad()
def generate(plan: SamplePlan, inputs: Sequence[SampleInput]) -> Iterator[Step]:
    """Pictures from pure noise, or from given ones, step by step; the last step's `.x` is x0
    [B,C,H,W].

    Everything random about a picture comes from its own seed, and its prompt is filled up to no
    other's length, so it is the same alone and in any batch. UsageError for pictures that the model
    does not go by, or lacks.
    """
    check_input(plan.model, inputs[0])
    x = torch.empty(0)
    for step in _grouped(plan, inputs):
        x = step.x
        yield step
    if plan.hires is not None:
        larger, first = _larger(plan, plan.hires, inputs, x), plan.steps - plan.hires.steps
        for step in _grouped(plan.hires, larger):
            yield step._replace(index=first + step.index)


def _larger(
    plan: SamplePlan, second: SamplePlan, inputs: Sequence[SampleInput], x0: Tensor
) -> list[SampleInput]:
    """What the second pass starts from: what the first made [B,c,h,w], made larger."""
    model, size, name = plan.model, second.settings.size, plan.settings.upscaler
    sides = size[1] // model.codec.factor, size[0] // model.codec.factor
    mode = UPSCALERS[name].latent if name in UPSCALERS else None
    tile = plan.settings.tile
    if mode is None:
        with tiled(model.codec, tile):
            images = decode(model, x0)
        pictures = [to_pil(each, plan.settings.rounding) for each in images]
        made = [to_tensor(upscaled(each, name, size, model.device, tile)) for each in pictures]
        return [i._replace(init=each) for i, each in zip(inputs, made, strict=True)]
    enlarge = partial(F.interpolate, mode=mode)
    if model.codec.learned:
        latents = enlarged_round(x0.float(), sides, tile, enlarge)
    else:  # whose channels may be neighbouring pixels
        images = enlarged_round(model.codec.decode(x0), (size[1], size[0]), tile, enlarge)
        latents = model.codec.encode(images)
    return [i._replace(init=None, latent=each) for i, each in zip(inputs, latents, strict=True)]


def _grouped(plan: SamplePlan, inputs: Sequence[SampleInput]) -> Iterator[Step]:
    """One pass, in groups of pictures whose prompts are of one shape."""
    groups: dict[object, list[int]] = {}
    for index, each in enumerate(inputs):
        shape = shape_of(plan.model, each, plan.settings, plan.evaluations)
        shape = index if plan.sampler.alone else shape
        groups.setdefault(shape, []).append(index)
    if len(groups) == 1:
        yield from _generate(plan, inputs)
        return
    places = [i for members in groups.values() for i in members]
    order = sorted(range(len(places)), key=places.__getitem__)
    at = on_device(order, plan.model.device)
    parts = [_generate(plan, [inputs[i] for i in members]) for members in groups.values()]
    for steps in zip(*parts, strict=True):
        x, x0 = (torch.cat([getattr(s, name) for s in steps])[at] for name in ("x", "x0"))
        yield steps[0]._replace(x=x, x0=x0)


def _generate(plan: SamplePlan, inputs: Sequence[SampleInput]) -> Iterator[Step]:
    """The same for pictures whose prompts are of one shape."""
    model, settings = plan.model, plan.settings
    codec, factor = model.codec, model.codec.factor
    shape = (codec.channels, *(side // factor for side in reversed(settings.size)))
    seeds = [each.seed for each in inputs]
    noise = ImageNoise(seeds, shape, model.device, settings.rng)
    vector = _variation(plan, inputs, noise)
    terms = terms_of(model, inputs, settings, vector, plan.evaluations, plan.sampler)
    pictures = _Pictures(plan, inputs, noise)
    unrest = ImageNoise([(seed * UNLIKE + 1) % 2**64 for seed in seeds], shape, model.device)
    x, numbers, evaluations = pictures.x, count(), count()
    if plan.sampler.brownian:
        levels = [*plan.levels, *(plan.refiner.levels if plan.refiner else ())]
        noise = BrownianNoise(seeds, shape, levels, model.device, settings.rng)
    else:
        noise = step_noise(noise, seeds, settings.step_noise, settings.ensd, settings.rng)
    for part in filter(None, (plan, plan.refiner)):
        if part is not plan:
            told = (part.settings, None, part.evaluations, part.sampler)
            terms = terms_of(part.model, inputs, *told)
            model.unload()
        denoise = _guided(part, terms, pictures, evaluations, unrest)
        part.model.load_part("unet")
        sampler = replace(part.sampler, paste=pictures.paste)
        for step in sampler(denoise, x, part.levels, noise):
            x, index = step.x, next(numbers)
            if settings.stop < 100 and index == plan.own_steps - 1:
                x = step.x0 if pictures.paste is None else pictures.paste(step.x0, step.level)
            yield step._replace(index=index, x=x)
    if plan.refiner is not None:
        plan.refiner.model.unload()


def _guided(
    plan: SamplePlan,
    terms: Sequence[Term],
    pictures: _Pictures,
    evaluations: Iterator[int],
    unrest: ImageNoise,
) -> Denoise:
    """The guided network, whose conditions may change with each of its evaluations; unrest: the
    noise of `chaos`."""
    settings, network = plan.settings, plan.model.network
    kept = DeepFeatures(settings.deepcache)
    weights, unguided = [term.weight for term in terms], [term.unguided for term in terms]
    if pictures.edits and len(terms) == 2:  # the second has the picture without the prompt
        scale, image = settings.guidance, settings.image_guidance
        weights, unguided = [scale, image - scale, 1 - image], [1.0, 0.0, 0.0]
    elif pictures.edits and len(terms) > 2:
        raise UsageError("AND does not go with a model that edits pictures", hint="one prompt")

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        evaluation = next(evaluations)
        conds = [term.at(evaluation) for term in terms]
        if share := settings.chaos / 100 * _unsettled(1 - evaluation / plan.evaluations):
            told = zip(terms, conds, strict=True)
            conds = [_noised(c, share, unrest) if term.wanted else c for term, c in told]
        conds = pictures.joined(conds)

        def of_part(part: Tensor, at: tuple[slice, slice]) -> Prediction:
            of_all = guided(
                plan.model.denoiser,
                [(_seen_at(c, at), weight) for c, weight in zip(conds, weights, strict=True)],
                rescale=settings.guidance_rescale,
                clip=clip_of(settings),
                interval=settings.guidance_interval,
                unguided=unguided,
                rederive_eps=rederives_eps(settings),
                cfg_pp=bool(plan.sampler.cfg_pp),
            )
            with tokens_joined(network, settings.tome, part.shape[2:], evaluation):
                return of_all(part, level)

        window = settings.window and settings.window // plan.model.codec.factor
        with tiled(network, settings.tile), deep_features_kept(network, kept, evaluation):
            return in_windows(of_part, x_t, window)

    return denoise


def _seen_at(cond: Cond, at: tuple[slice, slice]) -> Cond:
    """A condition of a part of the picture."""
    return cond if cond.concat is None else cond._replace(concat=cond.concat[:, :, *at])


def _unsettled(t: float) -> float:
    """The share of noise in a condition at t, which falls from 1 to 0: CADS' 1 - gamma, with its
    numbers for images of texts (2310.17347)."""
    return min(max((t - 0.6) / (0.9 - 0.6), 0.0), 1.0)


def _noised(cond: Cond, share: float, noise: ImageNoise) -> Cond:
    """A condition whose context is noise to that share of its variance, each picture's own."""
    if cond.context is None:
        return cond
    drawn = noise.draw(cond.context.shape[1:]).to(cond.context.dtype)
    spread = cond.context.std(dim=(1, 2), keepdim=True)
    return cond._replace(context=(1 - share) ** 0.5 * cond.context + share**0.5 * spread * drawn)


def _variation(plan: SamplePlan, inputs: Sequence[SampleInput], noise: ImageNoise) -> Tensor | None:
    """The conditioning vector of pictures to vary, given or of a prior's; [B,2P]."""
    model, number = plan.model, plan.settings.noise_level
    if model.normalizer is None or model.vision_path is None:
        return None
    if plan.prior is None:
        embeddings = _seen(model, inputs)
    else:
        embeddings = imagined(plan.prior, [each.prompt for each in inputs], noise)
    model.load_part("vision")
    drawn = noise.draw(embeddings.shape[1:])
    level = model.vision_path.level(number)
    return model.normalizer(embeddings, drawn, level.alpha, level.sigma, number)


def _seen(model: Model, inputs: Sequence[SampleInput]) -> Tensor:
    """The embeddings of the pictures that are given; [B,P]."""
    assert model.vision is not None
    model.load_part("vision")
    images = torch.stack([each.image for each in inputs if each.image is not None])
    return model.vision(images.to(model.device, model.dtype)).float()


def _posterior(settings: SampleConfig, noise: ImageNoise) -> Tensor | None:
    """The noise of a picture's latent; None = it is the mean."""
    return noise.draw() if settings.posterior == "drawn" else None


def _encoded(
    codec: Codec, image: Tensor, settings: SampleConfig, noise: Tensor | None = None
) -> Tensor:
    """x0 of pictures, whose borders may meet."""
    with tiled(codec, settings.tile):
        return codec.encode(image, noise)


def _others(
    settings: SampleConfig, inputs: Sequence[SampleInput], noise: ImageNoise
) -> ImageNoise | None:
    """The noise that start noise is turned to."""
    if not settings.vary:
        return None
    seeds = [each.seed if each.vary_seed is None else each.vary_seed for each in inputs]
    return ImageNoise(seeds, noise.shape, noise.device, settings.rng)


def _depth(given: SampleInput, sides: Sequence[int]) -> Tensor:
    """A map of depth as a network sees it: [1,1,h,w], its own range from -1 to 1."""
    assert given.depth is not None
    depth = F.interpolate(given.depth[None, None], size=tuple(sides), mode="bicubic")
    low, high = depth.amin(), depth.amax()
    if low == high:
        raise UsageError("the depth map is of one depth", hint="give one with near and far")
    return 2 * (depth - low) / (high - low) - 1


class _Pictures:
    """What is taken from the pictures of a batch: where x starts, what is joined to it and what is
    laid over it."""

    def __init__(self, plan: SamplePlan, inputs: Sequence[SampleInput], noise: ImageNoise):
        model, settings = plan.model, plan.settings
        self.concat: Tensor | None = None
        self.edits = False
        self.levels, self.known, self.mask = plan.levels, None, None
        kind, codec, device = model.concat, model.codec, model.device
        first = plan.levels[0]
        images = [each.init.to(device) for each in inputs if each.init is not None]
        masks = [each.mask.to(device) for each in inputs if each.mask is not None]
        image = torch.stack(images) if images else None
        latents = [each.latent.to(device) for each in inputs if each.latent is not None]
        known = torch.stack(latents) if latents else None
        self.label: Tensor | None = None
        if kind == "low_res" and image is not None:
            drawn = noise.draw(image.shape[1:])
            at = build_path(LOW_RES_PATH).level(settings.noise_level)
            self.concat = at.mix(image, drawn)
            self.label = torch.full((len(inputs),), settings.noise_level, device=device)
        elif image is not None:
            model.load_part("vae")
            if kind in ("none", "depth") or (kind == "inpaint" and settings.strength < 1):
                known = _encoded(codec, image, settings, _posterior(settings, noise))
        self.noise = noise.start(_others(settings, inputs, noise), settings.vary)
        self.x = start_amplitude(settings, first) * self.noise
        if known is not None and masks and settings.mask_content in ("noise", "nothing"):
            known = self._uncovered(known, torch.stack(masks), settings.mask_content)
        if known is not None and not (masks and settings.strength == 1):
            self.x = first.mix(known, self.noise)
        if kind == "depth":
            self.concat = torch.cat([_depth(i, self.x.shape[2:]) for i in inputs]).to(device)
        if kind == "edit" and image is not None:
            self.concat, self.edits = codec.raw(_encoded(codec, image, settings)), True
        if masks and image is not None:
            # Of the masked picture's latents, which not every model has.
            drawn = _posterior(settings, noise)
            mask = torch.stack(masks)[:, None]
            small = F.interpolate(mask, size=self.x.shape[2:])
            if kind == "inpaint":
                hidden = _encoded(codec, image * (mask < 0.5), settings, drawn)
                self.concat = torch.cat([(small >= 0.5).float(), hidden], dim=1)
            else:
                self.known, self.mask = known, small

    def _uncovered(self, known: Tensor, masks: Tensor, content: str) -> Tensor:
        """x0 with noise, or nothing, where it is masked for the most part [B,H,W], as in A1111."""
        hidden = F.interpolate(masks[:, None], size=known.shape[2:], mode="area").round()
        return (1 - hidden) * known + (hidden * self.noise if content == "noise" else 0.0)

    def joined(self, conds: list[Cond]) -> list[Cond]:
        """The conditions with what is joined to x. A picture to edit makes three of two: with both,
        with the picture, with neither."""
        if self.concat is None:
            return conds
        joined = [cond._replace(concat=self.concat) for cond in conds]
        if self.label is not None:
            joined = [cond._replace(label=self.label) for cond in joined]
        if self.edits and len(conds) == 2:
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
