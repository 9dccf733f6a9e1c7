"""Archives and folders that want to do harm or have come to it: read past or refused, and told."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import audit, captions_of, lay, pictures
from PIL import Image

from difftool.cli.console import plain
from difftool.config.schema import DataConfig
from difftool.data import archive, open_dataset
from difftool.errors import DifftoolError, InputError, UsageError


def png(shade: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


UNSAFE = [
    "../up.png",
    "x/../../up.png",
    "/etc/abs.png",
    "C:/windows.png",
    "..\\up.png",
    "\\\\share\\up.png",
    "esc\x1b[2Jape.png",
    "right-to-left\u202egnp.png",
    "line\nbreak.png",
    "deep/" * 70 + "a.png",
    "long" * 400 + ".png",
]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unsafe_names_are_not_read(tmp_path, name, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as made:
            made.writestr("good.png", png())
            made.writestr(zipfile.ZipInfo(name), png())
    else:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
            for member in ("good.png", name):
                info = tarfile.TarInfo(member)
                info.size = len(png())
                made.addfile(info, io.BytesIO(png()))
    data = open_dataset(str(path))
    assert [data.name(i) for i in range(len(data))] == ["good.png"]
    (reason,) = {skipped.reason for skipped in data.audit.skipped}
    assert reason in ("an unsafe path", "a name that is too long")
    assert all(c.isprintable() or c == "\n" for c in plain("\n".join(data.audit.lines())))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet", "1.png"])
def test_a_file_that_unpacks_to_more_than_its_archive_is_not_read(tmp_path, name):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("good.png", png())
        made.writestr(name, bytes(17 << 20))
    data = open_dataset(str(path))
    assert [data.name(i) for i in range(len(data))] == ["good.png"]
    (skipped,) = data.audit.skipped
    assert (skipped.name, skipped.reason) == (name, "larger than the archive that it is in")


def test_a_picture_of_captions_without_end_is_refused(tmp_path):
    rows = "".join(f"a.png,caption {n}\n" for n in range(20_000))
    where = lay(tmp_path, {**pictures("a.png"), "metadata.csv": "file_name,text\n" + rows})
    with pytest.raises(InputError, match="more than 1000 captions"):
        open_dataset(where)


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for n in range(3):
            made.writestr(f"{n}.png", bytes(8 << 20))
    with pytest.raises(InputError) as caught:
        open_dataset(str(path))
    assert caught.value.why and "more than 16 times its size" in caught.value.why


def test_names_from_windows_and_with_dots_are_made_plain(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as made:
        for name in ("cats\\1.png", "./dogs//2.png"):
            made.writestr(zipfile.ZipInfo(name), png())
    data = open_dataset(str(path))
    assert [data.name(i) for i in (0, 1)] == ["cats/1.png", "dogs/2.png"]
    assert data.classes == ("cats", "dogs")


def test_names_of_nothing_are_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        for name in ("", ".//.", "good.png"):
            made.writestr(zipfile.ZipInfo(name), png())
    data = open_dataset(str(tmp_path / "a.zip"))
    assert [data.name(i) for i in range(len(data))] == ["good.png"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_file_of_a_name_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("a.png", png(10))
        made.writestr("a.png", png(20))
    with tarfile.open(tmp_path / "a.tar", "w") as made:
        for shade in (10, 20):
            info = tarfile.TarInfo("a.png")
            info.size = len(png(shade))
            made.addfile(info, io.BytesIO(png(shade)))
    for kind in ("zip", "tar"):
        data = open_dataset(str(tmp_path / f"a.{kind}"))
        assert data.audit.skipped == [("a.png", "a second file of this name")]
        assert data.images([0], 8)[0, 0, 0, 0] == 10


def test_files_that_overlap_are_a_bomb(tmp_path):
    """Many entries of the directory that share the bytes of one, as in Fifield's zip bomb."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for number in range(5):
            made.writestr(f"{number}.png", png(size=(300, 300)))
        for info in made.infolist()[1:]:
            info.header_offset = made.infolist()[0].header_offset
            info.compress_size = info.file_size = 10_000
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="cannot read") as error:
        open_dataset(str(tmp_path / "a.zip"))
    assert error.value.why and "overlap" in error.value.why


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        for number in range(4):
            made.writestr(f"{number}.png", png())
    with pytest.raises(InputError) as error:
        open_dataset(str(tmp_path / "a.zip"))
    assert error.value.why == "more than 3 files"


