"""The whole work of `difftool noise` without its talk: from the options' values to figures.

    task = load(prepare(values))       # refuses what can be refused; then the model, if any
    for each in noise(task): ...       # a figure of each picture, in its file

Without a model torch-free; numpy is not imported before a figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.layers import merge, override_layers
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Level, build_path
from difftool.diffusion.path import Path as NoisePath
from difftool.errors import DifftoolError, ResourceError, UsageError
from difftool.forward.levels import (
    LevelRow,
    even_levels,
    finite,
    likelihood_table,
    likelihood_words,
)
from difftool.forward.options import DEFAULT_PATH
from difftool.forward.outputs import CURVES, OUTPUTS, curve_target, format_of, save, targets_of
from difftool.hub.find import find_model, model_name, place_of_model
from difftool.progress import Progress, silent

if TYPE_CHECKING:
    from PIL import Image

    from difftool.forward.figures import Figure
    from difftool.pipeline.model import Model

SAMPLER_STEPS, TABLE_LINES, EVALUATIONS = 20, 21, 128
"""Steps of a sampler, lines of a table and points of a likelihood, where it is not said."""
WORKS = ("latent", "reverse", "likelihood")
"""Options by which a model has to work."""


@dataclass(frozen=True, kw_only=True)
class NoiseTask:
    """What the options ask for, checked as far as it can be without a model."""

    values: Mapping[str, Any]
    """Every option by name, as `read_options` gives them."""
    kind: str = "png"
    """Of the files, or of what is shown."""
    targets: tuple[Path, ...] = ()
    """A file a picture, or that of the curves."""
    paths: Mapping[str, NoisePath] = field(default_factory=dict)
    """By name; more than one are compared. A model's is known when it is loaded."""
    model: Model | None = None
    """In whose space noise is added; None: to the pixels."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def source(self) -> str | None:
        """The model's name, or where it is; None where no model is asked for."""
        asked = any(self.values[name] for name in ("model", *WORKS))
        return model_name(self.values["model"]) if asked else None

    @property
    def name(self) -> str:
        """Of the first path."""
        return next(iter(self.paths))

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self.values["seed"] or 0

    def levels(self, path: NoisePath, usual: int | None) -> list[Level]:
        """The levels shown, clean to noisy: a sampler's, or `usual` even ones (None: all)."""
        if self.values["schedule"]:
            return self.visited(path)[::-1]
        return even_levels(path, self.values["steps"] or (usual and min(usual, path.steps)))

    def visited(self, path: NoisePath) -> list[Level]:
        """The levels that the sampler visits, noisy to clean."""
        return GRIDS[self.values["schedule"]](path, self.values["steps"] or SAMPLER_STEPS)


@dataclass(frozen=True)
class ShownPicture:
    """A picture that is shown in a file."""

    image: Path
    target: Path
    figure: Figure
    facts: dict[str, Any]
    """What else is known of it."""
    notes: tuple[str, ...]
    """How the picture was read."""

    def lines(self) -> tuple[list[tuple[str, str, str]], list[str]]:
        """What is said of its likelihood, if that was measured: a table, and what it means."""
        if "likelihood" not in self.facts:
            return [], []
        facts = self.facts["likelihood"]
        return likelihood_table(self.figure.rows(), facts), likelihood_words(facts)

    def report(self, task: NoiseTask) -> dict[str, Any]:
        """All that is known of it, as JSON."""
        width, height = self.figure.size
        result: dict[str, Any] = {"path": str(self.target), "image": str(self.image)}
        result |= {"width": width, "height": height, "seed": task.seed}
        if self.figure.comparison:
            strips = self.figure.strips
            result["noise_paths"] = {strip.title: finite(strip.rows()) for strip in strips}
        else:
            result |= {"noise_path": task.name, "levels": finite(self.figure.rows())}
        return result | self.facts


# --- what is asked for -----------------------------------------------------------------------


