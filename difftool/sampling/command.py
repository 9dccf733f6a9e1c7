"""The whole work of `difftool sample` without its talk: from the options' values to events.

    task = prepare(values)             # refuses what can be refused without a model; no torch
    for event in sample(task): ...     # loads the models, makes the pictures

The command and the library both work so.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import product as cartesian
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.layers import Layer, load_preset, merge, merged, origins, override_layers
from difftool.config.options import by_name, option_layers
from difftool.config.schema import SampleConfig
from difftool.config.validate import check_sampling, to_values, validate
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS, spelled
from difftool.errors import UsageError, clash
from difftool.evaluation.options import check_evaluation
from difftool.hub.find import model_name, place_of_model
from difftool.images.formats import format_of, is_picture
from difftool.pipeline.matches import MATCHES
from difftool.sampling.compare.products import Combination, Product, Replayed, axes_of, single
from difftool.sampling.events import Event, Failure, Note, Started
from difftool.sampling.expand import Expander, applied, is_plain, spread
from difftool.sampling.files.prompts import Lines, read_requests
from difftool.sampling.output import PAGES, Numbering, Output
from difftool.sampling.requests import Request, drawn_seed, request_of
from difftool.sampling.settings import IMAGES, PICTURES, SETTINGS
from difftool.storage.places import check_place

if TYPE_CHECKING:
    from difftool.pipeline.model import Model
    from difftool.sampling.preview import LivePreviews
    from difftool.sampling.reading import Reading
    from difftool.sampling.run import SampleRun

REFINER_START = 0.8
LISTS = (".txt", ".json", ".jsonl", ".ndjson")
"""Endings of files of prompts."""


@dataclass(frozen=True)
class SampleTask:
    """What the options ask for, checked as far as it can be without a model."""

    values: Mapping[str, Any]
    """Every option by name, as `read_options` gives them."""
    layers: list[Layer]
    """The settings of the model among them, each with its flag."""
    base: Request
    """What every picture is asked for, the prompts and labels apart; of several combinations, the
    first one."""
    product: Product
    """The combinations in which it is."""
    asked: list[Request]
    """What is asked for beside it, where that is no stream."""
    stream: Lines | None
    """The lines of --prompts."""
    output: Output | None
    """None where pictures go to no files."""
    total: int | None
    """How many pictures are asked for; None where lines are yet to be read."""

    @property
    def model(self) -> str:
        """The model's name, or where it is, as far as is known before it is loaded."""
        return " and ".join(dict.fromkeys(model_name(v["model"]) for v, _ in self.product.loads()))

    @property
    def said(self) -> str:
        """How many pictures there will be and why; "" where nothing is multiplied."""
        return self.product.said(self.total, self.asked)

    def steps(self, own: int) -> int | None:
        """Steps of all pictures of one model; own: of one that asks for no number."""
        asked = () if self.total is None else self.product.requests(self.asked)
        requests = [each for each in asked if isinstance(each, Request)]
        steps = sum(len(r.images()) * _steps(r, own) for r in requests)
        count = sum(len(r.images()) for r in requests) * len(list(self.product.loads()))
        return steps * (self.total or 0) // count if count else None

    def requests(self, place: Combination = ()) -> Lines:
        """What is asked for, whole; place: which of several models it is asked of."""
        return self.product.requests(self.asked if self.stream is None else self.stream, place)


def _steps(request: Request, own: int) -> int:
    """Steps of one of its pictures, by a count of the model's own."""
    asked = request.settings
    steps = asked.get("steps", own)
    if asked.get("hires", 1) == 1:
        return steps
    share = asked.get("hires_strength", SampleConfig().hires_strength)
    return steps + int((asked.get("hires_steps") or steps) * share)


