"""Pages of HTML that need nothing else: a package's page.html, filled. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files


def colours(inks: Mapping[str, str]) -> str:
    """A rule of CSS that gives colours their names."""
    return f":root {{ {' '.join(f'--{name}: {ink};' for name, ink in inks.items())} }}\n"


def filled(package: str, parts: Mapping[str, str], style: str = "") -> str:
    """The page.html of a package with each part in the place of <!--NAME-->, in order: the last may
    hold anything. STYLE is its page.css, after `style`, and SCRIPT its page.js."""
    source = files(package)
    css, script, text = (
        (source / f"page.{ending}").read_text(encoding="utf-8") for ending in ("css", "js", "html")
    )
    for place, part in {"STYLE": style + css, "SCRIPT": script, **parts}.items():
        text = text.replace(f"<!--{place}-->", part)
    return text
