"""What each network is made of: frozen, torch-free dataclasses, which are the preset schema too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from difftool.config.kinds import Kinds
from difftool.config.numbers import DEPTH, NOT_NEGATIVE, SHARE, SIDE, WIDTH, Within

Depth = int | tuple[int, ...]
"""Transformer depth of a level: one number for all its blocks, or one a block; 0 = no attention."""

Depths = tuple[tuple[int, ...], ...]
"""Transformer depths by level and block."""

T = TypeVar("T")

MOST_LEVELS, MOST_LAYERS = 16, 2048
"""More than any network has, residual and transformer blocks together: what names more is refused
before anything is made of it. SDXL's U-Net has 3 and 95."""


def _check_size(levels: Collection[int], *layers: Depth) -> None:
    """ValueError for a network that is too large to be one. layers: by level or of all."""
    if not 1 <= len(levels) <= MOST_LEVELS:
        raise ValueError(f"{len(levels)} levels are not from 1 to {MOST_LEVELS}")
    total = 0
    for each in layers:
        listed = each if isinstance(each, tuple) else (each,) * len(levels)
        total += sum(abs(count) for count in listed)
    if total > MOST_LAYERS:
        raise ValueError(f"{total} layers are more than {MOST_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of DDPM, ADM, Stable Diffusion 1/2/XL and their small relatives.

    Levels are listed from full resolution down; every list by level has one entry a level.
    ValueError if the values do not fit together.
    """

    in_channels: Annotated[int, WIDTH]
    """Channels of the input, any concatenated conditioning (mask, masked image) included."""
    out_channels: Annotated[int, WIDTH]
    """Channels of the output; twice the data's for learned-variance networks."""
    channels: Annotated[tuple[int, ...], WIDTH]
    """Width of each level."""
    blocks: Annotated[int | tuple[int, ...], DEPTH] = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention: Literal["plain", "transformer"] = "plain"
    """"plain": one self-attention layer (DDPM, ADM). "transformer": self-attention, cross-attention
    to the context and a GEGLU feed-forward, `depth` times (Stable Diffusion)."""
    depth: Annotated[tuple[Depth, ...], DEPTH] = ()
    """Attention layers after each block, by level; () = none."""
    up_depth: Annotated[tuple[Depth, ...] | None, DEPTH] = None
    """The same for the way up, also listed from full resolution down; None = as `depth`."""
    mid_blocks: Annotated[int, DEPTH] = 2
    """Residual blocks in the middle, attention between them; 1 in SSD-1B, 0 = no middle block."""
    mid_depth: Annotated[int, DEPTH] = 1
    """Attention layers between the middle's residual blocks."""
    context_dim: Annotated[int | None, WIDTH] = None
    """Width of the text context; None = no cross-attention."""
    only_cross: tuple[int, ...] = ()
    """Levels whose self-attention looks at the context instead (x4 upscaler)."""
    heads: Annotated[int | tuple[int, ...] | None, WIDTH] = None
    """Attention heads of each level; exactly one of heads and head_dim is given."""
    head_dim: Annotated[int | None, WIDTH] = None
    """Channels of one head."""
    linear_projection: bool = False
    """Transformer projections as linear layers (SD2, SDXL) or as 1x1 convolutions (SD1)."""
    num_classes: Annotated[int | None, WIDTH] = None
    """Size of the label table; for classifier-free guidance the last entry means "no label"."""
    vector_dim: Annotated[int | None, WIDTH] = None
    """Width of the conditioning vector (SDXL's pooled text and sizes; SD2 unCLIP's image)."""
    vector_name: Literal["add_embedding", "class_embedding"] = "add_embedding"
    """Name of the vector's layers in the state dict: SDXL's, or SD2 unCLIP's."""
    guidance_dim: Annotated[int | None, WIDTH] = None
    """Width of the embedded guidance scale (LCM)."""
    scale_shift: bool = False
    """Time embedding scales and shifts the second norm (ADM) in place of being added."""
    resblock_updown: bool = False
    """Resolution changes happen inside residual blocks (ADM) and not in plain convolutions."""
    groups: Annotated[int, WIDTH] = 32
    """Groups of every group norm."""
    norm_eps: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Of every group norm but the transformers', whose eps is 1e-6."""
    dropout: Annotated[float, Within(low=0, below=1)] = 0.0
    """Share of the values inside residual blocks that training leaves out."""
    flip_sin_to_cos: bool = True
    """Order of the time embedding: cosines first (SD) or sines first (DDPM)."""
    freq_shift: float = 0.0
    """1 in DDPM's published time embedding, else 0."""
    downsample_padding: Annotated[int, SHARE] = 1
    """1: symmetric; 0: one row and column at the far end (DDPM)."""

    def __post_init__(self) -> None:
        _check_size(self.channels, self.blocks, (self.mid_blocks, self.mid_depth))
        deep = (d if isinstance(d, tuple) else (d,) for d in (*self.depth, *(self.up_depth or ())))
        most = max((abs(depth) for depths in deep for depth in depths), default=0)
        _check_size(self.channels, (most * sum(self._by_level("blocks", self.blocks)),))
        levels, attends = len(self.channels), self.mid_blocks > 1 and self.mid_depth > 0
        for depths in (*self.down_depths, *self.up_depths):
            attends = attends or any(depths)
            if any(depths) and not all(depths):
                raise ValueError(f"depth {list(depths)}: all blocks of a level attend, or none")
            if self.attention == "plain" and max(depths) > 1:
                raise ValueError(f"depth {max(depths)}: plain attention is one layer deep")
        if attends and (self.heads is None) == (self.head_dim is None):
            raise ValueError("exactly one of heads and head_dim must be given")
        head_dim = 1 if self.head_dim is None else self.head_dim
        for width, heads in zip(self.channels, self.level_heads, strict=True):
            if self.groups < 1 or width % self.groups:
                raise ValueError(f"width {width} is not a multiple of the {self.groups} groups")
            if attends and (heads < 1 or width % heads or head_dim < 1 or width % head_dim):
                raise ValueError(f"width {width} cannot be split into equal heads")
        if self.attention == "plain" and self.context_dim is not None:
            raise ValueError("context_dim needs attention: transformer")
        if self.only_cross and (self.context_dim is None or max(self.only_cross) >= levels):
            raise ValueError("only_cross lists levels, and needs context_dim")
        if self.num_classes and self.vector_dim and self.vector_name == "class_embedding":
            raise ValueError("class_embedding cannot name both a label table and a vector's layers")

    @property
    def kind(self) -> str:
        """No field, and so no key of presets: the first kind is meant where none is named."""
        return "unet"

    @property
    def patch(self) -> int:
        """It takes sides that are odd too."""
        return 1

    @property
    def multiple(self) -> int:
        """Below it a level has no even number of rows to halve, and rounds."""
        return 2 ** (len(self.channels) - 1)

    def kept(self, height: int, width: int) -> int:
        """What the way down keeps for the way up of the highest level, and what the first block of
        that works on: both joined, the same normalised, and its output."""
        return height * width * self.channels[0] * (self._by_level("blocks", self.blocks)[0] + 5)

    @property
    def down_depths(self) -> Depths:
        """Attention layers after each block on the way down, by level and block."""
        return self._depths("depth", self.depth, 0)

    @property
    def up_depths(self) -> Depths:
        """The same on the way up; levels from full resolution down, blocks as they are run."""
        given = self.depth if self.up_depth is None else self.up_depth
        return self._depths("up_depth", given, 1)

    @property
    def level_heads(self) -> tuple[int, ...]:
        """Attention heads of each level; 1 where nothing attends."""
        if self.head_dim is not None:
            return tuple(width // max(self.head_dim, 1) for width in self.channels)
        return self._by_level("heads", self.heads or 1)

    def _depths(self, name: str, given: tuple[Depth, ...], more: int) -> Depths:
        depths = self._by_level(name, given or 0)
        counts = [blocks + more for blocks in self._by_level("blocks", self.blocks)]
        full = tuple(
            (depth,) * count if isinstance(depth, int) else depth
            for depth, count in zip(depths, counts, strict=True)
        )
        for depth, count in zip(full, counts, strict=True):
            if len(depth) != count or count < 1 or min(depth) < 0:
                raise ValueError(f"{name} {list(depth)} does not fit {count} blocks")
        return full

    def _by_level(self, name: str, given: T | tuple[T, ...]) -> tuple[T, ...]:
        if not isinstance(given, tuple):
            return (given,) * len(self.channels)
        if len(given) != len(self.channels):
            raise ValueError(f"{name} has {len(given)} entries for {len(self.channels)} levels")
        return given


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """DALL-E 2's prior (2204.06125, section 2.2): a transformer from a text to the embedding of a
    picture of it. ValueError if the values do not fit together.
    """

    kind: Literal["prior"] = "prior"
    """What denoises: a U-Net, of pictures, or a prior, of pictures' embeddings."""
    in_channels: Annotated[int, WIDTH]
    """Width of a picture's embedding."""
    context_dim: Annotated[int, WIDTH]
    """Width of the text's tokens."""
    vector_dim: Annotated[int, WIDTH]
    """Width of the pooled text."""
    length: Annotated[int, Within(low=2, high=1 << 20)] = 77
    """Tokens of the text."""
    width: Annotated[int, WIDTH] = 2048
    """Width of its tokens within."""
    heads: Annotated[int, WIDTH] = 32
    """Attention heads of a layer."""
    layers: Annotated[int, DEPTH] = 20
    """Transformer layers."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")

    @property
    def num_classes(self) -> None:
        """It is told no label."""

    @property
    def guidance_dim(self) -> None:
        """Nor a guidance scale."""

    @property
    def vector_name(self) -> str:
        """Its vector is the pooled text, as SDXL's is."""
        return "add_embedding"

    @property
    def masks_context(self) -> bool:
        """It is told how many tokens the text has."""
        return True

    @property
    def dropout(self) -> float:
        """It leaves nothing out."""
        return 0.0

    @property
    def patch(self) -> int:
        """An embedding has sides of 1."""
        return 1

    @property
    def multiple(self) -> int:
        """As `patch`."""
        return 1

    def kept(self, height: int, width: int) -> int:
        """The tokens of a layer's feed-forward network, which is four times as wide."""
        return height * width * 5 * self.width * (self.length + 4)


NETWORK_KINDS = Kinds("network", unet=UNetConfig, prior=PriorConfig)


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Pixels as they are."""

    kind: Literal["identity"] = "identity"
    """What stands between pictures and x0: nothing, blocks folded into channels, an autoencoder."""
    channels: Annotated[int, WIDTH] = 3
    """Image channels."""

    @property
    def factor(self) -> int:
        """How many times smaller the sides of x0 are."""
        return 1

    @property
    def learned(self) -> bool:
        """Whether it has weights."""
        return False

    @property
    def latent_channels(self) -> int:
        """Channels of x0."""
        return self.channels


@dataclass(frozen=True, kw_only=True)
class SpaceToDepthConfig:
    """Pixels folded block by block into channels: weightless, exact, cheap to model."""

    kind: Literal["space_to_depth"] = "space_to_depth"
    channels: Annotated[int, WIDTH] = 3
    """Image channels."""
    block: Annotated[int, WIDTH] = 2
    """Side of the blocks of pixels."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block {self.block} is less than 1")

    @property
    def factor(self) -> int:
        """How many times smaller the sides of x0 are."""
        return self.block

    @property
    def learned(self) -> bool:
        """Whether it has weights."""
        return False

    @property
    def latent_channels(self) -> int:
        """Channels of x0."""
        return self.channels * self.block**2


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The KL autoencoder of latent diffusion, in diffusers' and CompVis' architecture."""

    kind: Literal["vae"] = "vae"
    channels: Annotated[int, WIDTH] = 3
    """Image channels."""
    latent_channels: Annotated[int, WIDTH] = 4
    """Channels of x0."""
    widths: Annotated[tuple[int, ...], WIDTH] = (128, 256, 512, 512)
    """Width of each level; every level but the last halves the resolution."""
    patch: Annotated[int, WIDTH] = 1
    """Sides of the blocks of pixels that are folded into channels at the picture's end: the
    costliest resolution is left out. 1 in every published autoencoder."""
    blocks: Annotated[int, DEPTH] = 2
    """Residual blocks a level of the encoder; one more in the decoder."""
    groups: Annotated[int, WIDTH] = 32
    """Groups of every group norm."""
    scale: float = 0.18215
    """x0 = (latent - shift) * scale."""
    shift: float = 0.0
    """Taken from latents before they are scaled."""
    latents_mean: tuple[float, ...] | None = None
    """A shift for each latent channel, in place of `shift`."""
    latents_std: tuple[float, ...] | None = None
    """Each latent channel is also divided by its own deviation."""
    quant_conv: bool = True
    """1x1 convolutions between the networks and the latent; absent in 16-channel VAEs."""
    mid_attention: bool = True
    """Self-attention in the middle block."""
    force_upcast: bool = False
    """Run in fp32 whatever the model's dtype (SDXL's published VAE overflows fp16)."""

    @property
    def factor(self) -> int:
        """How many times smaller the sides of x0 are."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def learned(self) -> bool:
        """Whether it has weights."""
        return True

    def __post_init__(self) -> None:
        _check_size(self.widths, self.blocks)
        if self.patch < 1:
            raise ValueError(f"patch {self.patch} is less than 1")
        for width in self.widths:
            if self.groups < 1 or width % self.groups:
                raise ValueError(f"width {width} is not a multiple of the {self.groups} groups")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} values, not {self.latent_channels}")
        if not self.scale or not all(self.latents_std or (1,)):
            raise ValueError("a scale or deviation is zero")


