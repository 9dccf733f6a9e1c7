"""Tables of captions: no word, no row and no doubt is lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from folders import audit, captions_of, lay, lines, pictures

from difftool.data import open_dataset
from difftool.errors import InputError

THREE = pictures("0.png", "1.png", "2.png")


def read(tmp_path, table: str, name: str = "metadata.csv") -> tuple[list[str], str]:
    where = lay(tmp_path, {**THREE, name: table})
    return list(captions_of(where).values()), audit(where)


@pytest.mark.parametrize(
    ("rows", "captions", "says"),
    [
        (
            "file_name,text\n0.png,a cat, sitting, nice\n1.png,a dog\n2.png,b,\n",
            ["a cat, sitting, nice", "a dog", "b"],
            '1 row with "," and no quotes',
        ),
        (
            'file_name,text\n0.png,"a cat", sitting\n1.png, "a, b"\n2.png,"two\nlines"\n',
            ["a cat, sitting", "a, b", "two\nlines"],
            '1 row with ","',
        ),
        (
            "file_name;text\n0.png;a cat, sitting\n1.png;b;c\n2.png;d\n",
            ["a cat, sitting", "b;c", "d"],
            'separated by ";"',
        ),
        (
            'file_name , text\n0.png ,a 12" disc\n1.png,"a ""fine"" fox"\n2.png,d\n,\n',
            ['a 12" disc', 'a "fine" fox', "d"],
            "3 from metadata.csv",
        ),
        (
            "width,file_name,text\n9,0.png,a, b\n9,1.png,c\n9,2.png,d\n",
            ["a, b", "c", "d"],
            "1 row with",
        ),
    ],
)
def test_what_a_table_clearly_means_is_read_and_said(tmp_path, rows, captions, says):
    found, told = read(tmp_path, rows)
    assert found == captions and says in told


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ('file_name,text\n0.png,"a cat\n1.png,a dog\n2.png,a fox\n', "line 2 is not CSV"),
        ('file_name,text\n0.png,"a cat\n1.png,a "big" dog\n', "line 2 is not CSV"),
        ('file_name,text\n0.png,x\n1.png,"a dog\n2.png,a fox"\n', "line 3: a quote takes in"),
        ('file_name,text\n0.png,"a" cat\n', "line 2 is not CSV"),
        ("file_name,text,width\n0.png,a cat, sitting,64\n", "line 2 has 4 values in 3 columns"),
        ("text,file_name\na cat, sitting,0.png\n", "line 2 has 3 values in 2 columns"),
        ("file_name,text,text\n0.png,a,b\n", 'the column "text" twice'),
        ("0.png,a cat\n1.png,a dog\n", "has no header"),
    ],
)
def test_what_a_table_may_mean_in_two_ways_is_refused_by_its_line(tmp_path, rows, what):
    with pytest.raises(InputError, match=what):
        read(tmp_path, rows)


def test_tabs_too(tmp_path):
    table = "file_name\ttext\n0.png\ta, b\n1.png\tc\n2.png\td\te\n"
    found, told = read(tmp_path, table, "metadata.tsv")
    assert found == ["a, b", "c", "d\te"] and "3 from metadata.tsv" in told
    with pytest.raises(InputError, match="line 2 is not CSV"):
        read(tmp_path, 'file_name\ttext\n0.png\t"a" cat\n', "metadata.tsv")


def parquet(rows: list[dict]) -> SimpleNamespace:
    """pyarrow's reader, of these rows whatever the file."""
    batches = [SimpleNamespace(to_pylist=lambda: rows)]
    return SimpleNamespace(ParquetFile=lambda file: SimpleNamespace(iter_batches=lambda: batches))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "kohya"])
def test_every_row_of_a_picture_is_read(tmp_path, monkeypatch, kind):
    rows = [("0.png", "a cat"), ("1.png", "a dog"), ("./0.png", "it sits"), ("0.png", "a cat")]
    objects = [{"file_name": file, "text": text} for file, text in rows]
    name = f"metadata.{kind}"
    table = {"csv": ",", "tsv": "\t"}.get(kind, "").join(("file_name", "text")) + "\n"
    table += "".join({"csv": ",", "tsv": "\t"}.get(kind, "").join(row) + "\n" for row in rows)
    if kind == "jsonl":
        table = lines(*objects)
    elif kind == "parquet":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet(objects))
    elif kind == "kohya":
        name, keys = "meta_cap.json", ("0", "1.png", "/data/0.png", "x/0.png")
        entries = (f'"{k}": {{"caption": "{t}"}}' for k, (_, t) in zip(keys, rows, strict=True))
        table = f"{{{', '.join(entries)}}}"
    where = lay(tmp_path, {**THREE, name: table})
    data = open_dataset(where)
    assert set(data.captions([0] * 50, range(50))) == {"a cat", "it sits"}
    assert data.captions([1]) == ["a dog"]
    assert "1 picture " in audit(where) and "all of their captions are used" in audit(where)


def test_a_key_that_is_there_twice_is_refused_by_its_line(tmp_path):
    table = (
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "b", "text": "c"}\n'
    )
    with pytest.raises(InputError, match=r"line 2") as error:
        read(tmp_path, table, "metadata.jsonl")
    assert "'text'" in str(error.value.why)
    twice = '{"labels": [["0.png", 1], ["1.png", 0], ["2.png", 0], ["0.png", 0]]}'
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"dataset\.json") as error:
        read(tmp_path, twice, "dataset.json")
    assert error.value.why == "0.png has several labels"


def test_a_table_without_rows_is_mentioned(tmp_path):
    found, told = read(tmp_path, "file_name,text\n")
    assert found == ["", "", ""] and "metadata.csv has no rows" in told


def test_text_of_sixteen_bits_is_read_by_its_mark(tmp_path):
    where = lay(tmp_path, {**THREE, "0.txt": "\ufeffein Bär".encode("utf-16-le"),
                           "1.txt": "\ufeffein Hund".encode("utf-16-be"),
                           "2.txt": "ein Fuchs".encode("utf-8-sig")})  # fmt: skip
    assert list(captions_of(where).values()) == ["ein Bär", "ein Hund", "ein Fuchs"]
    (tmp_path / "0.txt").write_bytes("Loïc\u2019s".encode("cp1252"))
    with pytest.raises(InputError, match=r"0\.txt is not UTF-8"):
        open_dataset(where)
