"""Words learned elsewhere: every form of file, against diffusers' load_textual_inversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import WORDS, build
from safetensors.torch import save_file
from torch import Tensor, nn

from difftool.adapters.words import read_embeddings
from difftool.errors import InputError, UsageError
from difftool.pipeline.condition import encode_prompts
from difftool.pipeline.load import load_model
from difftool.pipeline.words import add_embeddings
from difftool.text.syntax import chunks
from difftool.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Pipelines of diffusers, as they are on disk: nothing that one test adds is in another."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("sd1", "sdxl"):
        build(family, folder)
    return folder


def theirs(folder: Path, xl: bool) -> Any:
    from pipelines import diffusers

    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    return getattr(diffusers, name).from_pretrained(folder)


def vectors(width: int, count: int | None = None, seed: int = 0) -> Tensor:
    shape = (width,) if count is None else (count, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a1111(path: Path, table: Tensor, name: str = "cat-toy", **more: Any) -> Path:
    """A file as the web interface writes it."""
    content = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": table}, "name": name, "step": 500,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    }  # fmt: skip
    torch.save(content | more, path)
    return path


PROMPT = "a photo of <cat> on a hill, <cat>"
FORMS: dict[str, int | None] = {"one": None, "rows of one": 1, "three": 3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_words_read_as_in_diffusers(families, form, suffix, tmp_path):
    table, path = vectors(24, FORMS[form]), tmp_path / f"learned_embeds.{suffix}"
    if suffix == "bin":
        torch.save({"<cat>": nn.Parameter(table)}, path)
    else:
        save_file({"<cat>": table}, path)
    pipe, model = theirs(families / "sd1", False), load_model(str(families / "sd1"), device="cpu")
    before = encode_prompts(model, [PROMPT])[0]
    files = {file: file.stat().st_mtime_ns for file in families.glob("sd1/**/*")}
    pipe.load_textual_inversion(str(path))
    add_embeddings(model, [path])
    expected, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    found = encode_prompts(model, [PROMPT])[0]
    assert found is not None and before is not None
    assert (found - expected).abs().max() <= 1e-5
    assert (found - before).abs().max() > 0.1, "the word says something"
    assert {file: file.stat().st_mtime_ns for file in families.glob("sd1/**/*")} == files
    plain = load_model(str(families / "sd1"), device="cpu")
    assert model.tensors().keys() == plain.tensors().keys(), "and no file would have it"


def test_sdxls_two_tables_read_as_in_diffusers(families, tmp_path):
    tables = {"clip_l": vectors(24, 2), "clip_g": vectors(40, 2, seed=1)}
    path = tmp_path / "toy.safetensors"
    save_file(tables, path)
    pipe, model = theirs(families / "sdxl", True), load_model(str(families / "sdxl"), device="cpu")
    for name, place in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipe, f"{n}{place}") for n in ("text_encoder", "tokenizer"))
        pipe.load_textual_inversion(
            {"<toy>": tables[name]}, token="<toy>", text_encoder=encoder, tokenizer=tokenizer
        )
    add_embeddings(model, [path])
    prompt = "a <toy> on a hill"
    expected = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    context, pooled = encode_prompts(model, [prompt])
    assert context is not None and pooled is not None
    assert (context - expected[0]).abs().max() <= 1e-5
    assert (pooled - expected[2]).abs().max() <= 1e-5
    plain = encode_prompts(model, ["a on a hill"])[0]
    assert plain is not None and (context - plain).abs().max() > 0.1


# --- forms of files ---------------------------------------------------------------------------


class OldParameters(nn.Module):
    """As nn.ParameterDict was pickled before torch 1.12: a module with its parameters inside."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_parameter("*", nn.Parameter(table))


def written(form: str, folder: Path, table: Tensor) -> tuple[Path, set[str]]:
    """A file of one word, and the names that stand for it."""
    path = folder / "toy.pt"
    match form:
        case "a1111":
            return a1111(path, table), {"cat-toy", "toy"}
        case "a1111's parameter":
            return a1111(path, nn.Parameter(table)), {"cat-toy", "toy"}
        case "a module of parameters":
            more: dict[str, Any] = {"string_to_param": OldParameters(table)}
            more["string_to_token"] = {"*": torch.tensor(265)}
            return a1111(path, table, **more), {"cat-toy", "toy"}
        case "emb_params":
            save_file({"emb_params": table}, path.with_suffix(".safetensors"))
            return path.with_suffix(".safetensors"), {"toy"}
        case "alone":
            torch.save(table, path)
            return path, {"toy"}
        case "half":
            save_file({"<dot.ted>": table.half()}, path.with_suffix(".safetensors"))
            return path.with_suffix(".safetensors"), {"<dot.ted>", "toy"}
    raise ValueError(form)


READ = ["a1111", "a1111's parameter", "a module of parameters", "emb_params", "alone", "half"]


@pytest.mark.parametrize("form", READ)
def test_every_form_is_the_same_word(families, form, tmp_path):
    table = vectors(24, 2).half().float()
    path, names = written(form, tmp_path, table)
    (read,) = read_embeddings(path)
    assert set(read.names) == names and read.widths == (24,)
    model = load_model(str(families / "sd1"), device="cpu")
    add_embeddings(model, [path])
    size = model.tokenizers[0].vocab_size
    for name in names:
        for prompt in (f"a {name}.", f"A {name.upper()}.", f"a embedding:{name}."):
            assert model.tokenizers[0].tokens(prompt)[1:3] == [size, size + 1], prompt
        assert size not in model.tokenizers[0].tokens("a toyota, a cat-toys")
    assert model.text[0].text_model.embeddings.learned.equal(table)  # type: ignore[union-attr]


