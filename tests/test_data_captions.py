"""The syntax of captions: lines, wildcards and tags, all by the key."""

from __future__ import annotations

from collections import Counter

import pytest
from folders import audit, captions_of, lay, pictures

from difftool.data import open_dataset
from difftool.data.captions import Syntax
from difftool.errors import InputError
from difftool.text.dice import Dice


def drawn(text: str, syntax: Syntax, n: int = 600) -> Counter[str]:
    return Counter(syntax.draw((text,), Dice("test", key)) for key in range(n))


def test_one_alternative_is_drawn_evenly():
    counts = drawn("a {red|green|blue} {fox|dog}", Syntax())
    assert len(counts) == 6 and min(counts.values()) > 60
    assert set(drawn("{|big }fox", Syntax())) == {"fox", "big fox"}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{{a|b}}", "{a|b}"),
        ("{one}", "{one}"),
        ("a } b { c", "a } b { c"),
        ("{{{{x}}}}", "{{x}}"),
        ("plain", "plain"),
        ("{ |", "{ |"),
    ],
)
def test_braces_that_are_no_wildcard(text, made):
    assert set(drawn(text, Syntax(), 20)) == {made}
    assert Syntax.varied(text) is False


def test_wildcards_can_be_left_alone():
    assert set(drawn("{a|b} {{c}}", Syntax(wildcards=False), 20)) == {"{a|b} {{c}}"}
    assert Syntax.varied("x {a|b}")


def test_tags_are_shuffled_and_some_stay():
    counts = drawn("a, b,c , d", Syntax(shuffle=True, keep=1))
    assert len(counts) == 6 and min(counts.values()) > 60
    assert all(text.startswith("a, ") for text in counts)
    assert set(drawn("b, a", Syntax(), 20)) == {"b, a"}
    assert set(drawn("a, b", Syntax(shuffle=True, keep=9), 20)) == {"a, b"}


def test_separators_of_what_stays():
    syntax = Syntax(shuffle=True, keep_separator="|||", secondary=";;;")
    assert set(drawn("a, b ||| c, d;;;e ||| z", syntax)) == {
        "a, b, c, d,e, z", "a, b, d,e, c, z",
    }  # fmt: skip
    assert set(drawn("a ||| b", syntax, 20)) == {"a, b"}


def test_tags_and_captions_are_dropped_in_their_share():
    counts = drawn("keep, b", Syntax(keep=1, tag_dropout=0.25), 2000)
    assert set(counts) == {"keep", "keep, b"} and 400 < counts["keep"] < 600
    assert 400 < drawn("x", Syntax(dropout=0.25), 2000)[""] < 600
    assert set(drawn("x", Syntax(prefix="p", suffix="s"), 5)) == {"p x s"}


def test_what_is_drawn_depends_on_the_sample_alone(tmp_path):
    files = pictures(*(f"{i}.png" for i in range(6)))
    texts = {f"{i}.txt": f"{{a|b|c}} {i}, x, y, z\nother {i}" for i in range(6)}
    where = lay(tmp_path, {**files, **texts})
    data, again = open_dataset(where), open_dataset(where)
    keys = [7 * i + 1 for i in range(6)]
    whole = data.captions(range(6), keys)
    assert [again.captions([i], [k])[0] for i, k in reversed([*enumerate(keys)])] == whole[::-1]
    assert len({*data.captions([0] * 50, range(50))}) == 4
    shuffled = captions_of(where, shuffle_captions=True, keep_tokens=1)
    assert all(set(text.split(", ")[1:]) in ({"x", "y", "z"}, set()) for text in shuffled.values())


def test_what_varies_is_said(tmp_path):
    where = lay(tmp_path, {**pictures("a.png", "b.png"), "a.txt": "{a|b}", "b.txt": "x, y"})
    told = audit(where, shuffle_captions=True, keep_tokens=2)
    assert "1 image with {a|b} in the caption: one is drawn each time" in told
    assert "tags between commas are shuffled each time, the first 2 stay" in told
    assert "drawn each time" not in audit(where, wildcards=False)


