"""What every kind of denoising network and of text encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from difftool.errors import UsageError


class Network(nn.Module, ABC):
    """A denoising network F(x, t, conditioning); it knows no noise schedule.

    Called with x [B,C,H,W] and t [B], and by name with exactly those of context [B,L,D], vector
    [B,V], label [B] and guidance [B] that its configuration has, and length [B], the tokens of the
    context that are read, where that has `masks_context`; it gives [B,C',H,W]. Its first and last
    layers are conv_in and conv_out, its tables of labels class_embedding: names by which Muon
    leaves them to AdamW.
    """

    neutral: tuple[str, ...] = ()
    """Weights that change nothing while they are zero, which a network that is to start from
    another may have beyond that one's."""
    computes_in: torch.dtype | None = None
    """The type of the numbers that it works with, where that is not its weights'."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, a function of the generator's state."""

    @property
    def embedding_width(self) -> int | None:
        """Of its time embedding, where it takes `augment` [B,E] in training, which joins that."""
        return None

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels of each of its `features`; UsageError where it has none to show."""
        raise _featureless()

    def features(self, x: Tensor, t: Tensor, **told: Tensor | None) -> list[Tensor]:
        """What it sees in x at each of its resolutions, [B,C,h,w] each; called as it itself.
        UsageError where it has none to show."""
        raise _featureless()

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


def _featureless() -> UsageError:
    what = "the network shows none of its features"
    return UsageError(what, "what judges a picture stands on them", "distil it by lcm or ect")


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
