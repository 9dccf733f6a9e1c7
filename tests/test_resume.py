"""Going on: with other settings, from nothing, beside others, and what is found beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from folders import lay, pictures

from difftool.config.options import read_options
from difftool.config.validate import build_preset
from difftool.errors import DifftoolError, UsageError
from difftool.pipeline.load import load_model
from difftool.storage.runs import save_checkpoint
from difftool.storage.yaml import read_yaml
from difftool.training.options import OPTIONS
from difftool.training.run.folder import RunFolder
from difftool.training.run.start import prepare, train

SMALL = {f"unet.{key}": value for key, value in tiny.UNET.items()} | {"sample.steps": 1}


@pytest.fixture
def values(tmp_path, monkeypatch):
    """The options of a small run in the folder "run"."""
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / "photos", pictures(*(f"{i}.png" for i in range(4))))

    def read(**more):
        return read_options(OPTIONS, {"data": "photos", "out": "run", "device": "cpu", **more})

    return read


def begin(values, steps: int = 3, **more) -> None:
    train(values(steps=steps, batch_size=2, size=16, sample_every=0, set=SMALL, **more))


def config(run: str = "run") -> dict:
    return read_yaml(Path(run, "config.yaml"))


# --- other settings --------------------------------------------------------------------------


def test_what_changes_what_is_learned_is_asked_for_told_and_kept(values):
    begin(values)
    before = config()
    changed = {"lr": 1e-5, "steps": 5, "set": {"train.loss": "huber", "unet.dropout": 0.1}}
    with pytest.raises(UsageError, match="change what is learned") as caught:
        prepare(values(resume=True, **changed))
    for words in ("train.lr was 0.001, now 1e-05", "train.steps was 3", "train.loss was mse"):
        assert words in str(caught.value)
    assert "--allow-change" in str(caught.value) and config() == before
    training = prepare(values(resume=True, allow_change=True, **changed))
    keys = {"train.lr", "train.steps", "train.loss", "unet.dropout"}
    assert {change.key for change in training.changes} == keys
    training.run()
    kept = config()
    assert [kept["train"][key] for key in ("lr", "steps", "loss")] == [1e-5, 5, "huber"]
    facts = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert facts["steps"] == 5
    assert {row[0]: row[1] for row in facts["choices"]}["train.lr"] == 1e-5
    assert {row[0] for row in facts["sessions"][-1]["changes"]} == keys
    again = prepare(values(resume=True))
    assert again.changes == [] and again.preset.train.loss == "huber"


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"set": {"target": "v"}}, "target"),
        ({"set": {"path": {"kind": "edm"}, "target": "edm"}}, "path.kind"),
        ({"set": {"unet.channels": [8, 16]}}, "unet.channels"),
        ({"batch_size": 4}, "train.batch_size"),
        ({"seed": 5}, "train.seed"),
        ({"ema": False}, "train.ema"),
    ],
)
def test_another_model_is_no_run_to_go_on_with(values, changed, key):
    begin(values)
    with pytest.raises(UsageError, match=r"cannot resume .* with another") as caught:
        prepare(values(resume=True, allow_change=True, **changed))
    assert f"{key} was" in str(caught.value)


@pytest.mark.parametrize(
    "free", [{"keep": 5}, {"set": {"sample.steps": 2}}, {"set": {"train.checkpointing": True}}, {}]
)
def test_what_changes_nothing_is_not_asked_about(values, free):
    begin(values)
    assert prepare(values(resume=True, **free)).changes == []


def test_more_steps_at_a_constant_rate_are_no_other_run(values):
    begin(values, lr=1e-4)
    with pytest.raises(UsageError, match=r"train\.steps"):
        prepare(values(resume=True, steps=6))
    begin(lambda **more: values(**{**more, "out": "flat", "set": {**SMALL, "train.decay": "none"}}))
    training = prepare(values(out="flat", resume=True, steps=6))
    assert [change.key for change in training.changes] == ["train.steps"]


def test_the_whole_command_can_be_given_again(values):
    given = {"preset": "pixel-small", "steps": 3, "batch_size": 2, "size": 16, "set": SMALL}
    train(values(sample_every=0, **given))
    assert prepare(values(resume=True, **given)).changes == []
    with pytest.raises(UsageError, match="another preset"):
        prepare(values(resume=True, **{**given, "preset": "text-small"}))


# --- from nothing ----------------------------------------------------------------------------


def killed(values, moment: str, **more) -> None:
    """A run that ends before its first checkpoint."""
    given = values(steps=3, batch_size=2, size=16, sample_every=0, set=SMALL, lr=5e-4, **more)
    training = prepare(given)
    training.begin()
    if moment == "step":
        for run in training.parts():
            next(run.steps())
            break
    training.close()


@pytest.mark.parametrize("moment", [pytest.param("folder", marks=pytest.mark.slow), "step"])
def test_a_run_killed_before_its_first_checkpoint_starts_anew(values, moment):
    killed(values, moment)
    with pytest.raises(UsageError, match="not empty"):
        prepare(values())
    training = prepare(values(resume=True))
    assert any("starts anew" in note for note in training.notes)
    assert (training.preset.train.steps, training.preset.train.lr) == (3, 5e-4)
    training.run()
    resumed = Path("run/model.safetensors").read_bytes()
    begin(values, out="whole", lr=5e-4)
    assert resumed == Path("whole/model.safetensors").read_bytes()


def test_a_run_killed_at_once_begins_by_what_is_given(values, tmp_path):
    RunFolder(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_text('{"schema": 1, "start": {}}', encoding="utf-8")
    begin(values, resume=True)
    assert Path("run/model.safetensors").is_file()
    with pytest.raises(UsageError, match="no checkpoint"):
        prepare(values(out="nowhere", resume=True))


def test_it_starts_anew_from_the_model_that_it_was_to_start_from(values):
    begin(values, out="base", steps=2)
    tuned = {"from_": "base", "steps": 1, "sample_every": 0, "batch_size": 2}
    whole = train(values(out="whole", **tuned))
    training = prepare(values(**tuned))
    training.begin()
    training.close()
    Path("other").mkdir()
    load_model("base", device="cpu").save(Path("other/model.safetensors"))
    with pytest.raises(UsageError, match="from another model"):
        prepare(values(resume=True, from_="other/model.safetensors"))
    again = train(values(resume=True))
    assert again.path and whole.path
    assert again.path.read_bytes() == whole.path.read_bytes()


def test_damaged_checkpoints_are_no_reason_to_start_anew(values):
    begin(values)
    for state in Path("run/checkpoints").glob("*/state.json"):
        state.unlink()
    with pytest.raises(UsageError, match="no checkpoint to resume") as caught:
        prepare(values(resume=True))
    assert "damaged" in str(caught.value)


# --- beside others ---------------------------------------------------------------------------


def test_of_two_runs_started_together_the_second_leaves_no_trace(values):
    first, second = (
        prepare(values(steps=3, batch_size=2, size=16, set=SMALL, lr=lr)) for lr in (1e-4, 2e-4)
    )
    first.begin()
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for refused in (second.check, second.begin):
        with pytest.raises(UsageError, match="another run is at work"):
            refused()
    first.close()
    with pytest.raises(UsageError, match="another run has begun"):
        second.begin()
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert build_preset(config(), "config").train.lr == 1e-4


def test_a_run_that_went_on_meanwhile_is_not_gone_on_with_from_before(values):
    begin(values)
    late = prepare(values(resume=True, steps=5, allow_change=True))
    train(values(resume=True, steps=4, allow_change=True))
    with pytest.raises(UsageError, match="another run was at work"):
        late.begin()
    assert config()["train"]["steps"] == 4


# --- beforehand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"set": {"train.optimizer": "sgd"}},
        {"set": {"train.betas": [0.9, 1.5]}},
        {"set": {"train.time": "never"}},
        {"set": {"train.loss": "none"}},
        {"set": {"sample.sampler": "none"}},
        {"set": {"sample.schedule": "none"}},
        {"set": {"sample.sampler_options": {"no": 1}}},
        {"set": {"sample.schedule_options": {"no": 1}}},
        {"set": {"sample.steps": 0}},
        {"set": {"unet.groups": 5}},
        {"validation": 4},
        {"from_": "base", "set": {"unet.channels": [8, 16]}},
    ],
)
def test_what_would_stop_a_run_later_stops_it_before_there_is_a_folder(values, wrong):
    if "from_" in wrong:
        begin(values, out="base", steps=1)
    size = {} if "from_" in wrong else {"size": 16}
    given = {"steps": 3, "batch_size": 2, **size, **wrong}
    given["set"] = {**({} if "from_" in wrong else SMALL), **wrong.get("set", {})}
    with pytest.raises(DifftoolError) as caught:
        prepare(values(**given))
    assert caught.value.code in (2, 3)
    assert not Path("run").exists()


# --- other runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["from_", "vae"])
def test_a_run_to_start_from_is_its_newest_good_checkpoint(values, option):
    codec = tiny.VAE | {"patch": 1, "latent_channels": 4}
    model = tiny.model(tiny.preset(4, codec=codec, sample={"steps": 1, "size": [16, 16]}))
    for step in (1, 2):
        save_checkpoint(Path("other"), step, lambda p: model.save(p / "model.safetensors"), 2)
    Path("other/checkpoints/step-000002/model.safetensors").write_bytes(b"")
    small = {} if option == "from_" else SMALL
    given = {option: "other", "steps": 1, "batch_size": 2, "size": 16, "set": small}
    notes = prepare(values(**given)).notes
    assert any("step-000002 is damaged and was passed over" in note for note in notes)
