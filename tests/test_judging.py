"""Sets of pictures compared: torch-fidelity's numbers, and what `--evaluate` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from folders import solid
from PIL import Image
from torch import Tensor

from difftool.data import open_dataset
from difftool.errors import InputError, UsageError
from difftool.evaluation.features import gradients, open_describer
from difftool.evaluation.judge import CHUNK, Collected, Kept, judge, reference_features
from difftool.evaluation.measures import frechet_distance, kernel_distance, precision_recall
from difftool.networks.inception import Inception, resized_as_tensorflow
from difftool.training.metrics import Metrics

# Recorded from torch-fidelity 0.4.0: the functions of its metrics on `sets`, its Inception with the
# weights of `inception` on `noise`. Its package wants torchvision, and so is no test oracle.
FRECHET, KID, KID_STD = 327.22205622970114, 21.961989822387697, 2.6272707310801238
PRECISION, RECALL = 0.125, 0.15714286267757416
FIRST = [0.0, 0.01025376282632351, 0.0035730681847780943, 1.426682710647583]
SUMS = [797.9689331054688, 799.9925537109375]


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