def prepare(values: Mapping[str, Any], *, loaded: bool = False) -> SampleTask:
    """What the options ask for; UsageError for all that can be refused without a model, InputError
    for a picture that does not say how it was made. loaded: the model is there already, and
    pictures go to files only where `output` says so."""
    if values["exact"] and values["batch_size"] not in (None, 1):
        raise clash("--exact", f"--batch-size {values['batch_size']}")
    if not loaded:
        _check_words(values["prompt"] or ())
    axes = axes_of(values)
    values = single(values, axes)
    labels = [part for text in values["label"] or [] for part in text.split(",")]
    if values["prompts"] and len(labels) > 1:
        raise UsageError("one --label goes with --prompts", hint='put a "label" on each line')
    layers = _layers(values)
    if (axes or _compares(values)) and not (values["seed"] or values["from_image"]):
        values["seed"] = (_seed_of_all(values),)
    if axes and values["vary"] is not None and values["vary_seed"] in (None, -1):
        values["vary_seed"] = _seed_of_all(values)
    pictures = _pictures(values, loaded) if values["from_image"] else [None]
    label = labels[0] if values["prompts"] and labels else None
    product = Product(values, axes, partial(_base, label=label), pictures)
    base = product.base
    for picture in filter(None, pictures):
        asked_for = product.ask(values, picture)
        _check_files(values, _opened(loaded), asked_for)
        _check_plugins(asked_for)
    for each in (base, *product.each()):
        _check_settings(each.settings)
    asked = [
        Request(prompt=prompt, label=label)
        for prompt, label in cartesian(values["prompt"] or [None], labels or [None])
    ]
    count = _counted(values, product, asked)
    loads = len(list(product.loads()))
    total = None if values["prompts"] else len(values["from_latents"] or ()) or count * loads
    output = None if loaded and values["output"] is None else _output(values, total)
    if not loaded:
        for given, _ in product.loads():
            for place in filter(None, (given[name] for name in ("vae", "prior", "refiner"))):
                place_of_model(place)
            place_of_model(given["model"])
    stream = read_requests(values["prompts"]) if values["prompts"] else None
    if values.get("evaluate"):
        check_evaluation(values["evaluate"], values["features"], total)
    return SampleTask(values, layers, base, product, asked, stream, output, total)


def _check_words(prompts: Sequence[str]) -> None:
    """UsageError for a prompt that is the name of a file which an option takes."""
    for prompt in prompts:
        if not isfile(prompt):
            continue
        hint = None
        if is_picture(prompt):
            hint = f"--init {prompt} starts from it"
        elif Path(prompt).suffix.lower() in LISTS:
            hint = f"--prompts {prompt} draws each of its lines"
        if hint:
            raise UsageError(f'"{prompt}" is a file, and no prompt', hint=hint)


def _compares(values: Mapping[str, Any]) -> bool:
    """Whether the pictures are seen side by side."""
    return bool(values["grid"]) or Path(values["output"] or "").suffix.lower() in PAGES


def _base(values: Mapping[str, Any], picture: Request | None, *, label: str | None) -> Request:
    """What every picture is asked for by these options, the prompts apart. picture: what one says
    of itself; label: the class of all lines."""
    given = {"prompt": None, "label": label, "no": ", ".join(values["no"] or ()) or None}
    base = request_of({**values, **given})
    base = replace(base, settings=merged(layer.values["sample"] for layer in _layers(values)))
    if picture is not None:
        found = frozenset(picture.settings) - frozenset(base.settings)
        base = replace(_taken_over(values, base.over(picture)), found=found)
        if base.loras and base.applied is None:
            base = replace(base, applied=[(Path(path), weight) for path, weight in base.loras])
    return base


def _opened(loaded: bool) -> tuple[str, ...]:
    """The options whose files are opened where a picture names them."""
    return PICTURES if loaded else (*PICTURES, "lora", "embedding")


def _pictures(values: Mapping[str, Any], loaded: bool) -> list[Request | None]:
    """The requests of --from-image: of a picture, or of those of a grid."""
    from difftool.sampling.metadata.files import read_all
    from difftool.sampling.metadata.named import locate, sought_in

    opened, found = _opened(loaded), list[Request | None]()
    for picture in read_all(values["from_image"]):
        named = (f for f in picture.named if f.option not in opened or not values[f.option])
        picture = replace(picture, named=tuple(named))
        if "lora" in opened and values["lora_dir"] and not values["lora"]:
            picture = sought_in(picture, values["lora_dir"])
        places = [p for p in (values["lora_dir"], values["embedding_dir"]) if p]
        trusted = bool(values["trust_image"])
        found.append(locate(picture, values["from_image"], opened, trusted=trusted, places=places))
    return found


