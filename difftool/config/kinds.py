"""What is asked of every kind of network, codec and text encoder, whichever it is: their kinds of
configuration, and the tables of them. Torch-free."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol

from difftool.registry import Registry


class Kinds(Registry[type]):
    """Configuration classes by the `kind` that presets name them by; where a mapping has no kind,
    the first is meant. In an annotation it says of which classes a value may be."""

    tables: ClassVar[list[Kinds]] = []

    def __hash__(self) -> int:
        return id(self)

    def __init__(self, what: str, **classes: type):
        super().__init__(what)
        for kind, cls in classes.items():
            self.add(kind, cls)
        self.tables.append(self)

    @classmethod
    def all(cls) -> tuple[type, ...]:
        """The classes of all tables."""
        return tuple(kind for table in cls.tables for kind in table.values())

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        classes = dict(self)
        first = next(iter(classes))

        def tag(values: Any) -> str:
            """The name of the class, as it stands in the location of an error."""
            kind = values.get("kind", first) if isinstance(values, dict) else first
            return classes[kind].__name__ if kind in classes else ""

        return core_schema.tagged_union_schema(
            {cls.__name__: handler.generate_schema(cls) for cls in classes.values()},
            tag,
            custom_error_type="unknown_kind",
            custom_error_message="there is no such kind",
            custom_error_context={"kinds": " ".join(classes)},
        )


class NetworkConfig(Protocol):
    """What is asked of every kind of denoising network, a frozen dataclass, outside its own file
    and those of formats.

    Whatever it is told beside x_t and t, it is told exactly if the configuration has it.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def kind(self) -> str:
        """By which presets, and networks.NETWORKS, name the kind."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of the input, any concatenated conditioning (mask, masked image) included."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Size of the label table; for classifier-free guidance the last means "no label"."""
        ...

    @property
    def vector_dim(self) -> int | None:
        """Width of the conditioning vector (SDXL's pooled text and sizes; SD2 unCLIP's image)."""
        ...

    @property
    def guidance_dim(self) -> int | None:
        """Width of the embedded guidance scale (LCM)."""
        ...

    @property
    def dropout(self) -> float:
        """In training."""
        ...

    @property
    def patch(self) -> int:
        """What the sides of x0 must be multiples of."""
        ...

    @property
    def multiple(self) -> int:
        """What they are best multiples of, so that nothing is rounded within the network."""
        ...

    def kept(self, height: int, width: int) -> int:
        """Values of feature maps that are in memory together for an x_t [C,height,width], at the
        least."""
        ...


class CodecConfig(Protocol):
    """What is asked of every kind of codec between pictures and x0, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def kind(self) -> str:
        """By which presets, and networks.CODECS, name the kind."""
        ...

    @property
    def channels(self) -> int:
        """Channels of pictures."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of x0."""
        ...

    @property
    def factor(self) -> int:
        """How many times smaller the sides of x0 are."""
        ...

    @property
    def learned(self) -> bool:
        """Whether it is an autoencoder, with weights and a posterior."""
        ...


class EncoderConfig(Protocol):
    """What is asked of every kind of text encoder, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def kind(self) -> str:
        """By which presets, and networks.ENCODERS, name the kind."""
        ...

    @property
    def tokenizer(self) -> str:
        """Whose vocabulary it reads: "clip", or one "learned" from the captions."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a prompt, start and end marks included."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Token that fills short prompts; None = the end mark."""
        ...

    @property
    def layers(self) -> int:
        """Of which each has a hidden state that can be the context."""
        ...

    @property
    def width(self) -> int:
        """Of the context."""
        ...

    @property
    def pooled(self) -> bool:
        """Whether its pooled text joins the conditioning vector."""
        ...

    @property
    def projection(self) -> int | None:
        """Width of the pooled text; None = that of the context."""
        ...
