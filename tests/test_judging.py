"""Sets of pictures compared: torch-fidelity's numbers, and what `--evaluate` says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from folders import solid
from PIL import Image
from torch import Tensor

from difftool import evaluate
from difftool.data import open_dataset
from difftool.errors import InputError, UsageError
from difftool.evaluation.features import gradients, open_describer
from difftool.evaluation.judge import CHUNK, Collected, Kept, judge, reference_features
from difftool.evaluation.measures import frechet_distance, kernel_distance, precision_recall
from difftool.networks.inception import Inception, resized_as_tensorflow
from difftool.storage.commit import sha256_of
from difftool.training.metrics import Metrics

# Recorded from torch-fidelity 0.4.0: the functions of its metrics on `sets`, its Inception with the
# weights of `inception` on `noise`. Its package wants torchvision, and so is no test oracle.
FRECHET, KID, KID_STD = 327.22205622970114, 21.961989822387697, 2.6272707310801238
PRECISION, RECALL = 0.125, 0.15714286267757416
META = (
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    *(("embeddings.", ""), ("layernorm", "norm"), ("encoder.layer", "blocks")),
    *(("attention.o_proj", "attn.proj"), ("attention.", "attn.")),
    *(("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma")),
)
"""What the names of DINOv2's tensors have in transformers' modules, and in Meta's files."""
FIRST = [0.0, 0.01025376282632351, 0.0035730681847780943, 1.426682710647583]
SUMS = [797.9689331054688, 799.9925537109375]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The user's, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def sets() -> tuple[np.ndarray, np.ndarray]:
    """Features of 600 and of 700 pictures, [N,48]."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> np.ndarray:
        values = rng.normal(size=(count, 48)).astype("f4")
        return values @ rng.normal(size=(48, 48)).astype("f4") * np.float32(0.5)

    return drawn(600), drawn(700) + np.float32(0.2)


@pytest.fixture(scope="module")
def inception() -> dict[str, Tensor]:
    """Weights that Inception might have."""
    weights, generator = Inception().state_dict(), torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if "var" in name or name.endswith("bn.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75)
        elif tensor.ndim > 1:
            scale = 1.4 * tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        elif tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    noise = torch.randint(0, 256, (2, 3, 40, 52), generator=generator, dtype=torch.uint8)
    return weights | {"noise": noise}


def test_the_measures_are_torch_fidelity_s():
    made, reference = sets()
    assert frechet_distance(made, reference) == pytest.approx(FRECHET, rel=1e-6)
    assert frechet_distance(reference, made) == pytest.approx(FRECHET, rel=1e-6)
    assert kernel_distance(made, reference, 100) == pytest.approx((KID, KID_STD), rel=1e-5)
    assert precision_recall(made, reference) == pytest.approx((PRECISION, RECALL), abs=1e-6)


def test_inception_s_features_are_torch_fidelity_s(inception, tmp_path):
    weights = dict(inception)
    noise = weights.pop("noise")
    weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights, tmp_path / "inception.pth")
    describer = open_describer(tmp_path / "inception.pth")
    assert (describer.name, describer.dimensions) == ("inception", 2048)
    features = describer.describe(noise)
    assert features[0, :4].tolist() == pytest.approx(FIRST, abs=1e-4)
    assert features.sum(1).tolist() == pytest.approx(SUMS, rel=1e-4)
    del weights["Mixed_6c.branch7x7_2.bn.running_var"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(InputError, match=r"lacks the tensor Mixed_6c\.branch7x7_2"):
        open_describer(tmp_path / "less.pth")


def dino(registers: int) -> Any:
    """transformers' DINOv2 by random weights, with pictures of another size in mind than are
    described."""
    transformers: Any = importlib.import_module("transformers")
    shape: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 140, "patch_size": 14,
    }  # fmt: skip
    if registers:
        settings = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **shape)
        network = transformers.Dinov2WithRegistersModel(settings)
    else:
        network = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return network.eval()


def squares(images: Tensor) -> Tensor:
    """Pictures, uint8 [B,3,H,W], as dgm-eval gives them to DINOv2."""
    made = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images]
    small = [np.asarray(each.resize((224, 224), Image.Resampling.BICUBIC)) / 255 for each in made]
    normed = (np.stack(small) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normed).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(
    ("registers", "name"), [(0, "dinov2-vit32-14"), (3, "dinov2-vit32-14-reg")]
)
def test_dinov2_s_features_are_transformers(registers, name, tmp_path):
    network, some = dino(registers), pictures(2, 0)[..., :24]
    with torch.no_grad():
        wanted = network(squares(some)).pooler_output
    network.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "state.pt"):
        describer = open_describer(path)
        assert (describer.name, describer.dimensions) == (name, 32)
        assert (describer.describe(some) - wanted).abs().max() < 1e-5
    assert open_describer(tmp_path).digest == sha256_of(tmp_path / "model.safetensors")


def as_meta(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a module of transformers by the names that Meta's files have."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for theirs, meta in META:
            name = name.replace(theirs, meta)
        found[name] = tensor
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return found


def test_dinov2_s_files_of_meta_are_read_and_scaled_as_there(tmp_path):
    network, some = dino(0), pictures(2, 0)
    weights = network.state_dict()
    torch.save(as_meta(weights), tmp_path / "dinov2_pretrain.pth")
    whole, grid = weights["embeddings.position_embeddings"].split([1, 100], 1)
    grid = grid.transpose(1, 2).unflatten(2, (10, 10))
    scaled = torch.nn.functional.interpolate(grid, scale_factor=16.1 / 10, mode="bicubic")
    own = torch.cat([whole, scaled.flatten(2).transpose(1, 2)], 1)
    network.embeddings.position_embeddings.data = own
    with torch.no_grad():
        wanted = network(squares(some)).pooler_output
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "num_attention_heads": 4}')
    describer = open_describer(tmp_path / "dinov2_pretrain.pth")
    assert (describer.describe(some) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blocks.1.attn.qkv.weight", None),
        ("blocks.1.ls2.gamma", torch.ones(5)),
        ("pos_embed", torch.ones(1, 100, 32)),
        ("patch_embed.proj.weight", torch.ones(32)),
    ],
)
def test_dinov2_that_is_not_whole_is_refused(name, change, tmp_path):
    weights = as_meta(dino(0).state_dict())
    del weights[name]
    torch.save(weights if change is None else weights | {name: change}, tmp_path / "less.pth")
    with pytest.raises(InputError, match=rf"lack the tensor {name}, or"):
        open_describer(tmp_path / "less.pth")


def test_pictures_are_enlarged_as_tensorflow_did():
    x = torch.tensor([[0.0, 3.0], [6.0, 9.0]])[None, None]
    assert resized_as_tensorflow(x, 3)[0, 0].tolist() == [
        pytest.approx(row, abs=1e-5) for row in ([0, 2, 3], [4, 6, 7], [6, 8, 9])
    ]


def test_a_gaussian_s_distance_is_known():
    rng = np.random.default_rng(1)
    made, reference = rng.normal(size=(20_000, 4)), 2 * rng.normal(size=(20_000, 4)) + 1
    assert frechet_distance(made, reference) == pytest.approx(4 + 4, rel=0.03)
    mean, deviation = kernel_distance(made[:300], rng.normal(size=(300, 4)))
    assert abs(mean) < deviation
    assert precision_recall(made[:500], made[:500]) == (1, 1)
    for seed in range(8):  # of the same pictures it is nothing, and never below
        few = np.random.default_rng(seed).normal(size=(6, 32))
        assert 0 <= frechet_distance(few, few) < 1e-9
    assert precision_recall(made[:500], 0.1 * made[:500])[0] < 0.5


def pictures(count: int, seed: int, scale: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 3, 8, 8, generator=generator) * 255 / scale
    return torch.nn.functional.interpolate(drawn, (32, 32), mode="bilinear").byte()


def test_gradients_tell_what_pictures_look_like():
    one, other = gradients(pictures(200, 0)).numpy(), gradients(pictures(200, 1)).numpy()
    assert one.shape == (200, open_describer(None).dimensions)
    same = frechet_distance(one, other)
    blurred = torch.nn.functional.avg_pool2d(pictures(200, 2).float(), 5, 1, 2).byte()
    for changed in (pictures(200, 2, scale=2), blurred, pictures(200, 2).roll(8, -1) // 2 + 99):
        assert frechet_distance(gradients(changed).numpy(), one) > 1.5 * same
    large = torch.nn.functional.interpolate(pictures(1, 0).float(), (128, 128), mode="bilinear")
    apart = (gradients(large.byte()) - gradients(pictures(1, 0))).abs().mean()
    assert apart < 0.1 * gradients(pictures(1, 0)).abs().mean()


def test_what_was_described_is_not_described_again(tmp_path):
    count, asked = 2 * CHUNK + 3, []

    def describe(some: range) -> Tensor:
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(some)
        return torch.arange(some.start, some.stop).float()[:, None]

    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path, "a").features(count, describe, lambda done: None)
    found = Kept(tmp_path, "a").features(count, describe, lambda done: None)
    assert found[:, 0].tolist() == list(range(count))
    assert asked == [range(CHUNK), None, range(CHUNK, 2 * CHUNK), range(2 * CHUNK, count)]
    (first, *_) = sorted((next(tmp_path.iterdir())).iterdir())
    first.write_bytes(b"damaged")
    Kept(tmp_path, "a").features(count, describe, lambda done: None)
    Kept(tmp_path, "b").features(4, describe, lambda done: None)
    assert asked[4:] == [range(CHUNK), range(4)]


def test_a_damaged_chunk_is_made_anew(tmp_path):
    made = torch.arange(4.0)[:, None]
    Kept(tmp_path, "a").features(4, lambda some: made, lambda done: None)
    (path,) = tmp_path.glob("*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a bit of a feature: the file can still be read
    path.write_bytes(data)
    kept = Kept(tmp_path, "a")
    assert kept.features(4, lambda some: made + 1, lambda done: None)[:, 0].tolist() == [1, 2, 3, 4]
    assert not kept.found
    kept = Kept(tmp_path, "a")
    assert kept.features(4, lambda some: made, lambda done: None)[:, 0].tolist() == [1, 2, 3, 4]
    assert kept.found == 4


def test_where_nothing_can_be_kept_it_is_compared_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    kept = Kept(tmp_path / "file", "a")
    assert kept.features(2, lambda some: torch.ones(2, 1), lambda done: None).sum() == 2


def test_a_reference_is_described_once_until_it_changes(tmp_path, cache):
    photos = solid(tmp_path / "photos", ((9 * i, 200, 240 - i) for i in range(12)))
    describer, told = open_describer(None), []

    def known(size: int) -> None:
        told.clear()
        reference_features(open_dataset(str(photos)), (size, size), describer, told=told.append)

    known(16)
    assert not told and [*cache.glob("difftool/features/*/*.safetensors")]
    known(16)
    assert told == ["12 of 12 reference pictures were described before"]
    known(8)
    assert not told
    Image.new("RGB", (16, 16), "red").save(next(Path(photos).glob("*.png")))
    known(16)
    assert not told


def test_pictures_that_a_network_saw_are_not_shown_to_it_again():
    shown: list[int] = []

    def describe(images: Tensor) -> Tensor:
        shown.append(len(images))
        return gradients(images)

    def features(count: int) -> np.ndarray:
        made = Collected(describer._replace(describe=describe, digest="some weights"))
        for each in pictures(count, 0):
            made.add(each)
        return made.features()

    describer = open_describer(None)
    first = features(CHUNK + 5)
    assert shown == [CHUNK, 5]
    assert np.array_equal(features(CHUNK + 9)[: CHUNK + 5], first) and shown == [CHUNK, 5, 9]


def test_too_few_are_not_compared():
    describer = open_describer(None)
    made = Collected(describer)
    for each in pictures(4, 0):
        made.add(each)
    with pytest.raises(UsageError, match="5 pictures are the least"):
        judge(made.features(), gradients(pictures(9, 1)).numpy(), describer)


# --- as commands -----------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    tiny.model(tiny.preset(sample={"size": [16, 16], "steps": 2})).save(path)
    return path


def test_samples_are_compared_and_those_that_are_there_count(difftool, model):
    reference = solid(Path("photos"), ((9 * i, 200, 240 - i) for i in range(12)))
    given = ("sample", "-m", model, "--seed", "0-5", "-o", "made/[seed].png")
    given += ("--evaluate", reference)
    first = difftool(*given, "--json")
    assert first.code == 0, first.err
    found = first.objects[-1]["evaluation"]
    assert (found["made"], found["reference"], found["features"]) == (6, 12, "gradients")
    assert "6 pictures beside 12, by gradients; too high by being few" in first.err
    next(Path("made").glob("*.png")).unlink()
    again = difftool(*given, "--json", "--skip-existing")
    assert again.objects[-1]["evaluation"] == found
    assert [each.get("existing") for each in again.objects].count(True) == 5
    describer, made = open_describer(None), Collected(open_describer(None))
    for path in sorted(Path("made").glob("*.png")):
        with Image.open(path) as image:
            made.add(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    known = reference_features(open_dataset(reference), (16, 16), describer)
    mine = judge(made.features(), known, describer)
    assert found["frechet"] == pytest.approx(mine.frechet, rel=1e-5)
    assert "12 of 12 reference pictures were described before" in again.err
    library = evaluate("made", reference)
    assert library._asdict() == found | {"frechet": library.frechet}
    assert library.frechet == pytest.approx(found["frechet"], rel=1e-9)
    listed = [Path(f"made/{seed}.png") for seed in range(6)]
    with Image.open(listed[0]) as image:
        assert evaluate([image, *listed[1:]], reference) == library
    with pytest.raises(UsageError, match="5 pictures are the least"):
        evaluate(listed[:4], reference)
    with pytest.raises(UsageError, match="pictures cannot be 5"):
        evaluate(cast(Any, 5), reference)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("-n 6 --evaluate nowhere", 2, "does not exist"),
        ("-n 4 --evaluate .", 2, "5 pictures are the least"),
        ("-n 6 --features model.safetensors", 2, "is what pictures are compared by"),
        ("-n 6 --evaluate . --features nowhere.pth", 2, "nowhere.pth"),
        ("-n 6 --evaluate . --features model.safetensors", 3, "none of the networks"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_work(difftool, model, words, code, said):
    ran = difftool("sample", "-m", model, "-o", "made/", *words.split())
    assert ran.code == code and said in ran.err and not Path("made").exists()


def test_a_trained_model_is_compared(difftool, monkeypatch):
    from difftool.training import judging

    reference = solid(Path("photos"), ((9 * i, 200, 240 - i) for i in range(12)))
    values = {"unet": tiny.UNET | {"depth": [0, 0]}, "sample": {"steps": 2}}
    given: list[Any] = ["train", reference, "--preset", "pixel-small", "--out", "run", "--steps", 2]
    given += ["--size", 16, "--batch-size", 4, "--sample-every", 0, "--validation", 0]
    given += [word for text in tiny.settings(**values) for word in ("--set", text)]
    compared = ["--evaluate", reference, "--evaluate-num", 8]
    ran = difftool(*given, *compared, "--json")
    assert ran.code == 0, ran.err
    found = ran.object["evaluation"]
    assert (found["made"], found["reference"]) == (8, 12)
    (line,) = Metrics.read(Path("run/metrics.jsonl")).of("evaluation")
    assert line["evaluation"] == found and line["step"] == 2
    assert "Frechet distance, gradients" in Path("run/report.html").read_text(encoding="utf-8")

    def refuse(*_: object) -> None:
        raise AssertionError("what was made is made again")

    monkeypatch.setattr(judging, "generate", refuse)
    again = difftool("train", reference, "--out", "run", "--resume", *compared, "--json")
    assert again.code == 0, again.err
    assert again.object["evaluation"] == found


def test_what_is_no_model_is_not_compared(difftool):
    reference = solid(Path("photos"), ((9 * i, 200, 240 - i) for i in range(12)))
    given = ("train", reference, "--evaluate", reference, "--dry-run")
    ran = difftool(*given, "--preset", "vae-small", "--part", "vae")
    assert ran.code == 2 and "the U-Net's" in ran.err
