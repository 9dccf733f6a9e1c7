"""What is asked for: prompts, seeds, sizes, and files of them, read as they come. Torch-free."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from difftool.errors import DifftoolError, UsageError, suggestion

MAX_SEED = 2**64 - 1
MAX_SEEDS = 1_000_000
MAX_SIDE = 16_384
MAX_TEXT = 10_000
MAX_LINE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """The images of one prompt; None, or a setting that is absent, is the model's own choice."""

    prompt: str | None = None
    negative: str | None = None
    label: str | None = None
    """A class, by name or index."""
    seeds: tuple[int, ...] | None = None
    """One an image, or the first of `num` consecutive ones; empty = drawn."""
    num: int | None = None
    out: str | None = None
    """Name of the picture below the output folder."""
    init: str | None = None
    """Path of the picture to start from, to repaint or to edit."""
    mask: str | None = None
    """Path of the picture whose white is repainted."""
    image: str | None = None
    """Path of the picture to vary (unCLIP)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SampleConfig, and `width`, `height`."""
    source: str = ""
    """Where it was read, for messages."""
    model_hash: str = ""
    """Hash of the model that the request was made for; empty = any."""
    embeddings: tuple[str, ...] = ()
    """Paths of the learned words that it was made with."""
    loras: tuple[tuple[str, float], ...] = ()
    """Paths and strengths of the LoRAs that it was made with."""

    def __post_init__(self) -> None:
        for text in (self.prompt, self.negative):
            _check_text(text or "")

    def images(self) -> Sequence[int]:
        """The seed of each image: image k of a request has seed + k."""
        if self.seeds and len(self.seeds) > 1:
            if self.num not in (None, len(self.seeds)):
                why = f"{len(self.seeds)} seeds for {self.num} images"
                raise UsageError("seeds and number of images differ", why, "leave --num out")
            return self.seeds
        num = 1 if self.num is None else self.num
        if num < 1:
            raise UsageError(f"{num} images cannot be made", hint="give at least 1")
        first = self.seeds[0] if self.seeds else secrets.randbelow(2**32)
        if first + num - 1 > MAX_SEED:
            raise UsageError(f"seed {first} is too large for {num} images", f"limit {MAX_SEED}")
        return range(first, first + num)

    def over(self, base: Request) -> Request:
        """This request, with what it leaves open taken from `base`."""
        own = {
            name: value for name in (*FIELDS, "num") if (value := getattr(self, name)) is not None
        }
        return replace(base, **own, settings=overlay(base.settings, self.settings))


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others; options of a sampler or grid go with the one they belong to."""
    dropped = {f"{name}_options" for name in ("sampler", "schedule") if name in top}
    dropped |= {"width", "height"} if "size" in top else set()
    return {name: value for name, value in base.items() if name not in dropped} | dict(top)


# --- values ----------------------------------------------------------------------------------


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of "7" or "1,2,5-10"; none, which is to say drawn, of "-1"."""
    if text.strip() == "-1":
        return ()
    ranges: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*(?:-\s*([0-9]{1,20})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            hint = "give 7, or 1,2,5-10, or -1 to draw one"
            raise UsageError(f'"{text}" is not a list of seeds', hint=hint)
        if last > MAX_SEED:
            raise UsageError(f"seed {last} is too large", f"the limit is {MAX_SEED}")
        ranges.append(range(first, last + 1))
    count = sum(part.stop - part.start for part in ranges)
    if count > MAX_SEEDS:
        raise UsageError(f"{count} seeds are too many", f"the limit is {MAX_SEEDS} at once")
    return tuple(seed for part in ranges for seed in part)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"; "512" is a square."""
    match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*[xX×*]\s*([0-9]{1,9}))?\s*", text)
    if not match:
        raise UsageError(f'"{text}" is not a size', hint="give WIDTHxHEIGHT, such as 512x768")
    width, height = int(match[1]), int(match[2] or match[1])
    for side in (width, height):
        _check_side(side)
    return width, height


def _check_side(side: int) -> None:
    if not 0 < side <= MAX_SIDE:
        raise UsageError(f"a side of {side} pixels is not usable", f"1 to {MAX_SIDE} are")


def parse_interval(text: str) -> tuple[float, float]:
    """(low, high) in log SNR of "LOW,HIGH"; either may be -inf or inf."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not low < high:
        hint = "give LOW,HIGH in log SNR, such as -2,4"
        raise UsageError(f'"{text}" is not an interval', hint=hint)
    return low, high


# --- files and streams of prompts ------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError("a number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**9:
        raise ValueError("a positive whole number")
    return value


def _side(value: Any) -> int:
    _check_side(_count(value))
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number, or a list such as 1,2,5-10")
    return parse_seeds(str(value))


def _label(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("the name or the index of a class")
    return str(value)


def _picture(value: Any) -> str:
    """A1111 takes a list of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError("the path of one picture")
    return value


# Keys of a JSON line (A1111's web interface): the field or the setting they fill, and the reader.
KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt": ("prompt", _text),
    "negative_prompt": ("negative", _text),
    "label": ("label", _label),
    "seed": ("seeds", _seeds),
    "out": ("out", _text),
    "steps": ("steps", _count),
    "cfg_scale": ("guidance", _number),
    "width": ("width", _side),
    "height": ("height", _side),
    "sampler_name": ("sampler", _text),
    "scheduler": ("schedule", _text),
    "init_images": ("init", _picture),
    "mask": ("mask", _text),
    "image_prompt": ("image", _text),
    "denoising_strength": ("strength", _number),
}
FIELDS = ("prompt", "negative", "label", "seeds", "out", "init", "mask", "image")

