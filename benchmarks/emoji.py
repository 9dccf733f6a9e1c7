"""Lay out emoji in four drawing styles as captioned image folders: python benchmarks/emoji.py DEST

Five npm packages (PACKAGES: versions, hashes, licences) are fetched with `npm pack`, or read from
--packages FOLDER with their .tgz files. The pictures are drawn over white with resvg
(pip install resvg-py) and laid out as

    DEST/train/      pictures and metadata.jsonl, for: difftool train DEST/train
    DEST/heldout/    the same for every (base, style) pair that training never shows

A base is an emoji without its skin tones. A pair is held out if sha1("base|style") % 25 == 0: its
base is then seen in other styles and its style on other bases, so only composition can draw it.

A line of the metadata has file_name, text (several captions, of which training draws one; the first
is the plainest), base, style, label and tone. The same packages and size give the same pixels.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "MIT",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "@lobehub/fluent-emoji-flat@1.1.0": (
        "MIT",
        "lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
    ),
    "@iconify-json/noto@1.2.9": (
        "Apache-2.0",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "@iconify-json/twemoji@1.2.5": (
        "CC-BY-4.0",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "emojibase-data@17.0.0": (
        "MIT",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
}
"""Licence and SHA-512 (base64, as npm gives it) of each package."""
FLUENT_3D, FLUENT_FLAT, NOTO, TWEMOJI, EMOJIBASE = PACKAGES


class Style(NamedTuple):
    """How a style is called in captions, and how much of its canvas its pictures usually span."""

    word: str
    span: float


STYLES = {
    "fluent-3d": Style("3d", 0.875),
    "fluent-flat": Style("flat", 0.875),
    "noto": Style("noto", 0.94),
    "twemoji": Style("twemoji", 1.0),
}
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
HELD_OUT = 25
"""One in so many pairs is held out."""
CANVAS = 512
"""Side in pixels at which pictures are drawn before they are laid out and shrunk."""
FILL = 15 / 16
"""What the longer side of a picture spans of the frame."""
SLACK = 1.25
"""How much more a small picture is enlarged, at most, than is usual for its style."""


# --- concepts --------------------------------------------------------------------------------


class Emoji(NamedTuple):
    """An emoji by its code points, and what it is called."""

    code: str
    label: str
    tags: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """Other names; of an emoji with skin tones, those of the emoji without."""


def normal(code: str) -> str:
    """Code points upper-case, joined by "-", without the variation selector FE0F."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def base_of(code: str) -> str:
    """A normal code without its skin tones."""
    return "-".join(point for point in code.split("-") if point not in TONES)


def held_out(base: str, style: str) -> bool:
    """Whether training never shows this concept in this style."""
    return int(hashlib.sha1(f"{base}|{style}".encode()).hexdigest(), 16) % HELD_OUT == 0


def thin(codes: Iterable[str], style: str, tones: str) -> list[str]:
    """Of each base in a style: "all" emoji, the "default" one, or that and N with skin tones.

    Which of the tones is left to a hash; a base that has no default keeps one in its place.
    """
    if tones == "all":
        return sorted(codes)
    kept = collections.defaultdict(list)
    for code in codes:
        kept[base_of(code)].append(code)
    count = 1 if tones == "default" else 1 + int(tones)

    def rank(code: str) -> tuple[bool, str]:
        return base_of(code) != code, hashlib.sha1(f"{code}|{style}|tone".encode()).hexdigest()

    return sorted(code for group in kept.values() for code in sorted(group, key=rank)[:count])


# --- captions --------------------------------------------------------------------------------

QUOTES = {"’": "'", "“": '"', "”": '"', "…": "..."}
MASS = frozenset(
    "rice bread bacon cheese butter salt honey tea fog fire wood sake luggage ice money yarn "
    "thread soap milk footwear infinity plus minus divide multiply hair garlic broccoli "
    "spaghetti sushi mahjong curling wrestling tofu".split()
)
"""Last words that take no article."""
PEOPLE = ("women", "men", "people", "children", "teeth", "feet")
SPOKEN = re.compile(r"(?=.{4})([a-z]*[aeiouy][a-z]*)( [a-z]*[aeiouy][a-z]*)*")
"""Names of words, without abbreviations ("family mwg") and numbers."""
SINGULAR = ("ss", "us", "is", "'s")
"""Ends of words that are no plurals."""


