"""Misuse of every command: one clear message, the contract's exit code, nothing left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from difftool.cli.app import main

MISUSES = """
2 train | missing argument
2 train nowhere | nowhere
3 train empty | picture
3 train broken | picture
2 train photos --presett ddpm | --preset
2 train photos --preset pixel-smal | pixel-small
2 train photos --steps 0 | steps
2 train photos --steps many | many
2 train photos --batch-size -1 | batch-size
2 train photos --accumulate 0 | accumulate
2 train photos --lr 0 | lr
2 train photos --size 17 | 17
2 train photos --precision fp8 | fp8
2 train photos --set train.lrr=1 | train.lr
2 train photos --set train.lr=fast | train.lr
2 train photos --set train | train
2 train photos --set path.kind=linear --set path.zero_snr=true --set target=eps | zero
2 train photos --preset text-small | captions
2 train photos --part vae | autoencoder
2 train photos --part head | unet
2 train photos --from nowhere.safetensors | nowhere.safetensors
3 train photos --from text.txt | text.txt
2 train photos --from photos --preset ddpm | --preset
3 train photos --vae text.txt | text.txt
2 train photos --out full | full
2 train photos --resume | --out
2 train photos --resume --out nowhere | nowhere
2 train photos --device cuda:99 | cuda:99
2 sample a_fox -m nowhere | nowhere
3 sample a_fox -m text.txt | text.txt
3 sample a_fox -m cut.safetensors | cut.safetensors
2 sample a_fox --sampler eulr | euler
2 sample a_fox --schedule karas | karras
2 sample a_fox --steps 0 | steps
2 sample a_fox --size 64by64 | 64by64
2 sample a_fox --size 0x64 | 0
2 sample a_fox --seed 5-x | 5-x
2 sample a_fox --guidance 0.5 | 0.5
2 sample a_fox -n 0 | 0
2 sample a_fox -o photos/0.png | photos/0.png
2 sample a_fox --label dog | dog
2 sample --prompts nowhere.txt | nowhere.txt
2 sample --from-image nowhere.png | nowhere.png
3 sample --from-image text.txt | text.txt
2 noise | picture
2 noise nowhere.png | nowhere.png
3 noise text.txt | text.txt
2 noise photos/0.png --path cosin | cosine
2 noise photos/0.png --compare linear,flo | flow
2 noise photos/0.png --steps 0 | 0
2 noise photos/0.png --size 2 | 2
2 noise photos/0.png -o strip.xyz | .xyz
2 noise photos/0.png -o photos/1.png | photos/1.png
2 noise --curve --markov | --markov
2 convert | missing argument
2 convert nowhere out --to diffusers | nowhere
3 convert text.txt out --to diffusers | text.txt
3 convert cut.safetensors out --to diffusers | cut.safetensors
2 convert text.txt --to onnx | diffusers
2 frobnicate | frobnicate
"""


def cases() -> list:
    lines = [line for line in MISUSES.splitlines() if line]
    assert len(lines) >= 40
    cases = []
    for line in lines:
        command, _, says = line.partition(" | ")
        code, *arguments = command.split()
        cases.append(pytest.param(int(code), arguments, says, id=" ".join(arguments)))
    return cases


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures, an empty one, one of broken pictures, and files that are no models."""
    for name in ("photos", "empty", "broken", "full"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.new("RGB", (24, 24), (80 * i, 90, 200)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "text.txt").write_text("This is a text, and nothing else.\n" * 20)
    (tmp_path / "cut.safetensors").write_bytes((400).to_bytes(8, "little") + b'{"unet.conv_in')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFTOOL_MODEL", raising=False)
    return tmp_path


def everything(place: Path) -> dict[str, bytes | None]:
    paths = sorted(place.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.mark.parametrize(("code", "arguments", "says"), cases())
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_misuse(place, monkeypatch, capsys, code, arguments, says, as_json):
    before = everything(place)
    monkeypatch.setattr(sys, "argv", ["difftool", *arguments, *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == code, err
    assert everything(place) == before
    assert "Traceback" not in out + err
    if as_json:
        error = json.loads(out.splitlines()[-1])["error"]
        assert error["code"] == code
        message = " ".join(str(v) for v in error.values())
    else:
        assert out == ""
        message = err[err.index("error: ") :]
        assert len(message.splitlines()) <= 3
    assert says.lower() in message.lower()
