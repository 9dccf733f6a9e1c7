"""report.html: all that a run shows, on one page that needs nothing else; and its plot, loss.png.

It is made from the files of the run folder alone (config.yaml, run.json, metrics.jsonl, samples/),
so it can be made again at any time.
"""

from __future__ import annotations

import base64
import html
import io
import json
import shlex
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from difftool.config.schema import RECIPES, Part, Preset
from difftool.config.validate import build_preset
from difftool.images.pages import colours, filled
from difftool.images.read import read_image
from difftool.storage import runs
from difftool.storage.commit import write_whole
from difftool.storage.yaml import parse_yaml
from difftool.training.metrics import METRICS, Metrics
from difftool.training.report.plots import CHANNELS, VARIABLES, colour_figure, loss_figure, png, svg

PARTS: dict[Part, str] = {
    "vae": "autoencoder", "clip": "text encoder", "unet": "U-Net", "prior": "prior"
}  # fmt: skip
SHEETS = 24
"""Sheets that the slider goes through, at most, the first and the last among them."""


def write_report(folder: Path) -> Path:
    """Write (or write anew) the plot and the report of the run in a folder; the report's path."""
    figure = loss_figure(Metrics.read(folder / runs.METRICS), folder.resolve().name)
    if figure is not None:
        write_whole(folder / runs.PLOT, png(figure), overwrite=True)
    path = folder / runs.REPORT
    write_whole(path, report(folder).encode(), overwrite=True)
    return path


def report(folder: Path) -> str:
    """The page, as HTML."""
    facts = json.loads((folder / runs.FACTS).read_text(encoding="utf-8"))
    config = (folder / runs.CONFIG).read_text(encoding="utf-8")
    preset = build_preset(parse_yaml(config, runs.CONFIG), runs.CONFIG)
    metrics = Metrics.read(folder / runs.METRICS)
    name = folder.resolve().name
    body = [
        _header(name, preset, facts, metrics),
        *(f'<p class="warning">{_text(w)}</p>' for w in metrics.warnings(facts["steps"]).values()),
        _learning(metrics, facts),
        _samples(folder),
        _colours(metrics),
        _use(preset, facts, folder),
        _data(facts),
        _configuration(facts, config),
        *(_earlier(folder / part, part) for part in ("vae", "clip")),
    ]
    parts = {"TITLE": _text(name), "BODY": "\n".join(part for part in body if part)}
    inks = colours({name: ink for ink, name in VARIABLES.items()})
    return filled("difftool.training.report", parts, inks)


def usage(preset: Preset, facts: dict[str, Any], folder: Path) -> list[str]:
    """Commands that do something with what a run made."""
    data, part = facts["argument"], facts["part"]
    if part == "vae":
        return [_command("train", data, "--part", "unet", "--vae", folder)]
    if part == "clip":
        return []
    if part == "prior":
        model = facts.get("start", {}).get("vision", "MODEL")
        return [_command("sample", facts["example"], "-m", model, "--prior", folder, "-n", 4)]
    asked: list[Any] = []
    if preset.text:
        asked = [facts["example"]]
    elif preset.classes:
        asked = ["--label", preset.classes[0]]
    model = ["-m", folder]
    if base := preset.train.lora_base:
        model = ["-m", base, "--lora", folder / runs.LORA]
    lines = [_command("sample", *asked, *model, "-n", 4, "--grid")]
    lines.append(_command("sample", *asked, *model, "--seed", 7, "-o", "picture.png"))
    return lines if base else [*lines, _command("train", data, "--from", folder)]


# --- sections --------------------------------------------------------------------------------


def _header(name: str, preset: Preset, facts: dict[str, Any], metrics: Metrics) -> str:
    step = metrics.training[-1]["step"] if metrics.training else 0
    done = f"{step:,} steps" if facts["finished"] else f"step {step:,} of {facts['steps']:,}"
    seconds = sum(s["seconds"] for s in facts["sessions"])
    images = sum((s["to"] - s["from"]) * facts["batch"] for s in facts["sessions"])
    total = sum(facts["parameters"].values())
    kind = {"text": "by caption", "class": f"{len(preset.classes)} classes", "none": ""}
    about = [preset.name, PARTS[facts["part"]], kind[facts["kind"]], f"{facts['size']} pixels"]
    rows = [
        ("state", f"finished, {done}" if facts["finished"] else done),
        ("loss", f"{metrics.training[-1]['loss']:.4f}" if metrics.training else ""),
        *(m.summary(metrics) for m in METRICS if m.summary and metrics.of(m.key)),
        ("time", duration(seconds)),
        ("speed", f"{images / seconds:,.1f} images/s" if seconds and images else ""),
        ("batch", f"{facts['batch']} images"),
        ("epochs", f"{step * facts['batch'] / max(1, facts['images']):,.2f}"),
        ("parameters", f"{total / 1e6:,.2f} M"),
        ("device", facts["device"]),
    ]  # fmt: skip
    cells = "".join(f"<div><dt>{k}</dt><dd>{_text(v)}</dd></div>" for k, v in rows if v)
    data = f"{facts['images']:,} pictures of {facts['data']}"
    return (
        f"<header><h1>{_text(name)}</h1><p>{_text(' · '.join(a for a in about if a))}</p>"
        f"<p>trained on {_text(data)}</p></header><dl class='facts'>{cells}</dl>"
    )


