"""Writes k_diffusion.safetensors: what k-diffusion 0.1.1 computes, for tests/test_samplers.py.

    pip install --no-deps --target /tmp/kd k-diffusion==0.1.1.post1 torchsde==0.2.6 trampoline
    PYTHONPATH=/tmp/kd python tests/golden/make_k_diffusion.py

Needs torch, numpy, scipy, tqdm and safetensors too. Only k_diffusion/sampling.py is loaded: the
rest of the package wants torchvision and others that sampling does not use, so its `utils` is
replaced by the one function that sampling.py calls, and torchdiffeq, which it imports for the
log-likelihood, by an empty module.

The file holds the start x, the noises z in the order of drawing, the sigmas of each path, x after
each step of each case (fp64, in k-diffusion's units), and increments of Brownian trees (fp32).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def load_sampling() -> Any:
    package = importlib.util.find_spec("k_diffusion")
    assert package and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    stubs: dict[str, dict[str, Any]] = {
        "torchdiffeq": {"odeint": None},
        "k_diffusion": {"__path__": [str(folder)]},
        "k_diffusion.utils": {"append_dims": lambda x, n: x[(...,) + (None,) * (n - x.ndim)]},
    }
    for name, values in stubs.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values)
    vars(sys.modules["k_diffusion"])["utils"] = sys.modules["k_diffusion.utils"]
    return importlib.import_module("k_diffusion.sampling")


K: Any = load_sampling()


def network(x: Tensor, t: float) -> Tensor:
    return 0.95 * torch.tanh(0.9 * x + math.sin(t / 100))


# --- denoisers: x in k-diffusion's units, sigma -> x0 -------------------------------------------

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
BAR = np.cumprod(1 - BETAS)
LOG_RHO = np.log((1 - BAR) / BAR) / 2


def sd15_eps(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma[0])
    t = float(np.interp(math.log(s), LOG_RHO, np.arange(1000)))
    return x - s * network(x / math.sqrt(1 + s * s), t)


def sd15_v(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma[0])
    t = float(np.interp(math.log(s), LOG_RHO, np.arange(1000)))
    a = 1 / math.sqrt(1 + s * s)
    return a * (a * x) - s * a * network(a * x, t)


def edm(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma[0])
    r = math.sqrt(s * s + 0.25)
    return 0.25 / r**2 * x + 0.5 * s / r * network(x / r, math.log(s) / 4)


def flow_rho(x: Tensor, sigma: Tensor) -> Tensor:
    """A flow model in the units x / alpha, sigma = rho."""
    t = float(sigma[0] / (1 + sigma[0]))
    return x * (1 - t) - t * network(x * (1 - t), 1000 * t)


def flow(x: Tensor, sigma: Tensor) -> Tensor:
    """A flow model in its own units, sigma = t, as SD3's reference code samples it."""
    t = float(sigma[0])
    return x - t * network(x, 1000 * t)


STEPS = 7
TIMES = torch.linspace(0.999, 0.02, STEPS, dtype=torch.float64)


def ended(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])


def karras(hi: float, lo: float) -> Tensor:
    share = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    return ended((hi ** (1 / 7) + share * (lo ** (1 / 7) - hi ** (1 / 7))) ** 7)


TABLE = karras(math.exp(LOG_RHO[-1]), math.exp(LOG_RHO[0]))
PATHS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "sd15_eps": (sd15_eps, TABLE),
    "sd15_v": (sd15_v, TABLE),
    "edm": (edm, karras(80.0, 0.002)),
    "flow_rho": (flow_rho, ended(TIMES / (1 - TIMES))),
    "flow": (flow, ended(torch.linspace(1, 0.02, STEPS, dtype=torch.float64))),
}

