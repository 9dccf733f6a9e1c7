"""What a run measures: the lines of its metrics.jsonl, and what they give reason to worry about.
Torch-free.

metrics.jsonl holds a JSON object a line, in the order of steps, each with "step" (the optimiser
steps done). What else it has says what it is:

    "loss", "grad_norm", "lr"    means since the last such line, and the learning rate of the step;
                                 beside them the terms of the loss under their names ("pixels",
                                 "structure", "kl", "critic", "fooling"; "right", a share)
    "levels"                     the mean loss in each bin of LEVELS, from the noisiest; null = none
    a key of METRICS             what is measured whenever samples are shown

Lines are a function of the configuration and the data alone: a resumed run writes the same ones.
But where no interval is set, the first measure comes after a while as well as after a step.

A metric of samples is a row in METRICS, which has it read, reported and judged, and its function in
run.previews.MEASURES. A term of the loss is what an objective returns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LEVELS = tuple(range(-12, 13, 2))
"""Inner edges of the bins of log SNR = log(alpha^2 / sigma^2) by which a loss is told apart."""
STEP_KEYS = ("step", "loss", "grad_norm", "lr", "levels")
"""Keys of what is measured in steps, beside the terms of the loss."""
RISE, PATIENCE = 1.05, 3
"""Overfitting: this much above the best validation loss, this many measures in a row."""
CAST, CONTRAST = 0.1, 1.6
"""Colours are far off where a mean is off by more than this (of a range of 2) and by more than
chance, or a deviation by more than this factor."""


class Metrics:
    """The lines of a metrics.jsonl by what they say."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self.lines = lines

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """The whole lines of the file."""
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # half a line, written as the process was killed
        return cls(lines)

    def of(self, key: str) -> list[dict[str, Any]]:
        """The lines that have a key, in order."""
        return [line for line in self.lines if key in line]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The lines of the loss."""
        return self.of("loss")

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The lines of held-out pictures."""
        return self.of("validation")

    @cached_property
    def colours(self) -> list[dict[str, Any]]:
        """The lines of the samples' colours."""
        return self.of("colours")

    def terms(self) -> list[str]:
        """What the loss is made of."""
        known = {*STEP_KEYS, *(metric.key for metric in METRICS)}
        return [key for key in self.training[-1] if key not in known] if self.training else []

    @property
    def compared(self) -> str:
        """By which of their measures training and held-out pictures are compared: the loss, unless
        a discriminator, which only learns from the former, has a say in it."""
        return "pixels" if "critic" in self.terms() else "loss"

    def training_at_validation(self) -> list[float]:
        """For each line of held-out pictures the same measure of the training pictures, its mean
        over the time before."""
        means, last = [], 0
        for line in self.validation:
            span = [x[self.compared] for x in self.training if last < x["step"] <= line["step"]]
            means.append(sum(span) / len(span) if span else float("nan"))
            last = line["step"]
        return means

    def scores(self) -> list[float]:
        """For each line of held-out pictures the mean logarithm of their loss by noise level, so
        that each counts alike; of the loss where it has no levels."""
        found = []
        for line in self.validation:
            measure = line["validation"]
            values = [value for value in measure.get("levels") or () if value]
            values = values or [measure[self.compared]]
            found.append(sum(math.log(max(value, 1e-12)) for value in values) / len(values))
        return found

    @property
    def best(self) -> int | None:
        """The step whose score is the lowest; None where nothing was held out."""
        scores = self.scores()
        if not scores:
            return None
        return self.validation[scores.index(min(scores))]["step"]

    @property
    def worse(self) -> bool:
        """Whether PATIENCE measures in a row are above the best one."""
        scores = self.scores()
        return bool(scores) and len(scores) - 1 - scores.index(min(scores)) >= PATIENCE

    def warnings(self, steps: int) -> dict[str, str]:
        """What the metrics of a run of that many steps give reason to worry about, by key."""
        judged = {m.key: m.worry(self, steps) for m in METRICS if m.worry and self.of(m.key)}
        return {key: words for key, words in judged.items() if words}


@dataclass(frozen=True)
class Metric:
    """What is measured whenever samples are shown."""

    key: str
    """Of its lines in metrics.jsonl."""
    about: str
    """What its value is."""
    summary: Callable[[Metrics], tuple[str, str]] | None = None
    """Its name and last value in words, for the head of a report."""
    worry: Callable[[Metrics, int], str | None] | None = None
    """What is wrong with it in a run of so many steps, in words; None if nothing is."""


