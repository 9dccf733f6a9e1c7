"""From requests to pictures on disk: batches of like settings, in order, one event at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from difftool.config.schema import SampleConfig
from difftool.engine.tiles import tiled
from difftool.errors import DifftoolError, ResourceError, first_line, out_of_memory
from difftool.images.fit import to_pil
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput, load_start
from difftool.pipeline.loras import use_loras
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.sampling.adapters import PromptAdapters
from difftool.sampling.batches import Planned, batches, default_batch
from difftool.sampling.events import (
    Event,
    Existing,
    Failure,
    Loading,
    Note,
    Result,
    Working,
)
from difftool.sampling.expand import Expander
from difftool.sampling.files.content import content_of
from difftool.sampling.files.inventory import Inventory
from difftool.sampling.files.prompts import Lines
from difftool.sampling.latents import latents_path, read_latents, write_latents
from difftool.sampling.metadata.a1111 import parameters
from difftool.sampling.metadata.chunk import chunk
from difftool.sampling.metadata.files import encode, texts
from difftool.sampling.metadata.named import locate
from difftool.sampling.output import Numbering, Output
from difftool.sampling.preview import LivePreviews
from difftool.sampling.requests import Request, located
from difftool.sampling.resolve import Resolver
from difftool.sampling.sample import Sample
from difftool.storage.commit import write_whole

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Generated = tuple["Tensor", "Tensor", float]
"""x0 [C,h,w], image [3,H,W] and the seconds that it took."""
MASKED = ("init", "mask")
"""Pictures that are needed where what is drawn is put back into one."""


@dataclass(kw_only=True)
class SampleRun:
    """Makes the pictures of requests; iterate over `events`.

    A request that cannot be done is a Failure and the others are still made. In the stream of
    requests None says that the next one has to be waited for, so what there is gets made.
    """

    model: Model
    output: Output | None = None
    """Where pictures go; None: nowhere, they are with the events."""
    batch_size: int | None = None
    """Images made together; 1 makes each one's arithmetic independent of the others."""
    metadata: bool = True
    latents: bool = False
    """Save each picture's x0 beside it."""
    strict: bool = False
    """Refuse a prompt that the model cannot read to its end."""
    match: str | None = None
    """Another tool, whose numbers are wanted where it has its own."""
    refiner: Model | None = None
    """Takes over for the last steps."""
    refiner_start: float = 0.8
    lora_dir: Path | None = None
    """Where the LoRAs are that prompts name."""
    embedding_dir: Path | None = None
    """Where the learned words are that prompts have."""
    expander: Expander = field(default_factory=Expander)
    """Chooses in prompts that stand for many."""
    numbering: Numbering = field(default_factory=Numbering)
    """Goes on from that of another model's pictures."""
    previews: LivePreviews | None = None
    """Takes x0 at each step."""
    trusted: bool = False
    """Open what files of latents name outside of their folders."""
    limit: int = field(default=1 << 30, init=False)
    """Images that fit in memory, as far as is known."""
    resolver: Resolver = field(init=False)
    inventory: Inventory | None = field(init=False)
    """What is there already, where that is left out."""

    def __post_init__(self) -> None:
        refiner = None if self.refiner is None else (self.refiner, self.refiner_start)
        if self.output and self.output.skip_existing and self.numbering.inventory is None:
            output = self.output
            self.numbering.inventory = Inventory(output.root, output.template, output.format)
        self.inventory = self.numbering.inventory
        self.resolver = Resolver(
            self.model, self.output, match=self.match, strict=self.strict, refiner=refiner,
            expander=self.expander,
            adapters=PromptAdapters(self.model, self.lora_dir, self.embedding_dir),
            numbering=self.numbering,
        )  # fmt: skip

    def events(self, requests: Lines) -> Iterator[Event]:
        """What happens, as it happens; results are in the order of the requests."""
        made: dict[int, Generated] = {}
        for samples, due in batches(self.entries(requests), self._room):
            started = time.perf_counter()
            images = yield from self._make(samples)
            seconds = (time.perf_counter() - started) / max(1, len(samples))
            made |= {s.index: (*image, seconds) for s, image in zip(samples, images, strict=True)}
            for entry in due:
                if isinstance(entry, Existing):
                    yield self._found(entry)
                elif isinstance(entry, Sample):
                    yield self._finished(entry, *made.pop(entry.index))
                else:
                    yield entry

    def _finished(
        self, sample: Sample, x0: Tensor, image: Tensor, seconds: float
    ) -> Result | Failure:
        """What became of a picture that is made."""
        return _unsound(sample, x0, image) or self._written(sample, x0, image, seconds)

    def _found(self, entry: Existing) -> Existing | Failure:
        """A picture that is there, where it is; or that it was to be made before, and was not."""
        if entry.path is None and self.inventory:
            entry = replace(entry, path=self.inventory.find(content_of(entry.sample).content))
        if entry.path is not None:
            return entry
        error = ResourceError("the same picture was not made before")
        return Failure(entry.index, located(error, entry.sample.request))

    def entries(self, requests: Lines) -> Iterator[Planned | None]:
        """The pictures to make, resolved and not made; see `Resolver.entries`."""
        return self.resolver.entries(requests)

    def _room(self, settings: SampleConfig) -> int:
        """How many images of these settings are made together."""
        return min(self.batch_size or default_batch(settings), self.limit)

    # --- making ------------------------------------------------------------------------------

    def _make(
        self, samples: list[Sample]
    ) -> Generator[Loading | Working, None, list[tuple[Tensor, Tensor]]]:
        """x0 [C,h,w] and image [3,H,W] of each; batches too large for memory are halved."""
        if samples and self.model.deferred:
            yield Loading(self.model.name)
        size = min(len(samples), self.limit)
        made: list[tuple[Tensor, Tensor]] = []
        while len(made) < len(samples):
            part = samples[len(made) : len(made) + size]
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

    def _generate(
        self, samples: list[Sample]
    ) -> Generator[Working, None, list[tuple[Tensor, Tensor]]]:
        plan, inputs = samples[0].plan, [sample.input for sample in samples]
        use_loras(self.model, samples[0].loras)
        x0, numbers = torch.empty(0), [sample.index for sample in samples]
        if self.previews:
            self.previews.begin(numbers)
        for step in generate(plan, inputs):
            x0 = step.x
            seen = self.previews.step(numbers, step.x0) if self.previews else None
            yield Working(len(samples), step.index + 1, plan.steps, seen)
        try:
            with tiled(self.model.codec, plan.settings.tile):
                images = decode(self.model, x0)
        except Exception as error:
            self._keep_latents(samples, x0, error)
            raise
        if self.previews and images.isfinite().all():
            seen = self.previews.shown([to_pil(image) for image in images.cpu()])
            yield Working(0, plan.steps, plan.steps, seen)
        return list(zip(x0.float().cpu(), images.cpu(), strict=True))

    def _keep_latents(self, samples: list[Sample], x0: Tensor, error: Exception) -> None:
        """Latents that could not be decoded, onto the disk: ResourceError that says where."""
        if isinstance(error, RuntimeError) and out_of_memory(error) and len(samples) > 1:
            return  # a smaller batch may do
        if self.output is None:
            return
        files = []
        for sample, latent in zip(samples, x0.float().cpu(), strict=True):
            stem = sample.path or self.output.root / f"undecoded-{sample.seed}.png"
            stem.parent.mkdir(parents=True, exist_ok=True)
            files.append(latents_path(stem))
            told = chunk(sample, stem.parent) if self.metadata else None
            write_latents(files[-1], latent, told, overwrite=True)
        what = f"the latents are kept in {files[0]}" + (" and beside it" if files[1:] else "")
        why, hint = first_line(error), "decode them with --from-latents"
        raise ResourceError(f"decoding failed; {what}", why, hint) from error

    # --- writing -----------------------------------------------------------------------------

    def _written(
        self, sample: Sample, x0: Tensor, image: Tensor, seconds: float
    ) -> Result | Failure:
        folder = self.output.folder(sample.path) if self.output else Path()
        values = chunk(sample, folder) if self.metadata else None
        text = parameters(sample.values()) if self.metadata else None
        pixels, path, latents, gif = finished(sample, image), None, None, None
        pixels.info.update(texts(text, values))
        try:
            if self.output:
                data = encode(pixels, self.output.format, texts(text, values))
                tail = "latents" if sample.seed is None else sample.seed
                path = self.output.write(data, sample.path, tail, partial(self._note, sample, data))
            if self.output and self.latents and path:
                latents = latents_path(path)
                write_latents(latents, x0, values, self.output.overwrite)
            if self.output and path and self.previews and self.previews.animated:
                gif = path.with_suffix(".gif")
                made = self.previews.animation(sample.index, pixels)
                write_whole(gif, made, self.output.overwrite)
        except ResourceError:
            raise  # a disk that is full is full for the next picture too
        except DifftoolError as error:
            return Failure(sample.index, located(error, sample.request))
        return Result(
            sample=sample, image=pixels, path=path, seconds=seconds, latents=latents, gif=gif
        )

    def _note(self, sample: Sample, data: bytes, path: Path) -> None:
        """Let it be known what is about to be written."""
        if self.inventory is not None and sample.seed is not None:
            seeds = sample.seed, sample.input.vary_seed
            self.inventory.add(path, data, content_of(sample), seeds)

    # --- from saved latents ------------------------------------------------------------------

    def decode(self, files: Iterable[Path]) -> Iterator[Event]:
        """The pictures of files that `latents` wrote; what they say of themselves goes along."""
        for index, file in enumerate(files):
            started = time.perf_counter()
            try:
                x0, request = read_latents(file, self.model)
                opened = tuple(each.option for each in request.named if each.option in MASKED)
                if "mask" not in opened and not request.settings.get("outpaint"):
                    opened = ()
                request = locate(request, file, opened, trusted=self.trusted)
                yield from (Note(request.opened, warning=False),) if request.opened else ()
                yield from map(Note, request.changed)
                plan = plan_sampling(self.model, resolve_settings(self.model, request.settings))
                seed = request.seeds[0] if request.seeds else None
                factor = self.model.preset.side_multiple
                given, request, lacks = _pictures_of(request, plan.settings, factor)
                if lacks:
                    yield Note(f"{file}: what was around the mask is not put back: {lacks}")
                sample = Sample(
                    index=index, request=request, plan=plan, input=given, seed=seed,
                    embeddings=request.embeddings, loras=self.model.base_loras,
                )  # fmt: skip
                path = self.output.path(sample.values()) if self.output else None
                with tiled(self.model.codec, plan.settings.tile):
                    image = decode(self.model, x0[None].to(self.model.device))[0]
                image = image.cpu()
            except DifftoolError as error:
                yield Failure(index, error)
                continue
            if path and self.output and self.output.skip_existing and path.exists():
                yield Existing(sample=sample, path=path)
                continue
            seconds = time.perf_counter() - started
            yield self._finished(replace(sample, path=path), x0, image, seconds)


