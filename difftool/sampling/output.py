"""Where pictures go: names from templates, files that replace none unasked. Torch-free."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from difftool.errors import UsageError
from difftool.images.formats import OUTPUT_FORMATS, format_of
from difftool.images.read import is_sheet
from difftool.sampling.files.inventory import Inventory
from difftool.sampling.files.names import (
    check_template,
    expand,
    fields,
    is_reserved,
    is_too_long,
    split_fields,
    without_fields,
)
from difftool.sampling.settings import Values
from difftool.storage.commit import write_whole
from difftool.storage.locks import Lock
from difftool.storage.places import check_place
from difftool.storage.read import read_bytes

PAGES = (".html", ".htm")
"""Endings of names of pages."""
SHEET = "grid"
"""How the name of a sheet ends that is beside the pictures."""


@dataclass
class Numbering:
    """How far the pictures of a command are numbered, and how they are called."""

    index: int = 0
    """Of the next picture."""
    names: dict[str, int] = field(default_factory=dict)
    """How often each name was asked for; pictures that came later have a number."""
    inventory: Inventory | None = None
    """What is there already, where that is left out."""


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
    only_sheet: bool = False
    """Whether the name is that of a sheet of all pictures, and none has a file of its own."""
    page: bool = False
    """Whether that is a page of HTML, with pictures in the format."""

    @classmethod
    def parse(
        cls,
        where: str | None,
        *,
        format: str | None = None,
        many: bool = False,
        grid: bool = False,
        overwrite: bool = False,
        skip_existing: bool = False,
    ) -> Output:
        """The meaning of -o: a folder (existing, or with a trailing /), a file, a template, or -.

        A file that is to hold `many` pictures becomes STEM-0000.png and so on, unless it is that of
        a `grid` of them, which is then all that is written.
        """
        if where == "-":
            if overwrite or skip_existing:
                raise UsageError("-o - writes no file that could be there already")
            return cls(stdout=True, format=format or "png", only_sheet=grid)
        if where is None or where.endswith(("/", os.sep)) or Path(where).is_dir():
            return cls(
                root=Path(where or "outputs"),
                format=format or "png",
                overwrite=overwrite,
                skip_existing=skip_existing,
            )
        check_template(where)
        page = PurePath(where).suffix.lower() in PAGES
        ending = PurePath(where).suffix
        if page and fields(where):
            raise UsageError(f"{where} is one page of all pictures", hint="give it a plain name")
        if not page:
            ending = _ending(where, f'"{where}/" is a folder, "{where}.png" a file')
        if not page and format is not None and format_of(ending) != format:
            raise UsageError(f"{where} is not a name for --format {format}", hint="leave one out")
        only_sheet = page or (grid and not fields(where))
        if only_sheet and skip_existing:
            hint = "-o FOLDER/ has one for each, and the grid beside them"
            raise UsageError("--skip-existing needs a file for each picture", hint=hint)
        if many and not only_sheet and not fields(where):
            where = f"{where.removesuffix(ending)}-[index:04]{ending}"
        root, template = split_fields(where)
        output = cls(
            root=Path(root),
            template=template,
            format=format_of(ending) or format or "png",
            overwrite=overwrite,
            skip_existing=skip_existing,
            only_sheet=only_sheet,
            page=page,
        )
        if not fields(template):
            output.path({})  # fails now if it is taken, not after all the work
        return output

    def check_folder(self) -> None:
        """UsageError if pictures cannot be written to its folder, ResourceError if its disk is
        full: fails now, not after all the work."""
        check_place(self.root / (PurePath(without_fields(self.template, "x")).name or "picture"))

    def path(self, values: Values, out: str | None = None) -> Path | None:
        """Where a picture of these values goes; None if its number is given when it is written.

        `out` is a name below the folder, asked for with the picture. UsageError for a name that
        would leave the folder or that some system would misread, and for one that is taken.
        """
        path = self.name(values, out)
        if path is not None:
            self.check_free(path)
        return path

    def name(self, values: Values, out: str | None = None) -> Path | None:
        """The same, whether it is taken or not."""
        if self.stdout:
            return None
        if not (self.template or out):
            return None
        name = expand(_checked_name(out, self.format) if out else self.template, values)
        for part in PurePath(name).parts:
            if is_reserved(part) or is_too_long(part):
                raise UsageError(f"{name} is not usable as the name of a picture")
        return self.root / name

    def check_free(self, path: Path) -> None:
        """UsageError for the name of a file that is there and is neither replaced nor left."""
        if os.path.lexists(path) and not (self.overwrite or self.skip_existing):
            raise _exists(path)

    def sheet_path(self, page: int = 1) -> Path | None:
        """Where a page of a sheet of all pictures goes; None where it gets a number. UsageError if
        taken; where what is there is left, a sheet of before is renewed."""
        if self.stdout or not self.template:
            return None
        whole = self.template if self.only_sheet else without_fields(self.template)
        name = PurePath(whole).name
        ending = PurePath(f"x{name}").suffix
        stem = name.removesuffix(ending).strip("-_. ")
        if not self.only_sheet:
            stem = f"{stem}{'-' if stem else ''}{SHEET}"
        path = self.root / f"{stem}{f'-{page}' if page > 1 else ''}{ending}"
        if os.path.lexists(path) and not self.overwrite:
            if not self.skip_existing:
                raise _exists(path)
            if not is_sheet(path):
                hint = "give another name, or remove what is there"
                raise UsageError(f"{path} exists, and is no grid of difftool's", hint=hint)
        return path

    def write_sheet(self, data: bytes, page: int = 1) -> tuple[Path | None, bool]:
        """Write a page of a sheet of all pictures; its path, None for stdout, and whether it was
        there already: where what is there is left, the same sheet is not written again."""
        path = self.sheet_path(page)
        if self.skip_existing:
            there = [path] if path else sorted(self.root.glob(f"*-{SHEET}.{self.format}"))
            for each in filter(os.path.isfile, there):
                if os.path.getsize(each) == len(data) and read_bytes(each, len(data)) == data:
                    return each, True
        renewed = replace(self, overwrite=self.overwrite or self.skip_existing)
        return renewed.write(data, path, SHEET), False

    def folder(self, path: Path | None) -> Path:
        """The folder of a picture of that path, or of one that is numbered when it is written; the
        working folder where it goes to stdout."""
        return Path() if self.stdout else path.parent if path else self.root

    @property
    def is_fixed(self) -> bool:
        """Whether it is the name of one picture."""
        return bool(self.template) and not fields(self.template)

    def write(
        self,
        data: bytes,
        path: Path | None,
        tail: int | str,
        before: Callable[[Path], None] = lambda path: None,
    ) -> Path | None:
        """Write a picture's bytes whole or not at all; returns its path, None for stdout.

        Without a path it is the next free number in the folder, with a tail (its seed). before: is
        told the path just before there is a file.
        """
        if self.stdout:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return None
        folder = self._folder(path.parent if path else self.root)
        if path:
            before(path)
            write_whole(path, data, self.overwrite)
            return path
        # One process at a time takes a number; where folders cannot be locked, no two pictures are
        # one file all the same.
        with Lock(folder):
            pattern = re.compile(r"([0-9]{5,9})-")
            taken = [int(m[1]) for name in os.listdir(folder) if (m := pattern.match(name))]
            path = folder / f"{max(taken, default=-1) + 1:05d}-{tail}.{self.format}"
            before(path)
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
    for part in without_fields(out, "x").split("/"):
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
