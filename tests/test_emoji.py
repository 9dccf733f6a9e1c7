"""The emoji data set and its evaluation: what is held out, captions, layout, ranks."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from difftool.data import open_dataset
from difftool.images.fit import to_tensor, to_uint8

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # as the scripts see each other
from benchmarks import emoji, emoji_eval

FOX = emoji.Emoji("1F98A", "fox", ("animal", "face"), ("fox face",))


# --- concepts --------------------------------------------------------------------------------


def test_codes_lose_the_variation_selector_and_bases_the_tones():
    assert emoji.normal("0031-fe0f-20e3") == "0031-20E3"
    couple = emoji.normal("1f9d1-1f3fb-200d-2764-fe0f-200d-1f9d1-1f3fc")
    assert couple == "1F9D1-1F3FB-200D-2764-200D-1F9D1-1F3FC"
    assert emoji.base_of(couple) == "1F9D1-200D-2764-200D-1F9D1"


def test_one_pair_in_twenty_five_is_held_out():
    pairs = [(f"{n:X}", style) for n in range(0x1F300, 0x1F700) for style in emoji.STYLES]
    held = [pair for pair in pairs if emoji.held_out(*pair)]
    assert 0.03 < len(held) / len(pairs) < 0.05
    assert held[0] == ("1F300", "twemoji") and ("1F30B", "fluent-3d") in held
    assert not emoji.held_out("1F98A", "fluent-3d")


def test_thinning_keeps_the_default_and_so_many_tones_of_each_base():
    waves = ["1F44B", *(f"1F44B-{tone}" for tone in emoji.TONES)]
    toned = [f"1F9D1-{tone}-200D-1F9D1" for tone in emoji.TONES]  # a base without a default
    codes = [*waves, *toned, "1F98A"]
    assert emoji.thin(codes, "noto", "all") == sorted(codes)
    for tones, each in (("default", 1), ("2", 3)):
        kept = emoji.thin(codes, "noto", tones)
        assert kept == emoji.thin(reversed(codes), "noto", tones)
        assert {"1F44B", "1F98A"} <= set(kept)
        assert len(set(kept) & set(waves)) == len(set(kept) & set(toned)) == each


# --- captions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
        ("octopus", "an octopus"),
        ("Christmas tree", "Christmas tree"),
        ("woman lifting weights", "a woman lifting weights"),
        ("women with bunny ears", "women with bunny ears"),
        ("flag: Peru", "the flag of Peru"),
        ("keycap: 1", "a keycap 1"),
        ("man: bald", "a bald man"),
        ("person: beard", "a person with a beard"),
        ("family: man, woman, girl", "a family of man, woman and girl"),
        ("waving hand: light skin tone", "a waving hand with light skin tone"),
        ("man: dark skin tone, red hair", "a man with red hair with dark skin tone"),
        (
            "kiss: woman, man, light skin tone, medium skin tone",
            "a kiss of woman and man with light and medium skin tone",
        ),
        ("couple with heart: man, man", "a couple with heart, man and man"),
        ("woman’s hat", "a woman's hat"),
    ],
)
def test_labels_become_phrases(label: str, phrase: str):
    assert emoji.tidy(emoji.with_article(emoji.subject(label))) == phrase


@pytest.mark.parametrize("style", emoji.STYLES)
def test_captions_vary_with_and_without_the_style(style: str):
    word = emoji.STYLES[style].word
    texts = emoji.captions(FOX, style)
    assert texts[0] == f"fox, {word} style"
    assert {"fox", "a fox", "fox face", f"a fox in {word} style"} <= set(texts)
    assert len(set(texts)) == len(texts)
    named = [text for text in texts if word in text.replace(",", "").split()]
    assert 0.4 < len(named) / len(texts) < 0.7
    others = {emoji.STYLES[other].word for other in emoji.STYLES} - {word}
    assert not any(others & set(text.replace(",", "").split()) for text in texts)


def test_every_caption_of_a_skin_tone_names_it():
    wave = emoji.Emoji("1F44B-1F3FD", "waving hand: medium skin tone", ("hello", "bye", "hi"))
    assert all("medium skin tone" in text for text in emoji.captions(wave, "noto"))


# --- packages --------------------------------------------------------------------------------


def package(folder: Path, name: str, files: dict[str, bytes]) -> tuple[str, str]:
    """A package as npm packs it; its licence and hash."""
    path = folder / (name.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    with tarfile.open(path, "w:gz") as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return "MIT", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def webp(colour: str, size: int = 128) -> bytes:
    """A disc of a colour on nothing."""
    picture = Image.new("RGBA", (size, size))
    margin = size // 16
    ImageDraw.Draw(picture).ellipse((margin, margin, size - margin - 1, size - margin - 1), colour)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small packages of the same form: the 3d style has three emoji, the others have none."""
    skins = [{"label": "hand: dark skin tone", "hexcode": "270B-1F3FF"}]
    data = [
        {"label": "volcano", "hexcode": "1F30B", "tags": ["lava flow"]},
        {"label": "hand", "hexcode": "270B-FE0F", "tags": ["five"], "skins": skins},
        {"label": "ghost", "hexcode": "1F47B"},
    ]
    empty = {"icons.json": b'{"icons": {}}', "chars.json": b"{}"}
    contents = {
        emoji.FLUENT_3D: {
            "assets/1f30b.webp": webp("navy"),
            "assets/270b-fe0f.webp": webp("gold"),
            "assets/270b-1f3ff.webp": webp("brown"),
            "assets/e50a.webp": webp("red"),
        },
        emoji.FLUENT_FLAT: {},
        emoji.NOTO: empty,
        emoji.TWEMOJI: empty,
        emoji.EMOJIBASE: {
            "en/data.json": json.dumps(data).encode(),
            "en/shortcodes/emojibase.json": json.dumps(
                {"1F30B": ["volcano", "lava_flow"], "270B-FE0F": "family_mwg"}
            ).encode(),
        },
    }
    folder = tmp_path / "packages"
    folder.mkdir()
    made = {name: package(folder, name, files) for name, files in contents.items()}
    monkeypatch.setattr(emoji, "PACKAGES", made)
    return folder


