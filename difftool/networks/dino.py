"""DINOv2's picture encoder (2304.07193), with registers too (2309.16588).

Its layers are CLIP's: what each scales its two outputs by is folded into the weights that make
them, where the tensors of a file are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from math import isqrt
from types import EllipsisType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import VisionConfig
from difftool.errors import InputError
from difftool.networks.clip import ClipLayer

SIDE = 224
"""Of the pictures that are described, in pixels (FD-DINOv2, 2306.04675)."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of the pictures that it was trained on, by channel, in [0, 1]."""
HEAD = 64
"""Channels of a head of every published network."""
EPS = 1e-6
NAMES = {384: "vits", 768: "vitb", 1024: "vitl", 1536: "vitg"}
"""By width."""


class DinoVision(nn.Module):
    """Pictures [B,3,H,W], normed by IMAGENET_MEAN and IMAGENET_STD, to features [B,width]: the
    normed state of the class token. H and W are multiples of the patch.

    registers: tokens that no picture has. offset: added to the patches across and down where the
    table of positions is scaled to them, as Meta's own code does.
    """

    def __init__(self, config: VisionConfig, registers: int = 0, offset: float = 0.0):
        super().__init__()
        width, across = config.width, config.size // config.patch
        self.offset = offset
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.register_embedding = nn.Parameter(torch.empty(1, registers, width))
        self.position_embedding = nn.Parameter(torch.empty(1, across**2 + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.layers = nn.ModuleList(ClipLayer(config, causal=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = EPS

    @property
    def name(self) -> str:
        """As its authors call it: dinov2-vitl14."""
        width, _, patch, _ = self.patch_embedding.weight.shape
        kind = NAMES.get(width, f"vit{width}-")
        return f"dinov2-{kind}{patch}" + ("-reg" if self.register_embedding.numel() else "")

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)
        x = x.flatten(2).transpose(1, 2) + self._positions(*x.shape[2:])
        first = self.class_embedding + self.position_embedding[:, :1]
        told = torch.cat([first, self.register_embedding], 1).expand(len(x), -1, -1)
        x = torch.cat([told, x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x[:, 0])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """What is added to the patches, [1,rows * columns,width]."""
        table = self.position_embedding[:, 1:]
        across = isqrt(table.shape[1])
        if (rows, columns) == (across, across):
            return table
        table = table.transpose(1, 2).unflatten(2, (across, across))
        smooth = self.register_embedding.numel() > 0  # the later networks were trained so
        if self.offset:
            scale = ((rows + self.offset) / across, (columns + self.offset) / across)
            table = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=smooth)
        else:
            table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=smooth)
        return table.flatten(2).transpose(1, 2)


def normed(pictures: Tensor) -> Tensor:
    """uint8 [B,3,H,W] as the network takes them."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pictures.float() / 255 - mean) / deviation


# --- from a file's tensors -------------------------------------------------------------------


class WeightPlace(NamedTuple):
    """Where a module, or a tensor that is no module's, is in a file."""

    name: str
    part: int | None = None
    """Which third of it, where queries, keys and values are one."""
    scale: str = ""
    """The tensor that its output is scaled by."""


class Naming(NamedTuple):
    """How a library names the tensors."""

    offset: float
    """See `DinoVision`; networks with registers have none."""
    layer: str
    """What the names of layers' tensors begin with, before their number."""
    places: Mapping[str, WeightPlace]
    """By the name here; of layers, without what it begins with."""


def _naming(offset: float, layer: str, whole: str, places: str) -> Naming:
    """whole: the names of WHOLE there; places: those of PARTS, each NAME, NAME:THIRD or
    NAME*SCALE."""
    found: dict[str, WeightPlace] = dict(zip(WHOLE, map(WeightPlace, whole.split()), strict=True))
    for part, text in zip(PARTS, places.split(), strict=True):
        text, _, scale = text.partition("*")
        name, _, third = text.partition(":")
        found[part] = WeightPlace(name, int(third) if third else None, scale)
    return Naming(offset, layer, found)


WHOLE = ("class_embedding", "register_embedding", "position_embedding", "patch_embedding", "norm")
PARTS = (
    *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)
"""The modules of a layer."""
_TRANSFORMERS = (
    "embeddings.cls_token embeddings.register_tokens embeddings.position_embeddings "
    "embeddings.patch_embeddings.projection layernorm"
)
NAMINGS = (
    _naming(
        0.1, "blocks", "cls_token register_tokens pos_embed patch_embed.proj norm",
        "norm1 attn.qkv:0 attn.qkv:1 attn.qkv:2 attn.proj*ls1.gamma norm2 mlp.fc1 "
        "mlp.fc2*ls2.gamma",
    ),
    _naming(
        0.0, "encoder.layer", _TRANSFORMERS,
        "norm1 attention.attention.query attention.attention.key attention.attention.value "
        "attention.output.dense*layer_scale1.lambda1 norm2 mlp.fc1 mlp.fc2*layer_scale2.lambda1",
    ),
    _naming(
        0.0, "encoder.layer", _TRANSFORMERS,
        "norm1 attention.q_proj attention.k_proj attention.v_proj "
        "attention.o_proj*layer_scale1.lambda1 norm2 mlp.fc1 mlp.fc2*layer_scale2.lambda1",
    ),
)  # fmt: skip
"""Meta's own; transformers' in files; and in its modules."""


def read_dino(tensors: Mapping[str, Tensor], heads: int | None = None) -> DinoVision:
    """The network whose tensors these are, fp32, by one of NAMINGS. heads: None = as many as
    published networks of its width have. InputError if they are not whole."""
    naming = next((n for n in NAMINGS if _name(n, "self_attn.q_proj") in tensors), NAMINGS[0])
    patches = _fitting(
        tensors, f"{naming.places['patch_embedding'].name}.weight", (..., 3, ..., ...)
    )
    table = _fitting(tensors, naming.places["position_embedding"].name, (1, ..., ...))
    registers = tensors.get(naming.places["register_embedding"].name, torch.empty(1, 0, 0))
    hidden = _fitting(tensors, _name(naming, "mlp.fc1"), (..., ...))
    width, _, patch, _ = patches.shape
    layers = next(n for n in count() if _name(naming, "layer_norm1", n) not in tensors)
    try:
        config = VisionConfig(
            width=width,
            layers=layers,
            heads=heads or max(width // HEAD, 1),
            mlp=len(hidden),
            size=isqrt(max(table.shape[1] - 1, 0)) * patch,
            patch=patch,
            projection=width,
            activation="gelu",
        )
    except ValueError as error:
        raise InputError("the weights are those of no DINOv2", str(error)) from None
    told = registers.shape[1] if registers.ndim == 3 else 0
    network = DinoVision(config, told, 0.0 if told else naming.offset)
    wanted = network.state_dict()
    network.load_state_dict({n: _weight(tensors, naming, n, t.shape) for n, t in wanted.items()})
    return network


def _name(naming: Naming, module: str, layer: int = 0) -> str:
    """Of the weight of a layer's module."""
    return f"{naming.layer}.{layer}.{naming.places[module].name}.weight"


def _weight(tensors: Mapping[str, Tensor], naming: Naming, name: str, shape: torch.Size) -> Tensor:
    """A tensor of the network: MODULE.KIND, layers.NUMBER.MODULE.KIND, or of no module."""
    if not shape.numel():
        return torch.empty(shape)
    module, _, kind = name.rpartition(".")
    before = ""
    if name.startswith("layers."):
        _, number, module = module.split(".", 2)
        before = f"{naming.layer}.{number}."
    place = naming.places[module or name]
    own = f"{before}{place.name}.{kind}" if module else place.name
    if place.part is None:
        tensor = _fitting(tensors, own, shape)
    else:
        tensor = _fitting(tensors, own, (3 * shape[0], *shape[1:])).chunk(3)[place.part]
    if place.scale:
        scale = _fitting(tensors, before + place.scale, shape[:1])
        tensor = tensor * scale.view(-1, *[1] * (tensor.ndim - 1))
    return tensor


def _fitting(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int | EllipsisType]
) -> Tensor:
    """A tensor of that shape, in which ... is any length; InputError if there is none."""
    tensor = tensors.get(name)
    if (
        tensor is None
        or len(shape) != tensor.ndim
        or any(wanted not in (..., side) for wanted, side in zip(shape, tensor.shape, strict=True))
    ):
        raise InputError(f"the weights lack the tensor {name}, or it is misshapen")
    return tensor
