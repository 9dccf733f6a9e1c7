"""What pictures look like while they are made: shown, in a file that is renewed, animated.

x0 is seen through a tiny decoder, at little cost; where none is near to the model's own, through a
linear map from latents to colours that is fitted to it. Codecs that learn nothing decode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from difftool.config.layers import preset_folder
from difftool.errors import UsageError
from difftool.formats.diffusers.components import component_tensors
from difftool.images.animation import gif
from difftool.images.fit import tile, to_pil, zoom_of
from difftool.images.formats import format_of
from difftool.images.write import encode
from difftool.networks.tiny import TinyDecoder, tiny_decoder
from difftool.pipeline.decode import decode
from difftool.pipeline.model import Model
from difftool.storage.commit import write_whole
from difftool.storage.tensor_file import open_source

STEM = "diffusion_pytorch_model"
"""Of the file in a folder of diffusers."""
SEEN = 256
"""A side of previews of the map, at most about."""
FIELDS, SIDE, COARSE = 8, 16, 3
"""Latents that the map is fitted on: so many, of that side, of noise that is so coarse."""


def open_tiny(path: Path, model: Model) -> TinyDecoder:
    """The tiny decoder of a file (TAESD's, or diffusers' AutoencoderTiny) for a model.

    InputError if it is none, UsageError if it is for other latents.
    """
    source = component_tensors(path, STEM) if path.is_dir() else open_source(path)
    decoder = tiny_decoder(source.load(dtype=torch.float32), str(path))
    codec = model.codec
    if (decoder.channels, decoder.factor) != (codec.channels, codec.factor):
        theirs = f"{decoder.channels} channels, {decoder.factor} times smaller"
        own = f"{codec.channels} and {codec.factor}"
        raise UsageError(f"{path} does not fit the model {model.name}", f"{theirs}, and not {own}")
    return decoder.to(model.device)


def smooth(count: int, channels: int, side: int, seed: int) -> Tensor:
    """Smooth random latents [count,channels,side,side] of unit deviation."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, COARSE, COARSE, generator=generator)
    x0 = F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=True)
    return x0 / x0.std()


@torch.no_grad()
def probe(model: Model) -> tuple[Tensor, Tensor]:
    """Smooth random latents x0 [B,c,h,w], and what the model's decoder makes of them."""
    x0 = smooth(FIELDS, model.codec.channels, SIDE, seed=0).to(model.device)
    return x0, decode(model, x0).nan_to_num().float()


@torch.no_grad()
def colours(x0: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [3,c], bias [3]) by which x0 [B,c,h,w] is about the mean colour of each of its places
    in images [B,3,H,W]: least squares."""
    images = F.avg_pool2d(images, images.shape[-1] // x0.shape[-1])
    places = x0.float().movedim(1, -1).flatten(0, 2).cpu()
    inputs = torch.cat([places, torch.ones(len(places), 1)], dim=1)
    targets = images.float().movedim(1, -1).flatten(0, 2).cpu()
    solved = torch.linalg.lstsq(inputs, targets).solution
    return solved[:-1].T, solved[-1]


def linear(weight: Tensor, bias: Tensor, factor: int, x0: Tensor) -> Tensor:
    """Pictures of x0 [B,c,h,w] by the linear map, factor times larger unless that is large."""
    weight, bias = weight.to(x0.device), bias.to(x0.device)
    made = torch.einsum("oc,bchw->bohw", weight, x0) + bias[:, None, None]
    zoom = min(factor, max(1, SEEN // min(made.shape[2:])))
    return F.interpolate(made, scale_factor=float(zoom), mode="bicubic")


def shipped(model: Model) -> Iterator[TinyDecoder]:
    """The tiny decoders that ship whose latents have the shape of a model's."""
    for path in sorted(preset_folder().glob("*/preview.safetensors")):
        decoder = tiny_decoder(open_source(path).load(dtype=torch.float32), str(path))
        if (decoder.channels, decoder.factor) == (model.codec.channels, model.codec.factor):
            yield decoder.to(model.device)


@torch.no_grad()
def nearest(model: Model) -> Callable[[Tensor], Tensor]:
    """What sees x0 most nearly as the model's decoder: the linear map or one of the decoders that
    ship, whichever model they were made for."""
    x0, images = probe(model)
    factor = model.codec.factor
    ways = [partial(linear, *colours(x0, images), factor), *shipped(model)]

    def error(way: Callable[[Tensor], Tensor]) -> float:
        made = F.interpolate(way(x0), size=images.shape[2:])
        return (made - images).square().mean().item()

    return min(ways, key=error)


class Previewer:
    """Makes small pictures of x0."""

    def __init__(self, model: Model, tiny: Callable[[Tensor], Tensor] | None = None):
        """tiny: what makes pictures of x0; None: the `nearest`, found when it is needed."""
        self.model, self.tiny = model, tiny

    @torch.no_grad()
    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [-1, 1], on the CPU, of x0 [B,c,h,w]; those of large latents are
        smaller than what they become."""
        if self.tiny is None and not self.model.codec.learned:
            return decode(self.model, x0).cpu()
        self.tiny = self.tiny or nearest(self.model)
        return self.tiny(x0.float()).nan_to_num().clamp(-1, 1).cpu()


@dataclass
class LivePreviews:
    """Takes x0 at each step of a batch."""

    previewer: Previewer
    path: Path | None = None
    """Of a file that is renewed at each step."""
    animated: bool = False
    """Whether frames are kept for an animation."""
    _frames: dict[int, list[Image.Image]] = field(default_factory=dict)

    def begin(self, numbers: Sequence[int]) -> None:
        """A batch of the pictures of these numbers begins, or begins anew."""
        self._frames |= {number: [] for number in numbers}

    def step(self, numbers: Sequence[int], x0: Tensor) -> Image.Image:
        """What x0 [B,c,h,w] of these pictures looks like."""
        pictures = [to_pil(each) for each in self.previewer.pictures(x0)]
        if self.animated:
            for number, picture in zip(numbers, pictures, strict=True):
                self._frames[number].append(picture)
        return self.shown(pictures)

    def shown(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """The pictures of a batch side by side, and in the file."""
        sheet = tile(pictures)
        if self.path is not None:
            zoom = zoom_of(pictures[0].size)
            size = sheet.width * zoom, sheet.height * zoom
            data = encode(
                sheet.resize(size, Image.Resampling.NEAREST), format_of(self.path.suffix) or "png"
            )
            write_whole(self.path, data, overwrite=True)
        return sheet

    def animation(self, number: int, last: Image.Image) -> bytes:
        """A picture from noise to what it became, as a GIF."""
        return gif([*self._frames.pop(number), last])
