"""DALL-E 2's prior: from a text to the CLIP embedding of a picture of it (2204.06125, section 2.2).

A causal transformer over the text's tokens, the pooled text, the time, the noised embedding and a
learned token, at whose place it puts out the embedding. Parameter names are diffusers'
PriorTransformer's. An embedding is a picture of one pixel, [B,P,1,1], so that paths, samplers and
guidance are those of pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import CLIP_MEAN, CLIP_STD, EmbeddingConfig, PriorConfig
from difftool.errors import UsageError
from difftool.networks.base import Network
from difftool.networks.codecs import Codec
from difftool.networks.layers import TimeEmbedding, TokenLinear, sinusoids
from difftool.networks.vision import ClipVision

ADDED = 4
"""Tokens beside the text's: pooled text, time, noised embedding, the learned one."""


class PriorTransformer(Network):
    """x [B,P,1,1], t [B], context [B,L,D] and vector [B,V], the text and the pooled text, to the
    clean embedding or whatever the target is, [B,P,1,1].

    length [B]: how many of the text's tokens are read, and that no token looks at later ones; None,
    as in diffusers: every token looks at all. x0 is normed by `clip_mean` and `clip_std` [1,P].
    """

    clip_mean: Tensor
    clip_std: Tensor

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config, width = config, config.width
        self.time_embedding = TimeEmbedding(width, width)
        self.proj_in = nn.Linear(config.in_channels, width)
        self.embedding_proj = nn.Linear(config.vector_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(config.context_dim, width)
        self.positional_embedding = nn.Parameter(torch.empty(1, config.length + ADDED, width))
        self.prd_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            _Block(width, config.heads) for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, config.in_channels)
        # No parameters: they are measured once, and neither trained nor averaged.
        self.register_buffer("clip_mean", torch.empty(1, config.in_channels))
        self.register_buffer("clip_std", torch.empty(1, config.in_channels))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        length: Tensor | None = None,
        **others: None,
    ) -> Tensor:
        """ValueError for conditions that a prior does not have, or lacks, or of another width."""
        told = self._checked(context, vector, others)
        time = self.time_embedding(sinusoids(t, self.config.width).to(x.dtype))
        tokens = torch.cat(
            [
                self.encoder_hidden_states_proj(told[0].to(x.dtype)),
                self.embedding_proj(told[1].to(x.dtype))[:, None],
                time[:, None],
                self.proj_in(x.flatten(1))[:, None],
                self.prd_embedding.to(x.dtype).expand(len(x), -1, -1),
            ],
            dim=1,
        )
        tokens = tokens + self.positional_embedding.to(x.dtype)
        mask = None if length is None else self._mask(length)
        for block in self.transformer_blocks:
            tokens = block(tokens, mask)
        return self.proj_to_clip_embeddings(self.norm_out(tokens[:, -1]))[..., None, None]

    def _checked(
        self, context: Tensor | None, vector: Tensor | None, others: dict[str, None]
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if context is None or vector is None or any(each is not None for each in others.values()):
            raise ValueError("a prior is told a text and its pooled form, and nothing else")
        found = (*context.shape[1:], vector.shape[1])
        if found != (config.length, config.context_dim, config.vector_dim):
            wanted = f"{config.length} tokens of {config.context_dim}, pooled {config.vector_dim}"
            raise ValueError(f"this prior takes {wanted}, not {found[0]} of {found[1]}, {found[2]}")
        return context, vector

    def _mask(self, length: Tensor) -> Tensor:
        """Which tokens [B,1,N,N] each one looks at: none after it, no padding."""
        count = self.config.length + ADDED
        place = torch.arange(count, device=length.device)
        real = (place < length[:, None]) | (place >= self.config.length)
        return (real[:, None] & (place <= place[:, None]))[:, None]

    def normed(self, embeddings: Tensor) -> Tensor:
        """x0 [B,P,1,1] of embeddings [B,P,1,1]."""
        return (embeddings - self._column(self.clip_mean)) / self._column(self.clip_std)

    def embeddings(self, x0: Tensor) -> Tensor:
        """Embeddings [B,P], fp32, of x0 [B,P,1,1]."""
        return (x0 * self._column(self.clip_std) + self._column(self.clip_mean)).flatten(1)

    def _column(self, values: Tensor) -> Tensor:
        return values.float()[..., None, None]

    @property
    def measured(self) -> bool:
        """Whether it knows by what x0 is normed."""
        return bool(self.clip_std.any())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal of deviation 0.02, the last layer of every residual branch and the output zero."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for block in self.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()  # type: ignore[union-attr,index]
            block.ff.net[2].weight.zero_()  # type: ignore[union-attr,index]
        self.proj_to_clip_embeddings.weight.zero_()
        self.positional_embedding.normal_(0, 0.02, generator=generator)
        self.prd_embedding.normal_(0, 0.02, generator=generator)
        self.clip_mean.zero_()
        self.clip_std.zero_()


class _Block(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _SelfAttention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = TokenLinear(width, width)
        self.to_k = TokenLinear(width, width)
        self.to_v = TokenLinear(width, width)
        self.to_out = nn.ModuleList([TokenLinear(width, width)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # The middle is diffusers' dropout; it fixes the names.
        self.net = nn.Sequential(
            _Gelu(width, 4 * width), nn.Identity(), TokenLinear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Gelu(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = TokenLinear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class EmbeddingCodec(Codec):
    """Pictures [B,3,side,side] in [-1, 1] to what a picture encoder says of them, [B,P,1,1].

    The encoder is no part of the model: it has weights where it was given some, to train.
    """

    def __init__(self, config: EmbeddingConfig):
        super().__init__(config)
        self.encoder = None if config.encoder is None else ClipVision(config.encoder)

    def encoders(self) -> dict[str, nn.Module]:
        return {} if self.encoder is None else {"vision": self.encoder}

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder is None or next(self.encoder.parameters()).is_meta > images.is_meta:
            raise UsageError("the picture encoder is not there", hint="give --vision MODEL")
        mean, std = (torch.tensor(v, device=images.device)[:, None, None]
                     for v in (CLIP_MEAN, CLIP_STD))  # fmt: skip
        dtype = self.encoder.visual_projection.weight.dtype
        embeddings = self.encoder((((images + 1) / 2 - mean) / std).to(dtype))
        return super().posterior(embeddings[..., None, None])

    def pictures(self, latent: Tensor) -> Tensor:
        raise UsageError("an embedding is no picture", hint="sample -m MODEL --prior PRIOR")