def test_too_many_without_a_caption(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    where = lay(tmp_path, {**pictures(*names), **{f"{i}.txt": "x" for i in range(4)}})
    with pytest.raises(InputError, match=r"4 of 8 pictures .* have no caption") as error:
        open_dataset(where)
    assert error.value.why == "the others have: 4 from .txt"
    assert error.value.hint and "--allow-uncaptioned" in error.value.hint
    assert "captions: 4 from .txt, 4 without" in audit(where, allow_uncaptioned=True)
    assert captions_of(where, labels="none") == dict.fromkeys(names, "")


def test_lone_captions_and_shared_names_are_said(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("a.png", "a.jpg", "b.png"),
            "bad.png": b"",
            **dict.fromkeys(["a.txt", "bad.txt", "gone.txt", "prompts/none.txt"], "x"),
        },
    )
    told = audit(where)
    assert "1 caption file without a picture: gone.txt" in told
    assert "2 images share a name but for its suffix: a.jpg, a.png" in told
    assert captions_of(where) == {"a.jpg": "x", "a.png": "x", "b.png": ""}


# --- captions that lie elsewhere, or are called otherwise -------------------------------------


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("a.png", "a.TXT"),
        ("a.png", "a.Caption"),
        ("a.png", "a.png.txt"),
        ("a.PNG", "a.PNG.TXT"),
        ("a.png", "captions/a.txt"),
        ("images/a.png", "captions/a.txt"),
        ("images/sub/a.png", "texts/sub/a.txt"),
        ("images/a.png", "images/Captions/a.caption"),
        ("train/images/a.png", "train/captions/a.png.txt"),
    ],
)
def test_captions_are_found_under_every_usual_name(tmp_path, picture, text):
    where = lay(tmp_path, {**pictures(picture), text: "a fox"})
    assert captions_of(where) == {picture: "a fox"}
    told = audit(where)
    assert "1 from ." in told and ("from a folder beside" in told) == ("/a" in text)


def test_the_nearest_caption_goes(tmp_path):
    texts = {"a.txt": "beside", "a.TXT": "capitals", "a.png.txt": "long", "captions/a.txt": "apart"}
    where = lay(tmp_path, {**pictures("a.png"), **texts})
    assert captions_of(where) == {"a.png": "beside"}
    assert "3 files called like pictures" not in audit(where)
    assert "a.png.txt" in audit(where) and "captions/a.txt" in audit(where)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.json": '{"caption": "x"}'}, "1 file called like pictures, not read: a.json"),
        ({"a.cap": "x", "b.tags": "x"}, "2 files called like pictures, not read: a.cap, b.tags"),
        ({"boxes/a.txt": "0 0.5 0.5"}, "1 file called like pictures of other folders, not read"),
        ({"c.txt": "x"}, "1 caption file without a picture: c.txt"),
        ({"a.txt": " \n", "b.txt": ""}, "2 caption files without text: a.txt, b.txt"),
        ({"train.csv": "id,label"}, "train.csv is not read: only tables called metadata are"),
        ({"metadata.csv": "file_name,text\n"}, "metadata.csv has no rows"),
    ],
)
def test_what_looks_like_captions_and_is_not_read_is_said(tmp_path, files, says):
    where = lay(tmp_path, {**pictures("a.png", "b.png"), **files, "README.txt": "of the set"})
    told = audit(where)
    assert says in told and "unconditional" in told and "README" not in told
    assert "not read" not in audit(where, labels="none")


@pytest.mark.parametrize("name", ["captions.csv", "captions.json", "caption.jsonl", "prompts.txt"])
def test_a_table_of_another_name_is_not_passed_over(tmp_path, name):
    where = lay(tmp_path, {**pictures("a.png"), name: "a.png,a fox"})
    with pytest.raises(InputError, match="is not read, and there are no other captions"):
        open_dataset(where)
    assert f"{name} is ignored" in audit(where, labels="none")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    assert f"{name} is ignored" in audit(where)


def test_malformed_metadata_of_kohya_is_not_passed_over(tmp_path):
    where = lay(tmp_path, {**pictures("a.png"), "meta_cap.json": '{"a.png": {"caption": "x"}'})
    with pytest.raises(InputError, match=r"meta_cap\.json"):
        open_dataset(where)
