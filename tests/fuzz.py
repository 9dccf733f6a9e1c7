"""A program for tests: hostile arguments and files, a case a number.

    python fuzz.py small FIRST COUNT    the cases from FIRST on, and what is wrong with them
    python fuzz.py small FIRST 1 -v     one case alone, with all that it says
    python fuzz.py large 0 500          files of 16 MB
    python fuzz.py faults 0 5           a case of each kind of fault, which has to be found

A case is a command line or a call of the library, over files that are sound, or made by code, or
changed. It may be refused in any way but these: an internal error, 5 seconds of one processor, 1 GB
of memory more than before, a file outside its folder, anything executed.
"""

from __future__ import annotations

import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_corpus as corpus

import difftool
from difftool.cli import app, console
from difftool.config.options import Option
from difftool.errors import DifftoolError

COMMANDS = ("train", "sample", "noise", "convert")
ROWS: dict[str, tuple[Option, ...]] = {
    name: tuple(import_module(f"difftool.cli.{name}").ROWS) for name in COMMANDS
}
SECONDS, STUCK = 5, 60
"""Of the processor, and of the clock, after which a case hangs."""
MEMORY = 1 << 30
SPACE = 4 << 30
"""Of addresses, more than before: what asks for more at once is told that there is none."""
BLOCK = 50
TEMPORARY = tempfile.gettempdir()
UNASKED = ("plugin", "list", "likelihood", "reverse", "steps", "num", "seed", "source", "target")
"""Options that the library is called with otherwise, or not at all; the first four, of which two
are long by right, are none of the commands' either."""
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
EXECUTES += ("pickle.find_class", "socket.connect", "pty.spawn")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Case(NamedTuple):
    """What is run, in an empty folder with the files beside it."""

    words: list[str]
    call: Callable[[], Any] | None = None
    """In place of the command of these words."""
    name: str = ""


class Finding(NamedTuple):
    """What is wrong with a case."""

    seed: int
    kind: str
    """internal, time, memory, outside, executed, lost"""
    name: str
    words: list[str]
    said: str

    def __str__(self) -> str:
        words = " ".join(repr(w) if len(w) < 80 else repr(w[:60]) + "..." for w in self.words)
        return f"{self.seed} {self.kind}: {self.name} {words}\n    {self.said.strip()[-1500:]}"


Make = Callable[[int, Path], Case | None]
"""The case of a number, whose files it writes into a folder; None: there are no more."""


class Hang(BaseException):
    """The time of a case is over."""


# --- cases ----------------------------------------------------------------------------------


def small(seed: int, folder: Path) -> Case:
    """Small files and arguments, drawn by the number."""
    rng = random.Random(seed)
    files = corpus.Files(rng, folder)
    kind = rng.choice((*KINDS, "arguments", "arguments"))
    return KINDS[kind](rng, files)


def arguments(rng: random.Random, files: corpus.Files) -> Case:
    """A command with options of any values."""
    name = rng.choice(COMMANDS)
    words = [name, *_subject(name, rng, files)]
    rows = [row for row in ROWS[name] if not row.argument and row.name not in UNASKED[:4]]
    for row in rng.sample(rows, rng.randint(0, 5)):
        words += _given(row, rng, files)
    if rng.random() < 0.05:
        words.append(corpus.text(rng))
    return Case(_bounded(name, words, rng))


def _subject(name: str, rng: random.Random, files: corpus.Files) -> list[str]:
    odd = rng.random() < 0.1
    if name == "train":
        return [corpus.word(rng) if odd else files.dataset(hostile=rng.random() < 0.2)]
    if name == "sample":
        return [corpus.text(rng) if odd else "a fox", "-m", files.model(hostile=rng.random() < 0.1)]
    if name == "noise":
        return [corpus.word(rng) if odd else files.picture(hostile=rng.random() < 0.2)]
    return [corpus.word(rng) if odd else files.model(hostile=rng.random() < 0.2), "out"]


def _given(row: Option, rng: random.Random, files: corpus.Files) -> list[str]:
    """An option with a value, or with none where it has none."""
    flag = rng.choice(row.spellings)
    if row.type is bool:
        return [flag]
    if row.name == "set":
        value = f"{rng.choice(corpus.KEYS)}={corpus.word(rng)}"
    elif row.choices and rng.random() < 0.7:
        value = rng.choice(list(row.choices()))
    elif row.type in (int, float):
        value = corpus.number(rng) if rng.random() < 0.6 else str(rng.randint(1, 4))
    elif row.file or row.type is Path:
        value = files.any() if rng.random() < 0.8 else corpus.word(rng)
    else:
        value = rng.choice([corpus.word(rng), corpus.number(rng), files.any()])
    return [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]


def _bounded(name: str, words: list[str], rng: random.Random) -> list[str]:
    """The same without what is long by right: training, and many pictures."""
    words = [word.replace("\0", "") if rng.random() < 0.99 else word for word in words]
    if name == "train":
        return [*words, rng.choice(["--dry-run", "--print-config"])]
    if name == "sample":
        if rng.random() < 0.6:
            return [*words, "--print-config"]
        small = [] if any(word.startswith("--size") for word in words) else ["--size", "32"]
        return [*words, *small, "--steps", "1", "--num", "1", "--seed", "1"]
    return words


