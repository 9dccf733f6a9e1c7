"""The options of `convert`, which are the library's keywords too. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftool.config.options import OFFLINE, OVERWRITE, Option
from difftool.storage.shards import parse_size

FORMATS = {
    "ldm": "a single file, as Stable Diffusion's own code, A1111 and ComfyUI have it",
    "diffusers": "a folder of the diffusers library",
    "difftool": "a file of difftool's own, which says all about itself",
}
DIALECTS = {
    "kohya": "a LoRA as sd-scripts, A1111 and ComfyUI have it",
    "peft": "a LoRA as PEFT and diffusers have it",
}
"""What models, and LoRAs, are converted to."""
FORMAT, MODEL, LORA, OUTPUT = "Format", "Model", "LoRA", "Output"
OF_MODELS = ("dtype", "weights", "prediction", "zero_snr", "ema_length", "lora", "max_shard_size")
"""Options that a LoRA under other names has no use for."""


def _lora(text: Any) -> tuple[Path, float]:
    from difftool.adapters.lora.file import parse_lora

    return parse_lora(str(text))


# fmt: off
OPTIONS = (
    Option(name="source", argument=True, required=True, metavar="SRC", panel=FORMAT,
           help="A model: file, folder or name"),
    Option(name="target", argument=True, type=Path, metavar="DST", panel=FORMAT,
           help="The file or folder to write"),
    Option(name="to", panel=FORMAT, choices=lambda: FORMATS | DIALECTS,
           help=f"Format; {' and '.join(DIALECTS)} are names of LoRAs"),
    Option(name="dtype", panel=FORMAT, choices=lambda: ("fp32", "fp16", "bf16"),
           default="as they are", help="Of the weights"),
    Option(name="max_shard_size", panel=FORMAT, metavar="SIZE", read=parse_size,
           default="5GB; ldm is not split", help="Split larger files: 500MB, 2GiB"),
    Option(name="strip_metadata", type=bool, panel=FORMAT,
           help="Leave out notes that no tool needs"),
    Option(name="weights", panel=MODEL, choices=lambda: ("live", "ema"), default="both",
           excludes=("ema_length",), help="Keep only the trained or the averaged weights"),
    Option(name="ema_length", type=float, metavar="SHARE", panel=MODEL,
           help="Average a run's weights over this share of it (train.ema_profile=power)"),
    Option(name="prediction", panel=MODEL, choices=lambda: ("eps", "v"),
           help="What the model predicts, where its files do not say"),
    Option(name="zero_snr", type=bool, flags=("--zero-snr/--no-zero-snr",), panel=MODEL,
           help="Whether its noise ends in pure noise"),
    Option(name="lora", many=True, metavar="FILE[:WEIGHT]", panel=LORA, read=_lora, default="1",
           file="LoRA", folder=True, help="Merge a LoRA into SRC; repeatable"),
    Option(name="allow_unused", type=bool, panel=LORA,
           help="Though some of a LoRA's tensors have no use"),
    Option(name="verify", type=bool, flags=("--verify/--no-verify",), default="--verify",
           panel=OUTPUT, help="Read back and compare"),
    Option(name="dry_run", type=bool, panel=OUTPUT,
           help="Check and say what would be written; write nothing"),
    OVERWRITE,
    OFFLINE,
)
# fmt: on
