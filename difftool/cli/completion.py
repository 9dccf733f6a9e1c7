"""What a shell is told that asks for the rest of a word.

Typer asks; here is what it gets: the values of an option that have names, with what they mean, and
nothing for a path, which the shell completes by itself.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping

from difftool.config.options import Option

VARIABLE = "_DIFFTOOL_COMPLETE"
"""What is set while a shell asks: complete_bash, complete_zsh, ..."""
BASH, BASH_INDEX, OTHERS = "COMP_WORDS", "COMP_CWORD", "_TYPER_COMPLETE_ARGS"
"""Where the shells put the words so far."""
KEY = "_DIFFTOOL_COMPLETE_KEY"
"""The KEY= before the part of a word that bash asks for."""


def words() -> list[str] | None:
    """The words of the command line that a shell asks about; None if none does."""
    if VARIABLE not in os.environ:
        return None
    return _split(os.environ.get(BASH) or os.environ.get(OTHERS) or "")[1:]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is still open
        return text.split()


def join_assignments() -> None:
    """Undo what bash does to KEY=VALUE: it makes three words of it, and asks for the last."""
    if os.environ.get(VARIABLE) != "complete_bash":
        return
    given = _split(os.environ.get(BASH, ""))
    index = int(os.environ.get(BASH_INDEX, len(given)))
    before, asked = given[:index], "".join(given[index : index + 1])
    if asked == "=":
        before, asked = [*before, "="], ""
    if before[-1:] == ["="] and len(before) > 1:
        del before[-1]
        if not before[-1].startswith("-"):
            os.environ[KEY] = f"{before.pop()}="
    before = [word for word in before if word != "="]  # of values that are whole already
    os.environ[BASH], os.environ[BASH_INDEX] = shlex.join([*before, asked]), str(len(before))


def completer(row: Option) -> Callable[[str], list[tuple[str, str]]] | None:
    """From the beginning of a value of an option to the values that begin so, each with a meaning;
    None if the values have no names."""
    values = row.complete or row.choices
    if values is None:
        return None

    def complete(incomplete: str) -> list[tuple[str, str]]:
        key = os.environ.get(KEY, "")
        found = {
            name.removeprefix(key): meaning
            for name, meaning in _meanings(values()).items()
            if name.startswith(key + incomplete)
        }
        heads = dict.fromkeys(name.partition("=")[0] for name in found if "=" in name)
        if "=" not in incomplete and len(heads) > 1:  # the keys first
            found = {f"{head}=": found.get(f"{head}=", "") for head in heads}
        return list(found.items())

    return complete


def _meanings(values: Iterable[str]) -> dict[str, str]:
    """Names and what they mean, where that is said."""
    about = getattr(values, "about", None)
    if about is not None:
        return {name: about(name) for name in values}
    return dict(values) if isinstance(values, Mapping) else dict.fromkeys(values, "")
