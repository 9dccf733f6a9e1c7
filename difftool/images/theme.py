"""The colours that everything drawn has in common."""

from __future__ import annotations

PAPER, INK, MUTED, RULE = "#fbfaf7", "#1c1b19", "#85817a", "#e3dfd6"
"""The page, what is written on it, what matters less, and lines."""
CAPTION = "#4a4741"
"""Small text under pictures."""
RED, BLUE, AMBER, GREEN, VIOLET, NAVY = (
    *("#d1495b", "#00798c", "#e09f3e"),
    *("#5b8c5a", "#6c5b9e", "#2e4057"),
)
COLORS = (RED, BLUE, AMBER, GREEN, VIOLET, NAVY)
"""Of what is compared, in turn."""
