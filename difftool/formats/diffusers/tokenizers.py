"""The tokenizers of a diffusers folder: CLIP's vocabulary, or refused. Torch-free."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

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
        text = read_bytes(folder / "merges.txt", MAX_BYTES).decode("utf-8", "replace")
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
            pad = read_json(folder / name).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if pad == "!":
                return 0
            if pad == "<|endoftext|>":
                return None
            if pad is not None:
                raise InputError(f"{folder} pads with an unknown token", repr(pad))
    return None


def tokenizer_files(config: EncoderConfig) -> dict[str, str]:
    """A tokenizer's folder that transformers reads as CLIP's."""
    vocabulary, merges = _clip()
    pad = CLIP_END if config.pad_id is None else next(
        token for token, i in vocabulary.items() if i == config.pad_id
    )  # fmt: skip
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END}
    special |= {"unk_token": CLIP_END, "pad_token": pad}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.length}
    about |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json_text(about | special),
        "special_tokens_map.json": json_text(special),
    }
