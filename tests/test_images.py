"""Reading and writing pictures: what a viewer shows, nothing hostile, never half a file."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from difftool.errors import InputError, ResourceError, UsageError
from difftool.images import read as images
from difftool.images.fit import framed, tile, to_pil, to_pixels, to_tensor
from difftool.images.read import probe, read_image, read_picture
from difftool.images.write import encode_png, write_png
from difftool.storage.commit import write_whole

GRADIENT = np.stack(np.meshgrid(np.arange(24) * 10, np.arange(16) * 15), -1)
PHOTO = Image.fromarray(np.concatenate([GRADIENT, GRADIENT[..., :1] // 2], -1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    read = read_image(encoded(PHOTO, format, **options))
    assert read.mode == "RGB" and read.size == PHOTO.size
    off = abs(np.asarray(read, int) - np.asarray(PHOTO, int)).mean()
    assert off < 12 if format in ("GIF", "JPEG") else off == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.asarray(PHOTO)
    turned = values.transpose(1, 0, 2)
    shown = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1],
        5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1],
    }[orientation]  # fmt: skip
    picture = read_picture(encoded(PHOTO, exif=exif))
    assert np.array_equal(np.asarray(picture.image), shown)
    assert bool(picture.notes) == (orientation != 1)


def test_16_bits_are_scaled_not_cut():
    values = np.array([[0, 128, 129, 32767, 32896, 65279, 65407, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    for format in ("PNG", "TIFF"):
        picture = read_picture(encoded(Image.fromarray(values), format))
        assert np.array_equal(np.asarray(picture.image)[..., 1], expected)
        assert picture.notes == ("16 bits scaled to 8",)


def test_16_bit_colour():
    rows = b"\0" + struct.pack(">6H", 0, 65535, 25700, 32896, 257, 65278)
    read = np.asarray(read_image(png(2, 1, 16, 2, rows)), int)
    assert abs(read.ravel() - [0, 255, 100, 128, 1, 254]).max() <= 1


def test_more_than_16_bits_are_refused():
    values = np.array([[0, 70000]], np.int32)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.float32))):
        with pytest.raises(InputError) as error:
            read_image(encoded(image, "TIFF"))
        assert error.value.why and "32 bits" in error.value.why


def test_alpha_is_composited_over_white():
    colours = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    picture = read_picture(encoded(image))
    assert np.asarray(picture.image).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert picture.notes == ("alpha composited over white",)
    grey = encoded(Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 51)]))
    assert read_image(grey).getpixel((0, 0)) == (204, 204, 204)
    assert not read_picture(encoded(PHOTO.convert("RGBA"))).notes


def test_palette_and_its_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(read_image(encoded(image))).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    for format in ("PNG", "GIF"):
        read = read_image(encoded(image, format, transparency=0))
        assert np.asarray(read).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    key = encoded(PHOTO, transparency=PHOTO.getpixel((0, 0)))
    assert read_image(key).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_three_equal_channels(mode):
    image = PHOTO.convert(mode)
    read = np.asarray(read_image(encoded(image)))
    assert (read == np.asarray(image.convert("L"))[..., None]).all()


def test_cmyk():
    for format in ("JPEG", "TIFF"):
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        picture = read_picture(encoded(image, format))
        assert abs(np.array(picture.image.getpixel((4, 4))) - (255, 0, 0)).max() < 4
        assert picture.notes == ("CMYK without a usable profile",)


def linear_profile() -> bytes:
    """A matrix profile (ICC.1:2010, version 2.4) with sRGB's primaries and linear light."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    text = b"linear light"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(79)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = {
        b"desc": desc, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7139), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kinds = b"\0\0\0\0" + b"\x02\x40\0\0" + b"mntr" + b"RGB " + b"XYZ "
    head = struct.pack(">I", start + len(body)) + kinds
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + table + body


def test_colour_profiles_are_converted_to_srgb():
    image = Image.new("RGB", (2, 2), (128, 55, 0))
    picture = read_picture(encoded(image, icc_profile=linear_profile()))
    linear = np.array([128, 55, 0]) / 255  # IEC 61966-2-1
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(np.array(picture.image.getpixel((0, 0))) - 255 * srgb).max() < 2.5
    assert picture.notes == ("colour profile converted to sRGB",)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, b"no profile at all"):
        assert read_picture(encoded(image, icc_profile=profile)) == (image, ())


