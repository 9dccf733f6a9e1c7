"""Folders of the diffusers library <-> difftool's models. Torch-free; nothing named in a folder is
ever imported or run.

Tensors keep their names, but for the component that they lie in: unet/ is unet., vae/ is vae., the
text encoders are text.0. and text.1. What diffusers has no place for lies beside it in
difftool_extra.json and difftool_extra.safetensors, so that a model comes back as it was.
"""
