"""What `train --evaluate` and `sample --evaluate` compare by, as rows. Torch-free."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from difftool.config.options import Option
from difftool.errors import InputError, UsageError
from difftool.storage.commit import sha256_of
from difftool.storage.strict_json import read_json
from difftool.storage.tensor_file import TensorSource, open_source

PANEL = "Evaluation"
GRADIENTS, INCEPTION, DINOV2 = "gradients", "inception", "dinov2"
"""Kinds of features: what needs no file, the network of FID, and that of FD-DINOv2."""
LEAST = 5
"""Pictures that can be compared: each needs its third neighbour, and KID two halves."""
MADE = 1000
"""Pictures that training makes to be compared, at most, where it is not said."""
SIGNS = {
    "Mixed_7c.branch_pool.conv.weight": INCEPTION,
    "blocks.0.ls1.gamma": DINOV2,
    "encoder.layer.0.layer_scale1.lambda1": DINOV2,
}
"""Tensors by which a file's network is known."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a folder of transformers has them in, where they are in one file."""

EVALUATION = (
    Option(
        name="evaluate",
        panel=PANEL,
        metavar="REFERENCE",
        help="Compare what is made with a folder of pictures: Frechet distance, KID, recall",
    ),
    Option(
        name="features",
        panel=PANEL,
        type=Path,
        file="file of weights",
        folder=True,
        metavar="FILE",
        needs=("evaluate",),
        why="is what pictures are compared by",
        default=f"{GRADIENTS}, without a file",
        help="Weights of Inception, as torch-fidelity has them, or of DINOv2",
    ),
)


class Weights(NamedTuple):
    """A network that describes pictures, as it lies in files."""

    kind: str
    source: TensorSource
    prefix: str
    """What the names of its tensors begin with."""
    heads: int | None
    """Of a transformer, where a config.json beside it says so."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file, in hex; of several, of all of theirs."""
        files = sorted({place.file for place in self.source.tensors.values()})
        found = [sha256_of(file) for file in files]
        return found[0] if len(found) == 1 else sha256("".join(found).encode()).hexdigest()


def open_weights(path: Path) -> Weights:
    """What is in a file of weights, or a folder of transformers; InputError if it is none that is
    known."""
    place = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    source = open_source(place)
    for sign, kind in SIGNS.items():
        for name in source.tensors:
            if name == sign or name.endswith(f".{sign}"):
                return Weights(kind, source, name.removesuffix(sign), _heads(source.path.parent))
    hint = "take pt_inception-2015-12-05-6726825d.pth, which torch-fidelity publishes, or "
    hint += "dinov2_vitl14_pretrain.pth, which Meta does"
    raise InputError(f"{path} has none of the networks that describe pictures", hint=hint)


def _heads(folder: Path) -> int | None:
    """Attention heads, by transformers' configuration."""
    path = folder / "config.json"
    told = read_json(path) if path.is_file() else {}
    heads = told.get("num_attention_heads")
    known = str(told.get("model_type", "")).startswith(DINOV2)
    return heads if known and isinstance(heads, int) and heads > 0 else None


def check_evaluation(reference: str | None, weights: Path | None, made: int | None = None) -> None:
    """UsageError if the reference is not there, or for too few pictures to be made (None: it is not
    known how many), InputError for weights that cannot be used."""
    from difftool.data import BUILTIN

    if made is not None and made < LEAST:
        what = f"{LEAST} pictures are the least to compare"
        raise UsageError(what, f"{made} to be made", "-n makes more")
    if reference is not None and not Path(reference).exists() and reference not in BUILTIN:
        hint = "name a folder of pictures"
        raise UsageError(f"--evaluate {reference} does not exist", hint=hint)
    if weights is not None:
        open_weights(weights)
