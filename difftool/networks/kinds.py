"""The kinds of networks, text encoders and codecs: what is built for a configuration of each.

A new kind is a row here, and one of its configuration in config.networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difftool.config.kinds import CodecConfig, EncoderConfig, NetworkConfig
from difftool.networks.base import Network, TextEncoder
from difftool.networks.clip import ClipText
from difftool.networks.codecs import Codec, SpaceToDepth, VaeCodec
from difftool.networks.prior import EmbeddingCodec, PriorTransformer
from difftool.networks.unet import UNet
from difftool.registry import Registry

NETWORKS: Registry[Callable[[Any], Network]] = Registry("network")
NETWORKS.add("unet", UNet)
NETWORKS.add("prior", PriorTransformer)

ENCODERS: Registry[Callable[[Any], TextEncoder]] = Registry("text encoder")
ENCODERS.add("clip", ClipText)

CODECS: Registry[Callable[[Any], Codec]] = Registry("codec")
CODECS.add("identity", Codec, "pixel")
CODECS.add("space_to_depth", SpaceToDepth)
CODECS.add("vae", VaeCodec)
CODECS.add("embedding", EmbeddingCodec)


def build_network(config: NetworkConfig) -> Network:
    """The denoising network of a configuration."""
    return NETWORKS[config.kind](config)


def build_encoder(config: EncoderConfig) -> TextEncoder:
    """The text encoder of a configuration."""
    return ENCODERS[config.kind](config)


def build_codec(config: CodecConfig) -> Codec:
    """The codec of a configuration."""
    return CODECS[config.kind](config)