def models(rng: random.Random, files: corpus.Files) -> Case:
    """A model's file that was changed."""
    model = files.model(hostile=True)
    kind = rng.choice(["difftool", "diffusers", "ldm"])
    return Case(
        rng.choice(
            [
                ["convert", "--inspect", model, *(["--json"] * rng.randint(0, 1))],
                ["convert", model, "out", "--to", kind, "--dry-run"],
                ["convert", model, "out", "--to", kind],
                ["sample", "a fox", "-m", model, "--steps", "1", "--size", "16", "--seed", "1"],
                ["sample", "a fox", "--print-config", "-m", model],
                ["noise", "-m", model, "--curve"],
            ]
        )
    )


def presets(rng: random.Random, files: corpus.Files) -> Case:
    """A preset that was changed."""
    how = ["--print-config"] if rng.random() < 0.5 else ["--dry-run"]
    more = ["--set", f"{rng.choice(corpus.KEYS)}={corpus.word(rng)}"] * (rng.random() < 0.3)
    return Case(["train", files.dataset(), "--preset", files.preset(), *how, *more])


def lines(rng: random.Random, files: corpus.Files) -> Case:
    """Lines of prompts, that were changed."""
    path = files.prompts()
    return Case(["sample", "-m", files.model(), "--prompts", path, "--steps", "1", "--size", "16"])


def metadata(rng: random.Random, files: corpus.Files) -> Case:
    """What a picture says of itself."""
    words = ["sample", "-m", files.model(), "--from-image", files.told()]
    run = ["--steps", "1", "--size", "16", "--num", "1", "--seed", "1"]
    return Case(words + (run if rng.random() < 0.3 else ["--print-config"]))


def pictures(rng: random.Random, files: corpus.Files) -> Case:
    """A picture that was changed."""
    picture = files.picture(hostile=True)
    run = ["--steps", "1", "--size", "16", "--seed", "1", "-m", files.model()]
    return Case(
        rng.choice(
            [
                ["noise", picture, "--steps", "2"],
                ["noise", picture, "--steps", "2", "-o", "out.gif"],
                ["sample", "a fox", "--init", picture, *run],
                ["sample", "a fox", "--init", files.picture(), "--mask", picture, *run],
            ]
        )
    )


def adapters(rng: random.Random, files: corpus.Files) -> Case:
    """A LoRA or a learned word that was changed."""
    run = ["sample", "a fox", "--steps", "1", "--size", "16", "--seed", "1", "-m", files.text_model]
    return Case(
        rng.choice(
            [
                ["convert", "--inspect", files.lora()],
                ["convert", files.lora(), "out.safetensors", "--to", rng.choice(["kohya", "peft"])],
                ["convert", files.text_model, "out", "--lora", files.lora(), "--dry-run"],
                [*run, "--lora", files.lora()],
                [*run, "--embedding", files.words()],
            ]
        )
    )


def datasets(rng: random.Random, files: corpus.Files) -> Case:
    """A set of pictures that was changed."""
    return Case(["train", files.dataset(hostile=True), "--dry-run", "--preset", "pixel-small"])


def library(rng: random.Random, files: corpus.Files) -> Case:
    """A function of the library with values of any type."""
    given = {}
    name = rng.choice(["sample", "noise", "convert"])
    rows = [r for r in ROWS[name] if r.name not in UNASKED]
    for row in rng.sample(rows, rng.randint(0, 3)):
        value = corpus.value(rng)
        given[row.name] = 10**5000 if value == corpus.DIGITS else value
    if name == "convert":
        model = files.model(hostile=rng.random() < 0.5)
        call = lambda: (difftool.inspect(model), difftool.convert(model, "out", **given))  # noqa: E731
    elif name == "noise":
        picture = files.picture(hostile=rng.random() < 0.5)
        call = lambda: difftool.noise(picture, **{**given, "steps": 2})  # noqa: E731
    else:
        model = files.model()
        call = lambda: difftool.load(model).sample(**{"prompt": "a fox", **given, "steps": 1})  # noqa: E731
    return Case(["library", name, str(list(given))], call)


KINDS: dict[str, Callable[[random.Random, corpus.Files], Case]] = {
    function.__name__: function
    for function in (
        arguments, models, presets, lines, metadata, pictures, adapters, datasets, library,
    )
}  # fmt: skip


def large(index: int, folder: Path) -> Case | None:
    """Large files, each made to cost much."""
    made = list(corpus.large(corpus.Files(random.Random(0), folder)).items())
    return Case(made[index][1](), None, made[index][0]) if index < len(made) else None


def _endless() -> None:
    while True:
        pass


FAULTS: dict[str, Callable[[], object]] = {
    "internal": lambda: {}["a"],
    "time": _endless,
    "memory": lambda: len(b"a" * (3 << 29)),
    "outside": lambda: Path("../evil").write_text("", encoding="utf-8"),
    "executed": lambda: os.system("true"),
}


