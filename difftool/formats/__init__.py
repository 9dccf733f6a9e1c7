"""Model files and folders. Torch-free until tensors are loaded.

`open_model` gives the model behind a path, whatever its format; FORMATS is the table of formats.
"""

from difftool.formats import diffusers, native  # each enters the table of formats
from difftool.formats.source import FORMATS, Evidence, ModelSource, open_model

__all__ = ["FORMATS", "Evidence", "ModelSource", "diffusers", "native", "open_model"]