CHURN = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "euler_churn": ("euler", CHURN),
    "euler_a": ("euler_ancestral", {}),
    "euler_a_0.6": ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    "heun": ("heun", {}),
    "heun_churn": ("heun", CHURN),
    "dpm2": ("dpm_2", {}),
    "dpm2_churn": ("dpm_2", CHURN),
    "dpm2_a": ("dpm_2_ancestral", {}),
    "dpm2_a_0.5": ("dpm_2_ancestral", {"eta": 0.5}),
    "lms": ("lms", {}),
    "lms_2": ("lms", {"order": 2}),
    "dpmpp_2s_a": ("dpmpp_2s_ancestral", {}),
    "dpmpp_2s_a_0.5": ("dpmpp_2s_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    "dpmpp_2s": ("dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_sde_0.5": ("dpmpp_sde", {"eta": 0.5, "r": 0.4}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_0.5": ("dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde_0.3": ("dpmpp_3m_sde", {"eta": 0.3}),
    "dpmpp_3m_sde_0": ("dpmpp_3m_sde", {"eta": 0.0}),
}
ON_FLOW = ("euler", "heun", "lms", "dpmpp_2m")
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"dpm_fast-{n}": ("dpm_fast", {"n": n}) for n in (1, 2, 6, 7, 8)},
    "dpm_fast-7-eta": ("dpm_fast", {"n": 7, "eta": 0.7, "s_noise": 0.9}),
    "dpm_adaptive-5": ("dpm_adaptive", {}),
    "dpm_adaptive-5-order": (
        "dpm_adaptive",
        {"order": 2, "rtol": 0.02, "atol": 0.01, "h_init": 0.4, "accept_safety": 0.9},
    ),
    "dpm_adaptive-5-pid": ("dpm_adaptive", {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1}),
    "dpm_adaptive-5-eta": ("dpm_adaptive", {"eta": 0.5, "h_init": 0.3, "rtol": 0.2}),
}
"""Those that choose their own steps between the ends of a grid."""
SHAPE = (2, 1, 3, 3)


def run(path: str, case: str, start: Tensor, z: Tensor) -> Tensor:
    denoise, sigmas = PATHS[path]
    name, options = CASES[case]
    draws = iter(z)
    if name not in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m"):
        options = options | {"noise_sampler": lambda *_: next(draws)}
    torch.randn_like = lambda x: next(draws)  # type: ignore[assignment]
    seen: list[Tensor] = []
    x = K.__dict__[f"sample_{name}"](
        lambda x, sigma: denoise(x, sigma),
        start * sigmas[0],
        sigmas,
        callback=lambda state: seen.append(state["x"]),
        disable=True,
        **options,
    )
    # With churn, the callback sees x after noise was put back: only the end is comparable.
    return torch.stack([x] if "s_churn" in options else [*seen[1:], x])


def run_own(path: str, case: str, start: Tensor, z: Tensor) -> Tensor:
    """x at the last sigma that is not 0."""
    denoise, sigmas = PATHS[path]
    name, options = OWN[case]
    draws = iter(z.repeat(8, 1, 1, 1, 1))
    torch.set_default_dtype(torch.float64)  # of its times and bounds
    x = K.__dict__[f"sample_{name}"](
        lambda x, sigma: denoise(x, sigma),
        start * sigmas[0],
        sigma_min=sigmas[-2],
        sigma_max=sigmas[0],
        disable=True,
        noise_sampler=lambda *_: next(draws),
        **options,
    )
    torch.set_default_dtype(torch.float32)
    return x


def brownian() -> dict[str, Tensor]:
    """Increments down a grid, over the two stages of a step, and out of order."""
    sigmas = torch.tensor([14.6146412, 7.0, 3.0, 2.9999, 1.0, 0.3, 0.0291672])
    pairs = [(i, i + 1) for i in range(6)] + [(3, 5), (0, 1), (0, 6), (2, 5)]
    found: dict[str, Tensor] = {"brownian/sigmas": sigmas, "brownian/pairs": torch.tensor(pairs)}
    seeds: dict[str, int | list[int]] = {"single": 5, "each": [7, 2**40 + 1]}
    for name, seed in seeds.items():
        lo, hi = sigmas.min(), sigmas.max()
        source = K.BrownianTreeNoiseSampler(torch.zeros(SHAPE), lo, hi, seed)
        found[f"brownian/{name}"] = torch.stack([source(sigmas[i], sigmas[j]) for i, j in pairs])
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    z = torch.randn((2 * STEPS, *SHAPE), dtype=torch.float64, generator=generator)
    tensors = {"x": start, "z": z, **brownian()}
    for path, (_, sigmas) in PATHS.items():
        tensors[f"{path}/sigmas"] = sigmas.clone()
        for case in ON_FLOW if path == "flow" else CASES:
            tensors[f"{path}/{case}"] = run(path, case, start, z)
        for case in OWN if path != "flow" else ():
            if (path, case) != ("edm", "dpm_fast-7-eta"):  # where a root of -0 gives NaN
                tensors[f"{path}/own/{case}"] = run_own(path, case, start, z)
    odd = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    assert not odd, odd
    save_file(tensors, Path(__file__).with_name("k_diffusion.safetensors"))


if __name__ == "__main__":
    main()
