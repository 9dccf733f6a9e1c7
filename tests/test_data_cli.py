"""The data flags of `difftool train`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import spawn
from folders import lay, pictures

from difftool.config.layers import data_config, load_preset, override_layers, preset_layers
from difftool.config.schema import DataConfig
from difftool.config.validate import to_yaml as written
from difftool.errors import UsageError

FLAGS = {
    "caption_column": ("--caption-column", "says"),
    "shuffle_captions": ("--shuffle-captions",),
    "keep_tokens": ("--keep-tokens", "2"),
    "crop": ("--crop", "random"),
    "background": ("--background", "#102030"),
    "allow_uncaptioned": ("--allow-uncaptioned",),
}


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return spawn("train", *arguments, cwd=cwd)


def test_flags_reach_the_data_and_the_preset(tmp_path):
    table = json.dumps({"file_name": "0.png", "text": "no", "says": "one, two, three"})
    files = pictures(*(f"{i}.png" for i in range(6)))
    lay(tmp_path / "photos", {**files, "metadata.jsonl": table})
    flags = [word for words in FLAGS.values() for word in words]
    done = train("photos", "--print-config", "--json", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 from metadata.jsonl, 5 without" in done.stderr
    assert "the first 2 stay" in done.stderr
    for name, (flag, *_) in FLAGS.items():
        assert f"data.{name}" in done.stdout and flag in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--crop", "middle"], 2, "choose from: centre, random"),
        (["--background", "whit"], 2, 'no colour "whit"'),
        (["--labels", "text"], 3, "has no captions"),
    ],
)
def test_misuse(tmp_path, flags, code, says):
    lay(tmp_path / "photos", pictures("a.png"))
    done = train("photos", *flags, "--dry-run", cwd=tmp_path)
    assert done.returncode == code and says in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


def test_a_resumed_run_reads_its_data_as_before(tmp_path):
    preset = load_preset("pixel-small", ["data.crop=random", "data.labels=prefix"])
    path = tmp_path / "config.yaml"
    path.write_text(written(preset))
    assert data_config(preset_layers(str(path))) == DataConfig(crop="random", labels="prefix")
    again = [*preset_layers(str(path)), *override_layers(["data.crop=centre"])]
    assert data_config(again) == DataConfig(labels="prefix")
    assert data_config([]) == DataConfig()
    with pytest.raises(UsageError, match="not a mapping"):
        data_config(override_layers(["data=3"]))
