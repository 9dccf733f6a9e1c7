"""Pictures compared with those of a reference as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from difftool.evaluation.features import open_describer
from difftool.evaluation.judge import Collected, open_reference
from difftool.images.fit import to_uint8
from difftool.images.read import read_picture
from difftool.sampling.events import Event, Existing, Finishing, Judged, Note, Result


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
    yield Finishing(f"comparing them with {reference}")
    notes: list[Note] = []
    judgement = made.judged(dataset, lambda words, warning: notes.append(Note(words, warning)))
    yield from notes
    yield Judged(judgement)
