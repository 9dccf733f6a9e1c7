"""One picture to make, and the pictures that it goes by: to start from, to repaint, to vary."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from difftool.config.families import family
from difftool.config.schema import SampleConfig
from difftool.errors import UsageError, check_file
from difftool.images.fit import to_tensor
from difftool.images.read import read_image, read_mask
from difftool.pipeline.backdrop import Backdrop, Fitting, Start, started
from difftool.pipeline.upscale import enlarged, upscaled
from difftool.storage.read import Stamped, stamped

if TYPE_CHECKING:
    from torch import Tensor

    from difftool.pipeline.model import Model


class SampleInput(NamedTuple):
    """One picture to make. The pictures of a batch have the same kinds of pictures to go by."""

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    seed: int = 0
    vary_seed: int | None = None
    """Of the noise that the start noise is turned to."""
    init: Tensor | None = None
    """The picture to start from, or to edit; [C,H,W] in [-1, 1]."""
    latent: Tensor | None = None
    """x0 to start from in place of a picture; [c,h,w]."""
    mask: Tensor | None = None
    """Where it is repainted; [H,W], 1 = wholly, 0 = not at all."""
    backdrop: Backdrop | None = None
    """Where what is drawn goes, if it is not all of the picture."""
    depth: Tensor | None = None
    """How near what it shows is, in any unit; [H,W]."""
    image: Tensor | None = None
    """The picture to vary, as CLIP's picture encoder is given it; [3,S,S]."""


def check_input(model: Model, given: SampleInput) -> None:
    """UsageError for pictures that the model does not go by, or lacks."""
    kind, name = model.concat, model.name
    if kind == "other" or (kind != "none" and not model.text):
        raise UsageError(f"the model {name} ({model.preset.family}) cannot be sampled yet")
    if kind == "inpaint" and (given.init is None or given.mask is None):
        raise UsageError(f"the model {name} repaints pictures", hint="give --init and --mask")
    if kind == "edit" and (given.init is None or given.mask is not None):
        raise UsageError(f"the model {name} edits pictures", hint="give --init, and no --mask")
    if kind == "depth" and given.depth is None:
        raise UsageError(f"the model {name} goes by depth", hint="give --depth-map")
    if kind != "depth" and given.depth is not None:
        raise UsageError(f"the model {name} takes no --depth-map", hint="models of depth do")
    if kind == "low_res" and (given.init is None or given.mask is not None):
        raise UsageError(f"the model {name} enlarges pictures", hint="give --init, and no --mask")
    if not family(model.preset.family).vision or model.prior is not None:
        return
    if model.vision is None:
        hint = "--prior MODEL makes it one of text"
        raise UsageError(
            f"the model {name} has no picture encoder that difftool can read", hint=hint
        )
    if given.image is None:
        hint = "give --image-prompt, or --prior MODEL to go by the text alone"
        raise UsageError(f"the model {name} varies a picture", hint=hint)


def _file(path: str) -> Stamped:
    check_file("picture", Path(path))
    return stamped(Path(path).resolve())


def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture."""
    return _read(_file(path)).size


def load_start(
    init: str | None,
    mask: str | None,
    settings: SampleConfig,
    factor: int = 1,
    device: str = "cpu",
) -> tuple[Tensor | None, Tensor | None, Backdrop | None]:
    """What a model is given of a picture: [3,H,W] in [-1, 1]; of its mask: [H,W], white 1, black
    and transparent 0; and where what is drawn goes, if it is not all of the picture. factor: of
    which sides that are drawn are multiples; device: of the network of an upscaler. UsageError
    where there is nothing to mask, or nothing is masked."""
    import torch

    if init is None:
        if mask is not None:
            raise UsageError("--mask has nothing to mask", hint="give --init")
        return None, None, None
    names = [name for name in Fitting._fields if name != "factor"]
    fitting = Fitting(factor=factor, **{name: getattr(settings, name) for name in names})
    larger = settings.upscale, settings.upscaler, device, settings.tile
    found = _start(_file(init), None if mask is None else _file(mask), fitting, larger)
    values = None if found.mask is None else torch.from_numpy(found.mask)
    return to_tensor(found.picture), values, found.backdrop


def load_depth(path: str) -> Tensor:
    """A map of depth, [H,W]: white is near."""
    return _depth(_file(path))


def load_image_prompt(path: str, side: int) -> Tensor:
    """A picture as CLIP's picture encoder is given it: the shorter side scaled to that
    (bicubic), the middle, normed; [3,side,side]."""
    return _image_prompt(_file(path), side)


# Many images may go by one picture, which is read once.


@lru_cache(maxsize=4)
def _read(file: Stamped) -> Image.Image:
    return read_image(file.path)


@lru_cache(maxsize=4)
def _start(
    init: Stamped, mask: Stamped | None, fitting: Fitting, larger: tuple[float, str, str, str]
) -> Start:
    picture, (scale, upscaler, *rest) = _read(init), larger
    if scale > 1:
        picture = upscaled(picture, upscaler, enlarged(picture.size, scale), *rest)
    return started(picture, None if mask is None else read_mask(mask.path), fitting)


@lru_cache(maxsize=4)
def _depth(file: Stamped) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(read_mask(file.path), np.float32))


@lru_cache(maxsize=4)
def _image_prompt(file: Stamped, side: int) -> Tensor:
    import torch

    from difftool.config.networks import CLIP_MEAN, CLIP_STD

    image = _read(file)
    short = min(image.size)
    width, height = (int(edge * side / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((to_tensor(image) + 1) / 2 - mean) / std