def _seed_of_all(values: Mapping[str, Any]) -> int:
    """One seed of pictures to be compared: drawn, but with --skip-existing the same whenever the
    same is asked for, so that a run that was stopped can be begun again."""
    if not values["skip_existing"]:
        return drawn_seed()
    asked = repr([values[name] for name in ("prompt", "prompts", "negative", "label", "vary")])
    return int(sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)


def _counted(values: Mapping[str, Any], product: Product, asked: Sequence[Request]) -> int:
    """How many pictures requests come to with each model; UsageError for what is wrong with
    one."""
    expander = Expander(values["wildcard_dir"], bool(values["combinatorial"]))
    count = 0
    for request in product.requests([] if values["prompts"] else asked):
        if not isinstance(request, Request):
            assert request is not None
            raise request
        for one in spread(request):
            plain = is_plain(one, values["match"])
            one = one if plain else applied(one)
            count += len(one.images()) * (1 if plain else expander.count(one))
    return count


def _layers(values: Mapping[str, Any]) -> list[Layer]:
    """The settings of the model, flag by flag, as layers over its preset."""
    layers = [Layer(*pair) for pair in option_layers(SETTINGS, values)]
    for layer in override_layers(values["set"] or []):
        if not isinstance(layer.values.get("sample"), dict):
            why = "the model's weights fix the rest"
            raise UsageError(f"{layer.origin}: only sample.KEY is set here", why)
        layers.append(layer)
    return layers


def _taken_over(values: Mapping[str, Any], request: Request) -> Request:
    """The request of a picture, with what options that are given ask for no longer missing."""
    missed = tuple((name, text) for name, text in request.missed if not values.get(name))
    settings = dict(request.settings)
    if any(name == "init" for name, _ in missed):
        for row in SETTINGS:  # which is said with the picture that is missing
            if row.panel == IMAGES and row.key:
                settings.pop(row.name, None)
    return replace(request, missed=missed, settings=settings)


def _check_files(values: Mapping[str, Any], opened: Collection[str], request: Request) -> None:
    """UsageError for a file of the options to be opened that a picture's metadata name, that no
    option replaces and that is not there."""
    paths = [(name, path) for name in PICTURES if (path := getattr(request, name))]
    paths += [("embedding", path) for path in request.embeddings]
    paths += [("lora", path) for path, _ in request.loras]
    rows = by_name(SETTINGS)
    named = [(rows[name], path) for name, path in paths if name in opened and not values[name]]
    for row, path in named:
        try:
            row.check_files([path] if row.many else path)
        except UsageError as error:
            why, hint = "the picture names it", f"give {row.flag}"
            if digest := request.hashes.get(path):
                why += f", of hash {digest}"
            if digest and not values["trust_image"]:
                hint += ", or --trust-image to look for its hash in the working folder too"
            raise UsageError(error.what, why, hint) from None


def _check_plugins(request: Request) -> None:
    """UsageError for a sampler or a schedule of a plugin that is not loaded: it is never loaded
    because a picture names it."""
    for name, registry in (("sampler", SAMPLERS), ("schedule", GRIDS)):
        asked = request.settings.get(name)
        if request.plugins and asked is not None and asked not in registry:
            named = " or ".join(plugin for plugin, _ in request.plugins)
            why = f"the picture was made with the plugin {named}"
            raise UsageError(f'there is no {registry.kind} "{asked}"', why, "give --plugin FILE.py")


def _check_settings(settings: Mapping[str, Any]) -> None:
    """UsageError for settings that no model has."""
    whole = merge(to_values(SampleConfig()), spelled(settings))
    check_sampling(validate(SampleConfig, whole, "the sampling settings"))