def parted(label: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A label as head, details and skin tones: "man: light skin tone, red hair"."""
    head, _, rest = label.partition(": ")
    details = [part for part in rest.split(", ") if part]
    tones = tuple(part for part in details if part.endswith("skin tone"))
    return head, tuple(part for part in details if part not in tones), tones


def subject(label: str) -> str:
    """What a label says as one would write it: "flag of Peru", "man with red hair"."""
    head, details, tones = parted(label)
    listed = " and ".join([", ".join(details[:-1]), details[-1]] if details[1:] else details)
    if not details:
        text = head
    elif head in ("flag", "family", "kiss"):
        text = f"{head} of {listed}"
    elif listed == "bald":
        text = f"bald {head}"
    elif listed == "beard":
        text = f"{head} with a beard"
    elif listed.endswith("hair"):
        text = f"{head} with {listed}"
    elif head == "couple with heart":
        text = f"{head}, {listed}"
    else:  # "keycap 1", "man running facing right"
        text = f"{head} {listed}"
    if tones:
        words = [tone.removesuffix(" skin tone") for tone in dict.fromkeys(tones)]
        text += f" with {' and '.join(words)} skin tone"
    return text


def with_article(text: str) -> str:
    """A phrase with "a" or "an" where a noun in the singular seems to stand; "the" flag of Peru."""
    if text.startswith("flag of"):
        return f"the {text}"
    head = tidy(text).partition(" with ")[0].partition(" of ")[0].split()
    first, last = head[0], head[-1]
    plural = (last.endswith("s") and not last.endswith(SINGULAR)) or last in PEOPLE
    someone = first in ("man", "woman", "person", "face")
    if not first[0].islower() or first in PEOPLE or (not someone and (plural or last in MASS)):
        return text
    vowel = first[0] in "aeiou" and not first.startswith(("uni", "use", "eu", "ew", "one-"))
    return f"{'an' if vowel else 'a'} {text}"


def captions(emoji: Emoji, style: str) -> list[str]:
    """Captions of an emoji drawn in a style, the plainest first; most of them name the style."""
    word = STYLES[style].word
    plain = subject(emoji.label)
    phrase = with_article(plain)
    tones = parted(emoji.label)[2]
    texts = [
        f"{plain}, {word} style", plain,
        f"{phrase} in {word} style", phrase,
        f"a {word} emoji of {phrase}", f"an emoji of {phrase}",
        f"{word} {plain}",
    ]  # fmt: skip
    said = set(plain.lower().split())
    tags = [tag for tag in emoji.tags if tag.lower() not in said]
    # Which tags are said is left to a hash, so that styles do not all say the same.
    tags.sort(key=lambda tag: hashlib.sha1(f"{emoji.code}|{style}|{tag}".encode()).digest())
    if tags:
        texts += [
            f"{plain}, {', '.join(tags[:3])}, {word} style",
            f"{plain}, {', '.join(tags[:2])}",
        ]
    if len(tags) >= 3 and not tones:
        texts.append(f"{', '.join(tags[:4])}, {word} style")
    if not tones:
        texts += [text for name in emoji.names[:2] for text in (f"{name}, {word} style", name)]
    return list(dict.fromkeys(tidy(text) for text in texts))


def tidy(text: str) -> str:
    """Text with the quotation marks of a keyboard."""
    return "".join(QUOTES.get(letter, letter) for letter in text)


# --- packages --------------------------------------------------------------------------------


def tgz(package: str, folder: Path) -> Path:
    """The file of a package in a folder, fetched by npm if it is not there, of the known hash."""
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        if not shutil.which("npm"):
            raise SystemExit(f"{path} does not exist, and there is no npm to fetch {package} with")
        subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != PACKAGES[package][1]:
        raise SystemExit(f"{path} is not {package}: its SHA-512 is {digest}")
    return path


def members(path: Path) -> dict[str, bytes]:
    """The files of an npm package by their paths in it."""
    with tarfile.open(path) as archive:
        files = ((archive.extractfile(m), m.name) for m in archive if m.isfile())
        return {name.partition("/")[2]: file.read() for file, name in files if file}


def emojis(files: Mapping[str, bytes]) -> dict[str, Emoji]:
    """Every emoji of emojibase by its normal code; skin tones have the tags of what they vary."""
    names = json.loads(files["en/shortcodes/emojibase.json"])

    def named(code: str, label: str) -> tuple[str, ...]:
        found = names.get(code, [])
        found = [found] if isinstance(found, str) else found
        texts = [name.replace("_", " ") for name in found if "flag" not in name]
        return tuple(text for text in texts if text != label and SPOKEN.fullmatch(text))

    found = {}
    for entry in json.loads(files["en/data.json"]):
        common = tuple(entry.get("tags", ())), named(entry["hexcode"], entry["label"])
        for one in (entry, *entry.get("skins", ())):
            code = normal(one["hexcode"])
            found[code] = Emoji(code, one["label"], *common)
    return found


def sources(packages: Mapping[str, Path]) -> dict[str, dict[str, bytes]]:
    """The SVG or WebP of every emoji, by style and normal code."""

    def assets(package: str) -> dict[str, bytes]:
        files = members(packages[package])
        paths = sorted(name for name in files if name.endswith((".svg", ".webp")))
        return {normal(Path(path).stem): files[path] for path in paths}

    def iconify(package: str) -> dict[str, bytes]:
        files = members(packages[package])
        icons, names = json.loads(files["icons.json"]), json.loads(files["chars.json"])
        return {normal(code): svg(icons | icons["icons"][name]) for code, name in names.items()}

    return {
        "fluent-3d": assets(FLUENT_3D),
        "fluent-flat": assets(FLUENT_FLAT),
        "noto": iconify(NOTO),
        "twemoji": iconify(TWEMOJI),
    }


def svg(icon: Mapping[str, Any]) -> bytes:
    """The SVG file of an icon of Iconify's JSON."""
    left, top, width, height = (icon.get(k, 0) for k in ("left", "top", "width", "height"))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'.encode()


# --- pictures --------------------------------------------------------------------------------


def draw(source: bytes) -> Image.Image:
    """An SVG or WebP as RGBA; an SVG about CANVAS pixels wide."""
    if not source.startswith(b"RIFF"):
        import resvg_py  # pyright: ignore[reportMissingImports]

        source = bytes(
            resvg_py.svg_to_bytes(svg_string=source.decode(), width=CANVAS, skip_system_fonts=True)
        )
    return Image.open(io.BytesIO(source)).convert("RGBA")


def lay_out(picture: Image.Image, span: float, size: int) -> Image.Image:
    """What is drawn in an RGBA picture, in the middle of a white square of `size` pixels.

    Its longer side spans FILL of the frame, in all styles alike; what spans much less of its canvas
    than is usual for its style (`span`), like a small square, is enlarged by SLACK more at most.
    """
    alpha = np.asarray(picture)[..., 3] > 16
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if not len(rows):
        raise ValueError("nothing is drawn")
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extent = int(max(bottom - top, right - left))
    side = extent / FILL / min(1, SLACK * extent / (span * picture.width))
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    # A margin of white, so that the frame may pass the edges of the canvas.
    margin = picture.width
    wide = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), "white")
    wide.paste(ground.convert("RGB"), (margin, margin))
    x, y = margin + (left + right) / 2, margin + (top + bottom) / 2
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return wide.resize((size, size), Image.Resampling.LANCZOS, box=box)


