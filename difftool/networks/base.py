"""What every kind of denoising network and of text encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """A denoising network F(x, t, conditioning); it knows no noise schedule.

    Called with x [B,C,H,W] and t [B], and by name with exactly those of context [B,L,D], vector
    [B,V], label [B] and guidance [B] that its configuration has, and length [B], the tokens of the
    context that are read, where that has `masks_context`; it gives [B,C',H,W]. Its first and last
    layers are conv_in and conv_out, its tables of labels class_embedding: names by which Muon
    leaves them to AdamW.
    """

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, a function of the generator's state."""

    def checkpoint(self, on: bool = True) -> None:
        """Whether what is inside the blocks is computed again for the gradient instead of kept: the
        same numbers with less memory, in more time. A network without such blocks keeps it all."""

    def attention_layers(self) -> dict[str, nn.Linear]:
        """The linear layers of its attention blocks by name, beside which LoRAs are trained."""
        return {
            name: layer
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Linear) and "attentions." in name
        }


class TextEncoder(nn.Module, ABC):
    """Token ids [B,L] to the context [B,L,width] and, if configured, the pooled text [B,P]."""

    @abstractmethod
    def forward(
        self, ids: Tensor, hidden: int | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: another hidden state than the configured one, from the end: -1 is the last.
        seen [B,L]: the tokens that others attend to; None = all."""

    @abstractmethod
    def pooled(self, ids: Tensor) -> Tensor:
        """The pooled text [B,P] of token ids [B,L], whether or not it conditions the network."""

    @abstractmethod
    def add_words(self, vectors: Tensor) -> None:
        """Words learned elsewhere, vectors [n,width] whose ids follow the vocabulary's."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, a function of the generator's state."""
