"""docs/reference.md, written from the code: `python -m difftool.cli.reference docs/reference.md`.

Nothing of it is kept by hand but the sentences between its tables.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path

from difftool import errors
from difftool.cli import help, lists
from difftool.cli.app import COMMANDS, Root
from difftool.cli.options import HELP
from difftool.config.keys import keys
from difftool.config.options import RUN, Option

PATH = "docs/reference.md"
RENEW = f"python -m difftool.cli.reference {PATH}"
"""How the file is written again."""
HEAD = f"""# Reference

Written from the code by `{RENEW}`; changes belong there.
"""
TABLES = {
    "samplers": "`--sampler`, and `sample.sampler`; options are `sample.sampler_options`. Case and "
    "separators make no difference, and a schedule may follow: `DPM++ 2M Karras`.",
    "schedules": "`--schedule`, and `sample.schedule`: the levels that a sampler visits.",
    "matches": "`--match`: what is set to make a tool's picture again. A flag stands over it.",
    "paths": "`noise --path`, and `path.kind`: how alpha and sigma run from data to noise.",
    "targets": "`target`: what the network predicts.",
    "times": "`train.time`: where on the path training looks.",
    "weights": "`train.weight`: how much each level counts.",
    "losses": "`train.loss`.",
    "optimizers": "`--optimizer`, and `train.optimizer`.",
    "datasets": "Built-in sets of `train`.",
    "presets": "`--preset`.",
    "formats": "`convert --to`.",
    "pictures": "`sample --format`.",
}
"""The lists that are shown as tables, and where their names are given."""
ENVIRONMENT = {
    "DIFFTOOL_MODEL": "The model where `--model` is not given.",
    "HF_HUB_OFFLINE": "Set to 1: as `--offline`.",
    "HF_HUB_CACHE": "Where models of the hub lie; also `HUGGINGFACE_HUB_CACHE`, `HF_HOME`, "
    "`XDG_CACHE_HOME`.",
    "CI": "Set: progress is told in lines, as where stderr is no terminal; `TERM=dumb` likewise.",
    "DIFFTOOL_FONTS": "Files of fonts for what DejaVu Sans lacks on grids and sheets, before the "
    "system's own.",
    "NO_COLOR": "Set: no colours.",
    "COLUMNS": "The terminal's width, where it does not tell.",
    "WORLD_SIZE": "Set by torchrun with `RANK` and `LOCAL_RANK`: training in several processes.",
}
"""Variables that the commands go by."""
RESULTS = {
    "`sample --grid`, of each page": "`path`, `grid` (pictures on it), and on the first, "
    "where they have no files of their own, `pictures`, each as an object",
    "`sample --evaluate`, at the end": "`evaluation`: `features`, `weights` (SHA-256 of "
    "their file), `dimensions`, `made`, `reference` (pictures), `frechet`, `kid`, "
    "`kid_deviation`, `kid_subset`, `precision`, `recall`",
    "`noise`, of each picture": "`path`, `image`, `width`, `height`, `seed`, `noise_path` and "
    "`levels`, or `noise_paths` where several are compared; of `--reverse` and `--likelihood` also "
    "`model`, `model_hash`, `prompt`, `label`, and of the latter `likelihood`: `bound`, `flow`, "
    "`tight` (the bound without its slack, where it was measured) and more",
    "`noise --curve`": "`path` if there is one, `noise_path` and `rows`, or `noise_paths`",
    "`convert`": "`version`, `counts`, `source`, `target`, `kinds`, `evidence`, `casts`, `loras`, "
    "`verified`, `warnings`, `family`, `layers`, `path`; in the file of `--report` `entries`",
    "`convert --inspect`": "`format`, `family`, `prediction`, `zero_snr`, `evidence`, `weights`, "
    "`components`, `metadata`, `warnings`, `preset`",
    "`convert PICTURE --inspect`": "`format`, `width`, `height`, `made_by`, `model`, `model_hash`, "
    "`request` (a line of `--prompts`), `loras`, `files`, `missed`, `texts`; null where it does "
    "not say how it was made",
    "`train`": "`model`, `steps`, and of `--evaluate` `evaluation` as of `sample --evaluate`",
    "`--list`": "`list`, `items`, each with `name`, `about`, `also`, and more",
    "`--print-config`": "`config`: of each key `value` and `origin`",
    "an error": "`error`: `code` (the exit code), `message`, `hint`; of a picture `index`, and "
    "of one of --prompts `line`",
}
"""What commands print with --json, but for pictures of `sample`."""
SIGNALS = {
    129: "The terminal was closed (SIGHUP).",
    130: "Interrupted (SIGINT).",
    143: "Terminated (SIGTERM).",
}


def reference() -> str:
    """The whole document."""
    parts = [HEAD, *_commands(), *_keys(), *_lists(), *_lines(), *_ends()]
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; columns without any text are left out."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    shown = [[row[i] for i in kept] for row in cells]
    lines = [[columns[i] for i in kept], ["---"] * len(kept), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _code(text: object) -> str:
    return f"`{text}`" if text not in ("", None) else ""


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    yield _options([*Root.rows, HELP])
    for name in COMMANDS:
        module = import_module(f"difftool.cli.{name}")
        about, _, examples = module.ABOUT.strip().partition(f"\n{help.HEADING}\n")
        lines = [line.strip() for line in examples.strip().splitlines()]
        yield f"### difftool {name}\n"
        yield f"{about.strip()}\n"
        yield "\n".join(["```sh", *lines, "```\n"])
        for panel, rows in groupby(module.ROWS, key=lambda row: row.panel):
            yield f"#### {name}: {panel}\n"
            yield _options([*rows, *([HELP] if panel == RUN else [])])
        if listed := [_code(row.flag) for row in module.ROWS if row.listed]:
            yield f"Several values, `a,b` or `10-30:10`, are tried in turn: {', '.join(listed)}.\n"


def _options(rows: Sequence[Option]) -> str:
    columns = ("option", "meaning", "default", "key of the preset")
    return _table(
        columns,
        (
            (_code(_flag(row)), _meaning(row), row.shown_default() or "", _code(row.key))
            for row in rows
        ),
    )


def _flag(row: Option) -> str:
    return " ".join(filter(None, (help.names(row), help.metavar(row))))


def _meaning(row: Option) -> str:
    """What help says, but for lists that are tables here."""
    names = tuple(row.choices()) if row.choices else ()
    for kind in TABLES:
        if names and names == tuple(entry.name for entry in lists.KINDS[kind]()):
            return f"{row.help}: [{kind}](#{kind})."
    return help.meaning(row)


def _keys() -> Iterator[str]:
    yield "## Keys of presets\n"
    yield "`--set KEY=VALUE` changes one. `[]` is the number of an entry, which a file has.\n"
    yield _table(
        ("key", "type", "default", "meaning"),
        (
            (_code(key.path), key.type, _code(key.default), f"{key.about}{_named(key.values)}")
            for key in keys()
        ),
    )


def _named(values: Sequence[str]) -> str:
    shown = [] if set(values) == {"true", "false"} or len(values) > 6 else values
    return f" ({', '.join(map(_code, shown))})" if shown else ""


def _lists() -> Iterator[str]:
    for kind, where in TABLES.items():
        yield f"## {kind.capitalize()}\n"
        yield f"{where} Shown by `--list {kind}`.\n"
        rows = ((_code(e.name), e.about, _defaults(e), e.note) for e in lists.KINDS[kind]())
        yield _table(("name", "what it is", "options", "also"), rows)


def _defaults(entry: lists.ListEntry) -> str:
    options = entry.more.get("options", {})
    return ", ".join(_code(f"{name}={json.dumps(value)}") for name, value in options.items())


def _lines() -> Iterator[str]:
    from difftool.sampling.files.names import ALIASES, FIELDS, NUMBERS, WORDS
    from difftool.sampling.settings import ALWAYS, KEYS
    from difftool.training import metrics

    yield "## Lines of JSON\n"
    yield "A line of `sample --prompts` is a prompt, or a JSON object with any of these keys.\n"
    yield _table(
        ("key", "also", "option", "in A1111's text", "meaning"),
        (
            (
                _code(row.json[0]),
                ", ".join(map(_code, row.json[1:])),
                _code(row.flag) if row.option else "",
                row.a1111.word if row.a1111 else "",
                f"{row.help}.",
            )
            for row in dict.fromkeys(KEYS.values())
        ),
    )
    always = ", ".join(_code(row.json[0]) for row in ALWAYS)
    yield "With `--json` commands print, each object with `schema`, 1:\n"
    yield _table(
        ("command", "keys"),
        [
            ("`sample`, of each picture", f"`path`, `index`, {always}, `model`, `model_hash`, "
             "`seconds`, any other key above whose value is not the model's own, and `existing` "
             "if it was there already"),
            *RESULTS.items(),
        ],
    )  # fmt: skip
    yield "## Lines of metrics.jsonl\n"
    _, _, text = str(metrics.__doc__).strip().partition("\n\n")
    yield f"```text\n{text}\n```\n"
    yield "## Names of pictures\n"
    settings = ", ".join(_code(f"[{name}]") for name in (*FIELDS, *ALIASES) if name not in WORDS)
    numbers = ", ".join(map(_code, NUMBERS))
    yield f"`sample -o` may have {settings}, and these, A1111's among them:\n"
    yield _table(
        ("word", "meaning"), ((_code(f"[{name}]"), word.about) for name, word in WORDS.items())
    )
    yield f"With as many digits as `[index:04]` says: {numbers}.\n"


def _ends() -> Iterator[str]:
    yield "## Exit codes\n"
    kinds = (errors.UsageError, errors.InputError, errors.CheckError, errors.ResourceError)
    codes = {0: "Done.", 1: "A failure, or a part of a batch that failed."}
    codes |= {kind.code: " ".join(str(inspect.getdoc(kind)).split()) for kind in kinds} | SIGNALS
    yield _table(("code", "meaning"), sorted(codes.items()))
    yield "## Environment variables\n"
    yield _table(("variable", "meaning"), ((_code(n), text) for n, text in ENVIRONMENT.items()))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
