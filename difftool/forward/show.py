"""What is shown of a picture: from what is asked for to a figure. Torch-free without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Level, Path
from difftool.forward import figures
from difftool.forward.figures import Figure
from difftool.forward.levels import even_levels
from difftool.forward.outputs import OUTPUTS
from difftool.forward.process import PixelSpace

if TYPE_CHECKING:
    from difftool.pipeline.model import Model

SAMPLER_STEPS, TABLE_LINES = 20, 21
"""Steps of a sampler and lines of a table, where it is not said."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """What is asked for; None is whatever suits the output."""

    paths: Mapping[str, Path]
    """By name; more than one are compared."""
    model: Model | None = None
    """In whose space noise is added; None: to the pixels."""
    schedule: str | None = None
    """Of GRIDS: the levels that a sampler visits, in place of even ones."""
    steps: int | None = None
    seed: int = 0
    size: int | None = None
    """Longest side of a frame, in pixels."""
    markov: bool = False
    reverse: bool = False
    prompt: str | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """Of the first path."""
        return next(iter(self.paths))

    @property
    def path(self) -> Path:
        """The first of them."""
        return self.paths[self.name]

    def levels(self, path: Path, usual: int | None) -> list[Level]:
        """The levels shown, clean to noisy: a sampler's, or `usual` even ones (None: all)."""
        if self.schedule:
            return self.visited(path)[::-1]
        return even_levels(path, self.steps or (usual and min(usual, path.steps)))

    def visited(self, path: Path) -> list[Level]:
        """The levels that the sampler visits, noisy to clean."""
        return GRIDS[self.schedule or ""](path, self.steps or SAMPLER_STEPS)

    def shown(self, kind: str) -> list[Level]:
        """The levels of the first path in an output of that kind."""
        return self.levels(self.path, OUTPUTS[kind].steps)

    def figure(
        self, image: Image.Image, kind: str, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[Figure, dict[str, Any]]:
        """What is drawn of a picture in an output of that kind, and what else is known of it."""
        levels, facts = self.shown(kind), {}
        if self.model:
            from difftool.forward.reverse import ModelSpace, condition

            space = ModelSpace(self.model, image, self.size)
            facts = {"model": self.model.name, "model_hash": self.model.hash}
            if self.reverse:
                cond = condition(self.model, space.size, self.prompt, self.label)
                given = f'"{self.prompt}"' if self.prompt else self.label or ""
                figure = figures.reverse_figure(space, levels, self.seed, cond, given, progress)
                return figure, facts | {"prompt": self.prompt, "label": self.label}
        else:
            space = PixelSpace(image, self.size)
        if self.markov:
            figure, check = figures.markov_figure(space, self.name, self.path, levels, self.seed)
            return figure, facts | {"chain": check._asdict()}
        if kind == "html" and not self.model:
            every = {name: self.levels(path, None) for name, path in self.paths.items()}
            return figures.page_figure(space, self.paths, every, self.seed), facts
        if len(self.paths) > 1:
            shown = {n: self.levels(p, OUTPUTS[kind].steps) for n, p in self.paths.items()}
            return figures.compare_figure(space, self.paths, shown, self.seed), facts
        return figures.marginal_figure(space, self.name, self.path, levels, self.seed), facts

    def curves(self, usual: int | None) -> Figure:
        """The paths without a picture, and on them what a sampler visits, or even levels: `usual`
        ones (None: all; 0: none)."""
        visited = {}
        for name, path in self.paths.items():
            if self.schedule:
                visited[name] = self.visited(path)
            elif usual == 0 and not self.steps:
                visited[name] = []
            else:
                visited[name] = self.levels(path, usual)
        figure = figures.curve_figure(self.paths, visited)
        if not self.schedule:
            return figure
        steps = self.steps or SAMPLER_STEPS
        return figure._replace(caption=f"dots: the levels of {self.schedule} in {steps} steps")
