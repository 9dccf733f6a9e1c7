"""Levels of a noise path as numbers: evenly chosen, in decibels, as rows of a table. Torch-free."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from difftool.diffusion.path import Edm, Flow, Level, Path
from difftool.errors import UsageError

COLUMNS: tuple[str, ...] = ("index", "t", "alpha", "sigma", "log_snr")
LevelRow = dict[str, Any]
"""Values by COLUMNS, and by the names of what else is known of a level."""


def even_levels(path: Path, count: int | None = None) -> list[Level]:
    """Levels from clean to noisy, evenly in the path's training time: its t, on EDM log sigma.

    On a table they are its nearest entries. Without a count: all of the table, about 1000 others.
    """
    if isinstance(path, Flow):
        return [path.level(path.shifted(t)) for t in _spaced(1.0, count or path.steps + 1)]
    if count is not None and count > path.steps and not path.continuous:
        raise UsageError("more levels than the noise path has", f"{count}, it has {path.steps}")
    indices = _spaced(path.steps - 1, count or path.steps)
    return [path.at_index(index if path.continuous else round(index)) for index in indices]


def _spaced(last: float, count: int) -> Iterator[float]:
    return (last * k / max(count - 1, 1) for k in range(count))


def log_snr(level: Level) -> float:
    """log(alpha^2 / sigma^2): natural logarithm, infinite at the ends of the path."""
    return 2 * level.half_log_snr


def decibels(level: Level) -> float:
    """The same in dB."""
    return 10 * log_snr(level) / math.log(10)


def signal_share(level: Level) -> float:
    """The signal's share of the variance, alpha^2 / (alpha^2 + sigma^2), in [0, 1]."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def psnr(rmse: float) -> float:
    """Peak signal-to-noise ratio in dB of an error in [-1, 1], whose peak is 2."""
    return 20 * math.log10(2 / rmse) if rmse else math.inf


# --- as rows ---------------------------------------------------------------------------------


def rows(levels: Iterable[Level], errors: Sequence[float] = ()) -> list[LevelRow]:
    """The levels as rows of COLUMNS, log_snr natural; with a prediction's errors rmse and psnr."""
    table: list[LevelRow] = [
        dict(zip(COLUMNS, (index, level.t, level.alpha, level.sigma, log_snr(level)), strict=True))
        for index, level in enumerate(levels)
    ]
    for row, rmse in zip(table, errors, strict=False):
        row |= {"rmse": rmse, "psnr": psnr(rmse)}
    return table


def finite(rows: Iterable[LevelRow]) -> list[LevelRow]:
    """Rows for JSON, which has no infinity: it is null there."""
    return [{key: None if _infinite(value) else value for key, value in r.items()} for r in rows]


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def csv_text(rows: Sequence[LevelRow]) -> str:
    """Rows as CSV with a header line; infinities are written inf and -inf."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(levels: Iterable[Level], bars: bool = False) -> list[str]:
    """Lines of a readable table; `bars` adds the signal's share of the variance as a bar."""
    head = f"{'index':>5}  {'t':>9}  {'alpha':>9}  {'sigma':>9}  {'log_snr':>8}  {'SNR dB':>7}"
    lines = [head + ("  signal" if bars else "")]
    for index, level in enumerate(levels):
        line = (
            f"{index:>5}  {short(level.t):>9}  {level.alpha:>9.6f}  {level.sigma:>9.6f}"
            f"  {log_snr(level):>8.3f}  {decibels(level):>7.2f}"
        )
        lines.append(line + (f"  {_bar(signal_share(level))}" if bars else ""))
    return lines


def _bar(share: float, width: int = 24) -> str:
    full, eighths = divmod(round(share * width * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


TOLD = {
    "pixels": "bits a dimension, of {} values of 256, dequantised by noise at log SNR {:.2f}",
    "latents": "bits a dimension of {} latents, as a density at log SNR {:.2f}: below 0 it may be, "
    "and comparable where autoencoder and level are the same",
}
"""What a likelihood is of."""


def likelihood_table(
    rows: Iterable[LevelRow], facts: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Lines of a readable table of where bits go, from `rows` of levels, clean to noisy: log SNR,
    by the bound, by the ODE."""
    bound, flow = facts["bound"], facts["flow"]
    lines = [("log SNR", "variational bound", "probability-flow ODE")]
    if facts["of"] == "pixels":
        lines.append(("pixels of z", f"{bound['data']:.4f}", "the same"))
    else:
        lines.append(("noise of z", typeset(bound["data"], 4), "the same"))
    for row in rows:
        ends = f"{typeset(row['log_snr_low'])} to {typeset(row['log_snr_high'])}"
        lines.append((ends, _bits(row, ""), _bits(row, "flow_")))
    lines.append(("beyond", typeset(bound["prior"], 4), typeset(flow["prior"], 4)))
    by_bound, by_flow = (f"{typeset(e['bits'], 3)} ± {e['error']:.3f}" for e in (bound, flow))
    lines.append(("in all", by_bound, by_flow))
    if tight := facts["tight"]:
        less = f"{typeset(tight['bits'], 3)} ± {tight['error']:.3f}"
        lines.append(("less slack", less, by_flow))
    return lines


def likelihood_words(facts: Mapping[str, Any]) -> list[str]:
    """What the numbers are of, and how far the two agree."""
    apart, error = facts["difference"], facts["difference_error"]
    lines = [TOLD[facts["of"]].format(facts["dimensions"], facts["log_snr"])]
    words = f"bound less ODE: {typeset(apart, 3)} ± {error:.3f}"
    if tight := facts["tight"]:
        slack = facts["bound"]["bits"] - tight["bits"]
        lines.append(f"{words}; slack of the bound: {typeset(slack, 3)} ± {tight['error']:.3f}")
        apart, error = (
            tight["bits"] - facts["flow"]["bits"],
            math.hypot(tight["error"], facts["flow"]["error"]),
        )
        words = f"bound without slack less ODE: {typeset(apart, 3)} ± {error:.3f}"
    if abs(apart) > 2 * error:
        words += ", more than by chance: the network's noise is not quite that of a density"
    return [*lines, words]


def _bits(row: LevelRow, which: str) -> str:
    return f"{typeset(row[f'{which}bits'], 4)} ± {row[f'{which}bits_error']:.4f}"


# --- in words --------------------------------------------------------------------------------


def short(t: float) -> str:
    """A time in about three digits."""
    return f"{t:.0f}" if abs(t) >= 1000 else f"{t:.3g}"


def typeset(value: float, digits: int = 1) -> str:
    """A number with a proper minus and infinity."""
    text = "∞" if math.isinf(value) else f"{abs(value):.{digits}f}"
    return ("−" if value < 0 and text.strip("0.") else "") + text


def brief(text: str, most: int = 60) -> str:
    """A user's words, cut to fit on a figure."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def describe(path: Path) -> str:
    """What a path is, in a few words."""
    if isinstance(path, Edm):
        return f"𝜎 from {path.sigma_min:g} to {path.sigma_max:g}"
    if isinstance(path, Flow):
        return "rectified flow" + (f", shift {path.shift:g}" if path.shift != 1 else "")
    return f"{path.steps} steps"


def terminal(path: Path) -> str:
    """How much of the picture is left at the noisy end."""
    return f"terminal SNR {typeset(decibels(path.level(path.t_max)))} dB"
