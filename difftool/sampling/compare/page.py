"""A page of all pictures that needs nothing else: tables, and two pictures against each other.

The pictures are in it as their files would be, with all that they say of themselves. Torch-free.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from difftool.images.fit import zoom_of
from difftool.images.formats import OUTPUT_FORMATS
from difftool.images.pages import colours, filled
from difftool.images.theme import INK, MUTED, PAPER, RULE
from difftool.sampling.compare.layout import Arrangement
from difftool.storage.strict_json import to_json

INKS = {"paper": PAPER, "ink": INK, "muted": MUTED, "rule": RULE}


class Embedded(NamedTuple):
    """A picture on the page."""

    data: Callable[[], bytes]
    """Of its file."""
    report: Mapping[str, Any]
    """What it was asked for."""


def page(arrangement: Arrangement, pictures: Sequence[Embedded], format: str) -> bytes:
    """The page, as HTML. pictures: those of the arrangement, in a format."""
    heading = arrangement.title or f"{len(pictures)} pictures"
    parts = {
        "TITLE": html.escape(heading[:120]),
        "HEADING": html.escape(heading),
        "ABOUT": html.escape(arrangement.about),
        "DATA": to_json(_data(arrangement, pictures, format)).replace("<", "\\u003c"),
    }
    text = filled("difftool.sampling.compare", parts, colours(INKS))
    start, end = text.split("<!--PICTURES-->")
    return b"".join([start.encode(), *_figures(arrangement, pictures, format), end.encode()])


def _figures(
    arrangement: Arrangement, pictures: Sequence[Embedded], format: str
) -> Iterator[bytes]:
    """The pictures with their captions, seen where no script runs too."""
    kind = OUTPUT_FORMATS[format].pillow.lower()
    for number, (picture, exhibit) in enumerate(zip(pictures, arrangement.pictures, strict=True)):
        caption = html.escape(arrangement.captions[number])
        size = 'width="{}" height="{}"'.format(*exhibit.size)
        small = ' class="small"' if zoom_of(exhibit.size) > 1 else ""
        said = f"<figcaption>{caption}</figcaption>" if caption else ""
        start = f'<figure><button type="button" class="open"><img{small} {size} alt="" src="data:'
        yield f"{start}image/{kind};base64,".encode()
        yield base64.b64encode(picture.data())
        yield f'"></button>{said}</figure>\n'.encode()


def _data(arrangement: Arrangement, pictures: Sequence[Embedded], format: str) -> dict[str, Any]:
    """What the script goes by."""
    axes = arrangement.axes
    shown = []
    for number, (picture, exhibit) in enumerate(zip(pictures, arrangement.pictures, strict=True)):
        width, height = exhibit.size
        at = [axis.texts.index(exhibit.facts[axis.name]) for axis in axes]
        shown.append(
            {
                "at": at or [number],
                "caption": arrangement.captions[number],
                "width": width,
                "height": height,
                "small": zoom_of(exhibit.size) > 1,
                "name": f"{number:04d}-{exhibit.facts['seed']}.{format}",
                "facts": dict(picture.report),
            }
        )
    return {"axes": [{"name": a.shown, "texts": list(a.texts)} for a in axes], "pictures": shown}
