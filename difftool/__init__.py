"""difftool: train, sample, inspect and convert diffusion models.

    import difftool

    model = difftool.load("emoji")
    pictures = model.sample("a smiling fox", seed=7)
    pictures[0].save("fox.png")

The commands are a front of these names: what the library makes is what they make. Nothing is
imported, torch least of all, before a name that needs it is used.
"""

from difftool.version import __version__

TYPE_CHECKING = False  # typing's own takes longer to import than the rest
if TYPE_CHECKING:
    from difftool.diffusion.grids import GRIDS
    from difftool.diffusion.losses import LOSSES, TIMES, WEIGHTS
    from difftool.diffusion.path import PATHS
    from difftool.diffusion.prediction import TARGETS
    from difftool.diffusion.samplers import SAMPLERS
    from difftool.errors import (
        CheckError,
        DifftoolError,
        InputError,
        ResourceError,
        Stopped,
        UsageError,
    )
    from difftool.evaluation.judge import Judgement
    from difftool.library import (
        Pipeline,
        SampleStep,
        convert,
        evaluate,
        inspect,
        load,
        noise,
        train,
    )
    from difftool.plugins import load_plugins
    from difftool.training.step.optim import OPTIMIZERS

__all__ = [
    "GRIDS",
    "LOSSES",
    "OPTIMIZERS",
    "PATHS",
    "SAMPLERS",
    "TARGETS",
    "TIMES",
    "WEIGHTS",
    "CheckError",
    "DifftoolError",
    "InputError",
    "Judgement",
    "Pipeline",
    "ResourceError",
    "SampleStep",
    "Stopped",
    "UsageError",
    "__version__",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "load_plugins",
    "noise",
    "train",
]

_HOMES = {
    "diffusion.grids": "GRIDS",
    "diffusion.losses": "LOSSES TIMES WEIGHTS",
    "diffusion.path": "PATHS",
    "diffusion.prediction": "TARGETS",
    "diffusion.samplers": "SAMPLERS",
    "errors": "CheckError DifftoolError InputError ResourceError Stopped UsageError",
    "evaluation.judge": "Judgement",
    "library": "Pipeline SampleStep convert evaluate inspect load noise train",
    "plugins": "load_plugins",
    "training.step.optim": "OPTIMIZERS",
}
"""Modules, and the public names that are theirs."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names.split():
                return getattr(import_module(f"difftool.{home}"), name)
        raise AttributeError(f"module 'difftool' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
