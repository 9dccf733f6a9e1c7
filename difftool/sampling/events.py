"""What happens while pictures are made, one event at a time. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.errors import DifftoolError

if TYPE_CHECKING:
    from PIL.Image import Image

    from difftool.config.schema import SampleConfig
    from difftool.evaluation.judge import Judgement
    from difftool.sampling.sample import Sample


@dataclass(frozen=True)
class Started:
    """The models are loaded, and the settings that are asked for fit."""

    model: str
    settings: SampleConfig
    """Of a picture that asks for nothing else."""
    notes: Sequence[str]
    """What was decided about the models: files, evidence, adapters, words."""
    work: int | None = None
    """Steps of all pictures that are asked for; None where lines are yet to be read."""


@dataclass(frozen=True)
class Loading:
    """A model's weights are about to be read, which were not needed before."""

    model: str


@dataclass(frozen=True)
class Working:
    """A step of the sampler is done for a batch of images."""

    images: int
    step: int
    steps: int
    preview: Image | None = None
    """What x0 looks like, where that is asked for; with 0 images, what became of them."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A picture that was made; `path` is None where it went to no file."""

    sample: Sample
    image: Image
    """Its `info` has the text chunks of its file."""
    path: Path | None
    seconds: float
    latents: Path | None = None
    gif: Path | None = None

    @property
    def index(self) -> int:
        """Its number in the run."""
        return self.sample.index

    def report(self) -> dict[str, Any]:
        """The picture as a JSON object, which as a line of --prompts asks for it again."""
        beside = {"latents": self.latents, "gif": self.gif}
        files = {name: str(path) for name, path in beside.items() if path is not None}
        said = self.sample.report(seconds=round(self.seconds, 3))
        path = {} if self.path is None else {"path": str(self.path)}
        return path | {"index": self.index} | said | files


@dataclass(frozen=True)
class Finishing:
    """All pictures are made, and something is made of them."""

    work: str
    """What, as "drawing a grid"."""


@dataclass(frozen=True)
class Sheet:
    """A page of the grid of all pictures."""

    path: Path | None
    images: int
    reports: Sequence[dict[str, Any]] = ()
    """With the first page, what each picture was asked for that has no file of its own."""
    existing: bool = False
    """Whether it was there already, as it would be made."""

    def report(self) -> dict[str, Any]:
        """As a JSON object."""
        pictures = {"pictures": list(self.reports)} if self.reports else {}
        existing = {"existing": True} if self.existing else {}
        return {"path": str(self.path), "grid": self.images} | pictures | existing


@dataclass(frozen=True)
class Failure:
    """An image, or a whole request, that was not made."""

    index: int
    error: DifftoolError


@dataclass(frozen=True, kw_only=True)
class Existing:
    """A picture that is there already."""

    sample: Sample
    path: Path | None
    """None while it is still to be made, for the first of those that ask for it."""

    @property
    def index(self) -> int:
        """Its number in the run."""
        return self.sample.index

    def report(self) -> dict[str, Any]:
        """The same object as of the picture when it was made."""
        said = self.sample.report(seconds=0.0)
        return {"path": str(self.path), "index": self.index} | said | {"existing": True}


@dataclass(frozen=True)
class Note:
    """Something to know about a request; a warning where it was not followed to the letter."""

    text: str
    warning: bool = True


@dataclass(frozen=True)
class Judged:
    """How near what was made is to a reference."""

    judgement: Judgement


Event = (
    Started | Loading | Working | Result | Finishing | Sheet | Failure | Existing | Note | Judged
)
