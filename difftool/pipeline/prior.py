"""What a prior says to prompts: the embeddings of pictures of them (DALL-E 2, 2204.06125)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from difftool.diffusion.denoiser import Cond
from difftool.diffusion.guidance import guided
from difftool.diffusion.noise import ImageNoise
from difftool.diffusion.path import Level
from difftool.networks.prior import PriorTransformer
from difftool.pipeline.condition import build_cond, context_lengths
from difftool.pipeline.model import Model
from difftool.pipeline.settings import SamplePlan, clip_of, rederives_eps, start_amplitude
from difftool.pipeline.texts import encode_prompts


def imagined(plan: SamplePlan, prompts: Sequence[str], noise: ImageNoise) -> Tensor:
    """The embeddings [B,P], fp32, of pictures of the prompts, guided away from an empty one.

    Prompts are read as they stand, whatever a syntax says of them. noise: of the pictures, whose
    generators go on.
    """
    model, network, settings = plan.model, plan.model.network, plan.settings
    assert isinstance(network, PriorTransformer)
    model.load_part("text")
    scale = max(settings.guidance, 1.0)
    terms = [(_told(model, prompts), scale)]
    if scale > 1:
        terms.append((_told(model, [""] * len(prompts)), 1 - scale))
    denoise = guided(
        model.denoiser, terms, clip=clip_of(settings), rederive_eps=rederives_eps(settings)
    )
    model.load_part("unet")
    noise = noise.shaped((network.config.in_channels, 1, 1))
    x = start_amplitude(settings, plan.levels[0]) * noise.draw()
    for levels in _stretches(plan):
        for step in plan.sampler(denoise, x, levels, noise):
            x = step.x
    embeddings = network.embeddings(x)
    model.unload()
    return embeddings


def _told(model: Model, prompts: Sequence[str]) -> Cond:
    texts, nothing = encode_prompts(model, prompts), [None] * len(prompts)
    length = context_lengths(model, prompts)
    return build_cond(model, texts, nothing, model.preset.sample.size, length=length)


def _stretches(plan: SamplePlan) -> list[Sequence[Level]]:
    """The levels, in pieces that are run one after the other."""
    if not plan.model.single_steps:
        return [plan.levels]
    path = plan.model.denoiser.path
    starts = plan.levels[:-1]
    return [(here, path.at_index(here.t - 1) if here.t else path.clean) for here in starts]
