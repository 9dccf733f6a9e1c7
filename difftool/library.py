"""difftool as a library: what the commands do, as functions that return objects.

Keywords are the commands' flags with underscores, read by the same rows, so that a wrong value is
the same UsageError; what is made is the same to the byte. Import the names from `difftool`. A
device, a dtype and pictures are given as on the command line, or as torch's and Pillow's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from os.path import abspath
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

from difftool.errors import UsageError, in_words
from difftool.sampling.events import Failure, Note, Result

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from difftool.conversion.ledger import Ledger
    from difftool.evaluation.judge import Judgement
    from difftool.pipeline.model import Model
    from difftool.sampling.command import SampleTask
    from difftool.training.prepared import Training


@in_words()
def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    vae: str | Path | None = None,
    lora: Sequence[str] = (),
    embedding: Sequence[str | Path] = (),
    **options: Any,
) -> Pipeline:
    """A model that is ready to work: all that -m takes; None is the bundled one.

        model = difftool.load("emoji")

    options: the other flags of `difftool sample` that are about the model: preset, prior, refiner,
    refiner_start, match, allow_unused, low_memory, engine. UsageError if nothing is there or a
    value is wrong, InputError if the model is malformed or not supported.
    """
    from difftool.config.options import read_options
    from difftool.sampling.command import load_models, prepare
    from difftool.sampling.settings import OPTIONS

    given = {"model": model, "device": device, "dtype": dtype, "vae": vae, "lora": lora}
    given |= {"embedding": embedding, **options}
    for name in given.keys() - _about_models():
        if any(row.name == name for row in OPTIONS):
            raise UsageError(f'"{name}" is about pictures', hint="give it to sample")
    task = prepare(read_options(OPTIONS, given), loaded=True)
    if task.product.axes:
        raise UsageError("several models are not loaded at once", hint="load each by itself")
    return Pipeline(*load_models(task), given)


@dataclass(frozen=True)
class SampleStep:
    """A step of the sampler that is done."""

    index: int
    """Its number; the first is 0."""
    total: int
    """How many there are."""
    sigma: float
    """Deviation of the noise in `x`."""
    x0: Tensor
    """The clean picture that the network saw where the step began; [1,C,H,W], in the model's
    space."""
    x: Tensor
    """What the step arrived at; [1,C,H,W]. The last one is the picture."""


class Pipeline:
    """A model at work; `load` makes one."""

    def __init__(
        self, model: Model, refiner: Model | None = None, given: Mapping[str, Any] | None = None
    ):
        """given: the options that the models were loaded by."""
        self.model, self.refiner, self.given = model, refiner, dict(given or {})

    @property
    def notes(self) -> list[str]:
        """What was decided when it was loaded, a line each."""
        return self.model.notes

    def __repr__(self) -> str:
        return f"Pipeline({self.model.name}, {self.model.device})"

    def sample(self, prompt: str | Sequence[str] | None = None, **options: Any) -> list[Image]:
        """Pictures, in the order that they are asked for; each one's `.info` has the text chunks
        of its PNG. With `output` they are written too, as by the command.

            pictures = model.sample("a smiling fox", seed=7)
            pictures = model.sample(["a smiling fox", "a red heart"], seed=[1, 2], steps=4)

        prompt: one, or several. options: the flags of `difftool sample` that are about pictures:
        seed (a number, several, or "1,2,5-10"), num, negative, label, size, steps, sampler,
        guidance, init (a file, or a picture), ...; set={"sample.clip": "static"}. What is not done
        to the letter is a warning. UsageError for what the model cannot do, InputError for files
        that cannot be read.
        """
        from difftool.sampling.command import sample

        pictures = []
        with in_words():
            task = self._task(prompt, options)
            for event in sample(task, self.model, self.refiner):
                _tell(event)
                if isinstance(event, Result):
                    pictures.append(event.image)
        return pictures

    def steps(
        self, prompt: str | Sequence[str] | None = None, **options: Any
    ) -> Iterator[SampleStep]:
        """One picture step by step, as `sample` makes it.

            for step in model.steps("a smiling fox", seed=7, steps=4):
                print(step.index, step.sigma, step.x0.std())

        `decode` of the last one's `x` is the picture. UsageError where several pictures are asked
        for.
        """
        from difftool.pipeline.generate import generate
        from difftool.pipeline.loras import use_loras
        from difftool.sampling.command import run_of
        from difftool.sampling.sample import Sample

        task = self._task(prompt, options)
        if task.total != 1 or task.values["from_latents"]:
            raise UsageError("steps are those of one picture", hint="one prompt and one seed")
        entries = run_of(task, self.model, self.refiner).entries(task.requests())
        pictures = []
        for entry in entries:
            _tell(entry)
            if isinstance(entry, Sample):
                pictures.append(entry)
        (picture,) = pictures
        total = picture.plan.steps
        use_loras(self.model, picture.loras)
        return (
            SampleStep(step.index, total, step.level.sigma, step.x0, step.x)
            for step in generate(picture.plan, [picture.input])
        )

    def _task(self, prompt: str | Sequence[str] | None, options: Mapping[str, Any]) -> SampleTask:
        """What is asked for, read by the command's rows."""
        from difftool.config.options import read_options
        from difftool.sampling.command import prepare
        from difftool.sampling.settings import OPTIONS, PICTURES

        for name in options.keys() & _about_models():
            raise UsageError(f'"{name}" is about the model', hint="give it to difftool.load")
        given = {**self.given, "prompt": prompt, **options}
        given |= {n: self._path(n, given[n]) for n in PICTURES if given.get(n) is not None}
        task = prepare(read_options(OPTIONS, given), loaded=True)
        if lacking := [lora for lora in task.base.loras if not self._has(lora, task.base.hashes)]:
            files = ", ".join(f"{path}:{strength:g}" for path, strength in sorted(lacking))
            hint = "give them to difftool.load"
            raise UsageError("the picture was made with LoRAs that are not there", files, hint)
        return task

    def _has(self, lora: tuple[str, float], hashes: Mapping[str, str]) -> bool:
        """Whether a LoRA of that path, or of its hash, and strength is applied."""
        path, strength = lora
        return any(
            each.lora.hash == hashes[path] if hashes.get(path)
            else abspath(each.lora.path) == abspath(path)
            for each in self.model.base_loras if each.strength == strength
        )  # fmt: skip

    def _path(self, name: str, picture: object) -> object:
        """Where the picture of an option is, one in memory in a file of its own as long as the
        model is used; anything else as it is, which its row refuses."""
        from PIL import Image

        from difftool.images.read import read_mask, read_picture
        from difftool.images.write import encode_png

        if not isinstance(picture, Image.Image):
            return picture
        read = read_mask(picture) if name == "mask" else read_picture(picture).image
        data = encode_png(read)
        path = self._folder / f"{sha256(data).hexdigest()[:16]}.png"
        path.write_bytes(data)
        return path

    @cached_property
    def _folder(self) -> Path:
        folder = mkdtemp(prefix="difftool-")
        finalize(self, rmtree, folder, ignore_errors=True)
        return Path(folder)

    @in_words()
    def encode(self, picture: Image | str | Path, size: tuple[int, int] | None = None) -> Tensor:
        """x0 of a picture, fp32 [1,C,H,W] in the space that the model works in.

            z = model.encode(pictures[0])

        size: (width, height) that it is scaled to first; None: its own, cut down to what the model
        takes. UsageError for a size that the model does not take.
        """
        from difftool.images.fit import scaled, to_tensor
        from difftool.pipeline.decode import encode
        from difftool.pipeline.settings import resolve_settings

        image = _image(picture)
        if size is None:
            factor = self.model.preset.side_multiple
            width, height = (max(factor, side - side % factor) for side in image.size)
            size = width, height
        size = resolve_settings(self.model, {"size": size}).size
        images = to_tensor(scaled(image, size))[None].to(self.model.device)
        return encode(self.model, images).float()

    @in_words()
    def decode(self, x0: Tensor) -> Image:
        """The picture of x0, [1,C,H,W] or [C,H,W].

            again = model.decode(z)

        UsageError for another shape.
        """
        from difftool.images.fit import to_pil
        from difftool.pipeline.decode import decode

        one = x0 if x0.ndim == 4 else x0[None]
        channels = self.model.codec.channels
        if one.shape[:2] != (1, channels):
            why = (
                f"its shape is {list(x0.shape)}, the model {self.model.name} has [1,{channels},H,W]"
            )
            raise UsageError("x0 does not fit", why, "give one picture's, x0[i:i+1]")
        return to_pil(decode(self.model, one.to(self.model.device))[0].cpu())