def finished(sample: Sample, image: Tensor) -> Image.Image:
    """The picture of an image [3,H,W], put back into the one that it was started from."""
    drawn = to_pil(image, sample.plan.settings.rounding)
    backdrop = sample.input.backdrop
    return drawn if backdrop is None else backdrop.finished(drawn)


def _pictures_of(
    request: Request, settings: SampleConfig, factor: int
) -> tuple[SampleInput, Request, str]:
    """The picture and the mask that latents were made from, where they have one; without them,
    what is said, and a request that no longer speaks of a mask."""
    if not request.init or not (request.mask or settings.outpaint):
        return SampleInput(), request, ""
    try:
        init, mask, backdrop = load_start(request.init, request.mask, settings, factor)
        return SampleInput(init=init, mask=mask, backdrop=backdrop), request, ""
    except DifftoolError as error:
        return SampleInput(), replace(request, mask=None), error.what


def _unsound(sample: Sample, x0: Tensor, image: Tensor) -> Failure | None:
    """What is said in place of a picture whose values are not finite: it becomes no file."""
    if x0.isfinite().all() and image.isfinite().all():
        return None
    what = f"image {sample.index} (seed {sample.seed}) has non-finite values"
    error = ResourceError(what, hint="--dtype fp32 may help")
    return Failure(sample.index, located(error, sample.request))
