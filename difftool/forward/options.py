"""The options of `noise`, most of which are the library's keywords too. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from difftool.config.numbers import NOT_NEGATIVE, Within
from difftool.config.options import DEVICE, DTYPE, OFFLINE, OVERWRITE, RUN, SET, Option, assignments
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS
from difftool.errors import UsageError
from difftool.forward.outputs import OUTPUTS

DEFAULT_PATH = "sd15"
PICTURE, LEVELS, MODEL, OUTPUT = "Picture", "Noise path", "Model", "Output"
PANELS = (PICTURE, LEVELS, MODEL, OUTPUT, RUN)
"""In the order of help."""


def _path(name: Any) -> str:
    PATHS.resolve(str(name))
    return str(name)  # as it was spelled


def _paths(given: Any) -> tuple[str, ...]:
    """Names of paths, all different, of "linear,flow" or of a list."""
    parts = given.split(",") if isinstance(given, str) else given
    names = tuple(_path(part.strip()) for part in parts)
    if len({*names}) < len(names):
        raise UsageError("a path is compared with itself", f"--compare {','.join(names)}")
    return names


OF_REVERSE = "is what --reverse and --likelihood ask the model with"
# fmt: off
OPTIONS = (
    Option(name="seed", type=int, within=NOT_NEGATIVE, panel=PICTURE, default="0",
           help="Of the noise"),
    Option(name="size", type=int, within=Within(low=8, high=4096), metavar="PIXELS", panel=PICTURE,
           default="the picture's, at most 256; the model's own",
           help="Longest side of a frame"),
    Option(name="path", panel=LEVELS, read=_path, choices=lambda: PATHS, default=DEFAULT_PATH,
           help="Noise path"),
    replace(SET, metavar="KEY=VALUE", panel=LEVELS, complete=lambda: assignments("path."),
            help="An option of the path; repeatable"),
    Option(name="steps", type=int, within=Within(low=1, high=100_000), panel=LEVELS,
           default="8, 40 of a moving picture; 20; 128",
           help="Levels shown, steps of the sampler, or evaluations of --likelihood"),
    Option(name="schedule", panel=LEVELS, read=GRIDS.resolve, choices=lambda: GRIDS,
           help="The levels a sampler visits"),
    Option(name="markov", type=bool, panel=LEVELS,
           help="Also walk the chain q(x_t | x_t-1), one picture at a time"),
    Option(name="model", flags=("--model", "-m"), metavar="MODEL", panel=MODEL,
           excludes=("path", "set"), help="The path of a model: file, run folder, or name"),
    Option(name="latent", type=bool, panel=MODEL, excludes=("path", "set"),
           help="Noise where the model works, decoded at each level"),
    Option(name="reverse", type=bool, panel=MODEL, excludes=("path", "set", "markov"),
           help="And back: the model's x0 at each level, with its error"),
    Option(name="likelihood", type=bool, panel=MODEL,
           excludes=("path", "set", "markov", "schedule", "latent", "reverse"),
           help="Bits per dimension under the model, and at which levels they go where"),
    Option(name="prompt", panel=MODEL, needs=("reverse", "likelihood"), why=OF_REVERSE, blank=True,
           help="What the model is told is there"),
    Option(name="label", panel=MODEL, needs=("reverse", "likelihood"), why=OF_REVERSE,
           help="The same by class, its name or index"),
    DEVICE,
    DTYPE,
    OFFLINE,
)
"""Of a picture and its noise: the library's keywords."""
FIGURES = (
    Option(name="images", argument=True, many=True, type=Path, file="picture", metavar="IMAGE",
           panel=PICTURE, help="Pictures; a file of each"),
    Option(name="compare", metavar="A,B,...", panel=LEVELS, read=_paths,
           excludes=("path", "set", "markov", "model", "latent", "reverse", "likelihood"),
           help="A row a path, SNR curves beside them"),
    Option(name="curve", type=bool, panel=LEVELS,
           excludes=("images", "markov", "latent", "reverse", "likelihood", "size", "seed"),
           help="No picture: alpha, sigma, log-SNR; table, .csv, .png or .html"),
    Option(name="output", flags=("--output", "-o"), panel=OUTPUT, default="IMAGE-noise.png",
           help="A file, of the kind that its ending says, or a folder"),
    Option(name="format", panel=OUTPUT, choices=lambda: OUTPUTS,
           help="Strip, animations, a page to play with, table"),
    OVERWRITE,
)
"""Of the figures that the command makes of it."""
# fmt: on