def test_the_folder_holds_what_is_labelled_and_is_the_same_again(packages: Path, tmp_path: Path):
    where = tmp_path / "first", tmp_path / "second"
    for folder in where:
        assert [*emoji.build(folder, packages, 32, "all", 1)] == [(1, 3), (2, 3), (3, 3)]
    files = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in where
    ]
    assert files[0] == files[1] and len(files[0]) == 5

    train, held = (emoji.read(where[0] / split) for split in ("train", "heldout"))
    assert [row["file_name"] for row in held] == ["fluent-3d_1f30b.png"]
    assert [(r["base"], r["style"], r["tone"]) for r in train] == [
        ("270B", "fluent-3d", ""),
        ("270B", "fluent-3d", "dark"),
    ]
    assert "lava flow" in held[0]["text"]
    assert not any("mwg" in text for row in train for text in row["text"])
    assert np.asarray(Image.open(where[0] / "train" / "fluent-3d_270b.png")).shape == (32, 32, 3)
    assert emoji.count(where[0]).splitlines()[-1].split() == ["all", "2", "2", "1", "1"]

    dataset = open_dataset(str(where[0] / "train"))
    assert dataset.kind == "text" and len(dataset) == 2
    for place, row in enumerate(sorted(train, key=lambda row: row["file_name"])):
        drawn = {dataset.captions([place], [key])[0] for key in range(200)}
        assert drawn == set(row["text"])


def test_a_package_of_another_hash_is_refused(packages: Path):
    path = emoji.tgz(emoji.NOTO, packages)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="SHA-512"):
        emoji.tgz(emoji.NOTO, packages)


def test_a_missing_package_without_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="no npm"):
        emoji.tgz(emoji.NOTO, tmp_path)