@in_words()
def train(data: str | Path, *, out: str | Path | None = None, **options: Any) -> Training:
    """Train a model on a folder of pictures, to the end.

        run = difftool.train(
            "photos", out="runs/p", preset="pixel-small", size=16, steps=3, set={"train.lr": 1e-4}
        )

    What comes back has the model's `path`, the run's `folder`, its `preset`, `metrics` and
    `report`; `difftool.load(run.path)` samples from it. options: the flags of `difftool train`, of
    which --from is called from_. UsageError for wrong values, InputError for data or models that
    cannot be used, Stopped after a first Ctrl-C, once the state is saved.
    """
    from difftool.config.options import read_options
    from difftool.training.options import OPTIONS
    from difftool.training.run.start import train as run

    return run(read_options(OPTIONS, {"data": data, "out": out, **options}))


@in_words()
def convert(source: str | Path, target: str | Path, **options: Any) -> Ledger:
    """Convert a model, or a LoRA, to another format, losing nothing; what became of every tensor.

        ledger = difftool.convert("shapes", "shapes-diffusers", to="diffusers")
        ledger.counts()

    The keywords are the flags of `difftool convert`. UsageError for what cannot be asked for,
    InputError for a source that is malformed or not supported, CheckError if anything would be
    lost or reads back otherwise; then nothing is written.
    """
    from difftool.config.options import read_options
    from difftool.conversion.convert import convert
    from difftool.conversion.options import OPTIONS

    return convert(read_options(OPTIONS, {"source": source, "target": target, **options}))


