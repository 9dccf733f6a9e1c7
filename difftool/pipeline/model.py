"""A whole model on a device: preset, networks, tokenizers. The one place where all parts meet.

Training, sampling and previews share `Model.generate`; nothing else assembles a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from difftool.adapters.lora.algebra import Applied, apply, open_loras
from difftool.adapters.lora.file import changed_by
from difftool.config.layers import load_preset, merge
from difftool.config.networks import CodecConfig, VaeConfig
from difftool.config.schema import Preset, SampleConfig
from difftool.config.validate import build_preset, to_values, validate
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Discrete, build_path
from difftool.diffusion.samplers import SAMPLERS, Step
from difftool.errors import InputError, UsageError, suggestion
from difftool.formats import open_model
from difftool.formats.autoencoder import open_autoencoder
from difftool.formats.diffusers.scheduler_switch import switched
from difftool.formats.model_source import EXTRA, UNKNOWN, ModelSource
from difftool.formats.native import write_native
from difftool.formats.unclip import read_vision
from difftool.hub.find import find_model
from difftool.networks.clip import ClipText
from difftool.networks.codecs import Codec, VaeCodec, build_codec
from difftool.networks.unet import UNet
from difftool.networks.vision import ClipVision, Normalizer
from difftool.pipeline.condition import Embed, cond, embed
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import Item, Second, generate, plan
from difftool.pipeline.words import Word
from difftool.storage.commit import sha256_of
from difftool.text.tokenizer import Tokenizer

__all__ = ["DTYPES", "Embed", "Item", "Model", "Second", "pick_device"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; "auto" is the first of cuda, mps, cpu that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f'device "{name}" cannot be used', why, "try --device cpu") from None
    return device


class Model:
    """A diffusion model: `denoiser` (U-Net, path, target), `codec`, text encoders, tokenizers."""

    def __init__(self, preset: Preset, tokenizer_json: str | None = None, device: str = "cpu"):
        """Networks on `device` with undefined weights; see `fresh` and `load`."""
        self.preset = preset
        self.name = preset.name
        self.file: Path | None = None
        """That it was loaded from."""
        self.notes: list[str] = []
        self.words: list[Word] = []
        self.loras: list[Applied] = []
        self.adapters: nn.Module | None = None
        """A LoRA that is being trained."""
        self.tokenizer_json = tokenizer_json
        self.device = torch.device(device)
        self.low_memory = False
        self.vision: ClipVision | None = None
        self.normalizer: Normalizer | None = None
        self.vision_path: Any = None
        with torch.device("meta"), _Unwritten():
            self.codec: Codec = build_codec(preset.codec)
            network = UNet(preset.unet)
            self.text = nn.ModuleList(ClipText(config) for config in preset.text)
        self.denoiser = Denoiser(network, build_path(preset.path), preset.target)
        self.tokenizers = [self._tokenizer(config) for config in preset.text]
        self._sources: dict[str, Callable[[], None]] = {}

    def _tokenizer(self, config: Any) -> Tokenizer:
        if config.tokenizer == "clip":
            return Tokenizer.clip(pad_id=config.pad_id)
        if self.tokenizer_json is None:
            raise InputError(f"the model {self.name} lacks the vocabulary that it was trained with")
        return Tokenizer.from_json(self.tokenizer_json)

    # --- weights -----------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """The networks that have weights, by the prefix of their tensors in a model file."""
        parts: dict[str, nn.Module] = {"unet": self.denoiser.network}
        if vae := getattr(self.codec, "vae", None):
            parts["vae"] = vae
        parts |= {f"text.{i}": encoder for i, encoder in enumerate(self.text)}
        return parts if self.adapters is None else parts | {"lora": self.adapters}

    def tensors(self) -> dict[str, Tensor]:
        """Every weight under its name in a model file."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, part in self.parts().items()
            for name, tensor in part.state_dict().items()
        }

    @cached_property
    def hash(self) -> str:
        """By which other tools know its file; "" where there is none (any more).

        Not before it is asked for: of a large file it takes longer than to read the weights.
        """
        try:
            return "" if self.file is None else sha256_of(self.file)[:10]
        except OSError:
            return ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the U-Net's weights."""
        return self.denoiser.dtype

    @classmethod
    def fresh(
        cls, preset: Preset, *, seed: int, tokenizer_json: str | None = None, device: str = "cpu"
    ) -> Model:
        """A model to be trained from nothing; its weights are a function of the seed."""
        model = cls(preset, tokenizer_json)
        for index, part in enumerate(model.parts().values()):
            part.to_empty(device="cpu")
            part.init_weights(torch.Generator().manual_seed(seed * 1000 + index))  # type: ignore[operator]
            part.to(device)
        model.device = torch.device(device)
        return model

    @classmethod
    def load(
        cls,
        where: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        vae: str | None = None,
        recipe: str | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        allow_unused: bool = False,
        low_memory: bool = False,
    ) -> Model:
        """A model from wherever a MODEL argument points to; what was decided is in `.notes`.

        vae: an autoencoder, or another model with one, that stands in. recipe: a preset, by whose
        way of sampling it is sampled (Turbo's, say, which no tensor shows). loras: files and their
        strengths, applied to the weights in order; allow_unused: though the model lacks some of
        their layers. low_memory: the weights of a network are there only while it is at work.
        UsageError if nothing is there, InputError if it is malformed or not supported.
        """
        target = pick_device(device)
        if dtype == "auto":
            dtype = "fp32" if target.type != "cuda" else "fp16"
        half = dtype != "fp32"
        path = find_model(where, half=half)
        source = open_model(path)
        preset, other = build_preset(source.values, str(path)), None
        if vae is not None:
            codec, other = open_autoencoder(find_model(vae, half=half), preset.codec)
            preset = _with_codec(preset, codec, vae)
        if recipe is not None:
            chosen = load_preset(recipe)
            preset = replace(preset, sample=chosen.sample, scheduler=chosen.scheduler)
        model = cls(preset, source.tokenizer_json)
        model.device = target
        if not any(name.startswith("unet.") for name in source.tensors):
            hint = "train the rest of the model with it: --vae, or --part unet"
            if base := preset.train.lora_base:
                run = path if path.is_dir() else path.parent
                hint = f"give -m {base} --lora {run / 'lora.safetensors'}"
            raise InputError(f"{path} holds a part of a model, without a U-Net", hint=hint)
        if strange := [name for name in source.tensors if name.startswith(UNKNOWN)]:
            name = source.tensors[strange[0]].name
            raise InputError(f"{path} has an unknown tensor {name}", f"and {len(strange)} in all")
        model._see(source)
        shapes = {name: place.info.shape for name, place in source.tensors.items()}
        model.loras = open_loras(loras, shapes, preset.unet, model.name, allow_unused=allow_unused)
        for prefix, part in model._all_parts().items():
            origin = other if other is not None and prefix == "vae" else source
            model._sources[prefix] = model._loader(part, origin, prefix, DTYPES[dtype])
        model.low_memory = low_memory
        if not low_memory:
            for fill in model._sources.values():
                fill()
        model.file = source.file
        model.notes = [f"model {model.name} ({path})", *source.evidence, f"{dtype} on {target}"]
        model.notes += [f"sampled as by preset {recipe}"] if recipe else []
        model.notes += [f"autoencoder of {vae}"] if vae else []
        model.notes += map(str, model.loras)
        return model

    def _see(self, source: ModelSource) -> None:
        """Build the picture encoder that an unCLIP model comes with."""
        seen = read_vision(source.configs)
        if seen is None or self.preset.family != "sd2-unclip":
            return
        with torch.device("meta"), _Unwritten():
            self.vision = ClipVision(seen.config)
            self.normalizer = Normalizer(seen.config.projection)
        self.vision_path = seen.path

    def _all_parts(self) -> dict[str, nn.Module]:
        """The parts, and the picture encoder, whose tensors lie elsewhere in a file."""
        seen = {"vision.image_encoder": self.vision, "vision.image_normalizer": self.normalizer}
        return self.parts() | {name: part for name, part in seen.items() if part is not None}

    def _loader(
        self, part: nn.Module, source: ModelSource, prefix: str, dtype: torch.dtype
    ) -> Callable[[], None]:
        """What gives a part its weights."""
        there = prefix.replace("vision.", f"{EXTRA}diffusers.") + "."
        if prefix == "vision.image_normalizer":
            dtype = torch.float32

        def fill() -> None:
            # what LoRAs change they change before it is cast
            changed = changed_by(applied.lora for applied in self.loras)
            tensors = source.load(there, str(self.device), dtype, changed)
            if isinstance(part, Normalizer):  # OpenCLIP's embeddings are not normed
                tensors = tensors or part.nothing()
            if prefix == "vision.image_encoder":
                kept = (name for name in tensors if "position_ids" not in name)
                tensors = {_vision_name(name): tensors[name] for name in kept}
            apply(tensors, there, self.loras)
            self._fill(part, tensors, prefix, dtype, str(source.path))

        return fill

    def match(self, tool: str | None) -> None:
        """Read prompts as another tool does where that is not how the model was trained."""
        for tokenizer, config in zip(self.tokenizers, self.preset.text, strict=True):
            tokenizer.reads_padding = tool == "diffusers" and config.pad_id is not None

    def need(self, kind: str) -> None:
        """See to it that the weights of "text", "unet", "vae" or "vision" are there; with little
        memory, that no others are."""
        if not self.low_memory:
            return
        for prefix, part in self._all_parts().items():
            here = not next(part.parameters()).is_meta
            if prefix.partition(".")[0] != kind:
                if here:
                    part.to("meta")
            elif not here:
                self._sources[prefix]()

    def give_back(self) -> None:
        """With little memory, drop all weights until they are needed again."""
        self.need("nothing")

    def _fill(
        self, part: nn.Module, tensors: Mapping[str, Tensor], prefix: str, dtype: Any, source: str
    ) -> None:
        """Weights into a network, strictly: InputError for missing, unknown or misshapen ones."""
        wanted = part.state_dict()
        missing = [name for name in wanted if name not in tensors]
        unknown = [name for name in tensors if name not in wanted]
        misshapen = [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape]
        for problem, names in (
            ("lacks", missing),
            ("has an unknown", unknown),
            ("has a misshapen", misshapen),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"{source} {problem} tensor {prefix}.{names[0]}{more}")
        moved = {name: t.to(self.device, dtype) for name, t in tensors.items()}
        part.load_state_dict(moved, assign=True)
        part.eval().requires_grad_(False)

    def adopt(self, path: Path, part: str) -> None:
        """Take the weights of a part ("vae", "text", "unet") from another model."""
        source = open_model(path)
        for prefix, network in self.parts().items():
            if prefix.partition(".")[0] == part:
                self._loader(network, source, prefix, torch.float32)()

    def save(
        self,
        path: Path,
        *,
        weights: Mapping[str, Tensor] | None = None,
        parts: Collection[str] | None = None,
        dtype: str | None = None,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        limit: int | None = None,
    ) -> None:
        """Write a self-describing model file; `weights` (the EMA, say) replace the live ones.

        With `parts` only those are in it, for another model to adopt. limit: bytes beyond which it
        is split into shards with an index; None: none.
        """
        tensors = self.tensors() | dict(weights or {})
        if parts is not None:
            prefixes = tuple(f"{part}." for part in parts)
            tensors = {name: t for name, t in tensors.items() if name.startswith(prefixes)}
        if dtype is not None:
            tensors = {name: t.to(DTYPES[dtype]) for name, t in tensors.items()}
        write_native(
            path,
            to_values(self.preset),
            {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
            tokenizer_json=self.tokenizer_json,
            extra_metadata=dict(metadata or {}),
            overwrite=overwrite,
            limit=limit,
        )

    # --- conditioning ------------------------------------------------------------------------

    @property
    def null_label(self) -> int | None:
        """The label that means "none", where the model was trained with one."""
        table = self.preset.unet.num_classes
        return table - 1 if table and len(self.preset.classes) == table - 1 else None

    def label(self, name: str) -> int:
        """The label of a class given by name or index; UsageError if there is none."""
        classes, count = self.preset.classes, self.preset.unet.num_classes
        if not count:
            why = f"the model {self.name} has no classes"
            raise UsageError(f'there is no class "{name}"', why, "leave --label out")
        if name in classes:
            return classes.index(name)
        if name.isdecimal() and int(name) < (len(classes) or count):
            return int(name)
        listed = list(classes) or [f"0..{count - 1}"]
        raise UsageError(f'there is no class "{name}"', hint=suggestion(name, listed))

    def tokens(self, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has and how many are read, start and end marks left out."""
        pairs = zip(self.tokenizers, self.preset.text, strict=True)
        return max(((t.count(prompt), c.length - 2) for t, c in pairs), default=(0, 0))

    def embed(
        self, prompts: Sequence[str], clip_skip: int | None = None, syntax: str = "none"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Context [B,L,D] and pooled [B,P] of prompts; None where the model has none."""
        return embed(self, prompts, clip_skip, syntax)

    def pooled(self, prompts: Sequence[str]) -> list[Tensor]:
        """The pooled text [B,P] of prompts, of each text encoder."""
        ids = self._ids(prompts)
        return [encoder.pooled(i) for encoder, i in zip(self.text, ids, strict=True)]  # type: ignore[operator]

    def _ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids [B,L] of prompts, of each tokenizer."""
        return [
            torch.tensor(tokenizer.encode(list(prompts), config.length), device=self.device)
            for tokenizer, config in zip(self.tokenizers, self.preset.text, strict=True)
        ]

    def cond(
        self, prompts: Sequence[str], labels: Sequence[int | None], size: tuple[int, int],
        guidance: float = 1.0, embed: Embed | None = None, **more: Any,
    ) -> Cond:  # fmt: skip
        """What conditions the U-Net for a batch; see `conditioning.cond`."""
        return cond(self, prompts, labels, size, guidance, embed, **more)

    # --- sampling ----------------------------------------------------------------------------

    def settings(self, **given: Any) -> SampleConfig:
        """The preset's sampling settings with the values given (None = not given), checked."""
        given = {name: value for name, value in given.items() if value is not None}
        for key, registry in (("sampler", SAMPLERS), ("schedule", GRIDS)):
            if key in given:
                given[key] = registry.resolve(given[key])
        values = to_values(self.preset.sample)
        match = given.pop("match", None)
        if self.switches and (match or {"sampler", "schedule"} & given.keys()):
            names = (given.get("sampler"), given.get("schedule"))
            values |= switched(self.preset, *names, floor=match == "diffusers")
        values = merge(values, given)
        settings = validate(SampleConfig, values, "the sampling settings")
        self.check(settings)
        return settings

    def check(self, settings: SampleConfig) -> None:
        """UsageError for settings that this model cannot be sampled with."""
        factor = self.codec.factor
        if settings.steps < 1:
            raise UsageError(f"--steps {settings.steps} is too few", hint="give at least 1")
        if any(side < factor or side % factor for side in settings.size):
            size = "x".join(map(str, settings.size))
            nearest = "x".join(str(max(factor, round(s / factor) * factor)) for s in settings.size)
            why = f"sides must be multiples of {factor}"
            raise UsageError(f"size {size} does not fit this model", why, f"try {nearest}")
        if 0 < settings.guidance < 1 or settings.guidance < 0:
            hint = "1 is off; 2 to 8 are usual"
            raise UsageError(f"guidance {settings.guidance:g} is not usable", hint=hint)
        if settings.guidance > 1 and not self.preset.unet.guidance_dim and not self.guidable:
            why = "it was trained without an empty caption or label to guide from"
            raise UsageError(f"the model {self.name} cannot be guided", why, "use --guidance 1")
        if not 0 < settings.strength <= 1:
            raise UsageError(f"strength {settings.strength:g} is not above 0 and at most 1")
        if settings.image_guidance < 1:
            why, hint = "the picture would be kept away from", "1 is off"
            raise UsageError(f"image guidance {settings.image_guidance:g} is not usable", why, hint)
        if not 0 <= settings.noise_level < 1000:
            raise UsageError(f"noise level {settings.noise_level} is not from 0 to 999")
        path = self.denoiser.path
        SAMPLERS[settings.sampler](path, **settings.sampler_options)
        GRIDS[settings.schedule](path, settings.steps, **settings.schedule_options)

    @property
    def switches(self) -> bool:
        """Whether samplers are built from the model's scheduler, as diffusers builds them."""
        return bool(self.preset.scheduler) and isinstance(self.denoiser.path, Discrete)

    @property
    def guidable(self) -> bool:
        """Whether there is something to guide away from: an empty prompt, or a null label."""
        return bool(self.text) or self.null_label is not None

    @property
    def concat(self) -> Literal["none", "inpaint", "edit", "other"]:
        """What the U-Net sees beside x_t: nothing, a mask and the masked picture, or a picture."""
        more, own = self.preset.unet.in_channels - self.codec.channels, self.codec.channels
        kinds: dict[int, Literal["none", "inpaint", "edit"]] = {
            0: "none", own: "edit", own + 1: "inpaint",
        }  # fmt: skip
        return kinds.get(more, "other") if more == 0 or self.text else "other"

    def raw(self, x0: Tensor) -> Tensor:
        """The latent as the autoencoder has it, of x0 [B,c,h,w]."""
        return self.codec.raw(x0) if isinstance(self.codec, VaeCodec) else x0

    def steps(self, settings: SampleConfig, *, init: bool = False) -> int:
        """How many steps are run; from a picture it is fewer than are asked for."""
        return plan(self, settings, init=init).steps

    def generate(
        self, items: Sequence[Item], settings: SampleConfig, second: Second | None = None
    ) -> Iterator[Step]:
        """Pictures from pure noise, or from given ones, step by step; the last step's `.x` is x0
        [B,C,H,W].

        Everything random about a picture comes from its own seed, so it is the same alone and in
        any batch. second: a model that takes over for the last steps.
        """
        self.check(settings)
        return generate(self, items, settings, second)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images [B,3,H,W], fp32 in [-1, 1], of x0 [B,C,h,w]."""
        self.need("vae")
        return decode(self.codec, x0).clamp(-1, 1)


def _vision_name(name: str) -> str:
    """Newer transformers leave the prefix out."""
    return name if name.startswith("vis") else f"vision_model.{name}"


def _with_codec(preset: Preset, theirs: CodecConfig, where: str) -> Preset:
    """A preset with another autoencoder; UsageError if their latents differ."""
    ours = preset.codec
    if not isinstance(theirs, VaeConfig) or (
        (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor)
    ):
        why = f"{theirs.latent_channels} channels, {theirs.factor} times smaller"
        raise UsageError(f"the autoencoder of {where} does not fit the model {preset.name}", why)
    return replace(preset, codec=theirs)


class _Unwritten(TorchFunctionMode):
    """Networks built in it leave their weights unwritten: they are about to be loaded, and on the
    meta device drawing numbers would import torch's compiler, which takes longer than the rest."""

    drawing = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.drawing:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