def png(source: bytes, style: str, size: int) -> bytes:
    """The finished picture of an SVG or WebP as a PNG file."""
    file = io.BytesIO()
    lay_out(draw(source), STYLES[style].span, size).save(file, "PNG")
    return file.getvalue()


def draw_all(
    pictures: Sequence[bytes], styles: Sequence[str], size: int, jobs: int
) -> Iterator[bytes]:
    """PNG files of many pictures, in order, by so many processes."""
    work = partial(png, size=size)
    if jobs == 1:
        yield from map(work, pictures, styles)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(work, pictures, styles, chunksize=16)


# --- the folder ------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A picture to be made: the emoji and its style."""

    emoji: Emoji
    style: str

    @property
    def split(self) -> str:
        return "heldout" if held_out(base_of(self.emoji.code), self.style) else "train"

    @property
    def file(self) -> str:
        return f"{self.style}_{self.emoji.code.lower()}.png"

    def line(self) -> dict[str, Any]:
        """Its line of the metadata."""
        tones = [tone.removesuffix(" skin tone") for tone in parted(self.emoji.label)[2]]
        return {
            "file_name": self.file,
            "text": captions(self.emoji, self.style),
            "base": base_of(self.emoji.code),
            "style": self.style,
            "label": self.emoji.label,
            "tone": ", ".join(tones),
        }


