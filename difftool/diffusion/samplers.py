"""The samplers by name, and by the names that other tools give them. Torch-free at import.

A method is a row of SAMPLERS: one of the loops of `solvers`, its numbers, and which of them a
user may change. Where a published method is only less exact than it could be, the row has the
published numbers and an option for the exact ones; where it is broken, it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.multisteps import (
    Ancestral,
    ErSde,
    GradientEstimation,
    IpndmV,
    SaSolver,
    er_sde,
)
from difftool.diffusion.path import Path
from difftool.diffusion.solvers import (
    Consistency,
    Ddpm,
    FirstOrder,
    Multistep,
    Noise,
    Pndm,
    Sampler,
    Singlestep,
    Step,
    ThreeStage,
    TwoStage,
    UniPC,
    adams,
    full,
    posterior,
    rectified,
    reverse_sde,
    tcd,
    transition,
)
from difftool.diffusion.stages import DpmAdaptive, DpmFast, HeunPlus, Restart
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry, canonical

__all__ = [
    "SAMPLERS",
    "Method",
    "Noise",
    "Sampler",
    "Step",
    "guides_apart",
    "spelled",
    "split_spelling",
    "transition",
]

# --- options ----------------------------------------------------------------------------------


class Range(NamedTuple):
    """An option that is a number within bounds."""

    low: float
    high: float
    infinite: bool = False

    def read(self, name: str, value: Any) -> Mapping[str, Any] | None:
        right = _is_number(value) and self.low <= value <= self.high
        right = right and (self.infinite or math.isfinite(value))
        return {name: value} if right else None

    def hint(self, value: Any) -> str:
        ends = f"from {self.low:g} to {self.high:g}" if self.high < math.inf else f">= {self.low:g}"
        return f"give a number {ends}"


class OneOf(NamedTuple):
    """An option that is one of some values; or of some names, each for values of fields."""

    values: tuple[Any, ...]
    fields: Mapping[str, Mapping[str, Any]] = {}

    def read(self, name: str, value: Any) -> Mapping[str, Any] | None:
        found = {self._text(v): v for v in self.values}.get(self._text(value))
        return None if found is None else self.fields.get(str(found), {name: found})

    def hint(self, value: Any) -> str:
        return suggestion(str(value), [self._text(v) for v in self.values])

    @staticmethod
    def _text(value: Any) -> str:
        return f"{value:g}" if _is_number(value) else str(value).lower()


class StepNumbers(NamedTuple):
    """An option that is a list of numbers of steps."""

    def read(self, name: str, value: Any) -> Mapping[str, Any] | None:
        right = isinstance(value, list | tuple) and all(type(i) is int and i >= 0 for i in value)
        return {name: tuple(value)} if right else None

    def hint(self, value: Any) -> str:
        return "give a list of step numbers; the first is 0"


SamplerOption = Range | OneOf | StepNumbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_of(*values: Any) -> OneOf:
    """An option that sets the field of its name."""
    return OneOf(values)


def variants(**fields: Mapping[str, Any]) -> OneOf:
    """An option whose values stand for those of other fields."""
    return OneOf(tuple(fields), fields)


RENAMED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "taper": ("lower_order_final", {}),
    "pair": ("solver_type", {"half": "midpoint", "exact": "heun"}),
    "variant": ("solver_type", {}),
    "third": ("d2_scale", {}),
    "corrector_off": ("disable_corrector", {}),
    "boundary": ("boundary_scalings", {}),
}
"""Options as older versions spelled them: today's name, and values that have another one."""


