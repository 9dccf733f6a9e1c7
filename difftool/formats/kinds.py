"""What a file of tensors is that is no whole model, told by their names. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable

KINDS = {
    "lora": r"lora_|\.lora\.|hada_w|lokr_w|dora_scale",
    "controlnet": r"^(control_model\.|controlnet_|input_hint_block\.)",
    "embedding": r"^(emb_params|clip_[lg]|string_to_param.*|<.*>)$",
    "unet": r"^(model\.diffusion_model\.)?"
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block)\.",
    "vae": r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv)",
    "text-encoder": r"^(text_model|transformer|cond_stage_model|conditioner\.embedders)\.",
}
"""Kinds of files that are no whole model, by the names of their tensors; the first that fits."""


def kind_of(names: Iterable[str]) -> tuple[str | None, str]:
    """The kind of a file that is no whole model, and what tells."""
    names = list(names)
    for kind, pattern in KINDS.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            return kind, f"{found} is a tensor of a {kind} file"
    return None, "no name that this version knows"