LEARNED_MARKS = ("<pad>", "<start>", "<end>")
"""The first tokens of every learned vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A CLIP text encoder, and which of its outputs condition the U-Net."""

    width: Annotated[int, WIDTH] = 768
    """Width of its hidden states."""
    layers: Annotated[int, DEPTH] = 12
    """Transformer layers."""
    heads: Annotated[int, WIDTH] = 12
    """Attention heads of a layer."""
    mlp: Annotated[int, WIDTH] = 3072
    """Width inside a feed-forward network."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the feed-forward networks: OpenAI's approximation, or GELU itself."""
    vocab_size: Annotated[int, WIDTH] = 49408
    """Tokens that it knows."""
    length: Annotated[int, Within(low=2, high=1 << 20)] = 77
    """Tokens of a prompt, start and end marks included."""
    projection: Annotated[int | None, WIDTH] = None
    """Width of the pooled output's projection; None = there is none."""
    hidden: int = -1
    """Which hidden state is the context: -1 the last, -2 the one before it."""
    final_norm: bool = True
    """Whether the final layer norm is applied to that hidden state (SD1, SD2) or not (SDXL)."""
    pooled: bool = False
    """Whether its projected end-of-text state joins the conditioning vector (SDXL)."""
    pad_id: Annotated[int | None, NOT_NEGATIVE] = None
    """Token that fills short prompts; None = the end mark (a learned vocabulary has its own)."""
    tokenizer: Literal["clip", "learned"] = "clip"
    """CLIP's byte-pair vocabulary, or one learned from the captions and stored in the model."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if not -self.layers - 1 <= self.hidden <= -1:
            raise ValueError(f"hidden {self.hidden} is not between {-self.layers - 1} and -1")

    @property
    def kind(self) -> str:
        """No field, as a U-Net's."""
        return "clip"

    @property
    def end_id(self) -> int:
        """The token whose state is pooled: the vocabulary's end mark."""
        return 49407 if self.tokenizer == "clip" else LEARNED_MARKS.index("<end>")