@in_words()
def noise(picture: Image | str | Path, **options: Any) -> list[Image]:
    """Pictures of x_t = alpha x0 + sigma eps, from the picture to static; each one's `.info` has
    its level: t, alpha, sigma, log_snr.

        noised = difftool.noise(pictures[0], path="cosine", steps=8)

    options: the flags of `difftool noise` that are about a picture: path, set, schedule, steps,
    seed, size, and model, by which latent=True adds noise where that works. With markov=True they
    are those of the chain q(x_t | x_t-1), with reverse=True (prompt, label) the model's x0 at each
    level. UsageError for wrong values, InputError for a picture or model that cannot be used.
    """
    from difftool.config.options import read_options
    from difftool.forward.command import load, noised, task_of
    from difftool.forward.options import OPTIONS

    task = load(task_of(read_options(OPTIONS, options)))
    for warning in task.warnings:
        warnings.warn(warning, stacklevel=2)
    return noised(task, _image(picture))


@in_words()
def evaluate(
    pictures: str | Path | Sequence[Image | str | Path],
    reference: str | Path,
    *,
    features: str | Path | None = None,
    device: str | None = None,
) -> Judgement:
    """How near pictures are to those of a reference: what `difftool sample --evaluate` says of what
    it makes.

        judgement = difftool.evaluate(noised, "photos")
        assert judgement.frechet > 0 and 0 <= judgement.recall <= 1

    pictures: a folder, or several, in the order that KID draws from. features: a file of weights,
    or a folder of transformers; None is what needs no file. UsageError for wrong values and for too
    few pictures, InputError for pictures or weights that cannot be read.
    """
    from difftool.config.options import DEVICE, read_options
    from difftool.evaluation.features import open_describer
    from difftool.evaluation.judge import Collected, open_reference
    from difftool.evaluation.options import EVALUATION, check_evaluation
    from difftool.images.fit import to_uint8
    from difftool.pipeline.load import pick_device

    given = {"evaluate": reference, "features": features, "device": device}
    values = read_options((*EVALUATION, DEVICE), given)
    check_evaluation(values["evaluate"], values["features"])
    device = str(pick_device(values["device"] or "auto"))
    made = Collected(open_describer(values["features"], device))
    if isinstance(pictures, str | Path):
        made.add_all(open_reference(str(pictures)))
    elif isinstance(pictures, Sequence):
        for picture in pictures:
            made.add(to_uint8(_image(picture)))
    else:
        raise UsageError(f"pictures cannot be {pictures!r:.80}", hint="name a folder, or several")
    notes: list[Note] = []
    judgement = made.judged(
        open_reference(values["evaluate"]), lambda *told: notes.append(Note(*told))
    )
    for note in notes:
        _tell(note)
    return judgement


@in_words()
def inspect(path: str | Path) -> dict[str, Any]:
    """What is in a model, or in any safetensors file, from its headers, or what a picture says of
    how it was made: the JSON object of `difftool convert --inspect`. Loads no tensor, nor torch.

        difftool.inspect("emoji")["family"]
    """
    from difftool.config.options import by_name
    from difftool.conversion.inspect import inspect as describe
    from difftool.conversion.options import OPTIONS
    from difftool.images.formats import is_picture
    from difftool.sampling.metadata.shown import shown

    source = by_name(OPTIONS)["source"].one(path, "path")
    return shown(Path(source)) if is_picture(source) else describe(source)


def _about_models() -> set[str]:
    """The options of `difftool sample` that are about the model and not about pictures."""
    from difftool.sampling.settings import ADAPTERS, MODEL, OPTIONS

    rows = (row.name for row in OPTIONS if row.panel in (MODEL, ADAPTERS))
    return {*rows, "device", "dtype", "low_memory", "engine"}


def _tell(event: object) -> None:
    """Raise the error of a picture, and warn of what is not done to the letter, two callers up."""
    if isinstance(event, Failure):
        raise event.error
    if isinstance(event, Note) and event.warning:
        warnings.warn(event.text, stacklevel=3)


def _image(picture: Image | str | Path) -> Image:
    """An RGB picture of a file, or of one in memory, read alike."""
    from difftool.config.options import by_name
    from difftool.forward.options import FIGURES
    from difftool.images.read import read_image

    if isinstance(picture, str | Path):
        row = by_name(FIGURES)["images"]
        path = row.one(picture, "picture")
        row.check_files([path])
        return read_image(path)
    return read_image(picture)