@dataclass(frozen=True)
class Method:
    """A row of SAMPLERS: called with a path and options, it makes the sampler."""

    name: str
    about: str
    loop: type[Sampler]
    numbers: Mapping[str, Any]
    """Fields of the loop that are not at their defaults."""
    options: Mapping[str, SamplerOption]
    """What a user may change."""
    a1111: str | None = None
    """A1111's name of it; None = it has none."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {name: self._default(name, option) for name, option in self.options.items()}

    def _default(self, name: str, option: SamplerOption) -> Any:
        if isinstance(option, OneOf) and option.fields:
            numbers = self.numbers.items()
            return next(v for v, fields in option.fields.items() if fields.items() <= numbers)
        return self.numbers.get(name, getattr(self.loop, name))

    def _current(self, name: str, value: Any) -> tuple[str, Any]:
        """An option in today's words, which older presets and pictures do not have."""
        new, values = RENAMED.get(name, (name, {}))
        if name in self.options or new not in self.options:
            return name, value
        return new, values.get(value, value) if isinstance(value, str) else value

    def __call__(self, path: Path, **options: Any) -> Sampler:
        numbers = dict(self.numbers)
        for name, value in options.items():
            numbers |= self._read(name, value)
        return self.loop(path=path, **numbers)

    def _read(self, name: str, value: Any) -> Mapping[str, Any]:
        """The fields that an option sets; UsageError if it cannot be."""
        name, value = self._current(name, value)
        refuse(f"{self.name} {name} {value}")
        if name not in self.options:
            what = f'sampler "{self.name}" has no option "{name}"'
            raise UsageError(what, hint=suggestion(name, self.options) if self.options else None)
        fields = self.options[name].read(name, value)
        if fields is None:
            what = f'sampler "{self.name}" has a wrong option'
            raise UsageError(what, f"{name} = {value!r}", self.options[name].hint(value))
        return fields


# --- the rows ---------------------------------------------------------------------------------

REFUSED = {
    "sde-dpmsolver": "as published it does not preserve the variance; use sde-dpmsolver++",
    "dpm++2mv2": "its steps do not go from one noise level to the next; dpmpp_2m is the nearest",
    "dpmpp_2m_sde order 3": "published with a wrong sign in diffusers; dpmpp_3m_sde is that method",
}
"""Published methods that do not do what they say, and what to take instead."""


def refuse(name: str) -> None:
    """UsageError for a method, or "method option value", that is known to be broken."""
    for broken, why in REFUSED.items():
        if canonical(name) in (canonical(broken), f"k{canonical(broken)}"):
            raise UsageError(f'"{name}" is not offered', why)


class Samplers(Registry[Method]):
    """The methods by name and by the names that other tools give them."""

    def resolve(self, name: str) -> str:
        refuse(name)
        return super().resolve(name)


SAMPLERS = Samplers("sampler")


def _row(
    name: str,
    loop: type[Sampler],
    about: str,
    spellings: str,
    options: Mapping[str, SamplerOption],
    a1111: str | None = None,
    **numbers: Any,
) -> None:
    names = (name, *spellings.split())
    method = Method(name, about, loop, numbers, options, a1111)
    SAMPLERS.add(name, method, *names, *(f"k_{spelling}" for spelling in names))


ANY = Range(0.0, math.inf)
NOISE: dict[str, SamplerOption] = {"eta": ANY, "s_noise": ANY}
BROWNIAN: dict[str, SamplerOption] = NOISE | {"brownian": one_of(True, False)}
CHURN: dict[str, SamplerOption] = dict.fromkeys(("s_churn", "s_tmin", "s_noise"), ANY)
CHURN["s_tmax"] = Range(0.0, math.inf, infinite=True)
ORDER: dict[str, SamplerOption] = {"order": one_of(1, 2, 3, 4)}
SOLVER_TYPE: dict[str, SamplerOption] = {"solver_type": one_of("midpoint", "heun")}
D2_SCALE: dict[str, SamplerOption] = {"d2_scale": one_of(0.5, 1.0)}
FINAL: dict[str, SamplerOption] = {"lower_order_final": one_of("never", "final", "short", "always")}
SINGLE: dict[str, SamplerOption] = SOLVER_TYPE | {
    "order": one_of(1, 2, 3),
    "lower_order_final": one_of("never", "always"),
}
CLOCK: dict[str, SamplerOption] = {"clock": one_of("lam", "log_sigma")}
UNIPC: dict[str, SamplerOption] = FINAL | {
    "order": one_of(1, 2, 3),
    "solver_type": variants(bh1={"solver_type": "bh1"}, bh2={"solver_type": "midpoint"}),
    "target": one_of("x0", "eps"),
    "disable_corrector": StepNumbers(),
}