# Options on a line of text: sd-scripts' and A1111's, by the key that they are here.
OPTIONS = {
    "n": "negative_prompt", "w": "width", "h": "height", "s": "steps", "d": "seed",
    "l": "cfg_scale", "t": "denoising_strength", "ss": "sampler_name", "f": "out",
} | {name: name for name in KEYS}  # fmt: skip


def parse_line(line: str) -> Request | None:
    """The request of one line: a prompt, maybe with options, or a JSON object; None for blanks and
    # comments."""
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    # A brace may open a prompt too, "{red|blue} fox"; JSON's is followed by a key or its end.
    if not re.match(r'\{\s*["}]', line):
        return _request(_with_options(line))
    try:
        values = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UsageError("not a JSON object", str(error)) from None
    return _request(values)


def _with_options(line: str) -> dict[str, Any]:
    """The values of a line in the manner of sd-scripts, `a fox --n bad --s 30`, or of A1111,
    `--prompt "a fox" --steps 30`."""
    first, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    values: dict[str, Any] = {"prompt": first.strip()} if first.strip() else {}
    for option in options:
        name, _, text = option.partition(" ")
        if name not in OPTIONS:
            raise UsageError(f'there is no option "--{name}"', hint=suggestion(name, OPTIONS))
        key = OPTIONS[name]
        if key in values:
            raise UsageError(f'"{key}" is given twice')
        text = text.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        values[key] = _as_written(key, text)
    return values


def _as_written(key: str, text: str) -> Any:
    """The value that a text stands for: the readers of numbers take no texts."""
    readers = {_number: float, _count: int, _side: int}
    try:
        return readers.get(KEYS[key][1], str)(text)
    except ValueError:
        return text


def _request(values: Mapping[str, Any]) -> Request:
    fields, settings = {}, {}
    for key, value in values.items():
        if key not in KEYS:
            raise UsageError(f'there is no key "{key}"', hint=suggestion(key, KEYS))
        if value is None:
            continue
        name, read = KEYS[key]
        try:
            (fields if name in FIELDS else settings)[name] = read(value)
        except ValueError as wanted:
            raise UsageError(f'"{key}" must be {wanted}', f"got {json.dumps(value)}"[:80]) from None
    return Request(**fields, settings=settings)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise UsageError(f"a prompt of {len(text)} characters", f"the limit is {MAX_TEXT}")
    if any(c < " " and c not in "\t\n" for c in text) or not _encodes(text):
        raise UsageError("the prompt has control characters", json.dumps(text)[:80])


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or undecodable arguments
        return False
    return True


def read_requests(where: str, base: Request) -> Iterator[Request | DifftoolError | None]:
    """The requests of a file, or of stdin for "-", one a line, each completed by `base`.

    A line that cannot be read is its error. None means that nothing more is there yet, so that
    what was read can be worked on: a stream's first image does not wait for its last line.
    """
    try:
        # Not the sys.stdin object: a thread left waiting in it would hold its lock at exit.
        descriptor = 0 if where == "-" else os.open(where, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise UsageError(f"cannot read the prompts {where}", error.strerror) from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"the prompts {where} are a folder", hint="give a file, or - for stdin")
    lines: Iterable[bytes | None] = _split(descriptor)
    if not stat.S_ISREG(mode):
        lines = _ahead(lines)
    return _parsed(lines, "stdin" if where == "-" else Path(where).name, base)


def _parsed(
    lines: Iterable[bytes | None], source: str, base: Request
) -> Iterator[Request | DifftoolError | None]:
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        where = f"{source} line {number}"
        if len(line) > MAX_LINE:
            why = f"more than {MAX_LINE} bytes, so what follows is not read"
            yield UsageError(f"{where} is too long", why)
            return
        try:
            request = parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield UsageError(f"{where}: not UTF-8 text")
        except DifftoolError as error:
            yield located(error, where)
        else:
            if request is not None:
                yield replace(request.over(base), source=where)


def located(error: DifftoolError, where: str) -> DifftoolError:
    """The same error, saying where it is."""
    what = f"{where}: {error.what}" if where else error.what
    return type(error)(what, error.why, error.hint)


def _split(descriptor: int) -> Iterator[bytes]:
    """Lines as they arrive, without waiting for a full buffer."""
    rest = b""
    try:
        while chunk := os.read(descriptor, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > MAX_LINE:
                break
    finally:
        if descriptor:
            os.close(descriptor)
    if rest:
        yield rest


def _ahead(lines: Iterable[bytes | None]) -> Iterator[bytes | None]:
    """The lines, read by a thread; None whenever the next one has to be waited for."""
    queue: Queue[bytes | None] = Queue(maxsize=1024)

    def read() -> None:
        try:
            for line in lines:
                queue.put(line)
        finally:
            queue.put(None)

    Thread(target=read, daemon=True).start()
    while True:
        try:
            line = queue.get_nowait()
        except Empty:
            yield None
            line = queue.get()
        if line is None:
            return
        yield line
