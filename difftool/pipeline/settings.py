"""What is asked of a model, resolved once into the plan of its sampling.

    settings = resolve_settings(model, {"steps": 8, "guidance": 5.0})  # the rest: the model's own
    plan = plan_sampling(model, settings)                              # sampler and levels built
    for step in generate(plan, [SampleInput("a fox", seed=7)]): ...    # as many as plan.steps

The plan is carried to whatever makes, counts or describes pictures; nothing is resolved again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

from difftool.config.layers import merge
from difftool.config.schema import SampleConfig
from difftool.config.validate import check_sampling, to_values, validate
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.guidance import Clip, dynamic_threshold, static_threshold
from difftool.diffusion.path import Discrete, Level
from difftool.diffusion.samplers import SAMPLERS, Sampler, spelled
from difftool.engine.approximate import finest_attention
from difftool.engine.memory import free_memory
from difftool.errors import ResourceError, UsageError, clash
from difftool.formats.diffusers.scheduler_switch import switched
from difftool.networks.unet import UNet
from difftool.pipeline.matches import MATCHES, Match
from difftool.pipeline.model import Model
from difftool.pipeline.upscale import enlarged
from difftool.pipeline.weighting import WEIGHTINGS
from difftool.text.syntax import SYNTAXES


def _below(levels: Sequence[Level], strength: float, times: float) -> int:
    """Levels to step from whose times are in that share of all, which is whole in a table."""
    share = times * strength
    share = round(share) if isinstance(times, int) else share
    return sum(level.t < share for level in levels[:-1])


class StrengthRule(NamedTuple):
    """A row of STRENGTH_RULES."""

    run: Callable[[int, float, Sequence[Level], float], int]
    """(steps, strength, levels of the whole grid, how many times there are) -> steps that are
    run."""
    whole: Callable[[int, float], int] = lambda steps, strength: steps
    """(steps, strength) -> steps of the whole grid, of which the last ones are run."""


STRENGTH_RULES: Mapping[str, StrengthRule] = {
    "diffusers": StrengthRule(lambda steps, strength, *_: int(steps * strength)),
    "a1111": StrengthRule(lambda steps, strength, *_: int(min(strength, 0.999) * steps) + 1),
    "comfyui": StrengthRule(lambda steps, *_: steps, lambda steps, strength: int(steps / strength)),
    "invokeai": StrengthRule(lambda _, strength, levels, times: _below(levels, strength, times)),
}
"""How many steps a strength is; `SampleConfig.strength_rule` names one."""
FP32 = 4
LARGE = 512 * 512
"""Pixels of pictures that models are trained on in sides of multiples of 64."""


@dataclass(frozen=True)
class SamplePlan:
    """How pictures are made, all of it decided."""

    model: Model
    settings: SampleConfig
    sampler: Sampler
    levels: Sequence[Level]
    """That are visited, noisy to clean."""
    refiner: SamplePlan | None = None
    """Of a model that takes over for the last steps, where `levels` end."""
    hires: SamplePlan | None = None
    """The second pass, on what this one makes, made larger."""
    prior: SamplePlan | None = None
    """How the embedding of the picture is made that a model of text is told."""

    @property
    def steps(self) -> int:
        """How many steps are run: less than are asked for from a picture on."""
        others = filter(None, (self.refiner, self.hires))
        return self.own_steps + sum(other.steps for other in others)

    @property
    def own_steps(self) -> int:
        """Those of the model itself, in this pass."""
        return len(self.sampler.visits(self.levels)) - 1

    @property
    def evaluations(self) -> int:
        """How often the network is asked in all `settings.steps`, by which prompts that change with
        the step go, as A1111 counts them."""
        return self.sampler.evaluations(self.settings.steps)


class Refiner(NamedTuple):
    """A model that takes over for the last steps (SDXL's refiner)."""

    model: Model
    settings: SampleConfig
    start: float = 0.8
    """The share of the path after which it does."""


def resolve_settings(
    model: Model, asked: Mapping[str, Any] | None = None, match: str | None = None
) -> SampleConfig:
    """The model's sampling settings with those that are asked for, checked against the model.

    asked: fields of SampleConfig, and `width`, `height`; None, or absent, is the model's own. A
    sampler may be named with its schedule, as other tools do ("DPM++ 2M Karras"). match: another
    tool, whose numbers are wanted where it has its own. UsageError for what cannot be.
    """
    given = spelled({name: value for name, value in (asked or {}).items() if value is not None})
    width, height = given.get("size", model.preset.sample.size)
    given["size"] = (given.pop("width", width), given.pop("height", height))
    values = to_values(model.preset.sample)
    tool = None if match is None else MATCHES[match]
    follows = follows_scheduler(model) and (tool is None or tool.scheduler is not None)
    if follows and (tool or {"sampler", "schedule"} & given.keys()):
        names = (given.get("sampler"), given.get("schedule"))
        values |= switched(model.preset, *names, exact=tool is not None)
    if tool is not None:
        values |= _as_tool(tool, values | given, model.device.type != "cpu")
    settings = validate(SampleConfig, merge(values, given), "the sampling settings")
    SYNTAXES.resolve(settings.prompt_syntax)
    WEIGHTINGS.resolve(settings.prompt_weighting or SYNTAXES[settings.prompt_syntax].weighting)
    _check(model, settings)
    return settings


def _as_tool(tool: Match, values: Mapping[str, Any], gpu: bool) -> dict[str, Any]:
    """What a tool sets, for these values."""
    fields = tool.of(gpu)
    if tool.scheduler is not None:
        return fields
    fields = spelled({"sampler": values["sampler"], **fields})
    drops = SAMPLERS.resolve(values["sampler"]) in tool.drops_penultimate
    grid = {"drop_penultimate": True} if drops else {}
    return fields | {"sampler_options": {}, "schedule_options": grid, "rederive_eps": None}


def shaped(size: tuple[int, int], ratio: tuple[float, float], factor: int) -> tuple[int, int]:
    """The size of that shape with about as many pixels, of sides that the factor divides; of large
    pictures 64 does too, as in those that models are trained on."""
    pixels, (width, height) = size[0] * size[1], ratio
    step = factor * max(1, 64 // factor) if pixels >= LARGE else factor
    sides = (sqrt(pixels * width / height), sqrt(pixels * height / width))
    across, down = (max(step, round(side / step) * step) for side in sides)
    return across, down


def follows_scheduler(model: Model) -> bool:
    """Whether samplers are built from the model's scheduler, as diffusers builds them."""
    return bool(model.preset.scheduler) and isinstance(model.denoiser.path, Discrete)


def _check(model: Model, settings: SampleConfig) -> None:
    """UsageError for settings that the model cannot be sampled with."""
    factor = model.preset.side_multiple
    check_sampling(settings)
    if any(side < factor or side % factor for side in settings.size):
        size = "x".join(map(str, settings.size))
        nearest = "x".join(str(max(factor, round(s / factor) * factor)) for s in settings.size)
        why = f"sides must be multiples of {factor}"
        raise UsageError(f"size {size} does not fit this model", why, f"try {nearest}")
    if settings.window and settings.window % factor:
        nearest = max(factor, round(settings.window / factor) * factor)
        why = f"it must be a multiple of {factor}"
        raise UsageError(f"--window {settings.window} does not fit", why, f"try {nearest}")
    if settings.window and settings.tile != "none":
        raise clash("--window", "--tile")
    if settings.deepcache > 1 and not isinstance(model.network, UNet):
        why = "its network is no U-Net, which has deep features"
        raise UsageError(f"--deepcache does not fit the model {model.name}", why, "leave it out")
    if settings.tome and not finest_attention(model.network):
        why = "its network has no transformer in which tokens could join"
        raise UsageError(f"--tome does not fit the model {model.name}", why, "leave it out")
    if settings.guidance > 1 and not model.preset.unet.guidance_dim and not model.guidable:
        why = "it was trained without an empty caption or label to guide from"
        raise UsageError(f"the model {model.name} cannot be guided", why, "use --guidance 1")


def _check_memory(model: Model, settings: SampleConfig) -> None:
    """ResourceError where not one picture fits: where memory is promised before it is there, the
    process would be killed."""
    codec = model.preset.codec
    width, height = (min(side, settings.window or side) for side in settings.size)
    maps = model.preset.unet.kept(height // codec.factor, width // codec.factor)
    guided = settings.guidance not in (0, 1) and not model.preset.unet.guidance_dim
    needed = model.dtype.itemsize * maps * (2 if guided else 1)
    needed += FP32 * codec.channels * width * height
    free = free_memory(model.device)
    if free is not None and needed > free:
        what = f"there is no memory for a picture of {width}x{height}"
        why = f"it needs more than {needed >> 20:,} MiB, and {free >> 20:,} are free"
        raise ResourceError(what, why, "use a smaller --size")


def plan_sampling(
    model: Model,
    settings: SampleConfig,
    *,
    from_picture: bool = False,
    refiner: Refiner | None = None,
) -> SamplePlan:
    """The sampler and the levels of settings, built once.

    from_picture: a picture is started from, which leaves out the first levels (and does not where
    the model edits pictures). UsageError for options that sampler or schedule lack, and where no
    step would be run; ResourceError where there is no memory for a picture of that size.
    """
    plan = _plan_pass(model, settings, from_picture, refiner)
    return plan if settings.hires == 1 else replace(plan, hires=_plan_hires(model, settings))


def _plan_hires(model: Model, settings: SampleConfig) -> SamplePlan:
    """The second pass of settings."""
    if model.concat != "none":
        what = f"the model {model.name} draws in one pass"
        raise UsageError(what, "it goes by a picture of one size", "leave --hires out")
    second = replace(
        settings,
        size=enlarged(settings.size, settings.hires, model.preset.side_multiple),
        steps=settings.hires_steps or settings.steps,
        strength=settings.hires_strength,
        hires=1.0,
        stop=100,
    )
    return _plan_pass(model, second, from_picture=True)


def _plan_pass(
    model: Model,
    settings: SampleConfig,
    from_picture: bool = False,
    refiner: Refiner | None = None,
) -> SamplePlan:
    """The sampler and the levels of one pass."""
    _check_memory(model, settings)
    path, steps = model.denoiser.path, settings.steps
    sampler = SAMPLERS[settings.sampler](path, **settings.sampler_options)
    options = dict(settings.schedule_options)
    shortened = from_picture and model.concat not in ("edit", "low_res")
    if shortened and settings.schedule == "lcm" and model.preset.unet.guidance_dim:
        options["strength"], shortened = settings.strength, False  # all steps, on the cleaner part
    rule = STRENGTH_RULES[settings.strength_rule]
    whole = rule.whole(steps, settings.strength) if shortened else steps
    levels = GRIDS[settings.schedule](path, whole, **options)
    still = len(levels) == whole and options.get("end") == "first"
    if shortened:
        entries = path.t_max if path.continuous else path.steps
        run = min(rule.run(steps, settings.strength, levels, entries), whole)
        levels = levels[max(whole, len(levels) - 1) - run :]
        if len(levels) < 2:
            why = f"{steps} steps times strength {settings.strength:g} is less than one step"
            raise UsageError("no step would be run", why, "give more --steps or --strength")
    prior = _plan_prior(model, settings)
    if settings.stop < 100:
        if refiner is not None:
            raise UsageError("--stop does not go with --refiner", hint="leave one of them out")
        kept = max(1, (len(levels) - 1) * settings.stop // 100)
        cut = sampler.part_of(steps, last=kept == len(levels) - 1, still=still)
        return SamplePlan(model, settings, cut, levels[: kept + 1], prior=prior)
    if refiner is None:
        return SamplePlan(model, settings, sampler.part_of(steps, still=still), levels, prior=prior)
    taking_over = _plan_pass(refiner.model, refiner.settings)
    cut = round(path.steps * (1 - refiner.start))
    first = sum(level.t >= cut for level in levels[:-1])
    rest = sum(level.t < cut for level in taking_over.levels[:-1])
    if not first or not rest or path.continuous:
        why = f"{first} steps before it and {rest} after it"
        raise UsageError(f"--refiner-start {refiner.start:g} does not divide the steps", why)
    rest_of = SamplePlan(
        refiner.model, refiner.settings, taking_over.sampler, taking_over.levels[-rest - 1 :]
    )
    whole = sampler.part_of(steps, last=False)
    return SamplePlan(model, settings, whole, levels[: first + 1], rest_of, prior=prior)


def clip_of(settings: SampleConfig) -> Clip | None:
    """What becomes of a predicted x0."""
    bound = {} if settings.clip_range is None else {"largest": settings.clip_range}
    return {
        "none": None,
        "static": partial(static_threshold, **bound),
        "dynamic": partial(dynamic_threshold, quantile=settings.clip_quantile, **bound),
    }[settings.clip]


def start_amplitude(settings: SampleConfig, first: Level) -> float:
    """Deviation of the noise that is started from, at the first level."""
    return {
        "unit": 1.0,
        "sigma": first.sigma,
        "hypot": (first.alpha**2 + first.sigma**2) ** 0.5,
    }[settings.start_noise]


def rederives_eps(settings: SampleConfig) -> bool:
    """Whether eps follows a clipped x0: where nothing is said of it, but for ddim."""
    follows = settings.rederive_eps
    return SAMPLERS.resolve(settings.sampler) != "ddim" if follows is None else follows


def _plan_prior(model: Model, settings: SampleConfig) -> SamplePlan | None:
    """How its prior is sampled: as the settings say, else as its own do."""
    if model.prior is None:
        return None
    asked = {"steps": settings.prior_steps, "guidance": settings.prior_guidance}
    return plan_sampling(model.prior, resolve_settings(model.prior, asked))
