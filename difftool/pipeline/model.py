"""A model on a device: its networks, their weights, its tokenizers; and its file.

What is done with it lies beside it: `load`, `condition`, `settings`, `generate`, `decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from difftool.adapters.lora.algebra import Applied
from difftool.config.families import concat_of
from difftool.config.schema import Preset
from difftool.config.validate import to_values
from difftool.devices import ByDevice
from difftool.diffusion.denoiser import Denoiser
from difftool.diffusion.path import build_path
from difftool.engine.cpu import adapt
from difftool.engine.quick import is_large, quicken
from difftool.errors import InputError, UsageError, suggestion
from difftool.formats.native import write_native
from difftool.networks.codecs import Codec
from difftool.networks.kinds import build_codec, build_encoder, build_network
from difftool.networks.vision import ClipVision, Normalizer
from difftool.storage.commit import known_sha256
from difftool.storage.strict_json import to_json
from difftool.text.tokenizer import Tokenizer

DECIDES = (
    *("family", "codec", "unet", "text", "size_numbers", "path", "target", "scheduler"),
    *("zero_negative", "classes"),
)
"""Parts of a preset that decide what weights make."""
LAYOUTS = ByDevice(cpu=torch.preserve_format, cuda=torch.channels_last, mps=torch.preserve_format)
"""In which the kernels of convolutions lie, and so pictures within a network: as the matrix units
of a GPU read them, which saves two copies a convolution."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Word:
    """A learned word of a model (textual inversion)."""

    path: Path
    names: tuple[str, ...]
    """What stands for it in a prompt."""
    first: int
    """The token id of its first vector."""

    def __str__(self) -> str:
        return " or ".join(self.names)


