"""From requests to pictures on disk: batches of like settings, in order, one event at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difftool.config.schema import SampleConfig
from difftool.errors import (
    DifftoolError,
    InputError,
    ResourceError,
    UsageError,
    out_of_memory,
)
from difftool.images.fit import tile, to_pil
from difftool.pipeline.condition import token_count
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import (
    SampleInput,
    check_input,
    load_image_prompt,
    load_init,
    load_mask,
    picture_size,
)
from difftool.pipeline.model import Model, Word
from difftool.pipeline.settings import Refiner, SamplePlan, plan_sampling, resolve_settings
from difftool.pipeline.words import used_words
from difftool.sampling import metadata
from difftool.sampling.metadata import Recipe
from difftool.sampling.output import Output
from difftool.sampling.requests import Request, located
from difftool.storage.safetensors import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_BATCH = 16
BATCH_PIXELS = 1 << 20
MAX_SHEET_PIXELS = 1 << 28
LATENTS_KEY = "difftool.image"
"""Metadata key of saved latents: the chunk that their picture carries."""


@dataclass(frozen=True)
class Working:
    """A step of the sampler is done for a batch of images."""

    images: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A picture that was made; `path` is None where it went to stdout."""

    index: int
    path: Path | None
    recipe: Recipe
    seconds: float
    latents: Path | None = None


@dataclass(frozen=True)
class Grid:
    """The sheet of all the run's pictures."""

    path: Path | None
    images: int


@dataclass(frozen=True)
class Failure:
    """An image, or a whole request, that was not made."""

    index: int
    error: DifftoolError


@dataclass(frozen=True)
class Skipped:
    """A picture that is there already."""

    index: int
    path: Path


@dataclass(frozen=True)
class Note:
    """Something to know about a request; a warning where it was not followed to the letter."""

    text: str
    warning: bool = True


Event = Working | Result | Grid | Failure | Skipped | Note


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    index: int
    recipe: Recipe
    plan: SamplePlan | None
    """None where it is made of saved latents."""
    item: SampleInput
    path: Path | None


Entry = Job | Failure | Skipped | Note