ENCODER_KINDS = Kinds("text encoder", clip=TextConfig)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on, by channel, in [0, 1]."""
CLIP_SIDE = 224
"""Of the pictures of CLIP's published encoders, in pixels."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP picture encoder (SD2 unCLIP's ViT-L or ViT-H)."""

    width: Annotated[int, WIDTH]
    """Width of its hidden states."""
    layers: Annotated[int, DEPTH]
    """Transformer layers."""
    heads: Annotated[int, WIDTH]
    """Attention heads of a layer."""
    mlp: Annotated[int, WIDTH]
    """Width inside a feed-forward network."""
    size: Annotated[int, SIDE]
    """Side of its pictures in pixels."""
    patch: Annotated[int, SIDE]
    """Side of the patches that are its tokens."""
    projection: Annotated[int, WIDTH]
    """Width of a picture's embedding."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the feed-forward networks: OpenAI's approximation, or GELU itself."""

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.patch) < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if self.size < 1 or self.size % self.patch:
            raise ValueError(f"side {self.size} is not a multiple of the patches' {self.patch}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """x0 [B,width,1,1] is what CLIP's picture encoder says of a picture: the codec of a prior."""

    kind: Literal["embedding"] = "embedding"
    width: Annotated[int, WIDTH]
    """Width of a picture's embedding."""
    encoder: VisionConfig | None = None
    """The picture encoder, which is no part of the model; None = it is not known."""

    def __post_init__(self) -> None:
        if self.encoder is not None and self.encoder.projection != self.width:
            width = self.encoder.projection
            raise ValueError(f"the picture encoder's embeddings are {width} wide, not {self.width}")

    @property
    def channels(self) -> int:
        """Channels of pictures."""
        return 3

    @property
    def latent_channels(self) -> int:
        """Channels of x0."""
        return self.width

    @property
    def factor(self) -> int:
        """The side of the encoder's pictures, of which each is one x0."""
        return CLIP_SIDE if self.encoder is None else self.encoder.size

    @property
    def learned(self) -> bool:
        """The model has no weights of it."""
        return False


CODEC_KINDS = Kinds(
    "codec", identity=IdentityConfig, space_to_depth=SpaceToDepthConfig, vae=VaeConfig,
    embedding=EmbeddingConfig,
)  # fmt: skip
