"""MATCHES: what other tools draw, round and schedule in their own way, as a row each. Torch-free.

A row is laid over the model's own settings, under whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from difftool.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Match:
    """A tool whose pictures are to be made again."""

    about: str
    settings: Mapping[str, Any]
    """Fields of SampleConfig."""
    on_gpu: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of a model on a GPU, where the tool draws on it too."""
    scheduler: str | None = None
    """How samplers are built: as k-diffusion's, whatever the model's scheduler says (None); from
    the model's scheduler (named); from it to the number of its class (exact)."""
    drops_penultimate: tuple[str, ...] = ()
    """Samplers whose grids lack the last level but one."""

    def of(self, gpu: bool) -> dict[str, Any]:
        """Its settings, where the model is on a GPU or not."""
        return {**self.settings, **(self.on_gpu if gpu else {})}

    def listed(self, asked: Mapping[str, Any], gpu: bool) -> str:
        """What it sets, in a line, and what stands otherwise because it was asked for."""
        settings = self.of(gpu)
        stand = {n: v for n in settings if (v := asked.get(n)) not in (None, settings[n])}
        parts = [_said(name, value) for name, value in settings.items() if name not in stand]
        parts += ["schedules of diffusers' classes"] if self.scheduler else []
        others = [_said(name, value) for name, value in stand.items()]
        return ", ".join(parts) + (f"; as asked for: {', '.join(others)}" if others else "")


def _said(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value}"


MATCHES: Registry[Match] = Registry("tool to match")

MATCHES.add(
    "a1111",
    Match(
        about="A1111's web interface on a GPU",
        settings={
            "rng": "gpu", "step_noise": "continued", "posterior": "mean", "start_noise": "sigma",
            "schedule": "automatic", "strength_rule": "a1111", "prompt_syntax": "a1111",
            "prompt_weighting": "a1111", "rounding": "down",
        },
        drops_penultimate=("dpm2", "dpm2_a"),
    ),
    "automatic1111", "webui",
)  # fmt: skip
MATCHES.add(
    "comfyui",
    Match(
        about="ComfyUI's KSampler and SaveImage",
        settings={
            "rng": "cpu", "step_noise": "comfyui", "posterior": "mean", "start_noise": "unit",
            "schedule": "normal", "strength_rule": "comfyui", "prompt_syntax": "comfy",
            "prompt_weighting": "comfy", "rounding": "down",
        },
        on_gpu={"step_noise": "comfyui-gpu"},
        drops_penultimate=("dpm2", "dpm2_a", "unipc", "unipc_bh2"),
    ),
    "comfy",
)  # fmt: skip
MATCHES.add(
    "diffusers",
    Match(
        about="diffusers' pipelines, given a generator of the CPU for each picture",
        settings={
            "rng": "cpu", "step_noise": "continued", "posterior": "drawn",
            "strength_rule": "diffusers", "prompt_syntax": "none", "prompt_weighting": "none",
            "rounding": "nearest",
        },
        scheduler="exact",
    ),
)  # fmt: skip
MATCHES.add(
    "invokeai",
    Match(
        about="InvokeAI, with noise of the CPU",
        settings={
            "rng": "cpu", "step_noise": "invokeai", "posterior": "mean",
            "strength_rule": "invokeai", "prompt_syntax": "compel", "prompt_weighting": "compel",
            "rounding": "nearest",
        },
        on_gpu={"step_noise": "invokeai-gpu"},
        scheduler="exact",
    ),
    "invoke",
)  # fmt: skip