def _output(values: Mapping[str, Any], total: int | None) -> Output:
    output = Output.parse(
        values["output"],
        format=values["format"],
        many=total != 1,
        grid=bool(values["grid"]),
        overwrite=bool(values["overwrite"]),
        skip_existing=bool(values["skip_existing"]),
    )
    for name in ("save_latents", "gif"):
        if output.only_sheet and values[name]:
            hint = "-o FOLDER/ has one for each, and the grid beside them"
            flag = by_name(SETTINGS)[name].flag
            raise UsageError(f"{flag} needs a file for each picture", hint=hint)
    if shown := values["preview_path"]:
        if format_of(shown.suffix) is None:
            raise UsageError(f"{shown} is not the name of a picture", hint=f"{shown}.png is one")
        check_place(shown)
    if values["grid"] or output.page:
        output.sheet_path()  # fails now if it is taken, not after all the work
    if not output.stdout:
        output.check_folder()
        return output
    if values.get("json"):
        raise UsageError("-o - and --json both want stdout", hint="leave one of them out")
    for name in ("save_latents", "gif"):
        if values[name]:
            flag = by_name(SETTINGS)[name].flag
            raise UsageError(f"{flag} needs a picture's name", hint="give -o FILE")
    if total != 1 and not values["grid"]:
        hint = "--grid puts them on one sheet, -o out/ writes files"
        raise UsageError("-o - takes one image", f"{total or 'a stream'} asked for", hint)
    if sys.stdout.isatty():
        raise UsageError("-o - does not write a picture to a terminal", hint="redirect: > fox.png")
    return output


def sample(
    task: SampleTask, model: Model | None = None, refiner: Model | None = None
) -> Iterator[Event]:
    """Load the models, unless they are given, and make the pictures: what happens, as it does.

    A picture that cannot be made is a Failure, and the others are made; a DifftoolError where none
    can be.
    """
    if task.output is None or not (task.values["grid"] or task.output.page):
        yield from _made(task, model, refiner)
        return
    from difftool.sampling.compare.gallery import Gallery

    with Gallery(task.output, metadata=not task.values["no_metadata"]) as gallery:
        for event in _made(task, model, refiner):
            gallery.take(event)
            yield event
        yield from gallery.written()


def _made(task: SampleTask, model: Model | None, refiner: Model | None) -> Iterator[Event]:
    """The pictures of each model in turn."""
    loads = list(task.product.loads())
    if len(loads) > 1 and task.stream is not None:
        task = replace(task, stream=Replayed(task.stream))
    numbering = Numbering()
    for values, place in loads:
        part = replace(task, values=values)
        if len(loads) > 1 or model is None:
            model = refiner = None  # let go before the next is loaded
            model, refiner = load_models(part)
        run = run_of(part, model, refiner, numbering)
        plan = run.resolver.plan(task.base.settings)
        words = [f"word {word} ({word.path})" for word in model.words]
        notes = [*model.notes, *(refiner.notes if refiner else ()), *words]
        work = task.steps(plan.settings.steps)
        yield Started(model.name, plan.settings, notes, work and work * len(loads))
        if values["match"]:
            listed = MATCHES[values["match"]].listed(task.base.settings, model.device.type != "cpu")
            yield Note(f"as in {values['match']}: {listed}", warning=False)
        for warning in (*model.warnings, *(refiner.warnings if refiner else ())):
            yield Note(warning)
        files = values["from_latents"]
        events = run.decode(files) if files else run.events(part.requests(place))
        if values.get("evaluate"):
            from difftool.sampling.evaluate import judged

            device = str(model.device)
            events = judged(events, values["evaluate"], values["features"], device)
        yield from events
        del run, events


