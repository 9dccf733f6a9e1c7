"""A program for tests: commands as they would run on another system than this.

    python systems.py windows|encodings COMMANDS.json

windows: without the modules, signals and calls that only POSIX has, where a folder cannot be opened
and a file's name has no `:` or `?`. encodings: whatever of the package reads or writes a text
without saying its encoding fails. Exit codes go to codes.json.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "pwd", "grp", "resource", "termios", "tty", "posix", "syslog")
CALLS = ("fork", "forkpty", "mkfifo", "sysconf", "getuid", "geteuid", "uname", "fchmod")
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGQUIT", "SIGKILL")
FORBIDDEN = set(':?*"<>|')


def _checked(path: Any) -> None:
    name = os.fspath(path) if not isinstance(path, int) else ""
    name = os.fsdecode(name)
    if name.startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", name)
    parts = Path(name).parts
    if any(FORBIDDEN & set(part) or part.endswith((" ", ".")) for part in parts if part != ".."):
        raise OSError(22, "Invalid argument", name)


def as_windows() -> None:
    """What is only POSIX's is gone."""
    for name in ("matplotlib.pyplot", "safetensors.torch", "torch.distributed", "torch.utils.data"):
        importlib.import_module(name)
    importlib.import_module("PIL.Image").preinit()
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in CALLS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        if hasattr(signal, name):
            delattr(signal, name)
    real_open, real_os_open, real_mkdir = builtins.open, os.open, os.mkdir

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        _checked(file)
        return real_open(file, *args, **options)

    def os_opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        _checked(path)
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_os_open(path, flags, *args, **options)

    def made(path: Any, *args: Any, **options: Any) -> None:
        _checked(path)
        real_mkdir(path, *args, **options)

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.open, os.mkdir = os_opened, made


def as_any_encoding() -> None:
    """A text without its encoding said is an error."""
    assert sys.flags.warn_default_encoding
    warnings.filterwarnings("error", category=EncodingWarning, module=r"difftool\.")


def main() -> None:
    {"windows": as_windows, "encodings": as_any_encoding}[sys.argv[1]]()
    from difftool.cli import app, console

    codes = []
    for command in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        console.mode = console.Mode()
        sys.argv = ["difftool", *command]
        try:
            app.main()
        except SystemExit as stopped:
            codes.append(stopped.code)
    Path("codes.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main()
