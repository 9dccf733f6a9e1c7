"""Pictures compared with those of a reference as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from difftool.evaluation.features import open_describer
from difftool.evaluation.judge import Collected, judge, open_reference, reference_features
from difftool.images.fit import to_uint8
from difftool.images.read import read_picture
from difftool.sampling.events import Event, Existing, Judged, Note, Result


def judged(
    events: Iterator[Event], reference: str, weights: Path | None, device: str
) -> Iterator[Event]:
    """The events, and how near the pictures among them, those that were there already too, are to
    the reference. weights: of what describes them; see `open_describer`."""
    describer, dataset = open_describer(weights, device), open_reference(reference)
    made = Collected(describer)
    for event in events:
        if isinstance(event, Result):
            made.add(to_uint8(event.image))
        elif isinstance(event, Existing) and event.path:
            made.add(to_uint8(read_picture(event.path).image))
        yield event
    if not made.count:
        yield Note("no picture was made that could be compared")
        return
    if len(made.sizes) > 1:
        width, height = made.size
        yield Note(f"pictures of several sizes; the reference is compared at {width}x{height}")
    known = reference_features(dataset, made.size, describer)
    yield Judged(judge(made.features(), known, describer))
