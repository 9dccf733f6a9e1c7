"""The mathematics of diffusion, in three equations. Torch-free at import.

    x_t = alpha x0 + sigma eps                                    where between data and noise
    F   = p x0 + q eps                                            what the network outputs
    x_s = alpha_s x0 + sqrt(sigma_s^2 - kappa^2) eps + kappa z    one step, kappa = fresh noise

A `Level` (t, alpha, sigma) is a point of a noise `Path`. Variance-preserving tables, rectified flow
and EDM differ in how alpha and sigma run and in nothing else. Written with alpha and sigma, never
with their quotient, nothing divides by zero where alpha = 0, so that zero terminal SNR and flow at
t = 1 need no constants.

The pair (p, q) is the training target and, inverted, the way from an output to x0 and eps
(`recover`). A sampler sees x0, eps and levels, and knows nothing of targets, guidance or text.

kappa tells the first-order samplers apart: 0 is DDIM and Euler, the posterior's deviation is DDPM
and Euler ancestral, sigma_s is LCM. The others put a better mean over the step for x0 or eps.

Units: images and x0 in [-1, 1], or latents scaled to about unit variance; alpha and sigma have
none; t in the path's own (table index, 0 to 1, or sigma). Images are [B,C,H,W]. Levels are Python
floats when sampling and [B,1,1,1] tensors when training; all of it is fp32, whatever the network's
dtype.
"""

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, Level, Path, build_path
from difftool.diffusion.prediction import TARGETS, Prediction, recover
from difftool.diffusion.samplers import SAMPLERS, Sampler, Step, transition

__all__ = [
    "GRIDS",
    "PATHS",
    "SAMPLERS",
    "TARGETS",
    "Level",
    "Path",
    "Prediction",
    "Sampler",
    "Step",
    "build_path",
    "recover",
    "transition",
]
