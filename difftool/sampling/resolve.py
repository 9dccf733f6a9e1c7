"""From requests to pictures to make: what is asked is decided once a request, and what is not
followed to the letter is said."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from difftool.adapters.lora.algebra import Applied
from difftool.config.schema import SampleConfig
from difftool.diffusion.samplers import guides_apart
from difftool.errors import DifftoolError, UsageError, clash
from difftool.pipeline.backdrop import FITS, canvas_size, rounded_up
from difftool.pipeline.condition import token_count
from difftool.pipeline.inputs import (
    SampleInput,
    check_input,
    load_depth,
    load_image_prompt,
    load_start,
    picture_size,
)
from difftool.pipeline.model import Model, Word
from difftool.pipeline.settings import (
    Refiner,
    SamplePlan,
    plan_sampling,
    resolve_settings,
    shaped,
)
from difftool.pipeline.upscale import enlarged
from difftool.pipeline.words import used_words
from difftool.plugins import loaded
from difftool.sampling.adapters import PromptAdapters
from difftool.sampling.batches import Planned
from difftool.sampling.events import Existing, Failure, Note
from difftool.sampling.expand import Expander, is_plain, spread
from difftool.sampling.files.content import content_of
from difftool.sampling.files.prompts import Lines
from difftool.sampling.output import Numbering, Output
from difftool.sampling.requests import SIZE, Request, located
from difftool.sampling.sample import Sample
from difftool.sampling.settings import SETTINGS
from difftool.text.constructs import unread
from difftool.text.networks import named_loras
from difftool.text.syntax import SYNTAXES

STRONG = 2.0
"""Guidance of CFG++ that is told of."""
LOW_RES_NOISE = 20
"""Noise level of a picture that a model enlarges, where nothing else is asked for."""
UPSCALED = 0.35
"""Strength with which a picture is drawn larger, where nothing else is asked for."""
SHARED = ("sampler", "schedule", "steps", "guidance", "size", "tile")
"""What a refiner is asked for too."""


class Resolver:
    """Resolves the requests of a run. match, strict and the refiner: see `SampleRun`."""

    def __init__(
        self,
        model: Model,
        output: Output | None,
        *,
        match: str | None = None,
        strict: bool = False,
        refiner: tuple[Model, float] | None = None,
        expander: Expander | None = None,
        adapters: PromptAdapters | None = None,
        numbering: Numbering | None = None,
    ):
        self.model, self.output = model, output
        self.match, self.strict, self.refiner = match, strict, refiner
        self.expander = expander or Expander()
        self.adapters = adapters or PromptAdapters(model, None, None)
        self._noted: set[str] = set()
        self.numbering = numbering or Numbering()
        self.inventory = self.numbering.inventory
        self._words: set[Word] = set()
        self._last: tuple[Mapping[str, Any], bool, SamplePlan] | None = None

    def entries(self, requests: Lines) -> Iterator[Planned | None]:
        """The pictures of requests, in order; a Failure for what cannot be made, a note for what is
        not done to the letter; None is passed on."""
        numbering = self.numbering
        for request in requests:
            if request is None:
                yield None
                continue
            if isinstance(request, DifftoolError):
                yield Failure(numbering.index, request)
                numbering.index += 1
                continue
            try:
                for each in self._expanded(request):
                    for entry in self._entries_of(each, numbering.index):
                        yield entry
                        numbering.index += not isinstance(entry, Note)
            except DifftoolError as error:
                yield Failure(numbering.index, located(error, request))
                numbering.index += 1
        for word in self.model.words:
            if word not in self._words:
                yield Note(f"no prompt has the word {word}: {word.path} was not used")

    def _expanded(self, request: Request) -> Iterator[Request]:
        """The requests that one is drawn as."""
        for one in spread(request):
            yield from [one] if self._is_plain(one) else self.expander.requests(one)

    def _entries_of(
        self, request: Request, index: int
    ) -> Iterator[Sample | Failure | Existing | Note]:
        """The same of one of these, whose failure is no other's."""
        try:
            for entry in self._of_request(request, index):
                yield entry
                index += not isinstance(entry, Note)
        except DifftoolError as error:
            yield Failure(index, located(error, request))

    def _is_plain(self, request: Request) -> bool:
        return is_plain(request, self.match, self.model.preset.sample)

    def _of_request(
        self, request: Request, index: int
    ) -> Iterator[Sample | Failure | Existing | Note]:
        """The pictures of a request, and what is to be said of them; UsageError for what makes none
        of them."""
        chooses = not self._is_plain(request) and self.expander.is_open(request)
        sample = None if chooses else self._resolved(request)
        request = self._seeded(request, sample)
        seeds = request.images()
        if sample is not None:
            yield from self._notes(sample)
        if not request.seeds:
            yield Note(f"seed {seeds[0]}", warning=False)
        variations = request.variations(len(seeds))
        if request.vary_seed in (None, -1) and variations[0] is not None:
            yield Note(f"variation seed {variations[0]}", warning=False)
        for number, (seed, other) in enumerate(zip(seeds, variations, strict=True)):
            try:
                chosen = sample or self._resolved(self.expander.chosen(request, seed))
                if sample is None:
                    yield from self._notes(chosen)
                given = chosen.input._replace(seed=seed, vary_seed=other)
                chosen = replace(chosen, index=index + number, input=given, seed=seed)
                yield self._placed(replace(chosen, seeds=seeds, number=number + 1))
            except DifftoolError as error:
                yield Failure(index + number, located(error, request))

    def _seeded(self, request: Request, sample: Sample | None) -> Request:
        """A request with the seeds that were drawn for it when a run before this one was stopped.
        sample: what it comes to, where it does not choose."""
        drawn = not request.seeds or (
            request.settings.get("vary") and request.vary_seed in (None, -1)
        )
        if self.inventory is None or not drawn:
            return request
        sample = sample or self._resolved(self.expander.chosen(request, 0))
        seed = request.seeds[0] if request.seeds else None
        other = None if request.vary_seed == -1 else request.vary_seed
        begun = self.inventory.begun(content_of(sample).series, seed, other)
        return request if begun is None else replace(request, seeds=begun[:1], vary_seed=begun[1])

    def _resolved(self, request: Request) -> Sample:
        """The picture of a request before it has a seed and a name; UsageError if the model cannot
        make it."""
        model, asked = self.model, dict(request.settings)
        prompt, named = request.prompt, []
        if prompt and not self._is_plain(request):
            prompt, named = named_loras(prompt)
            if named_loras(request.negative or "")[1]:
                tags = "a LoRA that the negative prompt names"
                request = replace(request, ignored=(*request.ignored, tags))
        loras = self.adapters.loras(named, request.applied)
        told = [*self._other(request, loras)]
        told += self.adapters.add_words(prompt or "", request.negative or "")
        request = replace(request, changed=(*request.changed, *told))
        if request.ar is not None:
            asked = {name: value for name, value in asked.items() if name not in SIZE}
            asked["size"] = shaped(model.preset.sample.size, request.ar, model.preset.side_multiple)
        elif request.init and not SIZE & asked.keys() and not asked.get("only_masked"):
            asked["size"] = self._size_of(request.init, asked)
        if model.concat == "low_res":
            asked.setdefault("noise_level", LOW_RES_NOISE)
        if asked.get("upscale"):
            asked.setdefault("strength", UPSCALED)
        if asked.get("outpaint"):
            asked.setdefault("strength", 1.0)  # there is nothing to start from
        plan = self.plan(asked, from_picture=request.init is not None)
        given = self._input(request, plan.settings)._replace(prompt=prompt or "")
        check_input(model, given)
        words = used_words(model, (given.prompt, given.negative))
        self._words |= words
        paths = dict.fromkeys(str(word.path) for word in model.words if word in words)
        return Sample(
            index=0, request=request, plan=plan, input=given, loras=loras, embeddings=tuple(paths)
        )

    @property
    def _scale(self) -> int:
        """How much larger the model draws than the picture is that it is given."""
        return self.model.codec.factor if self.model.concat == "low_res" else 1

    def _size_of(self, init: str, asked: Mapping[str, Any]) -> tuple[int, int]:
        """The size that a picture is drawn at where none is asked for."""
        factor, outpaint = self.model.preset.side_multiple, asked.get("outpaint")
        size = enlarged(picture_size(init), asked.get("upscale", 1.0) * self._scale)
        if outpaint is not None:
            return rounded_up(canvas_size(size, outpaint), factor)
        width, height = (side - side % factor for side in size)
        return width, height

    def _other(self, request: Request, loras: Sequence[Applied]) -> Iterator[str]:
        """LoRAs that are not those of their names that the picture was made with."""
        for each in loras[len(self.model.base_loras) :]:
            if request.networks.get(each.lora.path.stem, each.lora.hash) != each.lora.hash:
                yield f"{each.lora.path} is not the LoRA that the picture was made with"

    def plan(self, asked: Mapping[str, Any], *, from_picture: bool = False) -> SamplePlan:
        """What settings that are asked for come to; the same one for the same settings in turn."""
        if self._last is None or self._last[:2] != (asked, from_picture):
            settings = resolve_settings(self.model, asked, self.match)
            plan = plan_sampling(
                self.model, settings, from_picture=from_picture, refiner=self._refiner(settings)
            )
            self._last = dict(asked), from_picture, plan
        return self._last[2]

    def _input(self, request: Request, settings: SampleConfig) -> SampleInput:
        """What the model is given; InputError for a picture that cannot be read."""
        model = self.model
        if model.preset.text and request.prompt is None:
            raise UsageError(f"the model {model.name} needs a prompt", hint="give a PROMPT")
        if not model.preset.text and (request.prompt or request.negative):
            hint = "give --label" if model.preset.unet.num_classes else "leave the prompt out"
            raise UsageError(f"the model {model.name} reads no prompts", hint=hint)
        label = None if request.label is None else model.label(request.label)
        classes = model.preset.unet.num_classes and model.concat != "low_res"
        if label is None and classes and model.null_label is None:
            hint = f"give --label, one of {', '.join(model.preset.classes)}"
            raise UsageError(f"the model {model.name} needs a class", hint=hint)
        image = None
        if request.image_prompt and model.vision is None:
            hint = "unCLIP models do"
            raise UsageError(f"the model {model.name} takes no --image-prompt", hint=hint)
        if request.image_prompt and model.prior is not None:
            raise clash("--prior", "--image-prompt")
        if request.image_prompt and model.vision is not None:
            image = load_image_prompt(request.image_prompt, model.vision.config.size)
        depth = load_depth(request.depth_map) if request.depth_map else None
        given = SampleInput(request.prompt or "", request.negative or "", label, image=image)
        given = given._replace(depth=depth)
        factor = model.preset.side_multiple
        device = str(model.device)
        small = tuple(side // self._scale for side in settings.size)
        start = replace(settings, size=small)
        init, mask, backdrop = load_start(request.init, request.mask, start, factor, device)
        if mask is not None and settings.hires > 1:
            hint = "--only-masked draws the masked region larger"
            raise UsageError("--hires does not go with a mask", hint=hint)
        return given._replace(init=init, mask=mask, backdrop=backdrop)

    def _refiner(self, settings: SampleConfig) -> Refiner | None:
        if self.refiner is None:
            return None
        model, start = self.refiner
        asked = {name: getattr(settings, name) for name in SHARED}
        return Refiner(model, resolve_settings(model, asked, self.match), start)

    def _placed(self, sample: Sample) -> Sample | Existing:
        """The picture, with the name that it gets; UsageError where it cannot have one."""
        if self.output is None:
            return sample
        if self.inventory is not None:
            content, fixed = content_of(sample).content, self._fixed(self.output, sample)
            if found := self.inventory.find(content, fixed):
                return Existing(sample=sample, path=found)
            if not self.inventory.is_new(content, fixed):
                return Existing(sample=sample, path=None)
        return replace(sample, path=self._path(self.output, sample))

    def _fixed(self, output: Output, sample: Sample) -> Path | None:
        """The only name that a picture is wanted by, where there is one."""
        if sample.request.out or output.is_fixed:
            return output.name(sample.values(), sample.request.out)
        return None

    def _path(self, output: Output, sample: Sample) -> Path | None:
        """Where a picture goes; None if it is numbered when it is written. Of the pictures of a run
        that are called alike, as far as some system can tell, the later ones get a number."""
        values, out = sample.values(), sample.request.out
        path = output.name(values, out)
        if path is None:
            return None
        names, plain = self.numbering.names, path
        number = names.get(_folded(plain), 0) + 1
        if self.inventory is not None and os.path.lexists(plain) and self._fixed(output, sample):
            hint = "give it another name, or remove what is there"
            raise UsageError(f"{plain} exists, and is another picture", hint=hint)

        def is_taken(path: Path) -> bool:
            there = self.inventory is not None and os.path.lexists(path)
            return there or (number > 1 and _folded(path) in names)

        while is_taken(path := _numbered(plain, number)):
            number += 1
        names |= {_folded(path): 1, _folded(plain): number}
        output.check_free(path)
        return path

    def _notes(self, sample: Sample) -> Iterator[Note]:
        """What is not done to the letter, once each; UsageError for a cut prompt if strict."""
        request, plan = sample.request, sample.plan
        settings, texts = plan.settings, [*self._idle(sample)]
        apart = guides_apart(settings.sampler)
        if settings.guidance == 0 and not apart:
            texts.append("guidance 0 is read as 1, which is off")
        if apart and settings.guidance > STRONG * plan.sampler.guidance_unit:
            told = f"guidance {settings.guidance:g} is strong for {settings.sampler}"
            texts.append(f"{told}: of CFG++, 0.2 to 1.5 is usual")
        if request.opened and request.opened not in self._noted:
            yield Note(request.opened, warning=False)
            self._noted.add(request.opened)
        texts += request.changed
        texts += (f"{each} has no meaning here" for each in request.ignored)
        if request.ar is not None and settings.size != self.model.preset.sample.size:
            yield from self._once(
                "size {}x{}, the shape {:g}:{:g}".format(*settings.size, *request.ar)
            )
        if request.init is not None:
            yield from self._once(self._fitted(request.init, sample))
        partial = request.init is not None or self.refiner is not None or settings.stop < 100
        again = 0 if plan.hires is None else plan.hires.steps
        if partial and plan.steps - again != settings.steps:
            text = f"{plan.steps - again} of {settings.steps} steps are run"
            text += f" (strength {settings.strength:g})" if settings.stop == 100 else ""
            yield from self._once(text)
        if plan.hires is not None:
            second = plan.hires.settings
            size = "{}x{}".format(*second.size)
            text = f"then {again} of {second.steps} steps at {size}, from {settings.upscaler}"
            yield from self._once(text)
        if request.model_hash not in ("", self.model.hash):
            made_by = f"not with {self.model.name} ({self.model.hash})"
            texts.append(f"the picture was made with the model {request.model_hash}, {made_by}")
        now = {plugin.name: plugin.sha256 for plugin in loaded()}
        for name, digest in request.plugins:
            if now.get(name, digest) != digest:
                texts.append(f"the plugin {name} is not as it was when the picture was made")
        if request.missed:
            listed = ", ".join(text for _, text in request.missed)
            texts.append(f"not taken over from {request.source or 'the picture'}: {listed}")
        given = sample.input
        for name, prompt in (("prompt", given.prompt), ("negative prompt", given.negative)):
            count, limit = token_count(self.model, prompt) if prompt else (0, 0)
            cut = SYNTAXES[settings.prompt_syntax].plain
            if count > limit and (cut or self.strict):
                tokens = f"{count} tokens, of which {limit} are read" + ("" if cut else " at once")
                what = f'the {name} "{str(prompt)[:40]}..." has {tokens}'
                if self.strict:
                    raise UsageError(what, hint=f"leave out the last {count - limit}")
                texts.append(f"{what}: the last {count - limit} are cut")
        yield from self._unread(sample)
        yield from (Note(text) for text in texts if text not in self._noted)
        self._noted.update(texts)

    def _once(self, text: str) -> Iterator[Note]:
        """That, if it was not said before and is not nothing."""
        if text and text not in self._noted:
            self._noted.add(text)
            yield Note(text, warning=False)

    def _fitted(self, init: str, sample: Sample) -> str:
        """How a picture that is started from comes to the size that is drawn; "" = it has it."""
        settings, backdrop = sample.plan.settings, sample.input.backdrop
        given = picture_size(init)
        scale = settings.upscale * self._scale
        own, size = enlarged(given, scale), "{}x{}".format(*settings.size)
        plain = scale == 1
        if plain and own == settings.size and not settings.only_masked and not settings.outpaint:
            return ""
        said = "{} is {}x{}".format(Path(init).name, *given)
        if scale > 1:
            said += f", made {scale:g} times larger"
        if settings.only_masked and backdrop is not None:
            left, top, right, bottom = backdrop.box
            return (
                f"{said}: {right - left}x{bottom - top} of it at {left},{top} are drawn at {size}"
            )
        if settings.outpaint and backdrop is not None and backdrop.picture.size != settings.size:
            return f"{said}, drawn on {size} and cut to {'{}x{}'.format(*backdrop.picture.size)}"
        if settings.outpaint and settings.size == canvas_size(own, settings.outpaint):
            return f"{said}, drawn on {size}"
        if own == settings.size:
            return f"{said} and drawn at {size}"
        others = " or ".join(name for name in FITS if name != settings.fit)
        return f"{said}, fitted to {size} by --fit {settings.fit} (also {others})"

    def _unread(self, sample: Sample) -> Iterator[Note]:
        """What the prompts have of other tools' syntax and is drawn as words, each kind once;
        UsageError for what the syntax has and is not supported."""
        syntax = sample.plan.settings.prompt_syntax
        words = [name for word in self.model.words for name in word.names]
        for prompt in (sample.request.prompt, sample.request.negative):
            SYNTAXES[syntax].composition(prompt or "")  # which has sound weights, if any
            for construct, text in unread(prompt or "", syntax, words):
                if syntax in construct.refused:
                    raise construct.refusal(text)
                if construct.what not in self._noted:
                    self._noted.add(construct.what)
                    hint = f"; {construct.hint}" if construct.hint else ""
                    yield Note(
                        f"{text} is not understood and drawn as words: {construct.what}{hint}"
                    )

    def _idle(self, sample: Sample) -> Iterator[str]:
        """The settings that were asked for and change nothing."""
        values, own = sample.values(), self.model.preset.sample
        for row in SETTINGS:
            value = values.get(row.name)
            if row.effect is None or row.effect(values) or not value:
                continue
            if row.key is None or value != getattr(own, row.name):
                name = row.name.replace("_", " ")
                of_picture = row.name in sample.request.found
                said = f"the picture's {name}" if of_picture else row.flag
                said = name if sample.request.source else said  # a key of its line, it may be
                number = f" {value:g}" if isinstance(value, int | float) else ""
                yield f"{said}{number} has no effect {row.without}"


def _numbered(path: Path, number: int) -> Path:
    """A name with a number at its end, but for the first of its kind."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _folded(path: Path) -> str:
    """A path as a system reads it that minds neither capitals nor how accents are composed."""
    return unicodedata.normalize("NFC", str(path)).casefold()
