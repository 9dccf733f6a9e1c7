"""Layouts of models, other tools' and our own. Torch-free until tensors are loaded.

model_source    what every format gives; `open_model`, the model behind a path
native          difftool's own files
ldm/            single files: Stable Diffusion's own, A1111's, kohya's, ComfyUI's
diffusers/      folders of the diffusers library
rules           what one tensor of another layout is here
kinds           files of tensors that are no whole model
roundtrip       what another format has no place for
autoencoder     autoencoders on their own
unclip          what unCLIP models see pictures with

A format is what it has to be able to do, and a line here.
"""

from difftool.formats.diffusers.read import open_diffusers, recognises_diffusers
from difftool.formats.diffusers.write import plan_diffusers
from difftool.formats.ldm.read import lacks_codec, open_ldm, recognises_ldm
from difftool.formats.ldm.write import plan_ldm
from difftool.formats.model_source import FORMATS, Evidence, Format, ModelSource, open_model
from difftool.formats.native import open_native, plan_native, recognises_native
from difftool.storage.tensor_file import TensorSource, open_source

__all__ = ["FORMATS", "Evidence", "ModelSource", "TensorSource", "open_model", "open_source"]

FORMATS.add("diffusers", Format(recognises_diffusers, open_diffusers, plan_diffusers))
FORMATS.add("difftool", Format(recognises_native, open_native, plan_native))
FORMATS.add("ldm", Format(recognises_ldm, open_ldm, plan_ldm, lacks_codec))