def _learning(metrics: Metrics, facts: dict[str, Any]) -> str:
    figure = loss_figure(metrics, "loss")
    if figure is None:
        return ""
    words = []
    if metrics.validation:
        name = metrics.compared
        best = min(metrics.validation, key=lambda line: line["validation"][name])
        words.append(
            f"{facts['held_out']} pictures are held out: never trained on, measured with the "
            f"averaged weights, always with the same noise. Lowest {name}: "
            f"{best['validation'][name]:.4f}, at step {best['step']:,}."
        )
    return _section("Learning", f"<figure>{svg(figure)}</figure>", *words)


def _samples(folder: Path) -> str:
    sheets = _spread([*runs.by_step(folder / runs.SAMPLES, ".png").items()], SHEETS)
    if not sheets:
        return ""
    last = len(sheets) - 1
    images = "".join(
        f'<img data-step="{step:,}" alt="samples at step {step}" '
        f'src="{_embedded(path, path.stat().st_mtime_ns)}"{"" if i == last else " hidden"}>'
        for i, (step, path) in enumerate(sheets)
    )
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step">'
    control = f"<label>step <output>{sheets[last][0]:,}</output>{slider}</label>"
    return _section("Samples", f'<div class="sheets">{control if last else ""}{images}</div>')


def _colours(metrics: Metrics) -> str:
    figure = colour_figure(metrics)
    if figure is None:
        return ""
    last = metrics.colours[-1]["colours"]
    rows = [
        [
            f'<i style="background:{color}"></i> {name}',
            *(f"{last[who][key][i]:+.3f}".replace("-", "−")
              for key in ("mean", "std") for who in ("samples", "data")),
        ]
        for i, (name, color) in enumerate(CHANNELS.items())
    ]  # fmt: skip
    head = ["", "mean, samples", "data", "deviation, samples", "data"]
    return _section(
        "Colours",
        f"<figure>{svg(figure)}</figure>",
        _table(head, rows),
        "Of the sample sheets, and dashed of the data; pictures are in −1 to 1.",
    )


def _use(preset: Preset, facts: dict[str, Any], folder: Path) -> str:
    lines = usage(preset, facts, folder)
    if not lines:
        return ""
    return _section("Use", "<pre>" + "\n".join(map(_text, lines)) + "</pre>")


def _data(facts: dict[str, Any]) -> str:
    return _section("Data", "<pre>" + "\n".join(map(_text, facts["audit"])) + "</pre>")


def _configuration(facts: dict[str, Any], config: str) -> str:
    others = set(RECIPES.values()) - {RECIPES[facts["part"]]}
    rows = [
        [f"<code>{_text(k)}</code>", f"<code>{_text(_value(v))}</code>",
         _text(why.rpartition("chosen: ")[2])]
        for k, v, why in facts["choices"]
        if k.partition(".")[0] not in others
    ]  # fmt: skip
    sizes = ", ".join(f"{n} {c / 1e6:,.2f} M" for n, c in facts["parameters"].items())
    return _section(
        "Configuration",
        _table(["", "value", "why"], rows) if rows else "As the preset has it.",
        f"<details><summary>all of it</summary><pre>{_text(config)}</pre></details>",
        f"Parameters: {sizes}. difftool {facts['version']}, torch {facts['torch']}.",
    )


def _earlier(folder: Path, part: Part) -> str:
    """What a part that was trained before showed, in short."""
    if not (folder / runs.FACTS).is_file():
        return ""
    metrics = Metrics.read(folder / runs.METRICS)
    figure = loss_figure(metrics, f"loss of the {PARTS[part]}")
    drawn = f"<figure>{svg(figure)}</figure>" if figure else ""
    sheets = [*runs.by_step(folder / runs.SAMPLES, ".png").values()][-1:]
    shown = "".join(f'<img src="{_embedded(p, p.stat().st_mtime_ns)}" alt="">' for p in sheets)
    words = f'<a href="{part}/report.html">Its own report</a>'
    title = f"Before: the {PARTS[part]}"
    return _section(title, f"{drawn}<div class='sheets'>{shown}</div>", words)


# --- pieces ----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time in words: "42 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    seconds = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for i, (unit, length) in enumerate(units):
        if seconds >= length:
            whole, rest = divmod(seconds, length)
            below = units[i + 1] if i + 1 < len(units) else None
            more = rest // below[1] if below else 0
            return f"{whole} {unit}" + (f" {more} {below[0]}" if below and more else "")
    return "0 s"


def _value(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, ensure_ascii=False)


def _command(*words: object) -> str:
    return "difftool " + shlex.join(map(str, words))


def _text(value: object) -> str:
    """Safe in HTML, whatever it came from."""
    return html.escape(str(value))


def _section(title: str, *parts: str) -> str:
    blocks = (p if p.startswith("<") and not p.startswith("<a") else f"<p>{p}</p>" for p in parts)
    return f"<section><h2>{title}</h2>{''.join(blocks)}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _spread(items: list[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of them, evenly, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@lru_cache(4 * SHEETS)
def _embedded(path: Path, _modified: int) -> str:
    """A picture as a data URL."""
    with io.BytesIO() as file:
        read_image(path).save(file, "WEBP", quality=90)
        data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/webp;base64,{data}"
