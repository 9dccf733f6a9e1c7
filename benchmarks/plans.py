"""What `difftool train` plans for folders of ten kinds and four starts, as a Markdown table.

    python benchmarks/plans.py [FOLDER] [--digits 60000]

The folders, and a Stable Diffusion 1.5 of its true size without numbers (a file with holes), are
made in FOLDER, or in a temporary one. Nothing is trained. Exit code 1 where a choice is not
explained, a warm-up is more than a tenth of the run, or more memory is needed than is free and that
is not said.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from difftool.cli import app
from difftool.config.layers import load_preset
from difftool.config.validate import to_values
from difftool.pipeline.model import Model

STARTS = {"nothing": [], "emoji": ["--from", "emoji"]}
HEAD = (
    "folder", "start", "preset", "target", "path", "size", "batch", "steps", "warm-up", "lr",
    "memory", "time", "sheets and measures", "warnings",
)  # fmt: skip


def picture(path: Path, size: tuple[int, int]) -> Path:
    """A picture of one colour, which its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(random.Random(path.name).randbytes(3))).save(path)
    return path


def captioned(path: Path, size: tuple[int, int]) -> None:
    picture(path, size).with_suffix(".txt").write_text(f"a picture of {path.stem}", "utf-8")


def each(count: int, make: Callable[[Path, tuple[int, int]], Any], *size: int, ending="png"):
    """Makes so many pictures in a folder."""

    def lay(folder: Path) -> None:
        for number in range(count):
            make(folder / f"{number:05d}.{ending}", (size[0], size[-1]))

    return lay


def classes(names: str, count: int, side: int):
    def lay(folder: Path) -> None:
        for name in names.split():
            each(count, picture, side)(folder / name)

    return lay


def kohya(folder: Path) -> None:
    each(15, picture, 768)(folder / "10_sks dog")


def table(folder: Path) -> None:
    each(1000, picture, 256)(folder)
    lines = [
        json.dumps({"file_name": path.name, "text": f"number {path.stem}"}) + "\n"
        for path in sorted(folder.glob("*.png"))
    ]
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")


def shapes(folder: Path) -> None:
    sizes = [(1600, 400), (400, 1200), (800, 800)]
    for number in range(30):
        captioned(folder / f"{number}.jpg", sizes[number % 3])


def folders(digits: int) -> dict[str, Callable[[Path], None]]:
    """What is laid out, by what it is called."""
    return {
        "20 photos of 12 megapixels": each(20, picture, 4000, 3000, ending="jpg"),
        "the same with captions": each(20, captioned, 4000, 3000, ending="jpg"),
        "250 captioned icons of 64": each(250, captioned, 64),
        f"{digits:,} digits of 28, classes": classes("0 1 2 3 4 5 6 7 8 9", digits // 10, 28),
        "3 classes of 40 at 128": classes("cat dog fox", 40, 128),
        "kohya: 10_sks dog, 15 at 768": kohya,
        "metadata.jsonl, 1,000 at 256": table,
        "30 of three shapes, captioned": shapes,
        "500 tiles of 16": each(500, picture, 16),
        "one picture of 512": each(1, picture, 512),
    }


def hollow(path: Path) -> Path:
    """Stable Diffusion 1.5 as a model file of its true size, all zeros, which take no disk."""
    preset, entries, end = load_preset("sd15"), {}, 0
    for name, tensor in Model(preset).tensors().items():
        place = [end, end := end + 2 * tensor.numel()]
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": place}
    about = json.dumps({"schema": 1, "preset": to_values(preset)})
    header = json.dumps({"__metadata__": {"difftool": about}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def planned(data: Path, start: list[str]) -> dict[str, Any]:
    """What a dry run says of a folder."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = ["difftool", "train", str(data), *start, "--dry-run", "--json", "--quiet"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            app.main()
    except SystemExit:
        pass
    finally:
        sys.argv = argv
    return json.loads(out.getvalue())


def row(name: str, start: str, plan: dict[str, Any]) -> tuple[list[str], list[str]]:
    """A line of the table, and what of it does not fit together."""
    if "error" in plan:
        return [name, start, f"refused: {plan['error']['message']}", *[""] * (len(HEAD) - 3)], []
    values = {key: entry["value"] for key, entry in plan["plan"].items()}
    train = {key.removeprefix("train."): v for key, v in values.items() if key[:6] == "train."}
    path = [str(value) for key, value in values.items() if key.startswith("path.")]
    batch, more = train["batch_size"], train.get("accumulate", 1)
    wrong = [key for key, entry in plan["plan"].items() if not entry["why"]]
    if train["warmup"] > 0.1 * train["steps"] + 1:
        wrong.append("warm-up")
    if plan["memory"] > plan["memory_free"] and not plan["warnings"]:
        wrong.append("memory")
    cells = [
        *(name, start, values["name"], values["target"], " ".join(path), train["size"]),
        f"{batch} x {more}" if more > 1 else batch,
        *(train["steps"], train["warmup"], f"{train['lr']:g}", f"{plan['memory'] / 2**30:.1f} GiB"),
        *(plan["forecast"]["time"].partition(" as ")[0], plan["forecast"]["shown"]),
        "; ".join(plan["warnings"]),
    ]
    return [str(cell) for cell in cells], [f"{name}, {start}: {what}" for what in wrong]


def main(place: Path, digits: int) -> int:
    """Make what is missing, plan all, print the table."""
    place.mkdir(parents=True, exist_ok=True)
    model = str(hollow(place / "sd15.safetensors"))
    starts = STARTS | {"sd15": ["--from", model], "LoRA of sd15": ["--from", model, "--lora"]}
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    wrong = []
    for number, (name, lay) in enumerate(folders(digits).items()):
        data = place / f"data-{number}"
        if not data.exists():
            lay(data)
        for start, arguments in starts.items():
            cells, faults = row(name, start, planned(data, arguments))
            print(f"| {' | '.join(cells)} |", flush=True)
            wrong += faults
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--digits", type=int, default=60_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(given.folder or Path(temporary), given.digits))
