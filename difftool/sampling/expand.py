"""From prompts that stand for many to the prompt of each picture. Torch-free.

What is chosen follows the picture's seed. What it was chosen from goes along as the template, and a
prompt that has one is final: nothing in it stands for anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import TypeGuard, cast

from difftool.config.options import by_name
from difftool.config.schema import SampleConfig
from difftool.errors import UsageError
from difftool.pipeline.matches import MATCHES
from difftool.sampling.requests import Request, as_written, request_of
from difftool.sampling.settings import SETTINGS, Setting
from difftool.text.dice import Dice
from difftool.text.dynamic import Dynamic, is_dynamic
from difftool.text.midjourney import parameters
from difftool.text.syntax import SYNTAXES
from difftool.text.wildcards import Wildcards

TEMPLATES = {"prompt": "template", "negative": "negative_template"}
"""The prompts of a request, and where what they were chosen from is kept."""
LATE = ("seed", "repeat")
"""Parameters that say which pictures there are."""
MAX_COMBINATIONS = 100_000
FOLDER = Path("wildcards")
"""Where wildcards are where nothing else is said, if it is there."""


def applied(request: Request, inner: bool = False) -> Request:
    """A request with what Midjourney's parameters in its prompt ask for, and with what is not to be
    drawn in its negative prompt.

    inner: they stood within braces, where a seed and a number come too late. UsageError for one
    whose value is none.
    """
    if request.prompt and (inner or request.template is None):
        found, rows = parameters(request.prompt), by_name(SETTINGS)
        late = {name: found.values.pop(name) for name in LATE if inner and name in found.values}
        others = (*found.others, *(f"--{name} {text}" for name, text in late.items()))
        read = {}
        for name, text in found.values.items():
            row = cast(Setting, rows[name])
            given = as_written(name, text or row.alone or "")
            read[name] = row.one(given, f"--{name} in the prompt")
        request = _placed(request, read) if inner else request
        no = ", ".join(filter(None, (request.no, read.pop("no", ""))))
        request = replace(
            request_of(read).over(request), prompt=found.prompt, no=no or None,
            ignored=(*request.ignored, *others),
        )  # fmt: skip
    if not request.no:
        return request
    negative = ", ".join(filter(None, (request.negative, request.no)))
    kept = request.negative_template
    kept = negative if kept is not None and kept == (request.negative or "") else kept
    return replace(request, negative=negative, negative_template=kept, no=None)


def _placed(request: Request, read: Collection[str]) -> Request:
    """A request without its places on axes whose values what was chosen takes the places of."""
    taken = {*read, "size"} if "ar" in read else {*read}
    kept = tuple((axis, text) for axis, text in request.place if axis not in taken)
    told = [
        f'"{request.prompt}" is drawn as it says itself, not with {axis.replace("_", " ")} {text}'
        for axis, text in request.place
        if axis in taken
    ]
    return replace(request, place=kept, changed=(*request.changed, *told))


def is_plain(request: Request, match: str | None, own: SampleConfig | None = None) -> bool:
    """Whether nothing in its prompts stands for anything else. match: the tool whose syntax they
    are in where they do not say it; own: else it is this one."""
    tool = (own or SampleConfig()).prompt_syntax
    tool = tool if match is None else MATCHES[match].settings["prompt_syntax"]
    return not SYNTAXES[request.settings.get("prompt_syntax") or tool].stands


@dataclass(frozen=True)
class Expander:
    """Chooses the prompts of pictures."""

    folder: Path | None = None
    """Of wildcards."""
    combinatorial: bool = False
    """Whether every prompt is drawn that one can stand for."""
    dynamic: Dynamic = field(init=False)

    def __post_init__(self) -> None:
        folder = self.folder or (FOLDER if FOLDER.is_dir() else None)
        object.__setattr__(self, "dynamic", Dynamic(Wildcards(folder).lines))

    def requests(self, request: Request) -> Iterator[Request]:
        """The requests that one is drawn as: itself, or each of its combinations."""
        request = applied(request)
        open_ = self._open(request)
        if not (self.combinatorial and open_):
            yield request
            return
        every = (self.dynamic.all(getattr(request, name)) for name in open_)
        for texts in product(*every) if len(open_) > 1 else ((text,) for text in next(iter(every))):
            yield self._final(request, dict(zip(open_, texts, strict=True)))

    def count(self, request: Request) -> int:
        """How many requests one is drawn as; UsageError for more than MAX_COMBINATIONS."""
        count = 1
        for name in self._open(request) if self.combinatorial else ():
            every = self.dynamic.all(getattr(request, name))
            count *= sum(1 for _ in islice(every, MAX_COMBINATIONS + 1))
        if count > MAX_COMBINATIONS:
            why = f"the limit is {MAX_COMBINATIONS}"
            raise UsageError("the prompt has too many combinations", why, "ask for fewer at once")
        return count

    def chosen(self, request: Request, seed: int) -> Request:
        """The request of the picture of a seed."""
        return self._final(
            request,
            {
                name: self.dynamic.one(getattr(request, name), Dice(name, seed).roll)
                for name in self._open(request)
            },
        )

    def is_open(self, request: Request) -> bool:
        """Whether there is something to choose in it."""
        return bool(self._open(request))

    def _open(self, request: Request) -> list[str]:
        """Its prompts in which there is something to choose."""
        return [
            name
            for name, template in TEMPLATES.items()
            if getattr(request, template) is None and is_dynamic(getattr(request, name) or "")
        ]

    def _final(self, request: Request, texts: dict[str, str]) -> Request:
        kept = {TEMPLATES[name]: getattr(request, name) for name in texts}
        return applied(replace(request, **texts, **kept), inner="prompt" in texts)


def spread(request: Request) -> Iterator[Request]:
    """A request for each picture of the folder that it starts from or varies, with the mask of its
    name where there is a folder of masks; itself, where there is none. UsageError for a folder
    without a picture."""
    folders = [name for name in ("init", "image_prompt") if _is_folder(getattr(request, name))]
    if not folders:
        yield request
        return
    (name, *_) = folders
    folder = Path(getattr(request, name))
    if not (found := _pictures(folder)):
        raise UsageError(f"the folder {folder} holds no picture")
    masks: dict[str, Path] = {}
    if _is_folder(request.mask):
        masks = {file.stem: file for file in _pictures(Path(request.mask))}
    for file in found:
        one = replace(request, **{name: str(file)})
        if _is_folder(request.mask):
            mask = masks.get(file.stem, Path(request.mask, file.name))
            one = replace(one, mask=str(mask))
        yield from spread(one)


def _is_folder(path: str | None) -> TypeGuard[str]:
    return path is not None and Path(path).is_dir()


def _pictures(folder: Path) -> list[Path]:
    from difftool.images.formats import SUFFIXES

    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def final(request: Request) -> Request:
    """A request whose prompts are as a picture has them."""
    kept = {
        template: getattr(request, name) or ""
        for name, template in TEMPLATES.items()
        if getattr(request, template) is None
    }
    return replace(request, **kept)
