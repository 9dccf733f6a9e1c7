"""What each network is made of: frozen, torch-free dataclasses, which are the preset schema too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Depth = int | tuple[int, ...]
"""Transformer depth of a level: one number for all its blocks, or one a block; 0 = no attention."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of DDPM, ADM, Stable Diffusion 1/2/XL and their small relatives.

    Levels are listed from full resolution down; every list below has one entry a level.
    """

    in_channels: int
    """Channels of the input, any concatenated conditioning (mask, masked image) included."""
    out_channels: int
    """Channels of the output; twice the data's for learned-variance networks."""
    channels: tuple[int, ...]
    """Width of each level."""
    blocks: int | tuple[int, ...] = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention: Literal["plain", "transformer"] = "plain"
    """"plain": one self-attention layer (DDPM, ADM). "transformer": self-attention, cross-attention
    to the context and a GEGLU feed-forward, `depth` times (Stable Diffusion)."""
    depth: tuple[Depth, ...] = ()
    """Attention layers after each block, by level."""
    up_depth: tuple[Depth, ...] | None = None
    """The same for the way up, also listed from full resolution down; None mirrors `depth`."""
    mid_depth: int | None = 1
    """Attention layers in the middle block; 0 = residual blocks only, None = no middle block."""
    context_dim: int | None = None
    """Width of the text context; None = no cross-attention."""
    heads: int | tuple[int, ...] | None = None
    """Attention heads of each level; exactly one of heads and head_dim is given."""
    head_dim: int | None = None
    """Channels of one head."""
    linear_projection: bool = False
    """Transformer projections as linear layers (SD2, SDXL) or as 1x1 convolutions (SD1)."""
    num_classes: int | None = None
    """Size of the label table; for classifier-free guidance the last entry means "no label"."""
    vector_dim: int | None = None
    """Width of the conditioning vector (SDXL's pooled text and sizes; SD2 unCLIP's image)."""
    guidance_dim: int | None = None
    """Width of the embedded guidance scale (LCM)."""
    scale_shift: bool = False
    """Time embedding scales and shifts the second norm (ADM) in place of being added."""
    resblock_updown: bool = False
    """Resolution changes happen inside residual blocks (ADM) and not in plain convolutions."""
    groups: int = 32
    """Groups of every group norm."""
    norm_eps: float = 1e-5
    dropout: float = 0.0
    flip_sin_to_cos: bool = True
    """Order of the time embedding: cosines first (SD) or sines first (DDPM)."""
    freq_shift: float = 0.0
    """1 in DDPM's published time embedding, else 0."""
    downsample_padding: int = 1
    """1: symmetric; 0: one row and column at the far end (DDPM)."""


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Pixels as they are."""

    kind: Literal["identity"] = "identity"
    channels: int = 3


@dataclass(frozen=True, kw_only=True)
class SpaceToDepthConfig:
    """Pixels folded block by block into channels: weightless, exact, cheap to model."""

    kind: Literal["space_to_depth"] = "space_to_depth"
    channels: int = 3
    """Image channels."""
    block: int = 2


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The KL autoencoder of latent diffusion, in diffusers' and CompVis' architecture."""

    kind: Literal["vae"] = "vae"
    channels: int = 3
    """Image channels."""
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; every level but the last halves the resolution."""
    blocks: int = 2
    groups: int = 32
    scale: float = 0.18215
    """x0 = (latent - shift) * scale."""
    shift: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    quant_conv: bool = True
    mid_attention: bool = True
    force_upcast: bool = False
    """Decode in fp32 whatever the model's dtype (SDXL's published VAE overflows fp16)."""


CodecConfig = IdentityConfig | SpaceToDepthConfig | VaeConfig


LEARNED_MARKS = ("<pad>", "<start>", "<end>")
"""The first tokens of every learned vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A CLIP text encoder, and which of its outputs condition the U-Net."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    vocab_size: int = 49408
    length: int = 77
    """Tokens of a prompt, start and end marks included."""
    projection: int | None = None
    """Width of the pooled output's projection; None = there is none."""
    hidden: int = -1
    """Which hidden state is the context: -1 the last, -2 the one before it."""
    final_norm: bool = True
    """Whether the final layer norm is applied to that hidden state (SD1, SD2) or not (SDXL)."""
    pooled: bool = False
    """Whether its projected end-of-text state joins the conditioning vector (SDXL)."""
    pad_id: int | None = None
    """Token that fills short prompts; None = the end mark (a learned vocabulary has its own)."""
    tokenizer: Literal["clip", "learned"] = "clip"
    """CLIP's byte-pair vocabulary, or one learned from the captions and stored in the model."""

    @property
    def end_id(self) -> int:
        """The token whose state is pooled: the vocabulary's end mark."""
        return 49407 if self.tokenizer == "clip" else LEARNED_MARKS.index("<end>")