ADAMS: dict[str, SamplerOption] = {"eta": ANY, "s_noise": ANY} | {
    "order": one_of(1, 2, 3, 4),
    "corrector_order": one_of(0, 1, 2, 3, 4),
    "solver_type": one_of("heun", "bh1"),
    "tau_at": one_of("there", "here"),
    "lower_order_final": one_of("never", "always", "clean"),
    "tau_start": Range(0.0, 1.0),
    "tau_end": Range(0.0, 1.0),
}
ESTIMATE: dict[str, SamplerOption] = {
    "ge_gamma": ANY,
    "variable": variants(rho={"target": "eps"}, t={"target": "flow"}),
}
PHI: dict[str, SamplerOption] = {
    "solver_type": variants(phi_1={"solver_type": "midpoint"}, phi_2={"solver_type": "heun"})
}
CONTROL: dict[str, SamplerOption] = dict.fromkeys(("rtol", "h_init"), Range(1e-6, 1e3))
CONTROL |= dict.fromkeys(("atol", "pcoeff", "icoeff", "dcoeff"), ANY)
CONTROL |= {"accept_safety": Range(0.0, 1.0), "order": one_of(2, 3)}

# fmt: off
# First order: kappa alone.
_row("ddim", FirstOrder, "DDIM; eta = 1 is DDPM", "DDIMScheduler DDIMParallelScheduler",
     {"eta": ANY}, kappa=posterior, eta=0.0, a1111="DDIM")
_row("ddpm", Ddpm, "DDPM", "DDPMScheduler DDPMParallelScheduler",
     {"variance": one_of("small", "large")}, kappa=posterior)
_row("euler", FirstOrder, "Euler, with churn if asked; without it the same as DDIM",
     "EulerDiscreteScheduler EDMEulerScheduler FlowMatchEulerDiscreteScheduler", CHURN,
     a1111="Euler")
_row("euler_a", FirstOrder, "Euler ancestral", "euler_ancestral EulerAncestralDiscreteScheduler",
     NOISE, kappa=posterior, a1111="Euler a")
_row("euler_a_rf", FirstOrder, "Euler ancestral of rectified flows",
     "euler_ancestral_rf LTXEulerAncestralRFScheduler", NOISE, kappa=rectified)
_row("lcm", Consistency, "latent consistency models", "LCMScheduler FlowMatchLCMScheduler",
     {"boundary_scalings": one_of(True, False), "timestep_scaling": ANY, "s_noise": ANY},
     kappa=full, a1111="LCM")
_row("tcd", FirstOrder, "trajectory consistency distillation, eta its gamma", "TCDScheduler",
     {"eta": Range(0.0, 1.0)}, kappa=tcd, eta=0.3)

# The same of CFG++: x0 is guided, eps is not.
_row("ddim_cfg_pp", FirstOrder, "DDIM of CFG++; a guidance of 12.5 counts as 1", "ddim_cfgpp",
     {"eta": ANY}, kappa=posterior, eta=0.0, cfg_pp="x0", guidance_unit=12.5, a1111="DDIM CFG++")
_row("euler_cfg_pp", FirstOrder, "Euler of CFG++, with guidance from 0 to 1 or a little more", "",
     CHURN, cfg_pp="x0")
_row("euler_a_cfg_pp", FirstOrder, "Euler ancestral of CFG++", "euler_ancestral_cfg_pp",
     NOISE, kappa=posterior, cfg_pp="x0")

# Several steps, x0 in lam.
_row("dpmpp_2m", Multistep, "DPM-Solver++(2M)",
     "dpmsolver++ DPMSolverMultistepScheduler EDMDPMSolverMultistepScheduler",
     SOLVER_TYPE | CLOCK | FINAL | {"order": one_of(1, 2)},
     order=2, solver_type="midpoint", lower_order_final="short", a1111="DPM++ 2M")
_row("dpmpp_3m", Multistep,
     "DPM-Solver++(3M); published: of second order, d2_scale = 1: of third", "",
     SOLVER_TYPE | D2_SCALE | CLOCK | FINAL,
     order=3, solver_type="midpoint", d2_scale=0.5, lower_order_final="short")
_row("dpmpp_2m_sde", Multistep, "DPM-Solver++(2M) of the reverse SDE",
     "dpmpp_2m_sde_bt dpmpp_2m_sde_gpu sde-dpmsolver++",
     BROWNIAN | SOLVER_TYPE | FINAL | {"order": one_of(1, 2)},
     order=2, solver_type="midpoint", kappa=reverse_sde, brownian=True, lower_order_final="short",
     a1111="DPM++ 2M SDE")
_row("dpmpp_2m_sde_heun", Multistep, "dpmpp_2m_sde with the exact first moment",
     "dpmpp_2m_sde_heun_gpu", BROWNIAN | FINAL,
     order=2, kappa=reverse_sde, brownian=True, lower_order_final="short",
     a1111="DPM++ 2M SDE Heun")
