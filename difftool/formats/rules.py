"""What one tensor of another layout is here. Torch-free.

Each rule gives one tensor there and the one, or the three stacked in it, that it is here:

    copy        the same tensor
    reshape     a 1x1 convolution there, a linear layer here: the same bytes
    stack       three tensors here are thirds of the rows of the one there (OpenCLIP's q, k, v)
    transpose   rows there are columns here (OpenCLIP's text projection)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from difftool.storage.tensors import Op

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One tensor of a single file, and what it is in difftool."""

    there: str
    here: tuple[str, ...]
    shape: Shape
    """Of each tensor here."""
    op: Op = "copy"

    @property
    def shape_there(self) -> Shape:
        """Of the tensor there."""
        match self.op:
            case "reshape":
                return (*self.shape, 1, 1)
            case "stack":
                return (len(self.here) * self.shape[0], *self.shape[1:])
            case "transpose":
                return self.shape[::-1]
        return self.shape


def placed(rules: Iterable[Rule], there: str, here: str) -> Iterator[Rule]:
    """The same rules with a prefix before the names of each side."""
    for rule in rules:
        names = tuple(here + name for name in rule.here)
        yield rule._replace(there=there + rule.there, here=names)
