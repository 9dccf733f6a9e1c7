"""The files of figures: of which kind, where, and how a figure becomes one. Torch-free; without
numpy until one is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from difftool.errors import UsageError, suggestion
from difftool.storage.commit import refuse_existing, write_whole
from difftool.storage.places import check_place

if TYPE_CHECKING:
    from difftool.forward.figures import Figure


class FigureFormat(NamedTuple):
    """How a figure becomes a file."""

    encode: Callable[[Figure], bytes]
    steps: int
    """Levels shown where it is not said."""


def _png(figure: Figure) -> bytes:
    from difftool.forward.drawing import draw
    from difftool.images.formats import OWN
    from difftool.images.write import encode_png

    return encode_png(draw(figure), OWN)


def _curves_png(figure: Figure) -> bytes:
    from difftool.forward.plots import draw_curves
    from difftool.images.formats import OWN
    from difftool.images.write import encode_png

    return encode_png(draw_curves(figure), OWN)


def _gif(figure: Figure) -> bytes:
    from difftool.forward.animation import gif

    return gif(figure)


def _webp(figure: Figure) -> bytes:
    from difftool.forward.animation import webp

    return webp(figure)


def _page(figure: Figure) -> bytes:
    from difftool.forward.page import page

    return page(figure)


def _table(figure: Figure) -> bytes:
    from difftool.forward.levels import csv_text

    return csv_text(figure.rows()).encode("utf-8")


OUTPUTS: dict[str, FigureFormat] = {
    "png": FigureFormat(_png, 8),
    "gif": FigureFormat(_gif, 40),
    "webp": FigureFormat(_webp, 40),
    "html": FigureFormat(_page, 25),
    "csv": FigureFormat(_table, 8),
}
"""By ending, without the dot."""
CURVES: dict[str, Callable[[Figure], bytes]] = {"csv": _table, "png": _curves_png, "html": _page}
"""The same for curves without a picture."""


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def format_of(output: str | None, format: str | None, known: Sequence[str]) -> str:
    """The kind of file that is written, one of those known: as the ending says, or by name."""
    if format is not None and format not in known:
        raise UsageError(
            f"--format {format} is not made of curves", hint="made: " + ", ".join(known)
        )
    if output is None or _is_folder(output):
        return format or known[0]
    ending = Path(output).suffix.lower()
    if ending.lstrip(".") not in known:
        what = f"--output {output} has an unknown ending"
        nearest = suggestion(ending, [f".{name}" for name in known])
        raise UsageError(what, f'"{ending}"' if ending else None, nearest)
    if format is not None and f".{format}" != ending:
        raise UsageError(f"--output {output} and --format {format} differ")
    return ending[1:]


def targets_of(
    images: Sequence[Path], output: str | None, kind: str, overwrite: bool
) -> tuple[Path, ...]:
    """Where each picture goes; UsageError where one cannot, or is there and not to be replaced."""
    if output is not None and not _is_folder(output):
        if len(images) > 1:
            what = f"{len(images)} pictures do not fit in one file"
            raise UsageError(what, f"--output {output}", f"{output}/ is a folder for them")
        targets = [Path(output)]
    else:
        targets = [Path(output or ".") / f"{image.stem}-noise.{kind}" for image in images]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            hint = "show them one at a time, with --output"
            raise UsageError(f"two pictures would be shown in {target}", hint=hint)
        check_free(target, overwrite)
    for folder in {target.parent: None for target in targets}:
        check_place(folder / targets[0].name)
    return tuple(targets)


def curve_target(output: str | None, format: str | None, overwrite: bool) -> tuple[Path, ...]:
    """The file of curves, if there is to be one."""
    if output is None:
        if format:
            raise UsageError(f"--format {format} needs --output with --curve")
        return ()
    if _is_folder(output):
        raise UsageError(f"--output {output} is a folder", hint="give a file: curve.png")
    check_free(Path(output), overwrite)
    check_place(Path(output))
    return (Path(output),)


def check_free(target: Path, overwrite: bool) -> None:
    """UsageError if a file is there and is not to be replaced, or cannot be."""
    refuse_existing(target, overwrite)
    if target.is_dir():
        raise UsageError(f"{target} is a folder")


def save(target: Path, data: bytes, overwrite: bool) -> None:
    """Write a file, in a folder that is made if it is not there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {target.parent}", error.strerror) from None
    write_whole(target, data, overwrite)
