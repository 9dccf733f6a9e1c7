"""The text encoders of CLIP (Radford et al. 2021) and OpenCLIP, and small ones of their kind.

Parameter names are transformers' CLIPTextModel(WithProjection)'s, with the `text_model.` prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import TextConfig, VisionConfig
from difftool.networks.base import TextEncoder


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class ClipText(TextEncoder):
    """A text encoder of CLIP's kind.

    The context is the hidden state that `config.hidden` chooses. The pooled text is the last
    layer's normed state at the first end mark, projected.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = _TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(
        self, ids: Tensor, hidden: int | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        context, last = self._states(ids, config.pooled, hidden, seen)
        if config.final_norm:
            context = self.text_model.final_layer_norm(context)
        return context, self._pool(ids, last) if config.pooled else None

    def pooled(self, ids: Tensor) -> Tensor:
        return self._pool(ids, self._states(ids, True)[1])

    def add_words(self, vectors: Tensor) -> None:
        self.text_model.embeddings.learned = vectors

    def _states(
        self, ids: Tensor, whole: bool, hidden: int | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The chosen hidden state and, of the `whole` network, the last one."""
        depth = self.config.layers + 1 + (self.config.hidden if hidden is None else hidden)
        x = chosen = self.text_model.embeddings(ids)
        for index, layer in enumerate(self.text_model.encoder.layers, start=1):
            if index > depth and not whole:
                break
            x = layer(x, seen)
            if index == depth:
                chosen = x
        return chosen, x

    def _pool(self, ids: Tensor, last: Tensor) -> Tensor:
        # The first end mark (argmax returns the first maximum): padding repeats it, and tokens
        # added to the vocabulary have higher ids.
        end = (ids == self.config.end_id).int().argmax(dim=1)
        at_end = last[torch.arange(len(last), device=last.device), end]
        pooled = self.text_model.final_layer_norm(at_end)
        return pooled if self.config.projection is None else self.text_projection(pooled)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights at CLIP's scales, a function of the generator's state."""
        width, layers = self.config.width, self.config.layers
        residual = width**-0.5 * (2 * layers) ** -0.5
        scales = {
            "token_embedding": 0.02,
            "position_embedding": 0.01,
            "q_proj": width**-0.5,
            "k_proj": width**-0.5,
            "v_proj": width**-0.5,
            "out_proj": residual,
            "fc1": (2 * width) ** -0.5,
            "fc2": residual,
            "text_projection": width**-0.5,
        }
        for path, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                scale = scales[path.rpartition(".")[2]]
                module.weight.normal_(0, scale, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()


class _TextModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class _Embeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.learned: Tensor | None = None
        """Vectors [n,width] of words learned elsewhere, whose ids follow the vocabulary's; they
        are no part of the weights."""

    def forward(self, ids: Tensor) -> Tensor:
        length, limit = ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens exceed the encoder's length of {limit}")
        return self._tokens(ids) + self.position_embedding.weight[:length]

    def _tokens(self, ids: Tensor) -> Tensor:
        if self.learned is None:
            return self.token_embedding(ids)
        size = self.token_embedding.num_embeddings
        x, new = self.token_embedding(ids.clamp(max=size - 1)), ids >= size
        x[new] = self.learned[ids[new] - size].to(x.dtype)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))


class ClipLayer(nn.Module):
    """A layer of CLIP's towers; the text's is causal, the picture's is not."""

    def __init__(self, config: TextConfig | VisionConfig, causal: bool = True):
        super().__init__()
        self.self_attn = _Attention(config.width, config.heads, causal)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """seen [B,L]: the tokens that others attend to; None = all."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if seen is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mask = seen[:, None, None, :].expand(-1, 1, x.shape[1], -1)
            y = F.scaled_dot_product_attention(q, k, v, mask.tril() if self.causal else mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.activation = {"quick_gelu": quick_gelu, "gelu": F.gelu}[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