def faults(index: int, folder: Path) -> Case | None:
    """What has to be found, a kind each."""
    made = list(FAULTS.items())
    return Case(["library"], made[index][1], made[index][0]) if index < len(made) else None


MAKES: dict[str, Make] = {"small": small, "large": large, "faults": faults}


# --- running them ----------------------------------------------------------------------------


class Watch:
    """What a process opens, changes and runs, while a folder is its own."""

    def __init__(self) -> None:
        self.folder, self.seen = "", list[tuple[str, str]]()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in EXECUTES:
            self.seen.append(("executed", f"{event} {args!r:.200}"))
        elif event in CHANGES or (event == "open" and isinstance(args[2], int)):
            if event == "open" and not args[2] & WRITES:
                return
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(event, path)

    def _check(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        with suppress(ValueError):
            real = os.path.realpath(os.fsdecode(path))
            if event == "os.mkdir" and os.path.isdir(real):
                return
            if real != self.folder and not real.startswith((self.folder + "/", "/dev/null")):
                self.seen.append(("outside", f"{event} {real}"))


def run(case: Case) -> tuple[int, str]:
    """Exit code, 0 to 5 and no internal error, and what was said."""
    out, err = io.StringIO(), io.StringIO()
    console.mode = console.Mode()
    sys.argv = ["difftool", *case.words[:1], "--debug", *case.words[1:]]
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.call() if case.call else app.main()
        except SystemExit as stopped:
            code = stopped.code
        except DifftoolError as error:
            code = error.code
            print(error, file=err)
        except Exception:
            code = 1
            traceback.print_exc(file=err)
    return code, err.getvalue() + out.getvalue()[-3000:]


def _memory(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def attempt(make: Make, seed: int, watch: Watch, verbose: bool = False) -> list[Finding]:
    """What is wrong with a case; it is run in a folder of its own, which is removed."""
    above = Path(tempfile.mkdtemp(prefix=f"fuzz-{seed}-", dir=TEMPORARY))
    folder = above / "here"
    folder.mkdir()
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    found: list[tuple[str, str]] = []
    try:
        if (case := make(seed, folder)) is None:
            return []
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the highest use of memory is measured anew
        before, start = _memory("VmRSS"), time.process_time()
        watch.seen, watch.folder = [], str(folder.resolve())
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, STUCK)
        code, said = 0, ""
        try:
            code, said = run(case)
        except Hang:
            found.append(("time", traceback.format_exc()))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            watch.folder = ""
        more = _memory("VmHWM") - before
        if verbose:
            cost = f"{time.process_time() - start:.1f} s, {more >> 20} MB"
            print(f"{seed} {case.name} {code} {cost} {case.words}\n{said[-2000:]}", flush=True)
        some = code == 1 and re.search(r"^\d+ made(, .*)?, \d+ failed$", said, re.MULTILINE)
        if not (some or code in (0, 2, 3, 4, 5)) or "went wrong inside" in said:
            found.append(("internal", said))
        if more > MEMORY or "\nerror: out of memory" in f"\n{said}":
            found.append(("memory", f"{more >> 20} MB: {said}"))
        found += dict.fromkeys(watch.seen)
        if os.listdir(above) != ["here"]:
            found.append(("outside", f"{os.listdir(above)}"))
    finally:
        os.chdir("/")
        shutil.rmtree(above, ignore_errors=True)
    return [Finding(seed, kind, case.name, case.words, text) for kind, text in found]


def _end(*_: Any) -> None:
    raise Hang


def _block(make: Make, seeds: Iterable[int], write: int, verbose: bool) -> None:
    """In a process of its own: a line before every case, and one for each finding."""
    signal.signal(signal.SIGPROF, _end)
    signal.signal(signal.SIGALRM, _end)
    limit = _memory("VmSize") + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Watch()
    for seed in seeds:
        os.write(write, f"\x1e{seed}".encode())
        for finding in attempt(make, seed, watch, verbose):
            os.write(write, f"\x1f{finding}".encode("utf-8", "backslashreplace"))


def fuzz(make: Make, first: int, count: int, verbose: bool = False) -> list[str]:
    """What is wrong with so many cases; a process for each fifty of them."""
    corpus.build()
    found = []
    seeds = list(range(first, first + count))
    while seeds:
        block, seeds = seeds[:BLOCK], seeds[BLOCK:]
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                _block(make, block, write, verbose)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            cases = pipe.read().decode().split("\x1e")[1:]
        status = os.waitpid(child, 0)[1]
        found += (told := [finding for case in cases for finding in case.split("\x1f")[1:]])
        if status:
            last = int(cases[-1].split("\x1f")[0]) if cases else block[0]
            found.append(f"{last} lost: the process ended by {status}")
            seeds = list(range(last + 1, block[-1] + 1)) + seeds
        if verbose:
            print(*told, f"to {block[-1]}: {len(found)} findings", sep="\n", flush=True)
    return found


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    what, first, count = sys.argv[1:4]
    findings = fuzz(MAKES[what], int(first), int(count), "-v" in sys.argv)
    for finding in findings:
        print(finding)
    print(f"{count} cases, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
