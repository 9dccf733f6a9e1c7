"""Whether a place takes what is to be written there: found before the work. Torch-free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from difftool.errors import ResourceError, UsageError
from difftool.storage.commit import hidden_folder, write_whole

WEIGHTS = (".safetensors", ".sft")
"""Endings of the files that models are written to."""
PROMISES = frozenset(
    """
    .safetensors .sft .ckpt .pt .pth .bin .pkl .gguf .onnx .h5 .msgpack .npz .npy
    .png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif
    .json .jsonl .yaml .yml .toml .csv .tsv .html .pdf .parquet .zip .tar .gz .tgz .7z .rar .py
    """.split()
)
"""Endings that say what a file is; others (sd1.5) are part of a name."""
TRIAL = 4096
"""Bytes that are written to see whether any can be."""


def user_cache() -> Path:
    """Where programs keep what can be made or had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def there(path: Path) -> Path:
    """What there is of a path: itself, or the nearest above it."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_ending(path: Path, what: str, own: Collection[str] = ()) -> None:
    """UsageError for a name that promises something else than is written there. own: the endings
    that promise what is."""
    ending = path.suffix.lower()
    if ending in PROMISES and ending not in own:
        better = path.with_suffix(next(iter(own), ""))
        why = f'a name that ends in "{ending}" promises something else'
        raise UsageError(f"{path} is not the name of {what}", why, f"{better} is one")


def check_place(path: Path, needed: int = 0, *, makes: bool = True) -> None:
    """Try whether a file or folder can be written at a path. needed: its size in bytes; makes:
    folders that it is to lie in are made.

    UsageError for a name that is too long, a file where a folder should be, a folder that is not
    there or cannot be written to; ResourceError where the disk has no room.
    """
    with suppress(FileNotFoundError):
        try:
            os.lstat(path)
        except FileNotFoundError:
            raise
        except NotADirectoryError:
            pass  # the file in the way is named below
        except OSError as error:
            raise UsageError(f"cannot write {path}", error.strerror) from None
    above = there(path.absolute().parent)
    if not above.is_dir():
        kind = "a link to nothing" if above.is_symlink() and not above.exists() else "a file"
        raise UsageError(f"cannot write {path}", f"{above} is {kind} and no folder")
    if above != path.absolute().parent and not makes:
        raise UsageError(f"cannot write {path}", f"the folder {path.parent} does not exist")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to the folder {above}", "permission denied")
    if (free := shutil.disk_usage(above).free) < needed:
        why = f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} are free"
        raise ResourceError(f"the disk has no room for {path}", why, "free some space")
    try:
        with hidden_folder(above / path.name) as place:
            write_whole(place / "trial", bytes(TRIAL))
    except (UsageError, ResourceError) as error:  # which tell of the trial, and not of the path
        system = error.__cause__ or error.__context__
        reason = f"in the folder {above}: {getattr(system, 'strerror', None) or error.why}"
        if isinstance(error, ResourceError):
            raise ResourceError(error.what, reason, error.hint) from system
        raise UsageError(f"cannot write {path}", reason) from None