_row("dpmpp_3m_sde", Multistep, "DPM-Solver++(3M) of the reverse SDE", "dpmpp_3m_sde_gpu",
     BROWNIAN | D2_SCALE,
     order=3, d2_scale=0.5, kappa=reverse_sde, brownian=True, a1111="DPM++ 3M SDE")
_row("dpmpp_2m_cfg_pp", Multistep, "DPM-Solver++(2M) of CFG++, as in ComfyUI", "", CLOCK,
     order=2, solver_type="midpoint", cfg_pp="eps", guided_node=True)
_row("res_multistep", Ancestral, "RES, a DPM-Solver++(2M) with the exact first moment", "",
     CLOCK, order=2)
_row("res_multistep_a", Ancestral, "RES ancestral", "res_multistep_ancestral",
     NOISE, order=2, kappa=posterior)
_row("res_multistep_cfg_pp", Ancestral, "RES of CFG++, as in ComfyUI", "",
     CLOCK, order=2, cfg_pp="eps")
_row("res_multistep_a_cfg_pp", Ancestral, "RES ancestral of CFG++, as in ComfyUI",
     "res_multistep_ancestral_cfg_pp", NOISE, order=2, kappa=posterior, cfg_pp="eps")
_row("er_sde", ErSde, "ER-SDE, an SDE that renews its noise faster near the clean end", "",
     {"order": one_of(1, 2, 3), "s_noise": ANY}, order=3, kappa=er_sde)
_row("sa_solver", SaSolver, "SA-Solver, an Adams predictor and corrector of an SDE (ComfyUI's)", "",
     ADAMS, kappa=adams, order=3)
_row("sa_solver_pece", SaSolver, "sa_solver whose network is asked again after the corrector", "",
     ADAMS, kappa=adams, order=3, pece=True)
_row("sa_solver_bh1", SaSolver, "SA-Solver, of order 2 as in diffusers", "SASolverScheduler",
     ADAMS, kappa=adams, order=2, corrector_order=2, solver_type="bh1", lower_order_final="always",
     tau_at="here", tau_start=199 / 999, tau_end=799 / 999, draws_always=True)
_row("unipc", UniPC, "UniPC, B1 as in A1111 and ComfyUI", "uni_pc",
     UNIPC, order=3, solver_type="bh1", lower_order_final="always", a1111="UniPC")
_row("unipc_bh2", UniPC, "UniPC, B2 as in diffusers", "uni_pc_bh2 UniPCMultistepScheduler",
     UNIPC, order=3, solver_type="midpoint", lower_order_final="always")

# Several steps, eps.
_row("dpm_solver", Multistep, "DPM-Solver, of order 2 (2M) or 3", "dpmsolver",
     SOLVER_TYPE | D2_SCALE | FINAL | {"order": one_of(1, 2, 3)},
     target="eps", order=2, solver_type="midpoint", d2_scale=0.5, lower_order_final="short")
_row("deis", Multistep, "DEIS, a polynomial in log rho, rho or DEIS's own time (tab)",
     "DEISMultistepScheduler", ORDER | FINAL | {"variant": variants(
         log_rho={"clock": "lam"}, rho={"clock": "rho"}, tab={"clock": "vp"})},
     target="eps", order=2, clock="lam", lower_order_final="short")
_row("lms", Multistep, "linear multistep in rho, or in t = sigma / (alpha + sigma)",
     "LMSDiscreteScheduler", ORDER | {"variable": variants(
         rho={"target": "eps", "clock": "rho"}, t={"target": "flow", "clock": "t"})},
     target="eps", order=4, clock="rho", a1111="LMS")
_row("ipndm", Multistep, "Adams-Bashforth in the number of the step", "IPNDMScheduler",
     ORDER, target="eps", order=4, clock="index")
_row("ipndm_v", IpndmV, "the same over the lengths of steps, as published; lms is exact", "",
     ORDER | FINAL | {"weights": one_of("published", "exact")},
     target="eps", order=4, clock="rho", lower_order_final="final")
_row("gradient_estimation", GradientEstimation, "Euler along the way that eps changes",
     "", ESTIMATE, target="eps", order=2)
_row("gradient_estimation_cfg_pp", GradientEstimation, "gradient_estimation of CFG++", "",
     ESTIMATE, target="eps", order=2, cfg_pp="x0")
_row("plms", Pndm, "PNDM, begun by Heun or Runge-Kutta; target: the network's own",
     "pndm PNDMScheduler",
     {"target": one_of("eps", "v", "x0", "flow"), "start": one_of("heun", "runge_kutta")},
     target="eps", order=4, clock="index", a1111="PLMS")