# --- held-out pictures -----------------------------------------------------------------------


def overfits(validation: Sequence[float], training: Sequence[float]) -> bool:
    """Whether what is held out gets worse while what is learned still gets better.

    Both are losses at the same measures, in order.
    """
    if len(validation) <= PATIENCE:
        return False
    best = min(range(len(validation)), key=validation.__getitem__)
    since = validation[best + 1 :]
    worse = len(since) >= PATIENCE and min(since[-PATIENCE:]) > RISE * validation[best]
    return worse and training[-1] < training[best]


def _validation(metrics: Metrics) -> tuple[str, str]:
    value = metrics.validation[-1]["validation"][metrics.compared]
    return f"{metrics.compared}, held out", f"{value:.4f}"


def _bits(metrics: Metrics) -> tuple[str, str]:
    bits = metrics.of("bits")[-1]["bits"]
    return (
        f"bits a dimension of {bits['of']}, held out",
        f"{bits['mean']:.3f} ± {bits['error']:.3f}",
    )


def _evaluation(metrics: Metrics) -> tuple[str, str]:
    found = metrics.of("evaluation")[-1]["evaluation"]
    return f"Frechet distance, {found['features']}", f"{found['frechet']:.2f}, {found['made']} made"


def _overfitting(metrics: Metrics, steps: int) -> str | None:
    held = [line["validation"][metrics.compared] for line in metrics.validation]
    if not overfits(held, metrics.training_at_validation()):
        return None
    best = min(range(len(held)), key=held.__getitem__)
    return (
        f"the loss on held-out pictures was lowest at step {metrics.validation[best]['step']} and "
        "has risen since, while that on training pictures falls: the model learns the pictures by "
        "heart"
    )


# --- colours ---------------------------------------------------------------------------------


def cast(
    samples: Mapping[str, Sequence[float]], data: Mapping[str, Sequence[float]], count: int
) -> str | None:
    """What is wrong with the colours of `count` samples, in words; None if nothing is."""
    names, wrong = ("red", "green", "blue"), []
    off = [made - real for made, real in zip(samples["mean"], data["mean"], strict=True)]
    far = [abs(d) > max(CAST, 3 * s / count**0.5) for d, s in zip(off, data["spread"], strict=True)]
    if all(far) and (min(off) > 0 or max(off) < 0):
        shift = sum(off) / len(off)
        wrong.append(f"{'lighter' if shift > 0 else 'darker'} (by {abs(shift):.2f} of 2)")
    else:
        channels = zip(names, off, far, strict=True)
        wrong += [
            f"{'more' if d > 0 else 'less'} {name} ({d:+.2f})" for name, d, f in channels if f
        ]
    made, real = (sum(values) / len(values) for values in (samples["std"], data["std"]))
    if not real / CONTRAST <= made <= real * CONTRAST:
        wrong.append(f"{'more' if made > real else 'less'} varied ({made:.2f}, data {real:.2f})")
    return f"samples are {', '.join(wrong)} than the data" if wrong else None


def _colour_cast(metrics: Metrics, steps: int) -> str | None:
    last = metrics.colours[-1]
    if 2 * last["step"] <= steps:  # early samples are grey
        return None
    colours = last["colours"]
    return cast(colours["samples"], colours["data"], colours["count"])


# --- the rows --------------------------------------------------------------------------------


def _psnr(metrics: Metrics) -> tuple[str, str]:
    return "reconstruction", f"{metrics.of('psnr')[-1]['psnr']:.1f} dB"


METRICS = (
    Metric(
        "validation",
        'loss, its terms and "levels" of held-out pictures, with the averaged weights',
        _validation,
        _overfitting,
    ),
    Metric(
        "bits",
        '"mean" of bits per dimension of held-out pictures by the variational bound, its standard '
        '"error", "of" pixels or of latents, whose bits are a density\'s',
        _bits,
    ),
    Metric(
        "colours",
        '"samples" and "data", each the "mean" and "std" of red, green and blue, of the sample '
        "sheet and of the pictures it should resemble, in [-1, 1]",
        worry=_colour_cast,
    ),
    Metric(
        "evaluation",
        "how near samples of the finished model are to the reference of --evaluate, as "
        "`sample --evaluate` prints it",
        _evaluation,
    ),
    Metric("psnr", "mean of the sheet's reconstructions, in dB", _psnr),
)