def test_members_that_unpack_to_more_than_a_picture_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr("difftool.data.pictures.MAX_BYTES", 10_000)
    monkeypatch.setattr("difftool.images.read.MAX_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("good.png", png())
        made.writestr("bomb.png", png() + bytes(50_000_000))
    reasons = dict(open_dataset(str(tmp_path / "a.zip")).audit.skipped)
    assert list(reasons) == ["bomb.png"] and "larger than" in reasons["bomb.png"]


def test_encrypted_and_linked_members(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("good.png", png())
        made.writestr("secret.png", png())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        made.writestr(link, "/etc/passwd")
        made.infolist()[1].flag_bits |= 1
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    reasons = dict(open_dataset(str(tmp_path / "a.zip")).audit.skipped)
    assert reasons == {"secret.png": "encrypted", "link.png": "a link"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz", "a.7z", "a.rar"])
def test_compressed_archives_are_refused_with_the_way_out(tmp_path, name):
    lay(tmp_path, {name: b"whatever"})
    with pytest.raises(InputError, match="not a dataset") as error:
        open_dataset(str(tmp_path / name))
    assert error.value.hint and ".zip or a plain .tar" in error.value.hint


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives_are_read_or_refused_and_nothing_else(tmp_path, kind):
    path, dice = tmp_path / f"a.{kind}", random.Random(0)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for name in ("a.png", "b.png"):
                made.writestr(name, png())
    else:
        with tarfile.open(path, "w") as made:
            for name in ("a.png", "b.png"):
                info = tarfile.TarInfo(name)
                info.size = len(png())
                made.addfile(info, io.BytesIO(png()))
    whole = path.read_bytes()
    for _ in range(200):
        data = bytearray(whole[: dice.randint(len(whole) // 2, len(whole))])
        for _ in range(dice.randint(0, 6)):
            data[dice.randrange(min(len(data), 1500))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            assert len(open_dataset(str(path))) in (1, 2)
        except InputError as error:
            assert str(error)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def test_a_tar_that_breaks_off(tmp_path):
    path = tmp_path / "a.tar"
    noise = Image.effect_noise((200, 200), 80)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    with tarfile.open(path, "w") as made:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(buffer.getvalue())
            made.addfile(info, io.BytesIO(buffer.getvalue()))
    cut(path, 0.6)
    with pytest.raises(InputError, match="cannot read") as error:
        open_dataset(str(path))
    assert error.value.why == "unexpected end of data"


# --- pictures and texts that cannot be what they say -----------------------------------------


def huge(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


NOISE = io.BytesIO()
Image.effect_noise((64, 64), 60).save(NOISE, "JPEG")
BAD_PICTURES = {
    "empty.png": b"",
    "text.png": b"hello",
    "bomb.png": huge(50_000, 50_000),
    "wide.png": huge(30_000, 1),
    "short.png": huge(64, 64),
    "cut.jpg": NOISE.getvalue()[:-400],
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "pickle.png": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "gif.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    "tiff.tif": b"II*\x00\x08\x00\x00\x00" + b"\xff" * 40,
    "webp.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\0" * 20,
    "bmp.bmp": b"BM" + b"\xff" * 60,
    "iccp.png": png()[:33] + b"\xff\xff\xff\xffiCCPxxxx" + png()[33:],
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_told_and_the_others_trained_on(tmp_path, name):
    where = lay(tmp_path, {**pictures("good.png"), name: BAD_PICTURES[name]})
    data = open_dataset(where)
    assert [data.name(i) for i in range(len(data))] == ["good.png"]
    assert [s.name for s in data.audit.skipped] == [name] and data.audit.skipped[0].reason
    again = open_dataset(where)
    assert again.fingerprint == data.fingerprint and again.audit.lines() == data.audit.lines()


def test_all_of_them_together_are_too_many(tmp_path):
    where = lay(tmp_path, {**pictures("a.png", "b.png"), **BAD_PICTURES})
    with pytest.raises(InputError, match=r"14 of 16 pictures .* are unusable") as error:
        open_dataset(where)
    assert error.value.hint and "--allow-bad" in error.value.hint
    data = open_dataset(where, DataConfig(allow_bad=True))
    assert len(data) == 2 and data.images([0, 1], 8).shape == (2, 3, 8, 8)


def test_of_many_no_more_are_looked_at_than_it_takes(tmp_path):
    path, read = tmp_path / "a.zip", []
    with zipfile.ZipFile(path, "w") as made:
        for number in range(3000):
            made.writestr(f"{number:04d}.png", b"")
    with pytest.raises(InputError, match=r"1001 of the first 1001 pictures .* are unusable"):
        open_dataset(str(path), progress=lambda done, total: read.append((done, total)))
    assert read[-1] == (1000, 3000)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n'),
        ("metadata.csv", b"a.png,x\n"),
    ],
)
def test_a_table_without_proportion_to_its_pictures_is_refused_unread(tmp_path, name, line):
    where = lay(tmp_path, {**pictures("a.png"), name: line * 100_001})
    with pytest.raises(InputError, match=f"{name} has 100001 lines for 2 files") as error:
        open_dataset(where)
    assert error.value.hint


TABLES: dict[str, Callable[[], str | bytes]] = {
    "nested": lambda: '{"file_name": "a.png", "text": ' + "[" * 100_000,
    "long number": lambda: '{"file_name": "a.png", "text": ' + "9" * 10_000 + "}",
    "surrogate": lambda: '{"file_name": "a.png", "text": "\\ud800"}',
    "nul": lambda: '{"file_name": "a.png", "text": "x\\u0000"}',
    "no name": lambda: '{"file_name": 3, "text": "x"}',
    "object": lambda: '{"file_name": "a.png", "text": {"a": 1}}',
    "utf-16": lambda: '{"file_name": "a.png", "text": "x"}'.encode("utf-16-le"),
    "outside": lambda: '{"file_name": "../../etc/passwd.png", "text": "x"}',
    "absolute": lambda: '{"file_name": "/etc/passwd.png", "text": "x"}',
    "huge": lambda: json.dumps({"file_name": "a.png", "text": "x" * 100_000}),
}


@pytest.mark.parametrize("kind", TABLES)
def test_bad_tables_are_refused(tmp_path, kind):
    where = lay(tmp_path, {**pictures("a.png"), "metadata.jsonl": TABLES[kind]()})
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        open_dataset(where)


@pytest.mark.parametrize(
    "content",
    ["{" * 100_000, '{"labels": [["a.png", 1.5]]}', '{"labels": [["a.png"]]}', '{"labels": 3}',
     '{"labels": [["a.png", true]]}', '{"labels": [["a.png", "x"]]}', b"\xff\xfe"],
)  # fmt: skip
def test_bad_label_files_are_refused(tmp_path, content):
    where = lay(tmp_path, {**pictures("a.png", "b.png"), "dataset.json": content})
    with pytest.raises(InputError, match=r"dataset\.json"):
        open_dataset(where)


def test_names_that_are_not_unicode(tmp_path):
    where = lay(tmp_path, {**pictures("a.png"), "a.txt": "x"})
    (tmp_path / "b\udcff.png").write_bytes(png())
    data = open_dataset(where)
    assert len(data) == 2 and data.fingerprint and len(data.split(1)[1]) == 1
    plain(audit(where)).encode()


def test_captions_keep_control_characters_from_the_terminal(tmp_path):
    where = lay(tmp_path, {**pictures("a.png"), "a.txt": "red \x1b[2J fox"})
    assert captions_of(where) == {"a.png": "red \x1b[2J fox"}
    assert "\x1b" not in plain(audit(where))


@pytest.mark.parametrize("options", [{"background": "whit"}, {"keep_tokens": -1}])
def test_options_that_mean_nothing(tmp_path, options):
    with pytest.raises(UsageError):
        open_dataset(lay(tmp_path, pictures("a.png")), DataConfig(**options))


def test_random_bytes_in_every_place_are_told_never_a_crash(tmp_path):
    dice = random.Random(0)
    names = ("metadata.csv", "metadata.jsonl", "a.txt", "dataset.json", "meta_cap.json", "b.png")
    for number in range(120):
        noise = dice.randbytes(dice.randint(1, 300))
        if number % 2:
            noise = bytes(b'{}[]":,\nabfile_nametext0.png|'[b % 29] for b in noise)
        where = lay(tmp_path / str(number), {**pictures("a.png"), dice.choice(names): noise})
        try:
            data = open_dataset(where)
            data.captions(range(len(data)))
        except DifftoolError as error:
            assert error.code == 3 and str(error)
