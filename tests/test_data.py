"""Dataset folders: every layout, what is said about it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import audit, caption_by_picture, captions_of, lay, lines, pictures, shade
from PIL import Image

from difftool.config.schema import DataConfig
from difftool.data import open_dataset
from difftool.errors import InputError, UsageError
from difftool.images.fit import framed

# --- captions --------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "additional_feature"])
def test_metadata_jsonl(tmp_path, column):
    table = lines(
        {"file_name": "a.png", column: "an a"}, {"file_name": "sub/b.png", column: "ein Bär"}
    )
    where = lay(tmp_path, {**pictures("a.png", "sub/b.png", "c.png"), "metadata.jsonl": table})
    assert caption_by_picture(where) == {
        shade("a.png"): "an a", shade("sub/b.png"): "ein Bär", shade("c.png"): "",
    }  # fmt: skip
    data = open_dataset(where)
    assert data.kind == "text"
    assert "captions: 2 from metadata.jsonl, 1 without" in data.audit.lines()


def test_metadata_csv_in_each_folder(tmp_path):
    files = pictures("x/a.png", "y/a.png")
    for folder in "xy":
        table = f'file_name,text\r\na.png,"one, in {folder}"\r\n'
        files[f"{folder}/metadata.csv"] = table  # type: ignore[assignment]
    assert caption_by_picture(lay(tmp_path, files)) == {
        shade("x/a.png"): "one, in x", shade("y/a.png"): "one, in y",
    }  # fmt: skip


def test_another_caption_column(tmp_path):
    table = lines({"file_name": "a.png", "text": "no", "says": "yes"})
    where = lay(tmp_path, {**pictures("a.png"), "metadata.jsonl": table})
    assert list(caption_by_picture(where, caption_column="says").values()) == ["yes"]


@pytest.mark.parametrize(
    ("table", "what", "hint"),
    [
        ('{"file_name": "a.png"', "line 1 is not JSON", ""),
        ("\n[1]", "line 2 is not a JSON object", ""),
        (lines({"filename": "a.png", "text": "x"}), 'no "file_name"', '"filename"'),
        (lines({"file_name": "a.png", "txt": "x"}), "no caption", "text, caption, prompt"),
        (lines({"file_name": "a.png", "text": 3}), "text is not text", ""),
        (lines({"file_name": "a.png", "text": "x" * 70_000}), "too long", ""),
        (lines({"file_name": "a.png", "text": "x\0"}), "NUL", ""),
        (lines({"file_name": "data/a.png", "text": "x"}), "no picture that is there", '"a.png"'),
        ("[" * 10_000, "line 1 is not", ""),
        (b"\xff\xfe\x00", "not UTF-8", "UTF-8"),
    ],
)
def test_unsound_metadata_is_refused(tmp_path, table, what, hint):
    root = tmp_path / "root"
    where = lay(root, {**pictures("data/a.png", "data/b.png"), "data/metadata.jsonl": table})
    with pytest.raises(InputError, match=what) as error:
        open_dataset(where)
    assert "metadata.jsonl" in error.value.what and hint in (error.value.hint or "")


def test_metadata_of_absent_pictures_is_noted(tmp_path):
    table = lines({"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "y"})
    where = lay(tmp_path, {**pictures("a.png"), "metadata.jsonl": table})
    assert any("gone.png" in line for line in open_dataset(where).audit.lines())


@pytest.mark.parametrize("name", ["metadata.json", "metadata.json1", "Metadata.JSON"])
def test_captions_are_not_overlooked_for_a_typo(tmp_path, name):
    table = lines({"file_name": "a.png", "text": "x"})
    where = lay(tmp_path, {**pictures("a.png"), name: table})
    with pytest.raises(InputError, match="is not read") as error:
        open_dataset(where)
    assert error.value.hint and "metadata.jsonl" in error.value.hint
    assert any(
        "ignored" in line for line in open_dataset(where, DataConfig(labels="none")).audit.lines()
    )


def test_sidecars(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("a.png", "b.png", "c.png", "d.png", "e.v2.png"),
            "a.txt": "from txt\n",
            "b.caption": "\ufefffrom caption",
            "c.txt": "txt wins",
            "c.caption": "not this",
            "d.txt": " \n",
            "e.v2.txt": "dots in the name",
            "notes.md": "no caption of anything",
        },
    )
    assert caption_by_picture(where) == {
        shade("a.png"): "from txt", shade("b.png"): "from caption", shade("c.png"): "txt wins",
        shade("d.png"): "", shade("e.v2.png"): "dots in the name",
    }  # fmt: skip
    text = "\n".join(open_dataset(where).audit.lines())
    assert "captions: 1 from .caption, 3 from .txt, 1 without" in text
    assert "1 image with .txt and .caption" in text


@pytest.mark.parametrize("content", [b"\xff\xff", b"a\0b", b"x" * 70_000])
def test_unsound_sidecars_are_refused(tmp_path, content):
    where = lay(tmp_path, {**pictures("a.png"), "a.txt": content})
    with pytest.raises(InputError, match=r"a\.txt"):
        open_dataset(where)


def test_metadata_goes_before_sidecars(tmp_path):
    table = lines({"file_name": "a.png", "text": "metadata"})
    files = {**pictures("a.png", "b.png"), "a.txt": "no", "b.txt": "beside"}
    where = lay(tmp_path, {**files, "metadata.jsonl": table})
    assert set(caption_by_picture(where).values()) == {"metadata", "beside"}


def test_one_of_several_lines_is_drawn_by_the_key(tmp_path):
    where = lay(tmp_path, {**pictures("a.png", "b.png"), "a.txt": "one\n\ntwo\nthree\n"})
    data = open_dataset(where)
    drawn = data.captions([0] * 3000, range(3000))
    counts = [drawn.count(text) for text in ("one", "two", "three")]
    assert sum(counts) == 3000 and min(counts) > 900
    assert data.captions([0, 1, 0], [8, 9, 8])[::2] == [drawn[8]] * 2
    assert any("several captions" in line for line in data.audit.lines())


def test_metadata_above_and_beside_the_pictures(tmp_path):
    above = lines(
        {"file_name": "train/a.png", "text": "above"},
        {"file_name": "train/b.png", "text": "above"},
        {"file_name": "validation/c.png", "text": "held out"},
    )
    beside = lines({"file_name": "a.png", "text": "beside"})
    files = pictures("train/a.png", "train/b.png", "validation/c.png")
    tables = {"metadata.jsonl": above, "train/metadata.jsonl": beside}
    where = lay(tmp_path, {**files, **tables})
    assert captions_of(where) == {"train/a.png": "beside", "train/b.png": "above"}
    held = open_dataset(where).held_out
    assert held and held.captions([0]) == ["held out"] and held.name(0) == "validation/c.png"
    assert "validation/ is held out for validation: 1 image" in audit(where)


def test_only_train_is_described(tmp_path):
    files = pictures("train/a.png", "val/b.png", "test/c.png")
    table = lines({"file_name": "a.png", "text": "x"})
    data = open_dataset(lay(tmp_path, {**files, "train/metadata.jsonl": table}))
    assert data.held_out and data.held_out.captions([0]) == [""]
    assert data.held_out.name(0) == "val/b.png" and len(data) == 1
    assert any("train/ is used, test/ left alone" in line for line in data.audit.lines())


def test_lines_without_a_caption_count_as_such(tmp_path):
    table = lines(
        {"file_name": "a.png", "text": None}, {"file_name": "./b.png", "text": ["x", " "]},
        {"file_name": "c.png"},
    )  # fmt: skip
    where = lay(tmp_path, {**pictures("a.png", "b.png", "c.png"), "metadata.jsonl": table})
    assert captions_of(where) == {"a.png": "", "b.png": "x", "c.png": ""}
    short = "file_name,text,extra\na.png,one,3\nb.png\nc.png,,\n"
    (tmp_path / "metadata.csv").write_text(short)
    (tmp_path / "metadata.jsonl").unlink()
    assert captions_of(where) == {"a.png": "one", "b.png": "", "c.png": ""}
    assert "metadata.csv: columns not used: extra" in audit(where)


def test_of_several_tables_one_goes(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("a.png"),
            "metadata.csv": "file_name,text\na.png,csv",
            "Metadata.JSONL": lines({"file_name": "a.png", "text": "jsonl"}),
            "a.txt": "beside",
        },
    )
    assert captions_of(where) == {"a.png": "jsonl"}
    told = audit(where)
    assert "several metadata files in one folder: Metadata.JSONL goes" in told
    assert "1 image with a caption in metadata and beside it: the metadata is used" in told


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    where = lay(tmp_path, {**pictures("a.png"), "metadata.parquet": b"PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"metadata\.parquet") as error:
        open_dataset(where)
    assert error.value.why == "pyarrow is not installed"
    assert error.value.hint and "metadata.jsonl" in error.value.hint


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    where = lay(tmp_path, pictures("a.png", "b.png"))
    table = arrow.table({"file_name": ["a.png", "b.png"], "text": ["an a", None]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert captions_of(where) == {"a.png": "an a", "b.png": ""}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InputError, match="is not Parquet"):
        open_dataset(where)


def test_masks_are_not_pictures(tmp_path):
    where = lay(tmp_path, pictures("a.png", "a-masklabel.png", "a-condlabel.png", "b.png"))
    assert captions_of(where) == {"a.png": "", "b.png": ""}
    assert "2 masks (-masklabel, -condlabel) ignored" in audit(where)


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    junk = ("._a.png", "x/.DS_Store", "__MACOSX/x/a.png", "@eaDir/a.png", ".cache/a.png")
    where = lay(tmp_path, {**dict.fromkeys(junk, b"junk"), **pictures("x/a.png"), "Thumbs.db": ""})
    data = open_dataset(where)
    assert len(data) == 1 and not data.audit.skipped


# --- classes ---------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    where = lay(tmp_path, pictures("class10/a.png", "class2/deep/b.png", "class2/c.jpg"))
    data = open_dataset(where)
    assert data.kind == "class" and data.classes == ("class2", "class10")
    shades = data.images(range(3), 8)[:, 0].float().mean((1, 2)).round().int().tolist()
    by_shade = dict(zip(shades, data.labels(range(3)), strict=True))
    assert by_shade[shade("class10/a.png")] == 1 and by_shade[shade("class2/deep/b.png")] == 0
    assert any("2 classes of 1 to 2 images: class2, class10" in s for s in data.audit.lines())


def test_what_does_not_look_like_classes_is_none(tmp_path):
    one = open_dataset(lay(tmp_path / "one", pictures("photos/a.png", "photos/b.png")))
    assert one.kind == "none" and one.classes == ()
    with pytest.raises(TypeError):
        one.labels([0])
    mixed = open_dataset(lay(tmp_path / "mixed", pictures("x/a.png", "y/b.png", "c.png")))
    assert mixed.kind == "none"
    assert any("not read as classes" in line for line in mixed.audit.lines())
    assert mixed.captions([0, 1]) == ["", ""]


def test_labels_can_be_asked_for(tmp_path):
    where = lay(tmp_path, pictures("x/dog_1.png", "x/cat_1.png", "y/cat_2.png"))
    assert open_dataset(where, DataConfig(labels="none")).kind == "none"
    assert open_dataset(where, DataConfig(labels="folders")).classes == ("x", "y")
    by_name = open_dataset(where, DataConfig(labels="prefix"))
    assert by_name.classes == ("cat", "dog") and sorted(by_name.labels(range(3))) == [0, 0, 1]
    with pytest.raises(InputError, match="no captions"):
        open_dataset(where, DataConfig(labels="text"))


def test_labels_in_names_are_pointed_out(tmp_path):
    where = lay(tmp_path, pictures("cat_1.png", "cat_2.png", "dog_1.png", "dog_2.png"))
    assert "--labels prefix reads them" in audit(where)


def test_held_out_classes(tmp_path):
    train = pictures("train/x/a.png", "train/y/b.png")
    where = lay(tmp_path, {**train, **pictures("val/y/c.png", "val/z/d.png")})
    data = open_dataset(where)
    assert data.held_out and data.held_out.labels([0]) == [1] and len(data.held_out) == 1
    assert "1 image held out of classes that are not trained on" in audit(where)


def test_edm_labels(tmp_path):
    names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]
    labels = json.dumps({"labels": [[name, 7 * i] for i, name in enumerate(names)]})
    data = open_dataset(lay(tmp_path / "a", {**pictures(*names), "dataset.json": labels}))
    assert data.classes == ("0", "7", "14") and data.labels([0, 1, 2]) == [0, 1, 2]
    none = lay(tmp_path / "b", {**pictures(*names), "dataset.json": '{"labels": null}'})
    assert open_dataset(none).kind == "none"
    for wrong in ("[1]", '{"labels": 3}', '{"labels": [["00000/img0.png", 1]]}', "{"):
        where = lay(tmp_path / f"c{len(wrong)}", {**pictures(*names), "dataset.json": wrong})
        if wrong == "[1]":
            assert open_dataset(where).kind == "none"
            continue
        with pytest.raises(InputError, match=r"dataset\.json"):
            open_dataset(where)


def test_the_training_split_is_taken(tmp_path):
    where = lay(tmp_path, pictures("train/x/a.png", "train/y/b.png", "test/x/c.png"))
    data = open_dataset(where)
    assert len(data) == 2 and data.classes == ("x", "y")
    assert any("test/ is held out for validation: 1 image" in s for s in data.audit.lines())
    assert data.held_out and data.held_out.labels([0]) == [0]


# --- pictures --------------------------------------------------------------------------------


def test_pictures_are_resized_cut_and_mirrored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for name, part in (("a.png", pixels), ("b.png", pixels[:, :25])):
        Image.fromarray(part).save(tmp_path / name)
    data = open_dataset(str(tmp_path))
    assert data.native_size == 25
    batch = data.images([1, 0], 16, [True, False], [0, 0])
    expected = [framed(Image.fromarray(p), (16, 16)) for p in (pixels[:, :25], pixels)]
    assert batch.dtype == torch.uint8 and batch.shape == (2, 3, 16, 16)
    assert np.array_equal(batch[0].permute(1, 2, 0), np.asarray(expected[0])[:, ::-1])
    assert np.array_equal(batch[1].permute(1, 2, 0), np.asarray(expected[1]))


def test_sets_that_do_not_fit_in_memory_are_read_each_time(tmp_path, monkeypatch):
    where = lay(tmp_path, pictures("a.png", "b.png", "c.png"))
    held, read = open_dataset(where), open_dataset(where)
    held.prepare(8)
    monkeypatch.setattr("difftool.data.pictures.MEMORY_CAP", 100)
    before = held.images([2, 0, 2], 8, [True, False, False])
    assert torch.equal(read.images([2, 0, 2], 8, [True, False, False]), before)
    for name in "abc":
        (tmp_path / f"{name}.png").unlink()
    assert torch.equal(held.images([2, 0, 2], 8, [True, False, False]), before)
    with pytest.raises(InputError, match=r"cannot read c\.png any more"):
        read.images([2], 8)


def test_progress_is_told(tmp_path):
    seen: list[tuple[int, int]] = []
    where = lay(tmp_path, pictures("a.png", "b.png"))
    data = open_dataset(where, progress=lambda *at: seen.append(at))
    data.prepare(8, lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)] * 2


def test_conversions_are_in_the_audit(tmp_path):
    where = lay(tmp_path, pictures("a.png"))
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    audit = open_dataset(where).audit.lines()
    assert "note: alpha composited over white: 1 image (b.png)" in audit
    assert "sizes: 12x10 to 30x20, median 12x10" in audit


# --- bad files -------------------------------------------------------------------------------


def test_bad_files_are_skipped_with_the_reason(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures(*(f"{i:02d}.png" for i in range(8)), ".hidden.png", ".git/a.png"),
            "empty.png": b"",
            "text.jpg": "hello",
            "phone.heic": b"\0" * 100,
            "readme.md": "hello",
        },
    )
    data = open_dataset(where)
    assert len(data) == 8
    reasons = dict(data.audit.skipped)
    assert set(reasons) == {"empty.png", "text.jpg", "phone.heic"}
    assert reasons["empty.png"] == "0 bytes" and reasons["phone.heic"] == "unsupported format"
    text = "\n".join(data.audit.lines())
    assert "skipped: 3 files" in text and "empty.png: 0 bytes" in text
    (tmp_path / "also.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="4 of 12 pictures") as error:
        open_dataset(where)
    assert error.value.why and "0 bytes" in error.value.why
    assert len(open_dataset(where, DataConfig(allow_bad=True))) == 8


def test_long_lists_of_bad_files_are_cut(tmp_path):
    where = lay(tmp_path, {f"{i:02d}.png": b"" for i in range(25)} | pictures("good.png"))
    text = open_dataset(where, DataConfig(allow_bad=True)).audit.lines()
    assert "  and 15 more" in text and "skipped: 25 files" in text


def test_links_do_not_lead_out(tmp_path):
    outside = lay(tmp_path / "outside", pictures("secret.png"))
    where = lay(tmp_path / "inside", pictures("a.png", "sub/b.png"))
    root = Path(where)
    (root / "in.png").symlink_to("sub/b.png")
    (root / "out.png").symlink_to(Path(outside) / "secret.png")
    (root / "folder").symlink_to(outside)
    (root / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    data = open_dataset(where, DataConfig(allow_bad=True))
    assert len(data) == 3
    reasons = dict(data.audit.skipped)
    assert set(reasons) == {"out.png", "folder", "gone.png", "pipe.png"}
    assert reasons["out.png"] == reasons["folder"] == "a link that leads out of the folder"


@pytest.mark.parametrize("files", [{}, {"a.txt": "no picture"}, {"a.png": b""}])
def test_a_folder_without_a_usable_picture_is_refused(tmp_path, files):
    with pytest.raises(InputError, match="no usable picture"):
        open_dataset(lay(tmp_path, files))


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(UsageError, match="no folder and no built-in") as error:
        open_dataset("shaeps")
    assert error.value.hint and '"shapes"' in error.value.hint
    file = lay(tmp_path, {"a.rar": b"Rar!"}) + "/a.rar"
    with pytest.raises(InputError, match="not a dataset"):
        open_dataset(file)


def test_a_folder_goes_before_a_built_in_set(tmp_path, monkeypatch):
    lay(tmp_path / "shapes", pictures("a.png"))
    monkeypatch.chdir(tmp_path)
    data = open_dataset("shapes")
    assert len(data) == 1
    assert any("not the built-in set" in line for line in data.audit.lines())


# --- archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_hold_the_same_as_folders(tmp_path, kind):
    files = pictures("x/a.png", "x/b.png", "y/c.png", ".hidden/d.png")
    root = Path(lay(tmp_path / "root", {**files, "x/a.txt": "an a\nor b", "bad.png": b""}))
    archive = tmp_path / f"data.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
            for path in root.rglob("*"):
                made.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, "w") as made:
            made.add(root, ".")
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            made.addfile(link)
    folder, packed = open_dataset(str(root)), open_dataset(str(archive))
    assert packed.fingerprint == folder.fingerprint
    assert torch.equal(packed.images(range(3), 8), folder.images(range(3), 8))
    assert packed.captions([0, 1], [1, 2]) == folder.captions([0, 1], [1, 2])
    assert dict(packed.audit.skipped)["bad.png"] == "0 bytes"
    assert ("link.png" in dict(packed.audit.skipped)) == (kind == "tar")


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_malformed_archives_are_refused(tmp_path, name):
    where = lay(tmp_path, {name: b"PK\x03\x04 nonsense" * 100})
    with pytest.raises(InputError, match="cannot read"):
        open_dataset(f"{where}/{name}")


def test_damaged_members_are_bad_files(tmp_path):
    archive = tmp_path / "a.zip"
    root = Path(lay(tmp_path / "root", pictures("a.png", "b.png")))
    with zipfile.ZipFile(archive, "w") as made:
        made.write(root / "a.png", "a.png")
        made.write(root / "b.png", "b.png")
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    archive.write_bytes(data)
    assert dict(open_dataset(str(archive)).audit.skipped).keys() == {"a.png"}


# --- identity --------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_matters(tmp_path):
    files = {**pictures("a.png", "b.png"), "a.txt": "one"}
    first = open_dataset(lay(tmp_path / "1", files)).fingerprint
    assert open_dataset(lay(tmp_path / "2", files)).fingerprint == first
    os.utime(tmp_path / "2" / "a.png", (0, 0))
    assert open_dataset(str(tmp_path / "2")).fingerprint == first
    lay(tmp_path / "2", {"notes.md": "of no importance"})
    assert open_dataset(str(tmp_path / "2")).fingerprint == first
    for change in ({"a.txt": "two"}, pictures("c.png")):
        lay(tmp_path / "2", change)
        again = open_dataset(str(tmp_path / "2")).fingerprint
        assert again != first
        first = again


def test_the_package_is_torch_free_at_import():
    code = "import difftool.data, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
