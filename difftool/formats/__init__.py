"""Model files and folders. Torch-free until tensors are loaded.

`open_model` gives the model behind a path, whatever its format; FORMATS is the table of formats.
"""

from difftool.formats import diffusers, ldm, native  # each enters the table of formats
from difftool.formats.model_source import FORMATS, Evidence, ModelSource, open_model
from difftool.storage.tensor_file import TensorSource, open_source

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