def entries(
    known: Mapping[str, Emoji], drawn: Mapping[str, Iterable[str]], tones: str
) -> list[Entry]:
    """What is drawn and has a label, by code and style."""
    chosen = {style: thin(known.keys() & drawn[style], style, tones) for style in STYLES}
    return sorted(Entry(known[code], style) for style, codes in chosen.items() for code in codes)


def build(
    destination: Path, packages: Path, size: int, tones: str, jobs: int
) -> Iterator[tuple[int, int]]:
    """Make the data set in a new folder; on the way, how many pictures are done and in all."""
    files = {package: tgz(package, packages) for package in PACKAGES}
    drawn = sources(files)
    todo = entries(emojis(members(files[EMOJIBASE])), drawn, tones)
    for split in ("train", "heldout"):
        (destination / split).mkdir(parents=True)
    pictures = [drawn[entry.style][entry.emoji.code] for entry in todo]
    made = draw_all(pictures, [entry.style for entry in todo], size, jobs)
    for done, (entry, data) in enumerate(zip(todo, made, strict=True), 1):
        (destination / entry.split / entry.file).write_bytes(data)
        yield done, len(todo)
    for split in ("train", "heldout"):
        lines = [json.dumps(e.line(), ensure_ascii=False) for e in todo if e.split == split]
        text = "".join(f"{line}\n" for line in lines)
        (destination / split / "metadata.jsonl").write_text(text, encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's metadata."""
    text = (folder / "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def count(destination: Path) -> str:
    """How many pictures, bases and held-out pairs there are, by style."""
    rows = {split: read(destination / split) for split in ("train", "heldout")}
    lines = [f"{'style':12} {'train':>6} {'bases':>6} {'held out':>9} {'pairs':>6}"]
    for style in (*STYLES, "all"):
        of = {
            split: [row for row in found if style in (row["style"], "all")]
            for split, found in rows.items()
        }
        pairs = {split: {(r["base"], r["style"]) for r in found} for split, found in of.items()}
        bases = {base for found in pairs.values() for base, _ in found}
        lines.append(
            f"{style:12} {len(of['train']):6} {len(bases):6} {len(of['heldout']):9} "
            f"{len(pairs['heldout']):6}"
        )
    return "\n".join(lines)


def amount(text: str) -> str:
    """The value of --tones; ValueError unless all, default or a whole number."""
    if text not in ("all", "default") and not text.isdecimal():
        raise ValueError(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--tones", type=amount, default="all", help="all, default, or how many")
    parser.add_argument("--packages", type=Path, help="folder of .tgz files, filled as needed")
    parser.add_argument("--jobs", type=int, default=1, help="processes that draw")
    options = parser.parse_args()
    if options.destination.exists():
        parser.error(f"{options.destination} exists already")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        made = build(options.destination, packages, options.size, options.tones, options.jobs)
        for done, total in made:
            if done % 100 == 0 or done == total:
                print(f"\r{done} of {total}", end="", flush=True)
    print(f", {time.perf_counter() - start:.0f} s\n{count(options.destination)}")


if __name__ == "__main__":
    main()
