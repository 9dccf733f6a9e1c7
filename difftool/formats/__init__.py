"""Model files and folders. Torch-free until tensors are loaded.

`open_model` gives the model behind a path, whatever its format; FORMATS is the table of formats.
"""

from difftool.formats import diffusers, ldm, native  # each enters the table of formats
from difftool.formats.files import TensorSource, open_source
from difftool.formats.source import FORMATS, Evidence, ModelSource, open_model

__all__ = [
    "FORMATS",
    "Evidence",
    "ModelSource",
    "TensorSource",
    "diffusers",
    "ldm",
    "native",
    "open_model",
    "open_source",
]