def test_icons_are_drawn_at_their_own_size():
    pytest.importorskip("resvg_py")
    icon = {"body": '<path d="M0 0h20v10H0z" fill="red"/>', "width": 20, "height": 10}
    picture = emoji.draw(emoji.svg(icon))
    assert picture.size == (emoji.CANVAS, emoji.CANVAS // 2)
    assert np.asarray(picture).reshape(-1, 4).min(0).tolist() == [255, 0, 0, 255]


# --- layout ----------------------------------------------------------------------------------


def extent(picture: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is not white, as shares of the frame."""
    inked = np.asarray(picture).min(2) < 128
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    left, top = columns[0] / len(inked), rows[0] / len(inked)
    return left, top, (columns[-1] + 1) / len(inked), (rows[-1] + 1) / len(inked)


def box(left: float, top: float, right: float, bottom: float, size: int = 256) -> Image.Image:
    """A black box, its edges as shares of an RGBA canvas with nothing else on it."""
    picture = Image.new("RGBA", (size, size))
    corners = left * size, top * size, right * size - 1, bottom * size - 1
    ImageDraw.Draw(picture).rectangle(corners, "black")
    return picture


@pytest.mark.parametrize("style", emoji.STYLES.values())
@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_usual_pictures_fill_the_frame_alike_in_its_middle(style: emoji.Style, shift: float):
    edge = (1 - style.span) / 2
    low, high = (max(edge - shift, 0), 1 - edge - shift)
    picture = emoji.lay_out(box(low, 0.3, high, 0.5), style.span, 128)
    left, top, right, bottom = extent(picture)
    assert right - left == pytest.approx(emoji.FILL, abs=0.02)
    assert left == pytest.approx(1 - right, abs=0.02)
    assert top == pytest.approx(1 - bottom, abs=0.02)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_small_pictures_stay_smaller():
    small = emoji.lay_out(box(0.4, 0.4, 0.6, 0.6), 0.875, 128)
    left, _, right, _ = extent(small)
    assert right - left == pytest.approx(emoji.FILL * emoji.SLACK * 0.2 / 0.875, abs=0.02)


def test_what_shines_through_is_laid_over_white():
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    middle = emoji.lay_out(half, 1.0, 32).getpixel((16, 16))
    assert middle == (127, 127, 127)


def test_an_empty_picture_is_an_error():
    with pytest.raises(ValueError, match="nothing"):
        emoji.lay_out(Image.new("RGBA", (64, 64)), 1.0, 32)


# --- evaluation ------------------------------------------------------------------------------


def test_ranks_count_what_is_nearer_than_the_best_right_answer():
    gallery = torch.nn.functional.normalize(torch.randn(50, 8, generator=seeded(0)), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(20, 8, generator=seeded(1)), dim=1)
    right = torch.rand(20, 50, generator=seeded(2)) < 0.05
    right[:, 7] = True
    near = (queries @ gallery.T).numpy()
    for found, row, good in zip(
        emoji_eval.ranks(queries, gallery, right), near, right.numpy(), strict=True
    ):
        assert found == 1 + np.sum(row[~good] > row[good].max())


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    other = images + torch.tensor([0.2, 0.0]).reshape(2, 1, 1, 1)
    assert emoji_eval.psnr(images, other).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_contrast_prefers_partners_over_strangers():
    first = torch.eye(6, 8)
    assert emoji_eval.contrast(first, first) < 0.01
    assert emoji_eval.contrast(first, first.roll(1, 0)) > 5


def test_perturbed_pictures_differ_and_stay_near():
    disc = Image.open(io.BytesIO(webp("blue", 64)))
    white = Image.new("RGBA", disc.size, "white")
    white.alpha_composite(disc.convert("RGBA"))
    images = to_tensor(to_uint8(white.convert("RGB"))).expand(8, -1, -1, -1)
    changed = emoji_eval.perturbed(images, seeded(0))
    assert changed.shape == images.shape and changed.abs().max() <= 1
    assert torch.equal(changed, emoji_eval.perturbed(images, seeded(0)))
    near = emoji_eval.psnr(changed, images)
    assert 5 < near.min() and near.max() < 35
    assert torch.equal(images[0], to_tensor(to_uint8(white.convert("RGB"))))


@pytest.mark.slow
def test_the_encoder_learns_and_its_judgement_tells_right_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    widths = {"noto": 20, "twemoji": 3}  # of the line around a disc: one is full, one is a ring
    colours = ("red", "green", "blue", "black", "orange", "purple")
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for style, width in widths.items():
        for colour in colours:
            picture = Image.new("RGB", (32, 32), "white")
            ImageDraw.Draw(picture).ellipse((4, 4, 27, 27), outline=colour, width=width)
            split = "heldout" if emoji.held_out(colour, style) else "train"
            row = {"file_name": f"{style}_{colour}.png", "text": [colour], "base": colour}
            rows[split].append(row | {"style": style, "label": colour, "tone": ""})
            picture.save(tmp_path / split / f"{style}_{colour}.png")
    for split, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / split / "metadata.jsonl").write_text(text)

    real = emoji_eval.load(tmp_path)
    assert len(real.pairs) == len(real.images) == 12
    sizes = {"STEPS": 60, "BATCH": len(colours), "STYLE_STEPS": 60, "STYLE_BATCH": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(emoji_eval, name, value)
    cache = tmp_path / "encoder.safetensors"
    judge = emoji_eval.Judge(emoji_eval.encoder(cache, real), real)
    pairs = real.chosen(False)
    images = emoji_eval.perturbed(judge.true(pairs), seeded(0))
    scores = judge.score(images, pairs)
    assert scores["top1"] > 0.8 and scores["style"] > 0.8 and scores["top5"] >= scores["top1"]
    wrong = [(base, {"noto": "twemoji", "twemoji": "noto"}[style]) for base, style in pairs]
    assert judge.score(images, wrong)["style"] < 0.2
    moved = pairs[1:] + pairs[:1]
    assert judge.score(images, moved)["top1"] < 0.3
    assert judge.across(pairs)["top1"] > 0.6
    soft = emoji_eval.softened(judge.true(pairs), seeded(0))
    assert judge.styled(soft, pairs).float().mean() > 0.9

    black, red = pairs.index(("black", "noto")), pairs.index(("red", "noto"))
    twins = real.images.clone()
    twins[real.pairs["black", "twemoji"]] = twins[real.pairs["black", "noto"]]
    alike = emoji_eval.Judge(judge.model, real._replace(images=twins))
    assert alike.same("black", "noto") == alike.same("black", "twemoji") == ["noto", "twemoji"]
    assert alike.same("red", "noto") == judge.same("black", "noto") == ["noto"]
    taken = soft[[black, red]]
    assert judge.styled(taken, [wrong[black], wrong[red]]).tolist() == [False, False]
    assert alike.styled(taken, [wrong[black], wrong[red]]).tolist() == [True, False]

    again = emoji_eval.Judge(emoji_eval.encoder(cache, real), real)  # read back, not trained
    assert torch.equal(again.features, judge.features)


def seeded(seed: int) -> torch.Generator:
    """A generator of numbers."""
    return torch.Generator().manual_seed(seed)