def test_a_file_may_hold_several_words(families, tmp_path):
    path = tmp_path / "both.safetensors"
    save_file({"<a>": vectors(24), "<b>": vectors(24, 2, seed=1)}, path)
    model = load_model(str(families / "sd1"), device="cpu")
    add_embeddings(model, [path])
    size = model.tokenizers[0].vocab_size
    assert model.tokenizers[0].tokens("<b><a>both") == [
        size + 1, size + 2, size, *Tokenizer.clip().tokens("both"),
    ]  # fmt: skip


REFUSED: dict[str, tuple[Any, str]] = {
    "another width": ({"<cat>": vectors(768)}, "sd1 of 768 numbers a token, the model is sd1 of"),
    "of another family": (
        {"clip_l": vectors(768, 1), "clip_g": vectors(1280, 1)}, "sdxl of 768 and 1280 numbers",
    ),
    "unlike counts": ({"clip_l": vectors(24, 1), "clip_g": vectors(40, 2)}, "unlike numbers"),
    "whole numbers": ({"<cat>": torch.ones(24, dtype=torch.long)}, "I64 [24]"),
    "nothing": ({"<cat>": torch.ones(0, 24)}, "F32 [0, 24]"),
    "a picture": ({"<cat>": torch.ones(1, 24, 2)}, "F32 [1, 24, 2]"),
    "too long": ({"<cat>": vectors(24, 76)}, "has room for 75"),
    "not finite": ({"<cat>": torch.full((24,), torch.inf)}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(families, case, tmp_path):
    tables, says = REFUSED[case]
    save_file(tables, tmp_path / "a.safetensors")
    model = load_model(str(families / "sd1"), device="cpu")
    with pytest.raises(InputError) as refused:
        add_embeddings(model, [tmp_path / "a.safetensors"])
    assert says in str(refused.value)
    assert not model.words and not model.tokenizers[0].learned


def test_one_table_is_not_enough_for_sdxl(families, tmp_path):
    save_file({"emb_params": vectors(24)}, tmp_path / "a.safetensors")
    model = load_model(str(families / "sdxl"), device="cpu")
    with pytest.raises(InputError, match="the model is sdxl of 24 and 40 numbers a token"):
        add_embeddings(model, [tmp_path / "a.safetensors"])


def test_a_hostile_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    path = a1111(tmp_path / "a.pt", vectors(24), optimizer=Evil())
    (read,) = read_embeddings(path)
    assert read.widths == (24,) and not (tmp_path / "canary").exists()


def test_a_name_of_two_words_is_neithers(families, tmp_path):
    paths = [a1111(tmp_path / f"{n}.pt", vectors(24, seed=i), "same") for i, n in enumerate("ab")]
    model = load_model(str(families / "sd1"), device="cpu")
    add_embeddings(model, paths)
    assert [word.names for word in model.words] == [("a",), ("b",)]
    again = tmp_path / "sub" / "a.pt"
    again.parent.mkdir()
    a1111(again, vectors(24, seed=2), "same")
    with pytest.raises(UsageError, match="no name of its own"):
        add_embeddings(load_model(str(families / "sd1"), device="cpu"), [paths[0], again])


# --- prompts ----------------------------------------------------------------------------------


def test_weights_apply_and_a_word_is_not_parted():
    tokenizer = Tokenizer.clip()
    size = tokenizer.vocab_size
    tokenizer.learned = {"toy": [*range(size, size + 4)]}
    (chunk,) = chunks(tokenizer, "a (toy:1.3) b", 77, "a1111")
    assert chunk.ids[2:6] == [*range(size, size + 4)]
    assert chunk.weights[1:7] == [1.0, 1.3, 1.3, 1.3, 1.3, 1.0]
    first, second = chunks(tokenizer, "a " * 73 + "toy b", 77, "a1111")
    assert first.ids[74] == tokenizer.end_id, "73 words, of the four vectors only two would fit"
    assert second.ids[1:5] == [*range(size, size + 4)]
    for syntax in ("none", "comfy"):
        assert size in chunks(tokenizer, "a toy", 77, syntax)[0].ids


# --- the command ------------------------------------------------------------------------------


def test_the_command(families, difftool, tmp_path):
    a1111(tmp_path / "toy.pt", vectors(24, 2), "other")
    common = (
        "-m",
        families / "sd1",
        "--size",
        "32x32",
        "--steps",
        2,
        "--seed",
        1,
        "--device",
        "cpu",
    )
    used = difftool("sample", "a toy", "-o", "a.png", "--embedding", "toy.pt", *common, "-v")
    assert used.code == 0 and "word other or toy (toy.pt)" in used.err
    assert "was not used" not in used.err
    again = difftool("sample", "--from-image", "a.png", "-o", "e.png", "-m", families / "sd1")
    assert again.code == 0, again.err
    with Image.open("a.png") as first, Image.open("e.png") as second:
        assert first.tobytes() == second.tobytes(), "a picture remembers its words"
    unused = difftool("sample", WORDS, "-o", "b.png", "--embedding", "toy.pt", *common)
    assert unused.code == 0 and "no prompt has the word other or toy" in unused.err
    plain = difftool("sample", "a toy", "-o", "c.png", *common)
    assert plain.code == 0
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()
    refused = difftool("sample", "a toy", "-o", "d.png", "--embedding", "a.png", *common, "--json")
    assert refused.code == 3 and json.loads(refused.out)["error"]["code"] == 3
    gone = difftool("sample", "a toy", "-o", "d.png", "--embedding", "gone.pt", *common)
    assert gone.code == 2 and not Path("d.png").exists()