# Several steps that end a run, and begin the next one afresh.
_row("dpmpp_single", Singlestep, "DPM-Solver++ in runs of up to `order` steps of the grid",
     "dpmsingle DPMSolverSinglestepScheduler", SINGLE,
     order=2, solver_type="midpoint", lower_order_final="always")
_row("dpmpp_single_sde", Singlestep, "dpmpp_single of the reverse SDE", "", SINGLE | NOISE,
     order=2, solver_type="midpoint", lower_order_final="always", kappa=reverse_sde)
_row("dpm_solver_single", Singlestep, "DPM-Solver in runs of up to `order` steps of the grid",
     "", SINGLE, target="eps", order=2, solver_type="midpoint", lower_order_final="always")

# Two stages.
_row("heun", TwoStage, "Heun in rho (EDM, with churn if asked), or in t = sigma / (alpha + sigma)",
     "HeunDiscreteScheduler FlowMatchHeunDiscreteScheduler", CHURN | {"variable": variants(
         rho={"target": "eps"}, t={"target": "flow"})}, target="eps", r=1.0, a1111="Heun")
_row("dpm2", TwoStage, "DPM-Solver-2, with churn if asked", "dpm_2 KDPM2DiscreteScheduler",
     CHURN, target="eps", a1111="DPM2")
_row("dpm2_a", TwoStage, "DPM-Solver-2 ancestral",
     "dpm_2_a dpm_2_ancestral KDPM2AncestralDiscreteScheduler",
     NOISE, target="eps", kappa=posterior, a1111="DPM2 a")
_row("dpmpp_2s", TwoStage, "DPM-Solver++(2S)", "", {})
_row("dpmpp_2s_a", TwoStage, "DPM-Solver++(2S) ancestral", "dpmpp_2s_ancestral",
     NOISE, kappa=posterior, a1111="DPM++ 2S a")
_row("dpmpp_sde", TwoStage, "DPM-Solver++ with fresh noise in both stages",
     "dpmpp_sde_gpu DPMSolverSDEScheduler", BROWNIAN | {"r": Range(0.01, 1.0)},
     kappa=posterior, noisy_stage=True, brownian=True, a1111="DPM++ SDE")
_row("dpmpp_2s_a_cfg_pp", TwoStage, "DPM-Solver++(2S) ancestral of CFG++",
     "dpmpp_2s_ancestral_cfg_pp", NOISE, kappa=posterior, cfg_pp="x0")
_row("res_2s", TwoStage, "RES of two stages, a dpmpp_2s with the exact first moment", "",
     NOISE, kappa=posterior, eta=0.0, solver_type="heun")
_row("exp_heun_2_x0", TwoStage, "Heun in lam on x0", "exp_heun_2", PHI, r=1.0, solver_type="heun")
_row("exp_heun_2_x0_sde", TwoStage, "Heun in lam on x0, of the reverse SDE", "exp_heun_2_sde",
     NOISE | PHI, r=1.0, solver_type="heun", kappa=reverse_sde, noisy_stage=True,
     shared_noise=True)
_row("seeds_2", TwoStage, "SEEDS-2, of the reverse SDE", "", NOISE | PHI | {"r": Range(0.01, 1.0)},
     solver_type="midpoint", kappa=reverse_sde, noisy_stage=True, shared_noise=True)
_row("restart", Restart, "Heun, and from 20 steps on a part of the path again",
     "", {"s_noise": ANY}, target="eps", r=1.0, a1111="Restart")

# Three stages, or one to three.
_row("seeds_3", ThreeStage, "SEEDS-3, of the reverse SDE", "",
     NOISE | dict.fromkeys(("r_1", "r_2"), Range(0.01, 1.0)),
     kappa=reverse_sde, noisy_stage=True, shared_noise=True)
_row("heunpp2", HeunPlus, "Heun++, which looks two steps ahead", "heunpp", CHURN | {
     "variable": variants(rho={"target": "eps"}, t={"target": "flow"})}, target="eps")
_row("dpm_fast", DpmFast, "DPM-Solver-3 on a grid of its own, with --steps evaluations", "",
     NOISE, target="eps", eta=0.0, a1111="DPM fast")
_row("dpm_adaptive", DpmAdaptive, "DPM-Solver of orders 2 and 3, in steps as long as they may be",
     "dpm_ad", NOISE | CONTROL, target="eps", eta=0.0, a1111="DPM adaptive")