class Model:
    """A diffusion model: `denoiser` (U-Net, path, target), `codec`, text encoders, tokenizers."""

    def __init__(self, preset: Preset, tokenizer_json: str | None = None, device: str = "cpu"):
        """Networks on `device` with undefined weights; see `fresh` and `load_model`."""
        self.preset = preset
        self.name = preset.name
        self.file: Path | None = None
        """That it was loaded from."""
        self.files: tuple[Path, ...] = ()
        """All that its weights are in."""
        self.notes: list[str] = []
        self.warnings: list[str] = []
        """What was odd about its files."""
        self.words: list[Word] = []
        self.loras: list[Applied] = []
        """That are applied now."""
        self.base_loras: tuple[Applied, ...] = ()
        """That it was loaded with."""
        self.open_loras: Callable[[Iterable[tuple[Path, float]]], list[Applied]] = no_loras
        """Opens files for it."""
        self.word_files: tuple[list[Path], list[Path]] = [], []
        """Of `words`; the second are known by their own names alone."""
        self.adapters: nn.Module | None = None
        """A LoRA that is being trained."""
        self.tokenizer_json = tokenizer_json
        self.device = torch.device(device)
        self.low_memory = False
        self.deferred = False
        """Whether its weights are yet to be read, all of them when the first are needed."""
        self.vision: ClipVision | None = None
        self.normalizer: Normalizer | None = None
        self.vision_path: Any = None
        self.prior: Model | None = None
        """What says, from the text, what picture is to be varied."""
        self.single_steps = False
        """Whether, of a prior, each step goes to the timestep before it, whichever comes next:
        UnCLIPScheduler's in StableUnCLIPPipeline."""
        with unwritten():
            self.codec: Codec = build_codec(preset.codec)
            self.network = build_network(preset.unet)
            self.text = [build_encoder(config) for config in preset.text]
        for part in (self.network, self.codec, *self.text):
            adapt(part)
        self.denoiser = Denoiser(self.network, build_path(preset.path), preset.target)
        self.tokenizers = [self._tokenizer(config) for config in preset.text]
        self.loaders: dict[str, Callable[[], None]] = {}
        """What gives each of `all_parts` its weights."""

    def _tokenizer(self, config: Any) -> Tokenizer:
        if config.tokenizer == "clip":
            return Tokenizer.clip(pad_id=config.pad_id)
        if self.tokenizer_json is None:
            raise InputError(f"the model {self.name} lacks the vocabulary that it was trained with")
        return Tokenizer.from_json(self.tokenizer_json)

    # --- weights -----------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """The networks that have weights, by the prefix of their tensors in a model file."""
        parts: dict[str, nn.Module] = {"unet": self.network, **self.codec.parts()}
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
            return "" if self.file is None else known_sha256(self.file)[:10]
        except OSError:
            return ""

    @cached_property
    def content(self) -> str:
        """Hash of all that decides what it makes: of its files of weights, its configuration and
        its vocabulary; "" where a file is gone. Not before it is asked for, either."""
        own = to_values(self.preset)
        told = to_json({name: own[name] for name in DECIDES}, sort_keys=True)
        digest = sha256((told + (self.tokenizer_json or "")).encode())
        try:
            for found in sorted({known_sha256(file) for file in self.files}):
                digest.update(found.encode())
        except OSError:
            return ""
        return digest.hexdigest()

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

    def all_parts(self) -> dict[str, nn.Module]:
        """The parts, and the picture encoder, whose tensors lie elsewhere in a file."""
        vision = {"vision.image_encoder": self.vision, "vision.image_normalizer": self.normalizer}
        return self.parts() | {name: part for name, part in vision.items() if part is not None}

    def load_part(self, kind: str) -> None:
        """See to it that the weights of "text", "unet", "vae" or "vision" are there; with little
        memory, that no others are."""
        if not self.low_memory:
            if self.deferred:
                self.deferred = False
                for load in self.loaders.values():
                    load()
            return
        for prefix, part in self.all_parts().items():
            loaded = has_weights(part)
            if prefix.partition(".")[0] != kind:
                if loaded:
                    part.to("meta")
            elif not loaded:
                self.loaders[prefix]()

    def keep_weights(self) -> None:
        """Of a model that was loaded with little memory: read all weights when the first of them
        are needed, and keep them."""
        for each in filter(None, (self, self.prior)):
            each.low_memory, each.deferred = False, True

    def quicken(self, always: bool = False) -> None:
        """On a CPU in fp32, let a large U-Net and its autoencoder, or always, be computed by
        whatever way is the fastest there, within rounding."""
        for each in filter(None, (self, self.prior)):
            if each.device.type == "cpu" and (always or is_large(each.network)):
                quicken(each.network, each.loaders.get("unet"))
                quicken(each.codec, each.loaders.get("vae"), last=False)

    def unload(self) -> None:
        """With little memory, drop all weights until they are needed again."""
        if self.low_memory:
            self.load_part("none")

    def check_weights(self, prefix: str, shapes: Mapping[str, Sequence[int]], source: str) -> None:
        """InputError, naming the source, unless weights of those names and shapes are those that
        the part of that prefix has."""
        wanted = self.all_parts()[prefix].state_dict()
        missing = [name for name in wanted if name not in shapes]
        unknown = [name for name in shapes if name not in wanted]
        misshapen = [n for n in wanted if n in shapes and wanted[n].shape != tuple(shapes[n])]
        for problem, names in (
            ("lacks", missing),
            ("has an unknown", unknown),
            ("has a misshapen", misshapen),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"{source} {problem} tensor {prefix}.{names[0]}{more}")

    def set_weights(
        self, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str
    ) -> None:
        """Weights for the part of that prefix, strictly: InputError, naming the source, for
        missing, unknown or misshapen ones. dtype: that they are kept in; None: their own."""
        self.check_weights(prefix, {name: t.shape for name, t in tensors.items()}, source)
        part = self.all_parts()[prefix]
        kernels = LAYOUTS[self.device.type]
        moved = {
            name: t.to(
                self.device,
                dtype or t.dtype,
                memory_format=kernels if t.dim() == 4 else torch.preserve_format,
            )
            for name, t in tensors.items()
        }
        part.load_state_dict(moved, assign=True)
        part.eval().requires_grad_(False)

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
            self.preset,
            {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
            tokenizer_json=self.tokenizer_json,
            extra_metadata=dict(metadata or {}),
            overwrite=overwrite,
            limit=limit,
        )

    # --- what it can be given ----------------------------------------------------------------

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

    @property
    def guidable(self) -> bool:
        """Whether there is something to guide away from: an empty prompt, or a null label."""
        return bool(self.text) or self.null_label is not None

    @property
    def concat(self) -> str:
        """What the network sees beside x_t, a key of CONCAT or "other"."""
        return concat_of(self.preset.unet, self.preset.codec)

    def set_padding(self, tool: str | None) -> None:
        """Read prompts as another tool does where that is not how the model was trained."""
        for tokenizer, config in zip(self.tokenizers, self.preset.text, strict=True):
            tokenizer.reads_padding = tool == "diffusers" and config.pad_id is not None


def has_weights(part: nn.Module) -> bool:
    """Whether the weights of a network are there: some, where layers have made others of theirs."""
    return not all(each.is_meta for each in part.parameters())


def no_loras(files: Iterable[tuple[Path, float]]) -> list[Applied]:
    """What a model that is being made opens."""
    raise UsageError("a model that is not from a file takes no LoRAs", str([str(f) for f in files]))


@contextmanager
def unwritten() -> Iterator[None]:
    """Networks built in it have no weights yet: they are about to be loaded."""
    with torch.device("meta"), _Unwritten():
        yield


class _Unwritten(TorchFunctionMode):
    """No number is drawn: on the meta device that would import torch's compiler, which takes longer
    than the rest."""

    drawing = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.drawing:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
