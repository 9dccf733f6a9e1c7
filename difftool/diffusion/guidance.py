"""Guidance and thresholding: Denoiser -> Denoise, all that a sampler ever sees. Torch-free.

Every target is affine in F with x_t fixed, so a weighted sum of F guides alike in eps, x0, v and
flow. Classifier-free guidance is the terms [(cond, g), (uncond, 1 - g)].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from difftool.diffusion.path import Level
from difftool.diffusion.prediction import Prediction, recover

if TYPE_CHECKING:
    from torch import Tensor

    from difftool.diffusion.denoiser import Cond, Denoiser

Denoise = Callable[["Tensor", Level], Prediction]
"""x_t [B,C,H,W] and its level -> x0 and eps."""
Clip = Callable[["Tensor"], "Tensor"]
"""x0 [B,C,H,W] -> x0 within bounds."""
GuidanceWeight = float | Callable[[Level], float]


def guided(
    denoiser: Denoiser,
    terms: Sequence[tuple[Cond, GuidanceWeight]],
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    unguided: Sequence[float] | None = None,
    clip: Clip | None = None,
    rederive_eps: bool = False,
    cfg_pp: bool = False,
) -> Denoise:
    """The sum of weight * F over the terms, their weights adding up to 1.

    rescale: share phi of the guided output's deviation that is set back to the first term's.
    interval: log SNR range outside of which the terms have the weights `unguided` (2404.07724);
    None = the first one counts alone.
    clip: what becomes of x0 once it is predicted: `static_threshold`, `dynamic_threshold`.
    rederive_eps: whether eps follows the clipped x0, so that both still mix to x_t.
    cfg_pp: whether eps is the last term's, and x0 alone is guided (2406.08070).
    """

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        weights = [float(w(level) if callable(w) else w) for _, w in terms]
        apart = cfg_pp
        if interval and not interval[0] <= 2 * level.half_log_snr <= interval[1]:
            weights = list(unguided or [1.0] + [0.0] * (len(terms) - 1))
            apart = False
        used = [k for k, w in enumerate(weights) if w or (apart and k == len(terms) - 1)]
        outputs = _outputs(denoiser, x_t, level, [terms[k][0] for k in used])
        output = outputs[0] * weights[used[0]]
        for k, term in zip(used[1:], outputs[1:], strict=True):
            output = output + weights[k] * term if weights[k] else output
        if rescale and len(used) > 1 and used[0] == 0:
            output = output * (rescale * _std(outputs[0]) / _std(output) + 1 - rescale)
        x0, eps = recover(x_t.float(), output, level, denoiser.target)
        if clip:
            x0 = clip(x0)
            if rederive_eps:
                eps = (x_t.float() - level.alpha * x0) / level.sigma
        if apart:
            eps = recover(x_t.float(), outputs[-1], level, denoiser.target).eps
        return Prediction(x0, eps)

    return denoise


def static_threshold(x0: Tensor, largest: float = 1.0) -> Tensor:
    """x0 clamped to [-largest, largest]."""
    return x0.clamp(-largest, largest)


def dynamic_threshold(x0: Tensor, quantile: float = 0.995, largest: float = float("inf")) -> Tensor:
    """x0 clamped to its own quantile s of |x0|, image by image, and divided by it where s > 1
    (Imagen 2205.11487)."""
    import torch

    s = torch.stack([image.abs().quantile(quantile) for image in x0])  # torch limits one call
    s = s.clamp(1, largest).view(-1, 1, 1, 1)
    return x0.clamp(-s, s) / s


def _std(output: Tensor) -> Tensor:
    """Unbiased deviation of each image over C, H, W (2305.08891, section 3.4); [B,1,1,1]."""
    return output.std(dim=(1, 2, 3), keepdim=True)


def _outputs(denoiser: Denoiser, x_t: Tensor, level: Level, conds: Sequence[Cond]) -> list[Tensor]:
    """F for each condition; those of equal shapes share one call, in order, at any batch size."""
    groups: dict[object, list[int]] = {}
    for k, cond in enumerate(conds):
        shapes = tuple(None if field is None else field.shape for field in cond)
        groups.setdefault(shapes, []).append(k)
    outputs: dict[int, Tensor] = {}
    for members in groups.values():
        joined = _join([conds[k] for k in members])
        repeated = x_t.repeat(len(members), 1, 1, 1)
        outputs.update(zip(members, denoiser(repeated, level, joined).split(len(x_t)), strict=True))
    return [outputs[k] for k in range(len(conds))]


def _join(conds: Sequence[Cond]) -> Cond:
    """Conditions of equal shapes, one batch after the other."""
    import torch

    fields = zip(*conds, strict=True)
    return type(conds[0])(*(None if f[0] is None else torch.cat(f) for f in fields))
