"""Where pictures go: names from templates, files that replace none unasked. Torch-free."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from difftool.errors import UsageError, suggestion
from difftool.images.formats import OUTPUT_FORMATS, format_of
from difftool.sampling.settings import ALWAYS, SETTINGS, Values
from difftool.storage.commit import write_whole
from difftool.storage.locks import Lock
from difftool.storage.places import check_place

FIELDS = (*(row.name for row in ALWAYS), "index", "model", "model_hash", "date")
"""The words of templates."""
NUMBERS = ("seed", "index", *(row.name for row in ALWAYS if row.type is int))
"""Those that can be padded with zeros."""
ALIASES = {word: row.name for row in SETTINGS for word in row.words}

_FIELD = re.compile(r"\[([A-Za-z_]+)(?::([0-9]{1,2}))?\]")
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)}


MAX_SLUG, MAX_SLUG_BYTES, MAX_PART_BYTES = 100, 150, 200
"""Of a value in a name, and of one part of a path: systems have room for 255 bytes."""
_KEPT = frozenset("Lu Ll Lt Lm Lo Mn Mc Nd Nl No So".split())
"""Unicode's categories of letters, marks, numbers and pictographs."""


def slug(value: object, empty: str = "none", size: int = MAX_SLUG_BYTES) -> str:
    """A value as part of a file name: letters, digits and pictographs of every script, and ._-
    within; at most 100 characters, and bytes as said. No system takes it for a device."""
    plain = unicodedata.normalize("NFKC", str(value))
    kept = "".join(c if c in "._-" or unicodedata.category(c) in _KEPT else " " for c in plain)
    short = "-".join(kept.split())[:MAX_SLUG].encode("utf-8", "ignore")[:size]
    named = short.decode("utf-8", "ignore").strip(".-_") or empty
    return f"_{named}" if _is_reserved(named) else named


def _is_reserved(part: str) -> bool:
    """Whether Windows takes a part of a path for a device, whatever its ending."""
    return part.split(".")[0].strip().lower() in _RESERVED


def expand(template: str, values: Values) -> str:
    """The template with each [field] and [field:05] replaced by its value's slug; shorter ones
    where several make a name too long."""

    def filled(size: int) -> str:
        def value(match: re.Match[str]) -> str:
            name = _field(match[1])
            value = values[name]
            if isinstance(value, int):
                return f"{value:0{int(match[2] or 1)}d}"
            return slug(f"{value:g}" if isinstance(value, float) else value or "", name, size)

        return _FIELD.sub(value, template)

    name = filled(MAX_SLUG_BYTES)
    for size in (90, 60, 40, 25):
        if all(len(os.fsencode(part)) <= MAX_PART_BYTES for part in PurePath(name).parts):
            break
        name = filled(size)
    return name


def _field(name: str) -> str:
    """The word of a template in today's spelling."""
    return ALIASES.get(name.lower(), name.lower())


def check_template(template: str) -> None:
    """UsageError for a field that there is not, or that has no digits to pad."""
    for name, digits in _FIELD.findall(template):
        if name.lower() not in (*FIELDS, *ALIASES):
            what = f'there is no field "[{name}]" for names of pictures'
            raise UsageError(what, hint=suggestion(name, FIELDS))
        if digits and name.lower() not in NUMBERS:
            raise UsageError(f"[{name}:{digits}] pads what is not a whole number")