def test_only_the_first_frame_is_read():
    frames = [Image.new("RGB", (4, 4), (c, 0, 0)) for c in (250, 0, 90)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    picture = read_picture(data)
    assert picture.image.getpixel((1, 1)) == (250, 0, 0)
    assert picture.notes == ("first frame of several",)


def test_another_background():
    image = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))
    picture = read_picture(image, "#0000ff")
    assert picture.image.getpixel((0, 0)) == (0, 0, 204)
    assert picture.notes == ("alpha composited over #0000ff",)
    with pytest.raises(UsageError, match="no colour"):
        read_picture(image, "#12")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_probe_says_what_reading_gives(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in (PHOTO, PHOTO.convert("L"), PHOTO.resize((300, 7))):
        data = encoded(image, format, exif=exif, icc_profile=linear_profile())
        picture = read_picture(data)
        assert probe(data)[:2] == (picture.image.size, picture.notes)
    for bad in (b"", encoded(PHOTO, format)[:-60]):
        with pytest.raises(InputError) as error:
            probe(bad)
        with pytest.raises(InputError) as same:
            read_picture(bad)
        assert error.value.why == same.value.why


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"not a picture", "supported format"),
        (EPS, "supported format"),
        (encoded(PHOTO, "PPM"), "supported format"),
        (encoded(Image.effect_noise((64, 64), 50))[:-500], "cannot be decoded"),
        (encoded(PHOTO, "JPEG")[:-100], "cannot be decoded"),
        (encoded(PHOTO, "WEBP", lossless=True)[:-20], "cannot be decoded"),
        (png(50_000, 50_000), "megapixels"),
        (png(12_000, 9_000), "megapixels"),
        (png(8_001, 8_000), "megapixels"),
        (png(20_001, 1), "sides"),
        (png(16, 16, rows=b"\0"), "cannot be decoded"),
    ],
)
def test_bad_files_are_refused_with_the_reason(data, reason, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert error.value.why and reason in error.value.why
    assert str(path) in error.value.what


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError):
        read_image(tmp_path)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="larger than"):
        read_image(encoded(PHOTO, "BMP"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_files_are_read_or_refused_and_nothing_else(format):
    whole, dice = encoded(PHOTO, format), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert read_image(bytes(data)).mode == "RGB"
        except InputError as error:
            assert error.why


# --- shaping and tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (16, 16), (1000, 7), (9, 31)])
def test_a_square_is_the_resized_centre(size):
    image = PHOTO.resize(size)
    made = framed(image, (8, 8))
    assert made.size == (8, 8)
    scale = 8 / min(size)
    whole = image.resize((max(8, round(size[0] * scale)), max(8, round(size[1] * scale))), 1)
    left, top = (whole.width - 8) // 2, (whole.height - 8) // 2
    assert np.array_equal(np.asarray(made), np.asarray(whole)[top : top + 8, left : left + 8])


def test_an_image_of_the_size_is_left_alone():
    image = PHOTO.crop((0, 0, 16, 16))
    assert framed(image, (16, 16)) is image


def test_pixels_survive_the_way_to_tensors_and_back():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    x = to_tensor(levels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_pixels(x), levels)
    image = to_pil(x)
    assert image.mode == "RGB" and image.size == (256, 2)
    assert torch.equal(to_tensor(image), x)


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-2.0, -1.0, 1 - 0.6 / 127.5, 1 - 0.4 / 127.5, 1.0, 3.0])
    assert to_pixels(x).tolist() == [0, 0, 254, 255, 255, 255]
    assert to_pixels(x.bfloat16()).dtype == torch.uint8


def test_tile():
    sheet = tile([Image.new("RGB", (4, 3), (i, i, i)) for i in range(5)])
    assert sheet.size == (12, 6)
    assert sheet.getpixel((5, 4)) == (4, 4, 4) and sheet.getpixel((9, 4)) == (255, 255, 255)


# --- writing ---------------------------------------------------------------------------------


def test_text_chunks(tmp_path):
    path = tmp_path / "a.png"
    write_png(PHOTO, path, {"parameters": "a café", "difftool": '{"prompt": "狐"}'})
    with Image.open(path) as image:
        assert image.info["parameters"] == "a café"
        assert image.info["difftool"] == '{"prompt": "狐"}'
    data = path.read_bytes()
    assert b"tEXtparameters\0" in data and b"iTXtdifftool\0" in data
    buffer = BytesIO()
    write_png(PHOTO, buffer, {"parameters": "a café", "difftool": '{"prompt": "狐"}'})
    assert buffer.getvalue() == data


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="there already"):
        write_png(PHOTO, path)
    assert path.read_bytes() == b"mine"
    write_png(PHOTO, path, overwrite=True)
    assert path.read_bytes() == encode_png(PHOTO)
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_writers_one_wins(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, outcomes = tmp_path / "a.bin", []

    def write(number: int) -> None:
        try:
            write_whole(path, bytes([number]) * 1000)
            outcomes.append(number)
        except UsageError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert path.read_bytes() == bytes(outcomes) * 1000
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space"):
        write_png(PHOTO, tmp_path / "a.png")
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_the_users_error(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot write"):
        write_png(PHOTO, tmp_path / "none" / "a.png")
