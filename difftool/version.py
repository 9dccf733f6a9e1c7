"""The version of the package, and of its numbers."""

__version__ = "0.1.0"
ENGINE = 1
"""Raised whenever pictures of the same settings come out otherwise than before."""
