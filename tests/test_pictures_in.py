"""Pictures that come in by any door are read alike, in every depth and mode."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difftool
from difftool.config.networks import CLIP_MEAN, CLIP_STD
from difftool.config.schema import SampleConfig
from difftool.data import open_dataset
from difftool.errors import InputError
from difftool.images.read import read_image
from difftool.pipeline.inputs import load_image_prompt, load_start
from difftool.sampling.metadata.files import read

SIDE = 16
SHADES = np.repeat(np.array([[0, 64, 128, 255]], np.uint8), 4, axis=1).repeat(SIDE, axis=0)
"""Four stripes of grey, [16,16]."""
GREY = Image.fromarray(SHADES)


def palette() -> Image.Image:
    image = Image.fromarray((SHADES // 64).astype(np.uint8), "P")
    image.putpalette([v for shade in (0, 64, 128, 255) for v in (shade,) * 3])
    return image


def clear_palette() -> Image.Image:
    image = palette()
    image.info["transparency"] = 0
    return image


def turned() -> Image.Image:
    image = GREY.transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


def deep(kind: type, scale: int) -> Image.Image:
    return Image.fromarray(SHADES.astype(kind) * kind(scale))


KINDS = {
    "L.png": GREY,
    "LA.png": Image.merge("LA", (GREY, Image.new("L", GREY.size, 255))),
    "RGB.bmp": GREY.convert("RGB"),
    "RGBA.webp": GREY.convert("RGBA"),
    "P.gif": palette(),
    "P-clear.png": clear_palette(),
    "CMYK.tif": GREY.convert("RGB").convert("CMYK"),
    "I;16.png": deep(np.uint16, 257),
    "I;16.tif": deep(np.uint16, 257),
    "I.tif": deep(np.int32, 257),
    "turned.png": turned(),
}


def save(folder: Path, name: str) -> Path:
    path = folder / name.replace(";", "")
    image = KINDS[name]
    more: dict[str, Any] = {"exif": image.getexif()} if name.startswith("turned") else {}
    if path.suffix == ".webp":
        more["lossless"] = True
    if name == "P-clear.png":
        more["transparency"] = 0
    image.save(path, **more)
    return path


def near(found: np.ndarray | torch.Tensor, wanted: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(found, float) - wanted.astype(float)).max() <= 1)


@pytest.mark.parametrize("name", KINDS)
def test_all_doors_read_every_kind(tmp_path, name):
    path = save(tmp_path, name)
    clear = name == "P-clear.png"
    seen = np.where(SHADES == 0, 255, SHADES) if clear else SHADES  # white shows through
    size = (SIDE, SIDE)
    init, mask, _ = load_start(str(path), str(path), SampleConfig(size=size))
    assert init is not None and near((init[0] + 1) * 127.5, seen)
    assert mask is not None and near(mask * 255, SHADES)  # what is transparent is black
    prompt = load_image_prompt(str(path), SIDE)[0] * CLIP_STD[0] + CLIP_MEAN[0]
    assert near(prompt * 255, seen)
    assert near(open_dataset(str(tmp_path)).images([0], SIDE)[0, 0], seen)
    with Image.open(path) as opened:
        for given in (path, opened):
            frames = difftool.noise(given, steps=2, size=SIDE, path="flow")
            assert near(np.asarray(frames[0])[..., 0], seen)


@pytest.mark.parametrize("name", KINDS)
def test_pictures_in_memory_are_read_as_their_files(tmp_path, name):
    path = save(tmp_path, name)
    with Image.open(path) as opened:
        opened.load()
        before = opened.mode, opened.size, dict(opened.info)
        assert read_image(opened).tobytes() == read_image(path).tobytes()
        assert (opened.mode, opened.size, dict(opened.info)) == before


def test_more_than_sixteen_bits_are_refused_and_not_clipped(tmp_path):
    for number, image in enumerate((deep(np.int32, 1 << 20), deep(np.float32, 1))):
        path = tmp_path / f"{number}.tif"
        image.save(path)
        for given in (path, image):
            with pytest.raises(InputError) as error:
                read_image(given)
            assert error.value.why == "32 bits a channel; 8 and 16 are supported"


def test_the_shade_of_a_deep_picture_that_stands_for_transparency(tmp_path):
    image = deep(np.uint16, 257)
    image.save(tmp_path / "a.png", transparency=64 * 257)
    shades = np.asarray(read_image(tmp_path / "a.png"))[0, :, 0]
    assert shades.tolist() == [0] * 4 + [255] * 4 + [128] * 4 + [255] * 4


def test_sixteen_bits_of_colour(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    wide = (SHADES.astype(np.uint16) * 257)[..., None].repeat(3, axis=2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    assert near(np.asarray(read_image(data + chunk(b"IEND", b"")))[..., 0], SHADES)


@pytest.mark.parametrize("format", ["EPS", "PPM", "TGA", "ICO", "PCX"])
def test_no_door_runs_another_decoder(tmp_path, format):
    file = BytesIO()
    GREY.convert("RGB").save(file, format)
    path = tmp_path / "a.png"  # whatever it is called
    path.write_bytes(file.getvalue())
    good = tmp_path.parent / f"{format}.png"
    GREY.save(good)
    doors = (
        lambda: load_start(str(path), None, SampleConfig()),
        lambda: load_start(str(good), str(path), SampleConfig()),
        lambda: load_image_prompt(str(path), SIDE),
        lambda: read(path),
        lambda: open_dataset(str(tmp_path)),
        lambda: difftool.noise(path),
    )
    for door in doors:
        with pytest.raises(InputError) as error:
            door()
        assert "not a picture in a supported format" in str(error.value)
