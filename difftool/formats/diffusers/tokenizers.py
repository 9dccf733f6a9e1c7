"""The tokenizers of a diffusers folder: CLIP's vocabulary, or refused. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from difftool.config.kinds import EncoderConfig
from difftool.errors import InputError
from difftool.formats.diffusers.components import json_text
from difftool.storage.read import read_bytes
from difftool.storage.strict_json import MAX_BYTES, read_json
from difftool.text.tokenizer import CLIP_END, CLIP_START, clip_vocabulary


@cache
def _clip() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and the lines of its merges.txt."""
    vocabulary, merges = clip_vocabulary()
    return vocabulary, [" ".join(pair) for pair in merges]


def pad_id(folder: Path) -> int | None:
    """The padding token of a tokenizer's folder (None: the end mark); InputError if it is not
    CLIP's vocabulary."""
    merges: list[str] = []
    if (folder / "merges.txt").is_file():
        text = read_bytes(folder / "merges.txt", MAX_BYTES).decode("utf-8-sig", "replace")
        merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        match read_json(folder / "tokenizer.json"):
            case {"model": {"merges": list(found)}}:
                merges = [" ".join(map(str, m)) if isinstance(m, list) else m for m in found]
    if merges != _clip()[1]:
        raise InputError(f"{folder} is not CLIP's vocabulary", "this version reads no other")
    added = folder / "added_tokens.json"
    if added.is_file() and any(not t.startswith("<|") for t in read_json(added)):
        raise InputError(f"{folder} has tokens added to CLIP's vocabulary", "this is not supported")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            if config.get("pad_token") is not None:
                return read_pad(config, str(folder))
    return None


def read_pad(config: Mapping[str, Any], where: str) -> int | None:
    """The padding token in a tokenizer's file, as `pad_id`; InputError for an unknown one."""
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad not in (None, "!", CLIP_END):
        raise InputError(f"{where} pads with an unknown token", repr(pad))
    return 0 if pad == "!" else None


def tokenizer_files(config: EncoderConfig) -> dict[str, str]:
    """A tokenizer's folder that transformers reads as CLIP's."""
    vocabulary, merges = _clip()
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json_text(tokenizer_config(config)),
        "special_tokens_map.json": json_text(_special(config)),
    }


def tokenizer_config(config: EncoderConfig) -> dict[str, Any]:
    """The tokenizer_config.json among them."""
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.length}
    about |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    return about | _special(config)


def _special(config: EncoderConfig) -> dict[str, str]:
    pad = CLIP_END if config.pad_id is None else next(
        token for token, i in _clip()[0].items() if i == config.pad_id
    )  # fmt: skip
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END}
    return special | {"unk_token": CLIP_END, "pad_token": pad}
