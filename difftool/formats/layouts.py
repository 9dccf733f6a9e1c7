"""How other tools' files hold each kind of network, text encoder and codec. Torch-free.

Another kind's names and configurations, in files of their own, are a row here; a model of a kind
without a row has difftool's own format alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from difftool.config.families import Family
from difftool.config.kinds import CodecConfig, EncoderConfig, NetworkConfig
from difftool.errors import CheckError
from difftool.formats.diffusers import networks
from difftool.formats.ldm import detect, tables
from difftool.formats.rules import Rule, Shape

T = TypeVar("T")
Read = Callable[[Mapping[str, Any], str], Any]
"""(config.json, its place) -> a configuration; InputError if difftool has no such network."""
Rules = Callable[[Any], Iterator[Rule]]
"""A configuration -> its tensors in a single file; CheckError if LDM's code cannot build it."""


class NetworkLayout(NamedTuple):
    """A kind of denoising network."""

    classes: tuple[str, ...]
    """Of the component unet in diffusers."""
    read: Read
    write: Callable[[Any], dict[str, Any]]
    """A configuration -> config.json; CheckError if none of the classes can hold it."""
    rules: Rules
    mark: str
    """A tensor that no other kind has in a single file."""
    detect: Callable[[Mapping[str, Shape], bool], Any]
    """(names and shapes in a single file, whether a pooled text joins them) -> a configuration;
    KeyError, IndexError or ValueError if they make none."""
    settle: Callable[[Any, Family, Mapping[str, Any]], tuple[Any, tuple[str, ...]]]
    """(configuration, family, what a file beside it says of the network) -> the configuration with
    what no tensor shows, and warnings of what is guessed."""


class CodecLayout(NamedTuple):
    """A kind of learned codec."""

    rules: Rules
    write: Callable[[Any, int], dict[str, Any]]
    """A configuration, and the size of pictures in pixels -> config.json."""


class EncoderLayout(NamedTuple):
    """A kind of text encoder."""

    rules: Rules
    openclip: Rules
    """The same under OpenCLIP's names."""
    write: Callable[[Any], dict[str, Any]]


NETWORKS = {
    "unet": NetworkLayout(
        classes=("UNet2DConditionModel", "UNet2DModel"),
        read=networks.read_unet,
        write=networks.write_unet,
        rules=tables.unet_rules,
        mark="input_blocks.0.0.weight",
        detect=detect.unet_config,
        settle=detect.with_heads,
    )
}
CODECS = {"vae": CodecLayout(tables.vae_rules, networks.write_vae)}
ENCODERS = {"clip": EncoderLayout(tables.clip_rules, tables.openclip_rules, networks.write_text)}
DIFFUSERS = "the model has no counterpart in diffusers"
LDM = "LDM's single files cannot hold this model"


def _row(rows: Mapping[str, T], what: str, config: Any, where: str) -> T:
    """The row of a configuration's kind; CheckError if there is none."""
    if config.kind not in rows:
        raise CheckError(where, f"its {what} is of kind {config.kind}", "use --to difftool")
    return rows[config.kind]


def network_rules(config: NetworkConfig) -> Iterator[Rule]:
    """The table of a denoising network in a single file; CheckError if it has none."""
    return _row(NETWORKS, "network", config, LDM).rules(config)


def encoder_rules(config: EncoderConfig, openclip: bool = False) -> Iterator[Rule]:
    """The same of a text encoder, in transformers' or OpenCLIP's names."""
    row = _row(ENCODERS, "text encoder", config, LDM)
    return row.openclip(config) if openclip else row.rules(config)


def read_network(config: Mapping[str, Any], where: str) -> NetworkConfig:
    """The denoising network of a config.json; InputError if difftool does not have it."""
    name = config.get("_class_name")
    row = next((row for row in NETWORKS.values() if name in row.classes), NETWORKS["unet"])
    return row.read(config, where)


def write_network(config: NetworkConfig) -> dict[str, Any]:
    """The config.json of a denoising network; CheckError if diffusers has no class for it."""
    return _row(NETWORKS, "network", config, DIFFUSERS).write(config)


def write_codec(config: CodecConfig, sample_size: int) -> dict[str, Any]:
    """The same of a learned codec, for pictures of a size in pixels."""
    return _row(CODECS, "codec", config, DIFFUSERS).write(config, sample_size)


def write_encoder(config: EncoderConfig) -> dict[str, Any]:
    """The same of a text encoder."""
    return _row(ENCODERS, "text encoder", config, DIFFUSERS).write(config)
