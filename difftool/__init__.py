"""difftool: train, sample, inspect and convert diffusion models."""

__version__ = "0.1.0"