def prepare(values: Mapping[str, Any]) -> NoiseTask:
    """What the command's options ask for; UsageError for all that can be refused without a model,
    files that are there already among it."""
    output, format, overwrite = values["output"], values["format"], bool(values["overwrite"])
    if values["curve"]:
        kind = format_of(output, format, list(CURVES))
        return task_of(values, kind, curve_target(output, format, overwrite))
    if not values["images"]:
        hint = "difftool noise photo.png, or difftool noise --curve for the numbers"
        raise UsageError("no picture was given", hint=hint)
    kind = format_of(output, format, list(OUTPUTS))
    return task_of(values, kind, targets_of(values["images"], output, kind, overwrite))


def task_of(
    values: Mapping[str, Any], kind: str = "png", targets: tuple[Path, ...] = ()
) -> NoiseTask:
    """What the options ask for, without `FIGURES` as well; UsageError for models that are not
    there, options that the path does not have, and levels that are not on it."""
    task = NoiseTask(values=values, kind=kind, targets=targets)
    if task.source is not None:
        place_of_model(values["model"])
        return task
    options: dict[str, Any] = {}
    for layer in override_layers(values["set"] or []):
        options = merge(options, layer.values)
    if "kind" in options:
        raise UsageError("the kind of path is not set but named", hint="use --path NAME")
    names = values.get("compare") or [values["path"] or DEFAULT_PATH]
    task = replace(task, paths={name: build_path({"kind": name, **options}) for name in names})
    for path in task.paths.values():
        task.levels(path, OUTPUTS[kind].steps)
    return task


def load(task: NoiseTask) -> NoiseTask:
    """The same with the model's path, read from its header, or with the model where it has to work.

    UsageError for what the model cannot be told, InputError for a malformed or unsupported one.
    """
    values = task.values
    if task.source is None:
        return task
    if not any(values[name] for name in WORKS):
        return _with_path(task)
    from difftool.pipeline.load import load_model

    device, dtype = values["device"] or "auto", values["dtype"] or "auto"
    model = load_model(values["model"], device=device, dtype=dtype)
    warnings = list(model.warnings)
    if values["reverse"] or values["likelihood"]:
        from difftool.forward.reverse import condition
        from difftool.pipeline.condition import token_count

        condition(model, model.preset.sample.size, values["prompt"], values["label"])
        tokens, read = token_count(model, values["prompt"] or "")
        if tokens > read:
            warnings.append(f"the model reads {read} of the prompt's {tokens} tokens")
    return replace(
        task,
        model=model,
        paths={model.name: model.denoiser.path},
        notes=tuple(model.notes),
        warnings=tuple(warnings),
    )


def _with_path(task: NoiseTask) -> NoiseTask:
    """With the path of the model by the model's name; its weights are not loaded."""
    from difftool.formats import open_model

    file = find_model(task.values["model"])
    source = open_model(file)
    preset = source.preset
    notes = (f"model {preset.name} ({file})", *source.evidence)
    return replace(task, paths={preset.name: build_path(preset.path)}, notes=notes)


def configuration(task: NoiseTask) -> Iterator[tuple[str, Any, str]]:
    """Every value of what is shown, with its origin."""
    given = {text.partition("=")[0].strip(): f"--set {text}" for text in task.values["set"] or []}
    for name, path in task.paths.items():
        for key in fields(path):  # type: ignore[arg-type]
            value = getattr(path, key.name)
            if value is not None:
                yield f"{name}.{key.name}", value, given.get(key.name, f"path {name}")
    for flag in ("schedule", "steps", "seed", "size"):
        value = task.seed if flag == "seed" else task.values[flag]
        yield flag, value, f"--{flag}" if value else "default"


# --- what is shown ---------------------------------------------------------------------------


def noise(task: NoiseTask, progress: Progress = silent) -> Iterator[ShownPicture | DifftoolError]:
    """Show each picture in its file, one after the other; the error of one that cannot be."""
    from difftool.images.read import read_picture

    for image, target in zip(task.values["images"], task.targets, strict=True):
        try:
            picture = read_picture(image)
            figure, facts = figure_of(task, picture.image, progress)
            save(target, OUTPUTS[task.kind].encode(figure), bool(task.values["overwrite"]))
        except DifftoolError as error:
            if isinstance(error, ResourceError) and isinstance(error.__cause__, OSError):
                raise  # a disk that is full is full for the next picture too
            yield error
        else:
            yield ShownPicture(image, target, figure, facts, picture.notes)