def default_batch(settings: SampleConfig) -> int:
    """How many images of that size are made together when nothing is asked for."""
    width, height = settings.size
    return max(1, min(MAX_BATCH, BATCH_PIXELS // (width * height)))


@dataclass(kw_only=True)
class Run:
    """Makes the pictures of requests; iterate over `events`.

    A request that cannot be done is a Failure and the others are still made. In the stream of
    requests None says that the next one has to be waited for, so what there is gets made.
    """

    model: Model
    output: Output
    batch_size: int | None = None
    """Images made together; 1 makes each one's arithmetic independent of the others."""
    metadata: bool = True
    latents: bool = False
    """Save each picture's x0 beside it."""
    strict: bool = False
    """Refuse a prompt that the model cannot read to its end."""
    grid: bool = False
    """One sheet of all the pictures at the end; on stdout it stands for them."""
    match: str | None = None
    """Another tool, whose numbers are wanted where it has its own."""
    refiner: Model | None = None
    """Takes over for the last steps."""
    refiner_start: float = 0.8
    limit: int = field(default=1 << 30, init=False)
    """Images that fit in memory, as far as is known."""
    noted: set[str] = field(default_factory=set, init=False)
    planned: set[Path] = field(default_factory=set, init=False)
    used: set[Word] = field(default_factory=set, init=False)
    """Learned words that some prompt has had."""

    def events(self, requests: Iterable[Request | DifftoolError | None]) -> Iterator[Event]:
        """What happens, as it happens; results are in the order of the requests."""
        if self.grid:
            self.output.sheet_path()  # fails now if it is taken, not after all the work
        sheet: list[Image.Image] = []
        shown: list[Recipe] = []
        left_out = 0
        for batch in self._batches(self._plan(requests)):
            jobs = [entry for entry in batch if isinstance(entry, Job)]
            started = time.perf_counter()
            made = (yield from self._make(jobs)) if jobs else []
            seconds = (time.perf_counter() - started) / max(1, len(jobs))
            pictures = iter(made)
            for entry in batch:
                if not isinstance(entry, Job):
                    yield entry
                    continue
                x0, image = next(pictures)
                if not (x0.isfinite().all() and image.isfinite().all()):
                    what = f"image {entry.index} (seed {entry.item.seed}) has non-finite values"
                    error = ResourceError(what, hint="--dtype fp32 may help")
                    yield Failure(entry.index, error)
                    continue
                if self.grid and (len(sheet) + 1) * image[0].numel() <= MAX_SHEET_PIXELS:
                    shown.append(entry.recipe)
                    sheet.append(to_pil(image))
                elif self.grid:
                    left_out += 1
                if not (self.grid and self.output.stdout):
                    yield self._written(entry, x0, image, seconds)
        if left_out:
            yield Note(f"the sheet has room for {len(sheet)} images, {left_out} are not on it")
        if sheet:
            yield self._sheet(sheet, shown)

    # --- what to do --------------------------------------------------------------------------

    def _plan(self, requests: Iterable[Request | DifftoolError | None]) -> Iterator[Entry | None]:
        index = 0
        for request in requests:
            if request is None:
                yield None
                continue
            if isinstance(request, DifftoolError):
                yield Failure(index, request)
                index += 1
                continue
            try:
                plan, label = self._checked(request)
                seeds = request.images()
                self.used |= used_words(self.model, (request.prompt or "", request.negative or ""))
                yield from self._notes(request, plan)
                if not request.seeds:
                    yield Note(f"seed {seeds[0]}", warning=False)
            except DifftoolError as error:
                yield Failure(index, located(error, request.source))
                index += 1
                continue
            for seed in seeds:
                yield self._job(index, request, plan, label, seed)
                index += 1
        for word in self.model.words:
            if word not in self.used:
                yield Note(f"no prompt has the word {word}: {word.path} was not used")

    def _checked(self, request: Request) -> tuple[SamplePlan, int | None]:
        """The plan and the label of a request; UsageError if the model cannot do it."""
        model, asked = self.model, dict(request.settings)
        if request.init and not {"size", "width", "height"} & asked.keys():
            factor = model.codec.factor
            asked["size"] = tuple(side - side % factor for side in picture_size(request.init))
        settings = resolve_settings(model, asked, self.match)
        if model.preset.text and request.prompt is None:
            raise UsageError(f"the model {model.name} needs a prompt", hint="give a PROMPT")
        if not model.preset.text and (request.prompt or request.negative):
            hint = "give --label" if model.preset.unet.num_classes else "leave the prompt out"
            raise UsageError(f"the model {model.name} reads no prompts", hint=hint)
        label = None if request.label is None else model.label(request.label)
        if label is None and model.preset.unet.num_classes and model.null_label is None:
            hint = f"give --label, one of {', '.join(model.preset.classes)}"
            raise UsageError(f"the model {model.name} needs a class", hint=hint)
        check_input(model, self._item(request, settings, label, 0))
        start = request.init is not None
        refiner = self._refiner(settings)
        return plan_sampling(model, settings, from_picture=start, refiner=refiner), label

    def _item(
        self, request: Request, settings: SampleConfig, label: int | None, seed: int
    ) -> SampleInput:
        """What is to be made, pictures included; InputError if one cannot be read."""
        vision = self.model.vision
        if request.image and vision is None:
            hint = "unCLIP models do"
            raise UsageError(f"the model {self.model.name} takes no --image-prompt", hint=hint)
        return SampleInput(
            request.prompt or "",
            request.negative or "",
            label,
            seed,
            init=load_init(request.init, settings.size) if request.init else None,
            mask=load_mask(request.mask, settings.size) if request.mask else None,
            image=load_image_prompt(request.image, vision.config.size)
            if request.image and vision
            else None,
        )

    def _refiner(self, settings: SampleConfig) -> Refiner | None:
        """The refiner, told the same."""
        if self.refiner is None:
            return None
        names = ("sampler", "schedule", "steps", "guidance", "size")
        asked = {name: getattr(settings, name) for name in names}
        chosen = resolve_settings(self.refiner, asked, self.match)
        return Refiner(self.refiner, chosen, self.refiner_start)

    def _notes(self, request: Request, plan: SamplePlan) -> Iterator[Note]:
        """What is not done to the letter, once each; UsageError for a cut prompt if strict."""
        settings, texts = plan.settings, []
        for name, flag, there in (
            ("strength", "--strength", request.init and self.model.concat != "edit"),
            ("image_guidance", "--image-guidance", self.model.concat == "edit"),
            ("noise_level", "--noise-level", request.image),
        ):
            if not there and getattr(settings, name) != getattr(self.model.preset.sample, name):
                texts.append(f"{flag} {getattr(settings, name):g} has no effect here")
        if settings.guidance == 0:
            texts.append("guidance 0 is read as 1, which is off")
        picked = request.init is not None or self.refiner is not None
        if picked and plan.steps != settings.steps:
            run = f"{plan.steps} of {settings.steps} steps are run"
            text = f"{run} (strength {settings.strength:g})"
            if text not in self.noted:
                yield Note(text, warning=False)
                self.noted.add(text)
        if request.negative and settings.guidance in (0, 1):
            texts.append("a negative prompt has no effect without guidance")
        if request.model_hash not in ("", self.model.hash):
            made_by = f"not with {self.model.name} ({self.model.hash})"
            texts.append(f"the picture was made with the model {request.model_hash}, {made_by}")
        for name, prompt in (("prompt", request.prompt), ("negative prompt", request.negative)):
            if not prompt:
                continue
            count, limit = token_count(self.model, prompt)
            if count > limit and (settings.prompt_syntax == "none" or self.strict):
                what = (
                    f'the {name} "{prompt[:40]}..." has {count} tokens, of which {limit} are read'
                )
                if self.strict:
                    raise UsageError(what, hint=f"leave out the last {count - limit}")
                texts.append(f"{what}: the last {count - limit} are cut")
        yield from (Note(text) for text in texts if text not in self.noted)
        self.noted.update(texts)

    def _job(
        self, index: int, request: Request, plan: SamplePlan, label: int | None, seed: int
    ) -> Entry:
        refiner = None if self.refiner is None else self.refiner.name
        settings, words = (
            plan.settings,
            used_words(self.model, (request.prompt or "", request.negative or "")),
        )
        recipe = Recipe(
            request.prompt or "", request.negative or "", request.label, seed, settings,
            request.init, request.mask, request.image, refiner,
            tuple(dict.fromkeys(str(w.path) for w in self.model.words if w in words)),
        )  # fmt: skip
        try:
            item = self._item(request, settings, label, seed)
            path = self.output.path(self._fields(index, recipe), request.out)
            if path in self.planned:
                what = f"{path} would be the name of two pictures"
                raise UsageError(what, hint="put [seed] or [index] into the name")
        except DifftoolError as error:
            return Failure(index, located(error, request.source))
        if path:
            self.planned.add(path)
        if path and self.output.skip_existing and path.exists():
            return Skipped(index, path)
        return Job(index, recipe, plan, item, path)

    def _fields(self, index: int, recipe: Recipe) -> dict[str, str | int | float | None]:
        settings = recipe.settings
        width, height = settings.size
        return {
            **{name: getattr(recipe, name) for name in ("prompt", "negative", "label", "seed")},
            **{n: getattr(settings, n) for n in ("steps", "guidance", "sampler", "schedule")},
            "index": index,
            "width": width,
            "height": height,
            "model": self.model.name,
            "model_hash": self.model.hash,
            "date": date.today().isoformat(),
        }

    def _batches(self, entries: Iterable[Entry | None]) -> Iterator[list[Entry]]:
        """Entries in order, cut so that the jobs of each batch have like settings and fit."""
        batch: list[Entry] = []
        settings: SampleConfig | None = None
        like: Any = None
        count = 0
        for entry in entries:
            if isinstance(entry, Job):
                if count and _like(entry.recipe) != like:
                    yield batch
                    batch, count = [], 0
                settings, like = entry.recipe.settings, _like(entry.recipe)
                count += 1
            if entry is not None:
                batch.append(entry)
            full = settings and count >= min(self.batch_size or default_batch(settings), self.limit)
            if batch and (full or not count or entry is None):
                yield batch
                batch, count = [], 0
        if batch:
            yield batch

    # --- doing it ----------------------------------------------------------------------------

    def _make(self, jobs: list[Job]) -> Generator[Working, None, list[tuple[Tensor, Tensor]]]:
        """x0 [C,h,w] and image [3,H,W] of each job; batches too large for memory are halved."""
        size = min(len(jobs), self.limit)
        made: list[tuple[Tensor, Tensor]] = []
        while len(made) < len(jobs):
            part = jobs[len(made) : len(made) + size]
            try:
                made += yield from self._generate(part)
            except RuntimeError as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                self.limit = size = len(part) // 2
            else:
                continue
            # Here, and not in the handler, where the error still holds the failed batch's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return made

    def _generate(self, jobs: list[Job]) -> Generator[Working, None, list[tuple[Tensor, Tensor]]]:
        plan, items = jobs[0].plan, [job.item for job in jobs]
        assert plan is not None
        x0 = torch.empty(0)
        for step in generate(plan, items):
            x0 = step.x
            yield Working(len(jobs), step.index + 1, plan.steps)
        try:
            images = decode(self.model, x0)
        except Exception as error:
            self._rescue(jobs, x0, error)
            raise
        for image, item in zip(images, items, strict=True):
            if item.mask is not None and item.init is not None:  # what was not asked for stays
                mask, init = item.mask.to(image), item.init.to(image)
                image.copy_(mask * image + (1 - mask) * init)
        return list(zip(x0.float().cpu(), images.cpu(), strict=True))

    def _rescue(self, jobs: list[Job], x0: Tensor, error: Exception) -> None:
        """Latents that could not be decoded, onto the disk: ResourceError that says where."""
        if isinstance(error, RuntimeError) and out_of_memory(error) and len(jobs) > 1:
            return  # a smaller batch may do
        files = []
        for job, latent in zip(jobs, x0.float().cpu(), strict=True):
            stem = job.path or self.output.root / f"undecoded-{job.recipe.seed}.png"
            stem.parent.mkdir(parents=True, exist_ok=True)
            files.append(stem.with_suffix(".latents.safetensors"))
            save_tensors(files[-1], {"latents": latent.contiguous()}, {}, overwrite=True)
        what = f"the latents are kept in {files[0]}" + (" and beside it" if files[1:] else "")
        why, hint = str(error).splitlines()[0], "decode them with --from-latents"
        raise ResourceError(f"decoding failed; {what}", why, hint) from error

    # --- writing it --------------------------------------------------------------------------

    def _written(self, job: Job, x0: Tensor, image: Tensor, seconds: float) -> Result | Failure:
        recipe, latents = job.recipe, None
        chunk = metadata.chunk(recipe, self.model) if self.metadata else None
        text = metadata.parameters(recipe, self.model) if self.metadata else None
        try:
            data = metadata.encode(to_pil(image), self.output.format, text, chunk)
            tail = "latents" if recipe.seed is None else recipe.seed
            path = self.output.write(data, job.path, tail)
            if self.latents and path:
                latents = path.with_suffix(".latents.safetensors")
                header = {LATENTS_KEY: json.dumps(chunk)} if chunk else {}
                overwrite = self.output.overwrite
                save_tensors(latents, {"latents": x0.contiguous()}, header, overwrite=overwrite)
        except ResourceError:
            raise  # a disk that is full is full for the next picture too
        except DifftoolError as error:
            return Failure(job.index, error)
        return Result(index=job.index, path=path, recipe=recipe, seconds=seconds, latents=latents)

    def _sheet(self, pictures: list[Image.Image], shown: list[Recipe]) -> Grid | Failure:
        """Write one sheet of all pictures, a row a prompt where each has as many; it says what the
        first one says."""
        text = metadata.parameters(shown[0], self.model) if self.metadata else None
        groups = [len([*group]) for _, group in groupby(shown, lambda r: (r.prompt, r.label))]
        columns = groups[0] if len(groups) > 1 and set(groups) == {max(2, groups[0])} else None
        try:
            data = metadata.encode(tile(pictures, columns), self.output.format, text)
            path = self.output.sheet_path()
            return Grid(self.output.write(data, path, "grid"), len(pictures))
        except DifftoolError as error:
            return Failure(len(pictures), error)

    # --- from saved latents ------------------------------------------------------------------

    def decode(self, files: Iterable[Path]) -> Iterator[Event]:
        """The pictures of files that `latents` wrote; what they say of themselves goes along."""
        for index, file in enumerate(files):
            started = time.perf_counter()
            try:
                x0, recipe = self._read_latents(file)
                path = self.output.path(self._fields(index, recipe))
                image = decode(self.model, x0[None].to(self.model.device))[0].cpu()
            except DifftoolError as error:
                yield Failure(index, error)
                continue
            if path and self.output.skip_existing and path.exists():
                yield Skipped(index, path)
                continue
            job = Job(index, recipe, None, SampleInput(), path)
            yield self._written(job, x0, image, time.perf_counter() - started)

    def _read_latents(self, file: Path) -> tuple[Tensor, Recipe]:
        if not file.is_file():
            raise UsageError(f"there are no latents {file}")
        header = read_header(file)
        if "latents" not in header.tensors:
            listed = ", ".join(list(header.tensors)[:5])
            raise InputError(f"{file} holds no latents", f"its tensors are {listed or 'none'}")
        x0 = load_tensors(file, ["latents"])["latents"].float()
        codec: Any = self.model.codec
        if x0.ndim != 3 or x0.shape[0] != codec.channels:
            why = f"shape {list(x0.shape)}, the model {self.model.name} has [{codec.channels},H,W]"
            raise InputError(f"the latents {file} do not fit", why)
        if not x0.isfinite().all():
            raise InputError(f"the latents {file} have non-finite values")
        size = (x0.shape[2] * codec.factor, x0.shape[1] * codec.factor)
        if text := header.metadata.get(LATENTS_KEY):
            made = metadata.from_chunk(text, str(file))
            prompt, negative, label = made.prompt or "", made.negative or "", made.label
            settings = resolve_settings(self.model, {**made.settings, "size": size})
            seed = made.seeds[0] if made.seeds else None
            return x0, Recipe(prompt, negative, label, seed, settings)
        return x0, Recipe("", "", None, None, resolve_settings(self.model, {"size": size}))


def _like(recipe: Recipe) -> tuple[object, ...]:
    """What pictures of one batch have in common."""
    given = (recipe.init, recipe.mask, recipe.image)
    return (recipe.settings, *(path is not None for path in given))
