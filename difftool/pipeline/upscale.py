"""Pictures and latents made larger: by interpolation, or by a network of ESRGAN's kind.

Files of such networks are read by spandrel, which is installed apart, as difftool[upscale].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.errors import InputError, UsageError, check_file, first_line, suggestion
from difftool.storage.read import Stamped, stamped

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

TILE, AROUND = 256, 24
"""Pixels of a side that a network is given at once, and what it sees on each side beside them."""
FILES = (".pth", ".pt", ".ckpt", ".safetensors")


class Upscaler(NamedTuple):
    """A row of UPSCALERS."""

    about: str
    a1111: str
    latent: str | None = None
    """torch's mode of interpolation of latents; None: pictures are scaled."""
    resample: str = "LANCZOS"
    """Pillow's name of the filter."""


UPSCALERS: Mapping[str, Upscaler] = {
    "latent": Upscaler("latents, bilinear", "Latent", "bilinear"),
    "latent-bicubic": Upscaler("latents, bicubic", "Latent (bicubic)", "bicubic"),
    "latent-nearest": Upscaler("latents, nearest", "Latent (nearest-exact)", "nearest-exact"),
    "lanczos": Upscaler("pixels, Lanczos", "Lanczos"),
    "bicubic": Upscaler("pixels, bicubic", "Bicubic", None, "BICUBIC"),
    "nearest": Upscaler("pixels, nearest", "Nearest", None, "NEAREST"),
}
"""What makes pictures larger without a network; `read_upscaler` takes the file of one too."""


def read_upscaler(given: Any) -> str:
    """The name in UPSCALERS, by A1111's name too, or the path of a network's file."""
    named = {name: name for name in UPSCALERS} | {r.a1111: n for n, r in UPSCALERS.items()}
    text = str(given)
    known = {name.lower(): own for name, own in named.items()}.get(text.lower())
    if known is not None:
        return known
    if Path(text).suffix.lower() not in FILES:
        hint = f"{suggestion(text, UPSCALERS)}, or the file of a network such as ESRGAN"
        raise UsageError(f'there is no upscaler "{text}"', hint=hint)
    check_file("upscaler", Path(text))
    return text


def enlarged(size: tuple[int, int], scale: float, factor: int = 1) -> tuple[int, int]:
    """So much larger, of sides that the factor divides."""
    width, height = (max(factor, int(side * scale) // factor * factor) for side in size)
    return width, height


def upscaled(
    image: Image.Image, name: str, size: tuple[int, int], device: Any, tile: str = "none"
) -> Image.Image:
    """A picture at a larger size, by a name in UPSCALERS or by the network of a file; latents'
    interpolation is Lanczos here. tile: which of its borders meet. UsageError without spandrel,
    InputError for a file that holds no such network."""
    from PIL import Image

    from difftool.images.fit import scaled

    if tile != "none":
        from difftool.engine.tiles import enlarged_round
        from difftool.images.fit import to_pil, to_tensor

        def larger(x: Tensor, sides: tuple[int, int]) -> Tensor:
            return to_tensor(upscaled(to_pil(x[0]), name, (sides[1], sides[0]), device))[None]

        return to_pil(enlarged_round(to_tensor(image)[None], (size[1], size[0]), tile, larger)[0])
    row = UPSCALERS.get(name)
    if row is None:
        return scaled(_by_network(image, name, str(device)), size)
    return image.resize(size, Image.Resampling[row.resample])


def _by_network(image: Image.Image, path: str, device: str) -> Image.Image:
    import numpy as np
    import torch
    from PIL import Image

    network, scale = _network(stamped(Path(path)), device)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        made = in_tiles(pixels.to(device), network, scale)
    values = made[0].clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


@lru_cache(maxsize=1)
def _network(file: Stamped, device: str) -> tuple[Any, int]:
    """The network of a file, from [1,3,H,W] in [0, 1] to that times its scale."""
    path = str(file.path)
    try:
        spandrel = import_module("spandrel")
    except ImportError:
        why = "spandrel reads the networks of upscalers, and is not installed"
        hint = "pip install 'difftool[upscale]', or --upscaler lanczos"
        raise UsageError(f"--upscaler {path} cannot be used", why, hint) from None
    try:
        found: Any = spandrel.ModelLoader(device=device).load_from_file(path)
    except Exception as error:  # whatever a reader of many formats stumbles over
        raise InputError(f"{path} cannot be read as an upscaler", first_line(error)) from None
    if (getattr(found, "input_channels", 3), getattr(found, "output_channels", 3)) != (3, 3):
        raise InputError(f"{path} is no upscaler of pictures", "its channels are not 3")
    return found, int(found.scale)


def in_tiles(pixels: Tensor, network: Any, scale: int) -> Tensor:
    """What a network makes of [1,3,H,W], tile by tile, each with what is around it: the same as at
    once where the network sees no further than that."""

    import torch

    height, width = pixels.shape[2:]
    rows = []
    for top in range(0, height, TILE):
        bottom, row = min(top + TILE, height), []
        above = max(0, top - AROUND)
        for left in range(0, width, TILE):
            right, before = min(left + TILE, width), max(0, left - AROUND)
            made = network(pixels[:, :, above : bottom + AROUND, before : right + AROUND])
            down, across = (top - above) * scale, (left - before) * scale
            made = made[:, :, down : down + (bottom - top) * scale]
            row.append(made[..., across : across + (right - left) * scale])
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)
