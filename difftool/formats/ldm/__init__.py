"""LDM's single files (CompVis, Stability, A1111, kohya, ComfyUI) <-> difftool's models. Torch-free.

What no network of difftool's has (noise tables, counters, logit_scale, SD2's unused last layer,
image encoders) is kept under extra.ldm. and comes back. In what a file differs from those that are
written here, in names, shapes and metadata, is remembered too: every way there and back is exact.
"""