def figure_of(
    task: NoiseTask, image: Image.Image, progress: Progress = silent
) -> tuple[Figure, dict[str, Any]]:
    """What is drawn of a picture, and what else is known of it."""
    from difftool.forward import figures
    from difftool.forward.process import PixelSpace

    values, seed, name, path = task.values, task.seed, task.name, task.paths[task.name]
    usual, facts = OUTPUTS[task.kind].steps, {}
    levels = [] if values["likelihood"] else task.levels(path, usual)
    if task.model is not None:
        from difftool.forward.reverse import ModelSpace, condition

        space = ModelSpace(task.model, image, values["size"])
        facts = {"model": task.model.name, "model_hash": task.model.hash}
        if values["reverse"] or values["likelihood"]:
            prompt, label = values["prompt"], values["label"]
            cond = condition(task.model, space.size, prompt, label)
            given = f'"{prompt}"' if prompt else label or ""
            facts |= {"prompt": prompt, "label": label}
            if values["likelihood"]:
                steps = values["steps"] or EVALUATIONS
                found = space.likelihood(cond, steps, seed, progress)
                figure = figures.likelihood_figure(space, found, seed, given)
                return figure, facts | {"likelihood": found.facts()}
            with progress("predicting", len(levels)) as bar:
                return figures.reverse_figure(space, levels, seed, cond, given, bar.update), facts
    else:
        space = PixelSpace(image, values["size"])
    if values["markov"]:
        figure, check = figures.markov_figure(space, name, path, levels, seed)
        return figure, facts | {"chain": check._asdict()}
    if task.kind == "html" and task.model is None:
        every = {name: task.levels(path, None) for name, path in task.paths.items()}
        return figures.page_figure(space, task.paths, every, seed), facts
    if len(task.paths) > 1:
        shown = {name: task.levels(path, usual) for name, path in task.paths.items()}
        return figures.compare_figure(space, task.paths, shown, seed), facts
    return figures.marginal_figure(space, name, path, levels, seed), facts


def noised(task: NoiseTask, image: Image.Image) -> list[Image.Image]:
    """The frames of a picture's last strip, each with its level in `.info`."""
    from PIL import Image as Images

    strip = figure_of(task, image)[0].strips[-1]
    pictures = [Images.fromarray(frame) for frame in strip.frames]
    for picture, row in zip(pictures, strip.rows(), strict=True):
        picture.info.update(row)
    return pictures


def curves(task: NoiseTask, usual: int | None) -> Figure:
    """The paths without a picture, and on them what a sampler visits, or even levels: `usual` ones
    (None: all; 0: none)."""
    from difftool.forward.figures import curve_figure

    schedule, steps = task.values["schedule"], task.values["steps"]
    visited = {}
    for name, path in task.paths.items():
        if schedule:
            visited[name] = task.visited(path)
        else:
            visited[name] = [] if usual == 0 and not steps else task.levels(path, usual)
    figure = curve_figure(task.paths, visited)
    if not schedule:
        return figure
    caption = f"dots: the levels of {schedule} in {steps or SAMPLER_STEPS} steps"
    return figure._replace(caption=caption)


def save_curves(task: NoiseTask) -> None:
    """The curves in their file, if there is to be one: all levels in a table; in a picture and a
    page the curve, and what is asked for as dots on it."""
    for target in task.targets:
        figure = curves(task, None if task.kind == "csv" else 0)
        save(target, CURVES[task.kind](figure), bool(task.values["overwrite"]))


def curve_rows(task: NoiseTask) -> dict[str, list[LevelRow]]:
    """All levels of each path, for JSON."""
    return {strip.title: finite(strip.rows()) for strip in curves(task, None).strips}
