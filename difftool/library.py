"""difftool as a library: what the commands do, as functions that return objects.

Keywords are the commands' flags with underscores, read by the same rows, so that a wrong value is
the same UsageError; what is made is the same to the byte. Import the names from `difftool`. A
device, a dtype and pictures are given as on the command line, or as torch's and Pillow's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from difftool.pipeline.model import Model


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vae: str | Path | None = None,
    lora: Sequence[str] = (),
    embedding: Sequence[str | Path] = (),
    preset: str | None = None,
    match: str | None = None,
    allow_unused: bool = False,
    low_memory: bool = False,
) -> Pipeline:
    """A model, ready to work: all that -m takes, None being the bundled one.

        model = difftool.load("emoji")

    The keywords are those flags of `difftool sample` that are about the model. UsageError if
    nothing is there, InputError if it is malformed or not supported.
    """
    from difftool.adapters.lora.file import parse_lora
    from difftool.pipeline.load import load_model
    from difftool.pipeline.words import add_embeddings

    loaded = load_model(
        None if model is None else str(model), device=device, dtype=dtype,
        vae=None if vae is None else str(vae), recipe=preset, low_memory=low_memory,
        loras=[parse_lora(str(text)) for text in lora], allow_unused=allow_unused,
    )  # fmt: skip
    loaded.set_padding(match)
    add_embeddings(loaded, map(Path, embedding))
    return Pipeline(loaded, match)


@dataclass(frozen=True)
class SampleStep:
    """A step of the sampler that is done."""

    index: int
    """Its number; the first is 0."""
    total: int
    """How many there are."""
    sigma: float
    """The noise's deviation in `x`, beside a signal of the path's own alpha."""
    x0: Tensor
    """The clean picture as the network saw it where the step began; [1,C,H,W], in the model's
    space."""
    x: Tensor
    """What the step arrived at; [1,C,H,W]. The last one is the picture."""


class Pipeline:
    """A model at work; `load` makes one. `model` has its networks, preset and tokenizers."""

    def __init__(self, model: Model, match: str | None = None):
        self.model, self.match = model, match

    @property
    def notes(self) -> list[str]:
        """What was decided when it was loaded, a line each."""
        return self.model.notes

    def __repr__(self) -> str:
        return f"Pipeline({self.model.name}, {self.model.device})"

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
            factor = self.model.codec.factor
            width, height = (max(factor, side - side % factor) for side in image.size)
            size = width, height
        size = resolve_settings(self.model, {"size": size}).size
        images = to_tensor(scaled(image, size))[None].to(self.model.device)
        return encode(self.model, images).float()

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


def inspect(path: str | Path) -> dict[str, Any]:
    """What is in a model, or in any safetensors file, from its headers: the JSON object of
    `difftool convert --inspect`. Loads no tensor, and not torch.

        difftool.inspect("emoji")["family"]
    """
    from difftool.conversion.inspect import inspect as describe
    from difftool.hub.find import find_model

    return describe(find_model(str(path)))


def _image(picture: Image | str | Path) -> Image:
    """An RGB picture of a file, or of one in memory, read alike."""
    from difftool.images.read import read_image

    if isinstance(picture, str | Path):
        return read_image(picture)
    if picture.mode == "RGB":
        return picture
    file = BytesIO()
    picture.save(file, "PNG")
    return read_image(file.getvalue())
