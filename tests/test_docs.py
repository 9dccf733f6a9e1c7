"""What docs/ says is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from difftool.cli import lists, reference
from difftool.cli.reference import ENVIRONMENT, PATH, RENEW, RESULTS

ROOT = Path(__file__).parent.parent


def test_the_reference_is_as_new_as_the_code():
    written = (ROOT / PATH).read_text(encoding="utf-8")
    assert written == reference.reference(), f"{PATH} is old; renew it: {RENEW}"


def test_every_variable_that_is_read_is_told():
    told = " ".join([*ENVIRONMENT, *ENVIRONMENT.values()])
    for path in (ROOT / "difftool").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        found = re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', source)
        found += re.findall(r'"([A-Z_]+)" (?:not )?in os\.environ', source)
        assert [name for name in found if not re.search(rf"\b{name}\b", told)] == [], path


def test_every_list_is_told():
    text = reference.reference()
    for kind in lists.KINDS.keys() - {"models", "keys", "settings"}:
        assert f"\n## {kind.capitalize()}\n" in text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("`noise`, of each picture", "noise photo.png"),
        ("`noise --curve`", "noise --curve --steps 4"),
        ("`noise --curve`", "noise --curve --compare linear,cosine"),
        ("`convert --inspect`", "convert {model} --inspect"),
        ("`convert`", "convert {model} copy --to difftool --dry-run"),
        ("`--list`", "--list targets"),
        ("`--print-config`", "noise photo.png --print-config"),
        ("an error", "noise nowhere.png"),
    ],
)
def test_the_keys_of_what_commands_print_are_told(difftool, what, words):
    Image.new("RGB", (16, 16)).save("photo.png")
    words = words.format(model=bundled())
    (line,) = difftool(*words.split(), "--json").lines
    told = set(re.findall(r"`(\w+)`", RESULTS[what]))
    assert json.loads(line).keys() - {"schema"} <= told


def bundled() -> Path:
    """A model that ships."""
    from difftool.hub.find import bundled_models

    return bundled_models()["shapes"]
