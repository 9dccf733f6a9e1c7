"""Distillation: its mathematics on Gaussians, whose ODE is known; runs that go on, and what they
leave."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from folders import solid
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftool.adapters.lora.file import SAMPLE
from difftool.config.options import read_options
from difftool.data import open_dataset, shapes
from difftool.diffusion.consistency import (
    Guided,
    LevelTable,
    boundary_scalings,
    consistency,
    ode_step,
    pseudo_huber,
    tuning_ratio,
)
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Level, build_path
from difftool.diffusion.path import Path as NoisePath
from difftool.diffusion.prediction import TARGETS
from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import DifftoolError, InputError, UsageError
from difftool.formats import open_model
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.progress import silent
from difftool.text.tokenizer import Tokenizer
from difftool.training.options import OPTIONS
from difftool.training.run.start import prepare, train
from difftool.training.run.teaching import drawn

MEAN, DEVIATION = 0.3, 0.6
"""Of a Gaussian's x0."""
PATHS: dict[str, dict[str, Any]] = {
    "table": {"kind": "sd15"}, "flow": {"kind": "flow", "shift": 3.0}, "edm": {"kind": "edm"},
}  # fmt: skip
TARGET = {"table": "v", "flow": "flow", "edm": "edm"}


class OfGaussian(nn.Module):
    """A network whose x0 is the mean that x_t has (`exact` False), or the end of x_t's ODE."""

    def __init__(self, kind: str, exact: bool):
        super().__init__()
        self.path, self.target, self.exact = build_path(PATHS[kind]), TARGET[kind], exact

    def forward(self, x: Tensor, t: Tensor, **told: Any) -> Tensor:
        # the time that the path's network_time was made of
        time = {"table": t, "flow": t / 1000, "edm": (4 * t).exp()}[kind_of(self.path)]
        alpha, sigma = self.path.coefficients(time)
        x = x / self.path.input_scale(sigma)
        x0 = MEAN + factor(alpha, sigma, self.exact) * (x - alpha * MEAN)
        p, q = TARGETS[self.target](alpha, sigma)
        return p * x0 + q * (x - alpha * x0) / sigma


def kind_of(path: NoisePath) -> str:
    return {"Discrete": "table", "Flow": "flow", "Edm": "edm"}[type(path).__name__]


def factor(alpha: Any, sigma: Any, exact: bool) -> Any:
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    return DEVIATION / variance**0.5 if exact else alpha * DEVIATION**2 / variance


def of_gaussian(kind: str, exact: bool) -> Denoiser:
    network = OfGaussian(kind, exact)
    return Denoiser(network, network.path, network.target)


def column(level: Level, count: int = 1) -> Level:
    return LevelTable.of([level], torch.device("cpu")).at(torch.zeros(count, dtype=torch.long))


