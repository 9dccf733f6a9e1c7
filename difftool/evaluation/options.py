"""What `train --evaluate` and `sample --evaluate` compare by, as rows. Torch-free."""

from __future__ import annotations

from pathlib import Path

from difftool.config.options import Option
from difftool.errors import InputError, UsageError
from difftool.storage.tensor_file import TensorSource, open_source

PANEL = "Evaluation"
GRADIENTS, INCEPTION = "gradients", "inception"
"""Kinds of features: what needs no file, and the network of FID."""
LEAST = 5
"""Pictures that can be compared: each needs its third neighbour, and KID two halves."""
MADE = 1000
"""Pictures that training makes to be compared, at most, where it is not said."""
SIGNS = {INCEPTION: "Mixed_7c.branch_pool.conv.weight"}
"""A tensor by which a file's network is known."""

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
        metavar="FILE",
        needs=("evaluate",),
        why="is what pictures are compared by",
        default=f"{GRADIENTS}, without a file",
        help="Inception weights, as torch-fidelity and pytorch-fid have them",
    ),
)


def open_weights(path: Path) -> tuple[str, TensorSource]:
    """The kind of a file of weights, and what is in it; InputError if it is none that is known."""
    source = open_source(path)
    for kind, sign in SIGNS.items():
        if sign in source.tensors:
            return kind, source
    hint = "take pt_inception-2015-12-05-6726825d.pth, which torch-fidelity publishes"
    raise InputError(f"{path} has none of the networks that describe pictures", hint=hint)


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
