"""What one tensor of another layout is in difftool. Torch-free.

Each rule gives one tensor of theirs and the one of ours, or the three stacked in it, that it is:

    copy        the same tensor
    reshape     a 1x1 convolution of theirs, a linear layer of ours: the same bytes
    stack       three tensors of ours are thirds of the rows of theirs (OpenCLIP's q, k, v)
    transpose   their rows are our columns (OpenCLIP's text projection)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from difftool.storage.tensors import Op

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One tensor of another layout, and what it is in difftool."""

    theirs: str
    """Its name in the other layout."""
    ours: tuple[str, ...]
    shape: Shape
    """Of each tensor of ours."""
    op: Op = "copy"

    @property
    def their_shape(self) -> Shape:
        """Of their tensor."""
        match self.op:
            case "reshape":
                return (*self.shape, 1, 1)
            case "stack":
                return (len(self.ours) * self.shape[0], *self.shape[1:])
            case "transpose":
                return self.shape[::-1]
        return self.shape


def placed(rules: Iterable[Rule], theirs: str, ours: str) -> Iterator[Rule]:
    """The same rules with a prefix before the names of each side."""
    for rule in rules:
        names = tuple(ours + name for name in rule.ours)
        yield rule._replace(theirs=theirs + rule.theirs, ours=names)