def draw(level: Level, count: int = 8) -> Tensor:
    """x_t of the Gaussian."""
    z = torch.randn((2, count, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    return level.mix(MEAN + DEVIATION * z[0], z[1])


# --- mathematics -----------------------------------------------------------------------------


def test_the_scalings_are_those_of_lcm():
    assert boundary_scalings(0.0) == (1.0, 0.0)
    skip, out = boundary_scalings(torch.tensor([0.0, 999.0]))
    s = 9990.0
    assert skip.tolist() == pytest.approx([1.0, 0.25 / (s**2 + 0.25)])
    assert out.tolist() == pytest.approx([0.0, s / (s**2 + 0.25) ** 0.5])


@pytest.mark.parametrize("kind", PATHS)
def test_the_clean_end_is_left_as_it_is(kind):
    denoiser = of_gaussian(kind, exact=False)
    x = draw(denoiser.path.clean)
    level = column(denoiser.path.clean, len(x))
    assert torch.equal(consistency(denoiser, x, level, Cond()), x)
    if kind == "table":  # as LCM has it, the table's first entry too
        first = denoiser.path.level(0)
        assert torch.equal(consistency(denoiser, x, column(first, len(x)), Cond()), x)


@pytest.mark.parametrize("kind", PATHS)
def test_a_step_of_the_ode_is_ddim(kind):
    denoiser = of_gaussian(kind, exact=False)
    path = denoiser.path
    levels = GRIDS["lcm"](path, 10)
    sampler = SAMPLERS["ddim"](path)
    for here, there in pairwise(levels):
        x = draw(here)
        (step,) = sampler(denoiser.predict, x, [here, there], lambda a, b: torch.zeros(1))
        made = ode_step(Guided(denoiser, Cond()), x, *(column(v, len(x)) for v in (here, there)))
        assert torch.allclose(made, step.x, atol=2e-5)


@pytest.mark.parametrize("kind", PATHS)
def test_the_exact_consistency_function_costs_nothing(kind):
    exact, teacher = of_gaussian(kind, exact=True), of_gaussian(kind, exact=False)
    path = exact.path

    def loss(steps: int, known: bool) -> float:
        table = LevelTable.of(GRIDS["lcm"](path, steps, original_steps=steps), torch.device("cpu"))
        total = 0.0
        for number in range(steps):
            ends = [table.at(torch.full((8,), n)) for n in (number, number + 1)]
            here, there = ends
            x = draw(here)
            if known:  # the ODE's own end: a straight line in the Gaussian's own deviation
                wide = [((a * DEVIATION) ** 2 + s**2) ** 0.5 for _, a, s in ends]
                x_s = there.alpha * MEAN + wide[1] / wide[0] * (x - here.alpha * MEAN)
            else:
                x_s = ode_step(Guided(teacher, Cond()), x, here, there)
            with torch.no_grad():
                error = consistency(exact, x, here, Cond()) - consistency(exact, x_s, there, Cond())
            total += float(error[error.isfinite()].abs().mean())
        return total / steps

    # The table's last entries are LCM's mixtures of x0 and x_t.
    assert loss(20, known=True) < (2e-3 if kind == "table" else 2e-5)
    if kind != "table":
        assert loss(200, known=False) < 0.05 * loss(20, known=False)


def test_guidance_is_the_teacher_s_and_each_sample_s_own():
    class Told(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor, **told: Any) -> Tensor:
            return x * 0 + context[:, :1, :1, None]

    denoiser = Denoiser(Told(), build_path(PATHS["flow"]), "flow")
    one, zero = (Cond(context=torch.full((2, 1, 1), value)) for value in (1.0, 0.0))
    level = column(denoiser.path.level(0.5), 2)
    x = torch.zeros(2, 1, 2, 2)
    x0, _ = Guided(denoiser, one, zero, torch.tensor([1.0, 4.0]))(x, level)
    assert x0[:, 0, 0, 0].tolist() == pytest.approx([-0.5, -2.0])


def test_the_pseudo_huber_loss_is_that_of_the_vector():
    error = torch.tensor([[[[3.0, 4.0]]]])
    c = 0.00054 * 2**0.5
    assert float(pseudo_huber(error)) == pytest.approx(((25 + c**2) ** 0.5 - c) / 2**0.5)
    assert float(pseudo_huber(0 * error)) == 0


def test_consistency_tuning_takes_shorter_steps_from_stage_to_stage():
    rho = torch.tensor([0.01, 1.0, 80.0])
    stages = [tuning_ratio(rho, stage).tolist() for stage in range(8)]
    assert stages[0][:2] == [0.0, 0.0] and stages[0][2] == pytest.approx(0.5)
    assert all(a <= b for before, after in pairwise(stages)
               for a, b in zip(before, after, strict=True))  # fmt: skip
    assert min(stages[-1]) > 0.97


# --- runs ------------------------------------------------------------------------------------

CAPTIONS = [str(caption) for caption in shapes.captions()][::97][:6]
TURBO, LCM, ECT = ({"distill": method} for method in ("turbo", "lcm", "ect"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Models to distil: of captions, of classes and of nothing; and data for each."""
    folder = tmp_path_factory.mktemp("bases")
    words = Tokenizer.learn(CAPTIONS, 300)
    text = tiny.TEXT | {"vocab_size": words.vocab_size}
    sample: dict[str, Any] = {"size": [16, 16], "steps": 2}
    blocks = {"in_channels": 12, "out_channels": 12}
    preset = tiny.small(
        "text-small", {"unet": tiny.TEXT_UNET | blocks, "text": [text], "sample": sample}
    )
    tiny.model(preset, tokenizer_json=words.to_json()).save(folder / "text.safetensors")
    classes = {
        "classes": ["dark", "light"], "unet": {"num_classes": 3}, "sample": sample | {"guidance": 2}
    }  # fmt: skip
    tiny.model(tiny.preset(**classes)).save(folder / "class.safetensors")
    edm = {"path": {"kind": "edm"}, "target": "edm", "sample": sample | {"start_noise": "sigma"}}
    tiny.model(tiny.preset(**edm)).save(folder / "none.safetensors")
    for name in classes["classes"]:
        (folder / "class" / name).mkdir(parents=True)
        shade = 30 if name == "dark" else 220
        Image.new("RGB", (16, 16), (shade,) * 3).save(folder / "class" / name / "0.png")
    (folder / "none").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(folder / "none" / "0.png")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def values(bases, tmp_path, monkeypatch):
    """The options of a small run in the folder "run"."""
    monkeypatch.chdir(tmp_path)

    def read(data: str = "shapes", base: str | None = "text", **more: Any):
        data = data if data == "shapes" else str(bases / data)
        start = {"from_": str(bases / f"{base}.safetensors")} if base else {}
        small = {"steps": 4, "batch_size": 2, "sample_every": 0, "save_every": 2, "keep": 9}
        small["validation"] = 0
        given = {"data": data, "out": "run", "device": "cpu", **start, **small, **more}
        return read_options(OPTIONS, given)

    return read


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(LCM | {"data": "captions.txt"}, marks=pytest.mark.slow),
        TURBO,
        pytest.param(LCM | {"lora": True, "rank": 2}, marks=pytest.mark.slow),
        pytest.param(LCM, marks=pytest.mark.slow),
        pytest.param(ECT, marks=pytest.mark.slow),
        pytest.param(TURBO | {"lora": True, "rank": 2}, marks=pytest.mark.slow),
    ],
    ids=["captions", "turbo", "lora", "lcm", "ect", "turbo lora"],
)
def test_a_run_goes_on_bit_for_bit(values, more):
    whole = train(values(**more, out="whole"))
    part = Path("part")
    part.mkdir()
    config = Path("whole/config.yaml").read_text(encoding="utf-8")
    (part / "config.yaml").write_text(config, encoding="utf-8")
    again = {
        "data": more.get("data", "shapes"),
        "out": "part",
        "base": None,
        "steps": None,
        "validation": None,
    }
    resumed = train(values(**again, resume_from="whole/checkpoints/step-000002"))
    assert whole.path and resumed.path
    for name in ("live", "optimizer", "helpers"):
        file = f"{'model' if name == 'live' else name}.safetensors"
        ends = [Path(run, "checkpoints/step-000004", file) for run in ("whole", "part")]
        if not ends[0].exists():
            assert name == "helpers" and more["distill"] == "ect"
            continue
        first, second = map(load_file, ends)
        assert first.keys() == second.keys()
        assert [n for n in first if not torch.equal(first[n], second[n])] == []
    assert whole.path.read_bytes() == resumed.path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("class", "turbo"),
        ("none", "ect"),
        pytest.param("class", "lcm", marks=pytest.mark.slow),
        pytest.param("class", "ect", marks=pytest.mark.slow),
        pytest.param("none", "lcm", marks=pytest.mark.slow),
        pytest.param("none", "turbo", marks=pytest.mark.slow),
    ],
)
def test_models_of_classes_and_of_nothing_are_distilled(values, kind, method):
    training = train(values(kind, kind, distill=method, steps=1, set={"train.flip": False}))
    assert training.path
    model = load_model(str(training.path), device="cpu")
    sample = model.preset.sample
    assert (sample.sampler, sample.schedule, sample.guidance) == ("lcm", "lcm", 1.0)
    assert sample.steps == {"lcm": 4, "turbo": 1, "ect": 2}[method]
    guided = kind == "class" and method != "ect"
    assert model.preset.train.distill.guidance == ((2.0, 2.0) if guided else (1.0, 1.0))
    *_, last = generate(plan_sampling(model, resolve_settings(model)), [SampleInput(label=0)])
    assert last.index == sample.steps - 1 and last.x.isfinite().all()


def test_a_student_may_be_told_its_scale(values):
    training = train(values(**LCM, steps=1, set={"unet.guidance_dim": 8}))
    model = load_model(str(training.path), device="cpu")
    assert model.preset.sample.guidance == 3.0
    assert model.preset.train.distill.guidance == (1.0, 6.0)
    assert model.tensors()["unet.time_embedding.cond_proj.weight"].any()


def test_what_is_chosen_is_told(values):
    rows = {key: (value, why) for key, value, why in prepare(values(**LCM)).choices()}
    assert rows["train.distill.guidance"] == (
        [3.0, 3.0], "the model's own, which is learned with it"
    )  # fmt: skip
    assert rows["sample.steps"] == (4, "usual of lcm")
    rows = {k: (v, w) for k, v, w in prepare(values("captions.txt", **TURBO)).choices()}
    samples, why = rows["train.distill.samples"]
    assert samples == 8 and "captions alone" in why


def test_the_teacher_draws_what_captions_ask_for(values):
    training = prepare(values("captions.txt", **LCM, teacher_samples=3))
    data = drawn(training.preset, training.dataset, Path("run"), training.device, silent)
    assert len(data) == 3 and data.captions([2]) == CAPTIONS[2:3]
    (piece,) = Path("run/teacher").iterdir()
    pictures = load_file(piece)["pictures"]
    assert pictures.shape == (3, 3, 16, 16)
    teacher = load_model(training.preset.train.distill.teacher, device="cpu")
    *_, last = generate(
        plan_sampling(teacher, resolve_settings(teacher)), [SampleInput(CAPTIONS[1], seed=1)]
    )
    made = (decode(teacher, last.x)[0] + 1) * 127.5
    assert (pictures[1] - made).abs().max() <= 1


def test_a_lora_tells_how_it_is_sampled(values, bases):
    base = str(bases / "text.safetensors")
    train(values(**LCM, lora=True, rank=2, steps=1))
    path = Path("run/lora.safetensors")
    model = load_model(base, device="cpu", loras=[(path, 1.0)])
    assert (model.preset.sample.steps, model.preset.sample.guidance) == (4, 1.0)
    assert any("as its LoRA asks: 4 steps of lcm" in note for note in model.notes)
    assert load_model(base, device="cpu", loras=[(path, 0.0)]).preset.sample.steps == 2
    for says in ('{"prompt": "x"}', "[]", '{"steps": "many"}', '{"sampler": "none"}', "{"):
        save_file(load_file(path), "odd.safetensors", {SAMPLE: says})
        with pytest.raises(InputError):
            load_model(base, device="cpu", loras=[(Path("odd.safetensors"), 1.0)])


def test_what_was_distilled_is_trained_further_as_any_model(values):
    train(values(**LCM, steps=1))
    again = prepare(values(base=None, from_="run", out="next"))
    assert again.preset.train.distill.method == "none"
    with pytest.raises(UsageError, match="another method"):
        prepare(values(base=None, resume=True, allow_change=True, **TURBO))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"base": None, **LCM}, "--from"),
        ({**LCM, "part": "vae"}, "--part vae"),
        ({"data": "captions.txt"}, "captions alone"),
        ({"teacher_samples": 4}, "--distill"),
        ({"distill": "add"}, "lcm"),
        ({"data": "none", "base": "none", **LCM,
          "set": {"train.distill.guidance": [3.0, 3.0]}}, "cannot be guided"),
        ({**LCM, "set": {"train.distill.ode_steps": 2000}}, "steps = 2000"),
        ({**LCM, "set": {"target": "v"}}, "another"),
        ({**LCM, "lora": True, "set": {"unet.guidance_dim": 8}}, "LoRA"),
        ({**LCM, "set": {"train.distill.guidance": [0.5, 1.0]}}, "at least 1"),
    ],
)  # fmt: skip
def test_misuse_is_told(values, more, says):
    with pytest.raises(DifftoolError, match=says) as caught:
        prepare(values(**more))
    assert caught.value.code in (2, 3) and not Path("run").exists()


def test_captions_alone_are_read_as_data(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a {red|blue} fox\n\n  a hill \n", encoding="utf-8")
    data = open_dataset(str(path))
    assert len(data) == 2 and not data.pictured
    assert set(data.captions([0] * 20, range(20))) == {"a red fox", "a blue fox"}
    assert data.captions([1]) == ["a hill"]
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="no captions"):
        open_dataset(str(path))


# --- what is learned -------------------------------------------------------------------------

ENDS = ((200, 60, 60), (60, 60, 200))


@pytest.fixture(scope="module")
def undecided(tmp_path_factory) -> Path:
    """A model of red and of blue pictures; the mean of both is what its single step draws."""
    folder = tmp_path_factory.mktemp("undecided")
    solid(folder / "data", ENDS * 4)
    small = {f"unet.{key}": value for key, value in tiny.UNET.items()}
    small |= {"unet.channels": [32, 32], "unet.groups": 8, "train.ema": 0.99}
    small |= {"path": {"kind": "flow"}, "target": "flow", "train.time": "uniform"}
    small |= {"sample.sampler": "euler", "sample.schedule": "trailing"}
    given = {"preset": "pixel-small", "steps": 400, "size": 16, "lr": 2e-3, "set": small}
    train(read_options(OPTIONS, LEARNS | given | {
        "data": str(folder / "data"), "out": folder / "teacher"}))  # fmt: skip
    return folder


LEARNS: dict[str, Any] = {"batch_size": 16, "sample_every": 0, "validation": 0, "device": "cpu"}


def drawn_ends(where: Path, steps: int) -> tuple[float, float]:
    """How far the mean colours of pictures are from the nearer end, over the distance between the
    ends: 1/2 is undecided; and the share of pictures that are nearer to the second."""
    model = load_model(str(where), device="cpu")
    plan = plan_sampling(model, resolve_settings(model, {"steps": steps}))
    *_, last = generate(plan, [SampleInput(seed=i) for i in range(48)])
    means = ((decode(model, last.x) + 1) * 127.5).mean(dim=(2, 3))
    ends = torch.tensor(ENDS, dtype=torch.float32)
    apart = torch.cdist(means, ends) / (ends[0] - ends[1]).norm()
    return float(apart.amin(1).mean()), float(apart.argmin(1).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lcm", "ect", "turbo"])
def test_single_steps_come_to_a_decision(undecided, tmp_path, method):
    """And not always to the same one."""
    before, _ = drawn_ends(undecided / "teacher", 1)
    assert before > 0.25
    given = {"from_": str(undecided / "teacher"), "distill": method, "steps": 150, "lr": 1e-3}
    train(read_options(OPTIONS, LEARNS | given | {
        "data": str(undecided / "data"), "out": tmp_path / "run"}))  # fmt: skip
    after, share = drawn_ends(tmp_path / "run", 1)
    assert after < 0.75 * before and 0.05 < share < 0.95
    later, _ = drawn_ends(tmp_path / "run", 4)
    assert later < 0.75 * after or method == "turbo"


# --- elsewhere -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "lora"), ("sd1", "whole"), ("sd1", "told"), ("sd15", "lora")]
)
def test_what_is_distilled_of_stable_diffusion_is_sampled_by_diffusers(
    values, tmp_path, family, kind
):  # fmt: skip
    """sd15: at its published size."""
    from conversions import convert
    from pipelines import build, build_whole, diffusers

    {"sd1": build, "sd15": build_whole}[family](family, tmp_path)
    Path("two.txt").write_text("a fox on a hill\na red house\n", encoding="utf-8")
    more: dict[str, Any] = {"lora": {"lora": True, "rank": 4}, "whole": {}, "told": {
        "set": {"unet.guidance_dim": 32}}}[kind]  # fmt: skip
    given = {"data": str(tmp_path / "two.txt"), "base": None, "from_": str(tmp_path / family)}
    made = train(values(**given, **LCM, **more, size=64, steps=2, lr=0.01, teacher_samples=2))
    assert made.path
    where = str(tmp_path / family)
    if kind == "lora":
        model = load_model(where, device="cpu", loras=[(made.path, 1.0)])
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(where)
        plain = pictures_of(pipe, 1.0)
        pipe.load_lora_weights(str(made.path))
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        assert np.abs(pictures_of(pipe, 1.0) - plain).max() > 8 / 255
    else:
        model = load_model(str(made.path), device="cpu")
        convert(open_model(made.path), tmp_path / "there", "diffusers")
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there")
    plan = plan_sampling(model, resolve_settings(model, {"width": 64, "height": 48}))
    assert plan.settings.steps == 4 and type(pipe.scheduler).__name__ == "LCMScheduler"
    *_, last = generate(plan, [SampleInput("a fox", seed=7)])
    ours = ((decode(model, last.x)[0] + 1) / 2).permute(1, 2, 0).numpy()
    assert np.abs(pictures_of(pipe, plan.settings.guidance) - ours).max() < 1 / 255


def pictures_of(pipe: Any, guidance: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a fox", width=64, height=48, num_inference_steps=4, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7), output_type="np",
    ).images[0]  # fmt: skip