def run_of(
    task: SampleTask,
    model: Model,
    refiner: Model | None = None,
    numbering: Numbering | None = None,
) -> SampleRun:
    """The run that makes the pictures of a task; numbering: where it goes on from another."""
    from difftool.sampling.run import SampleRun

    values, start = task.values, task.values["refiner_start"]
    return SampleRun(
        model=model,
        output=None if task.output and task.output.only_sheet else task.output,
        batch_size=1 if values["exact"] else values["batch_size"],
        metadata=not values["no_metadata"],
        latents=bool(values["save_latents"]),
        strict=bool(values["strict_prompt"]),
        lora_dir=values["lora_dir"],
        embedding_dir=values["embedding_dir"],
        expander=Expander(values["wildcard_dir"], bool(values["combinatorial"])),
        match=values["match"],
        refiner=refiner,
        refiner_start=REFINER_START if start is None else start,
        trusted=bool(values["trust_image"]),
        numbering=numbering or Numbering(),
        previews=_previews(values, model),
    )


def _previews(values: Mapping[str, Any], model: Model) -> LivePreviews | None:
    if not any(values[name] for name in ("preview", "preview_path", "gif")):
        return None
    from difftool.sampling.preview import LivePreviews, Previewer, open_tiny

    file = values["preview_decoder"]
    tiny = None if file is None else open_tiny(file, model)
    return LivePreviews(Previewer(model, tiny), values["preview_path"], bool(values["gif"]))


def load_models(task: SampleTask) -> tuple[Model, Model | None]:
    """The model, and the refiner if there is one, with their words."""
    from difftool.engine.cpu import keep_memory, return_memory
    from difftool.pipeline.load import load_model, sample_as
    from difftool.pipeline.words import add_embeddings

    values, refiner = task.values, None
    recipe = None if values["preset"] is None else load_preset(values["preset"])
    common: dict[str, Any] = {name: values[name] or "auto" for name in ("device", "dtype")}
    common["low_memory"] = bool(values["low_memory"] or values["skip_existing"])
    if not common["low_memory"]:
        return_memory()
    model = load_model(
        values["model"],
        vae=values["vae"],
        prior=values["prior"],
        loras=values["lora"] or [(Path(path), weight) for path, weight in task.base.loras],
        allow_unused=bool(values["allow_unused"]),
        **common,
    )
    if recipe is not None:
        sample_as(model, recipe)
    if values["refiner"]:
        refiner = load_model(values["refiner"], **common)
    if not values["low_memory"]:
        keep_memory()
    for each in filter(None, (model, refiner)):
        each.set_padding(values["match"])
        if each.prior is not None:
            each.prior.set_padding(values["match"])
        if not values["low_memory"] and values["skip_existing"]:
            each.keep_weights()
        if values["engine"] != "plain" and not (values["exact"] or each.low_memory):
            each.quicken(always=values["engine"] == "quick")
        add_embeddings(each, values["embedding"] or map(Path, task.base.embeddings))
    return model, refiner


def readings(task: SampleTask) -> Iterator[Reading | Note | Failure]:
    """How the prompts of each picture are read; and what is to be said of them."""
    from difftool.sampling.reading import Reading
    from difftool.sampling.sample import Sample

    values = {**task.values, "low_memory": True}  # weights are not read before they are needed
    model, refiner = load_models(replace(task, values=values))
    run = run_of(replace(task, output=None), model, refiner)
    for entry in run.entries(task.requests()):
        if isinstance(entry, Sample):
            yield Reading(entry)
        elif isinstance(entry, Note | Failure):
            yield entry


def configuration(task: SampleTask) -> Iterator[tuple[str, Any, str]]:
    """(key path, value, origin) of every value of the preset that pictures are made by."""
    from difftool.pipeline.settings import plan_sampling, resolve_settings

    values = {**task.values, "low_memory": True}  # weights are not read before they are needed
    model, _ = load_models(replace(task, values=values))
    settings = resolve_settings(model, task.base.settings, task.values["match"])
    plan_sampling(model, settings)
    below = [Layer(f"model {model.name}", to_values(model.preset))]
    if image := task.values["from_image"]:
        below.append(Layer(f"--from-image {image}", {"sample": task.base.settings}))
    return origins(replace(model.preset, sample=settings), below + task.layers)