# fmt: on


for names, hint in (
    ("res_2m res_3m res res_solver RES", "res_multistep is RES of two steps, res_2s of two stages"),
    ("res_3s res_5s res_6s res_8s", "res_2s and seeds_3 have two and three stages"),
    ("deis_2m deis_3m deis_4m", "deis, with --set sample.sampler_options.order=3"),
    ("rk4 rk4_4s rk45 dopri5 ode bosh3 fehlberg2 midpoint ralston_2s",
     "heun has two evaluations a step, dpm_adaptive steps as long as they may be"),
    ("euler_max euler_dy euler_smea_dy euler_negative euler_dy_negative kohaku_lonyu_yog "
     "euler_smea Extended_Reverse-Time_SDE nai_smea", "euler and euler_a are the nearest"),
    ("dpmpp_2m_alt DPM++_2M_alt DPM++_2M_Sharp dpmpp_dualmodel", "dpmpp_2m is the nearest"),
    ("clyb_4m_sde_momentumized ttm ttmjvp", "dpmpp_3m_sde is the nearest"),
    ("k-diffusion k_diffusion kdiffusion", "--list samplers has all of them"),
    ("CosineDPMSolverMultistepScheduler", "dpmpp_2m_sde is that method"),
    ("CogVideoXDPMScheduler CogVideoXDDIMScheduler", "dpmpp_2m_sde and ddim are these methods"),
    ("KarrasVeScheduler", "euler or heun, with --set sample.sampler_options.s_churn=40"),
    ("ScoreSdeVeScheduler ScoreSdeVpScheduler", "euler_a and ddpm are the nearest"),
    ("CMStochasticIterativeScheduler", "lcm is the sampler of consistency models"),
    ("UnCLIPScheduler", "ddpm is that method"),
    ("RePaintScheduler", "--init and --mask repaint, with any sampler"),
    ("DDIMInverseScheduler DPMSolverMultistepInverseScheduler",
     "these make noise of a picture; --init starts from one"),
    ("ConsistencyDecoderScheduler VQDiffusionScheduler AmusedScheduler DDPMWuerstchenScheduler "
     "HeliosScheduler", "its models are not read"),
):  # fmt: skip
    SAMPLERS.answer(names, hint)


def guides_apart(name: str) -> bool:
    """Whether a sampler is of CFG++, in which guidance moves x0 alone, at scales from 0 on."""
    return name in SAMPLERS and bool(SAMPLERS[name].numbers.get("cfg_pp"))


def split_spelling(name: str) -> tuple[str, str | None]:
    """Sampler and schedule of a name such as "DPM++ 2M Karras"; the latter None if not named."""
    if name in SAMPLERS:
        return SAMPLERS.resolve(name), None
    suffixes = {canonical(each): own for own in GRIDS for each in (own, *GRIDS.aliases(own))}
    for suffix, schedule in (suffixes | SUFFIXES).items():
        stem = canonical(name).removesuffix(suffix)
        if stem != canonical(name) and stem in SAMPLERS:
            return SAMPLERS.resolve(stem), schedule
    return SAMPLERS.resolve(name), None


def spelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a sampler's name, such as "DPM++ 2M Karras", taken apart; a schedule beside it
    wins. "Automatic" is the schedule that A1111 gives that sampler, without one the model's own."""
    sampler, schedule, implied = settings.get("sampler"), settings.get("schedule"), None
    if sampler is not None:
        sampler, implied = split_spelling(sampler)
    if schedule is not None and canonical(schedule) == "automatic":
        schedule = implied or (None if sampler is None else AUTOMATIC.get(sampler, "normal"))
    elif schedule is not None:
        schedule = GRIDS.resolve(schedule)
    named = {"sampler": sampler, "schedule": schedule or implied}
    rest = {name: value for name, value in settings.items() if name not in named}
    return rest | {name: value for name, value in named.items() if value is not None}


AUTOMATIC = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "karras"),
    "restart": "karras",
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential"),
    **dict.fromkeys(("ddim", "ddim_cfg_pp", "plms"), "ddim_uniform"),
    "lcm": "lcm",
}
"""What A1111's schedule "Automatic" is; of its other samplers it is "normal"."""
SUFFIXES = {"k": "karras", "ka": "karras", "exp": "exponential"}
"""Of InvokeAI and A1111."""