@dataclass
class Numbering:
    """How far the pictures of a command are numbered, and how they are called."""

    index: int = 0
    """Of the next picture."""
    names: dict[str, list[tuple[object, ...]]] = field(default_factory=dict)
    """What templates took of the pictures of each name, that others have with a number."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the pictures of a run go, and in which format.

    `template` is relative to `root`, below which everything stays; "" numbers the pictures:
    NNNNN-SEED. With `stdout` there is one picture, and it goes there.
    """

    root: Path = Path("outputs")
    template: str = ""
    format: str = "png"
    stdout: bool = False
    overwrite: bool = False
    skip_existing: bool = False

    @classmethod
    def parse(
        cls,
        where: str | None,
        *,
        format: str | None = None,
        many: bool = False,
        overwrite: bool = False,
        skip_existing: bool = False,
    ) -> Output:
        """The meaning of -o: a folder (existing, or with a trailing /), a file, a template, or -.

        A file that is to hold `many` pictures becomes STEM-0000.png and so on.
        """
        if where == "-":
            if overwrite or skip_existing:
                raise UsageError("-o - writes no file that could be there already")
            return cls(stdout=True, format=format or "png")
        if where is None or where.endswith(("/", os.sep)) or Path(where).is_dir():
            return cls(
                root=Path(where or "outputs"),
                format=format or "png",
                overwrite=overwrite,
                skip_existing=skip_existing,
            )
        check_template(where)
        ending = _ending(where, f'"{where}/" is a folder, "{where}.png" a file')
        if format is not None and format_of(ending) != format:
            raise UsageError(f"{where} is not a name for --format {format}", hint="leave one out")
        if many and not _FIELD.search(where):
            where = f"{where.removesuffix(ending)}-[index:04]{ending}"
        parts = PurePath(where).parts
        first = next((i for i, part in enumerate(parts) if _FIELD.search(part)), len(parts) - 1)
        root, template = Path(*parts[:first]), str(PurePath(*parts[first:]))
        output = cls(
            root=root,
            template=template,
            format=format_of(ending) or "png",
            overwrite=overwrite,
            skip_existing=skip_existing,
        )
        if not _FIELD.search(template):
            output.path({})  # fails now if it is taken, not after all the work
        return output

    def check_folder(self) -> None:
        """UsageError if pictures cannot be written to its folder, ResourceError if its disk is
        full: fails now, not after all the work."""
        check_place(self.root / (PurePath(self.template).name or "picture"))

    def check_tells_apart(self, images: int) -> None:
        """UsageError for a template that gives the pictures of one prompt one name."""
        words = {_field(name) for name, _ in _FIELD.findall(self.template)}
        if self.template and not words & {"seed", "index"}:
            what = f"{self.template} would be the name of {images} pictures"
            raise UsageError(what, hint="put [seed] or [index] into the name")

    def fields(self, values: Values) -> tuple[object, ...]:
        """What the template takes of a picture's values: it cannot tell apart where all are the
        same."""
        return tuple(values[_field(name)] for name, _ in _FIELD.findall(self.template))

    def path(self, values: Values, out: str | None = None) -> Path | None:
        """Where a picture of these values goes; None if its number is given when it is written.

        `out` is a name below the folder, asked for with the picture. UsageError for a name that
        would leave the folder or that some system would misread, and for one that is taken.
        """
        path = self.name(values, out)
        if path is not None:
            self.check_free(path)
        return path

    def name(self, values: Values, out: str | None = None, number: int = 1) -> Path | None:
        """The same, whether it is taken or not. `number`: above 1, it ends the name."""
        if self.stdout:
            return None
        if not (self.template or out):
            if self.skip_existing:
                hint = f"name them, such as -o {self.root}/[index:05].png"
                raise UsageError("--skip-existing has no meaning for numbered pictures", hint=hint)
            return None
        name = expand(_checked_name(out, self.format) if out else self.template, values)
        for part in PurePath(name).parts:
            if _is_reserved(part) or len(os.fsencode(part)) > MAX_PART_BYTES:
                raise UsageError(f"{name} is not usable as the name of a picture")
        path = self.root / name
        return path.with_name(f"{path.stem}-{number}{path.suffix}") if number > 1 else path

    def check_free(self, path: Path) -> None:
        """UsageError for the name of a file that is there and is neither replaced nor left."""
        if os.path.lexists(path) and not (self.overwrite or self.skip_existing):
            raise _exists(path)

    def sheet_path(self) -> Path | None:
        """Where a sheet of all pictures goes; None where it gets a number. UsageError if taken."""
        if self.stdout or not self.template:
            return None
        name = PurePath(self.template).name
        ending = PurePath(name).suffix
        stem = _FIELD.sub("", name.removesuffix(ending)).strip("-_. ")
        path = self.root / f"{stem}{'-' if stem else ''}grid{ending}"
        if os.path.lexists(path) and not self.overwrite:
            raise _exists(path)
        return path

    def folder(self, path: Path | None) -> Path:
        """The folder of a picture of that path, or of one that is numbered when it is written; the
        working folder where it goes to stdout."""
        return Path() if self.stdout else path.parent if path else self.root

    def write(self, data: bytes, path: Path | None, tail: int | str) -> Path | None:
        """Write a picture's bytes whole or not at all; returns its path, None for stdout.

        Without a path it is the next free number in the folder, with a tail (its seed).
        """
        if self.stdout:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return None
        folder = self._folder(path.parent if path else self.root)
        if path:
            write_whole(path, data, self.overwrite)
            return path
        # One process at a time takes a number; where folders cannot be locked, no two pictures are
        # one file all the same.
        with Lock(folder):
            pattern = re.compile(r"([0-9]{5,9})-")
            taken = [int(m[1]) for name in os.listdir(folder) if (m := pattern.match(name))]
            path = folder / f"{max(taken, default=-1) + 1:05d}-{tail}.{self.format}"
            write_whole(path, data)
        return path

    def _folder(self, folder: Path) -> Path:
        """The folder, made if need be, and found to lie below the root."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            root = self.root.resolve()
            # Once before anything is made through a link, once for what is there in the end.
            inside = folder.resolve().is_relative_to(root)
            if inside:
                folder.mkdir(parents=True, exist_ok=True)
                inside = folder.resolve().is_relative_to(root)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}", error.strerror) from None
        if not inside:
            raise UsageError(f"{folder} leads out of {self.root}", f"to {folder.resolve()}")
        return folder


def _ending(name: str, hint: str) -> str:
    ending = PurePath(name).suffix
    if format_of(ending) is None:
        *names, last = OUTPUT_FORMATS
        listed = f"{', '.join(names)} or {last}"
        raise UsageError(f"{name} is not the name of a {listed} picture", hint=hint)
    return ending


def _checked_name(out: str, format: str) -> str:
    """A name that came with a request, and may come from anywhere."""
    check_template(out)
    for part in _FIELD.sub("x", out).split("/"):
        if not part or part[0] in ".-" or part[-1] in ". " or re.search(r'[\\:*?"<>|]', part):
            raise UsageError(f'"{out}" is not usable as the name of a picture')
    if not out.isprintable():
        raise UsageError("the name of a picture has control characters")
    ending = _ending(out, f'"{out}.{format}" is one')
    if format_of(ending) != format:
        raise UsageError(f"{out} is not the name of a {format} picture", hint="see --format")
    return out


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists", hint="give --overwrite to replace it")
