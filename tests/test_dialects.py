"""How pictures of other tools say how they were made: what is taken over, and what is listed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from difftool.adapters.lora.file import lora_hash
from difftool.config.options import read_options
from difftool.errors import DifftoolError, InputError
from difftool.sampling.command import prepare
from difftool.sampling.metadata.comfy import from_graph
from difftool.sampling.metadata.files import read
from difftool.sampling.requests import Request
from difftool.sampling.settings import OPTIONS

A1111 = """a (red:1.3) fox, [dark] <lora:ink:0.6>, BREAK a hill
Negative prompt: (bad:1.2)
Steps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5, VAE hash: 63aeecb90f, VAE: x.safetensors, Variation seed: 8, \
Variation seed strength: 0.2, Denoising strength: 0.5, Clip skip: 2, RNG: NV, Hires upscale: 2, \
Hires steps: 10, Hires upscaler: Latent, Lora hashes: "ink: {digest}, pen: 0123456789ab", \
TI hashes: "easyneg: c74b4e810b03", Version: v1.10.1"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path: str = "x.png", **texts: str) -> Path:
    """A PNG with these text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return Path(path)


def comment(data: bytes, format: str = "jpg") -> Path:
    """A picture with this EXIF user comment."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = data
    Image.new("RGB", (8, 8)).save(f"x.{format}", exif=exif)
    return Path(f"x.{format}")


def missed(request: Request) -> str:
    return "; ".join(text for _, text in request.missed)


def lora(path: str = "ink.safetensors", value: float = 1.0) -> str:
    """A file, and its hash."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"a.lora_up.weight": torch.full((2, 2), value)}, path, metadata={"x": "y"})
    return lora_hash(Path(path))


# --- A1111 -----------------------------------------------------------------------------------


def test_all_of_a1111_s_text_is_taken_over_or_listed():
    digest = lora()
    request = read(picture(parameters=A1111.format(digest=digest)))
    assert request.prompt == "a (red:1.3) fox, [dark] , BREAK a hill"
    assert request.negative == "(bad:1.2)" and request.seeds == (5,)
    assert request.settings == {
        "steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 7.0,
        "size": (512, 768), "clip_skip": 2, "prompt_syntax": "a1111", "rng": "gpu", "vary": 0.2,
        "hires": 2.0, "hires_steps": 10, "hires_strength": 0.5, "upscaler": "latent",
    }  # fmt: skip
    assert request.vary_seed == 8
    assert request.loras == (("ink.safetensors", 0.6),)
    said = missed(request)
    for word in ("VAE x.safetensors", "easyneg"):
        assert word in said
    for word in ("ink", "Model", "Version", "Variation", "RNG", "Hires", "Denoising"):
        assert word not in said


@pytest.mark.parametrize(
    "where", ["loras/ink.safetensors", "sub/ink.safetensors", "other.safetensors"]
)
def test_a_lora_is_found_by_name_and_hash(where):
    digest = lora(where)
    Path("sub").mkdir(exist_ok=True)
    request = read(picture("sub/x.png", parameters=A1111.format(digest=digest)))
    assert [Path(path).name for path, _ in request.loras] == [Path(where).name]


def test_a_lora_of_the_name_and_another_hash_is_another():
    lora()
    request = read(picture(parameters=A1111.format(digest="00112233aabb")))
    assert request.loras == () and "the LoRA ink (00112233aabb) at 0.6" in missed(request)
    assert dict(request.missed)["lora"]


@pytest.mark.parametrize(
    ("name", "same", "says"),
    [
        ("ink", True, ""),
        ("renamed", True, ""),
        ("INK", False, "not the LoRA"),
        ("pen", False, None),
    ],
)
def test_loras_of_a_picture_are_looked_for_in_the_user_s_folder(name, same, says):
    digest = lora(f"styles/sub/{name}.safetensors")
    digest = digest if same else "00112233aabb"
    picture(parameters=A1111.format(digest=digest).replace("VAE: x.safetensors, ", ""))
    (made,) = prepare(
        read_options(OPTIONS, {"from_image": "x.png", "lora_dir": "styles"})
    ).requests()
    assert isinstance(made, Request)
    if says is None:
        assert made.loras == () and f"the LoRA ink ({digest})" in missed(made)
        return
    assert made.loras == ((f"styles/sub/{name}.safetensors", 0.6),)
    assert "LoRA ink" not in missed(made) and made.sought == ()
    assert [says in text for text in made.changed] == ([True] if says else [])


def test_the_hash_of_nothing_is_no_file_s():
    """As forge wrote it for files that it could not read, and took for another one's."""
    save_file({}, "pen.safetensors")
    assert lora_hash(Path("pen.safetensors")) == "e3b0c44298fc"
    request = read(picture(parameters=A1111.format(digest="e3b0c44298fc")))
    assert request.loras == ()
    lora()
    request = read(picture(parameters=A1111.format(digest="e3b0c44298fc")))
    assert request.loras == (("ink.safetensors", 0.6),)


@pytest.mark.parametrize(
    ("said", "schedule"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "exponential"),
        ("Sampler: Euler a, Schedule type: Automatic", "normal"),
        ("Sampler: DDIM, Schedule type: Automatic", "ddim_uniform"),
        ("Sampler: DDIM CFG++, Schedule type: Automatic", "ddim_uniform"),
        ("Sampler: Restart, Schedule type: Automatic", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "normal"),
        ("Sampler: DPM++ 2M, Schedule type: DDIM", "ddim_uniform"),
        ("Sampler: DPM++ 2M, Schedule type: SGM Uniform", "sgm_uniform"),
        ("Sampler: DPM++ 2M, Schedule type: KL Optimal", "kl_optimal"),
        ("Sampler: DPM++ 2M, Schedule type: Align Your Steps GITS", None),
        ("Sampler: DPM++ 2M Karras, Version: v1.6.0", "karras"),
        ("Sampler: DPM++ 2M, Version: v1.6.0", "normal"),
        ("Sampler: DPM++ 2M, Version: v1.9.3", "karras"),
        ("Sampler: DPM++ 2M, Version: f2.0.1v1.10.1-previous", "karras"),
        ("Sampler: LMS, Schedule type: Karras", "karras"),
        ("Sampler: DPM fast, Schedule type: Karras", "karras"),
        ("Sampler: DPM adaptive, Schedule type: Karras", "karras"),
        ("Sampler: DPM of another day, Schedule type: Karras", "karras"),
    ],
)
def test_schedules_are_a1111_s(said, schedule):
    request = read(picture(parameters=f"a fox\nSteps: 9, {said}, Seed: 5"))
    assert request.settings.get("schedule") == schedule
    if schedule is None:
        assert "Schedule type: Align Your Steps GITS" in missed(request)
    if "DPM fast" in said or "adaptive" in said:
        assert request.settings["sampler"] in ("dpm_fast", "dpm_adaptive")
    if "another" in said:
        assert "Sampler: DPM" in missed(request) and "sampler" not in request.settings


def test_a_picture_that_was_started_from_another_says_so():
    text = "a fox\nSteps: 9, Sampler: Euler, Seed: 5, Denoising strength: 0.4, Mask blur: 4"
    request = read(picture(parameters=text))
    assert request.settings["strength"] == 0.4 and "init" in dict(request.missed)
    assert request.settings["mask_blur"] == 4.0 and "Mask" not in missed(request)


@pytest.mark.parametrize(("sampler", "word"), [("Euler a", "Eta"), ("DDIM", "Eta DDIM")])
def test_eta_is_taken_over_where_the_sampler_has_it(sampler, word):
    text = f"a fox\nSteps: 9, Sampler: {sampler}, Seed: 5, {word}: 0.5, Version: v1.10.1, RNG: CPU"
    request = read(picture(parameters=text))
    assert request.settings["sampler_options"] == {"eta": 0.5} and request.missed == ()
    request = read(picture(parameters=text.replace(sampler, "Euler", 1)))
    assert missed(request) == f"{word}: 0.5" and "sampler_options" not in request.settings


def test_a_plain_prompt_needs_no_syntax():
    request = read(picture(parameters="a fox\nSteps: 9, Sampler: Euler, Seed: 5"))
    assert "prompt_syntax" not in request.settings and request.missed == ()


TEXT = "ein Bär (x:1.2)\nSteps: 9, Sampler: Euler, Seed: 5"


@pytest.mark.parametrize(
    "data",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + b"\xfe\xff" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode(),
        b"ASCII\0\0\0" + TEXT.encode(),
        b"\0" * 8 + TEXT.encode(),
        TEXT.encode(),
    ],
    ids=["be", "le", "le mark", "be mark", "utf-8", "ascii", "undefined", "bare"],
)
@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_comments_in_every_encoding(data, format):
    request = read(comment(data, format))
    assert (request.prompt, request.seeds) == ("ein Bär (x:1.2)", (5,))


def test_a_jpeg_s_own_comment_is_read():
    Image.new("RGB", (8, 8)).save("x.jpg", comment=TEXT.encode())
    assert read(Path("x.jpg")).seeds == (5,)


def test_a_comment_about_something_else_is_none():
    with pytest.raises(InputError, match="does not say"):
        read(comment(b"ASCII\0\0\0taken at the lake"))
    Image.new("RGB", (8, 8)).save("y.jpg", comment=b"CREATOR: gd-jpeg v1.0")
    with pytest.raises(InputError, match="does not say"):
        read(Path("y.jpg"))


# --- ComfyUI ---------------------------------------------------------------------------------


def graph(**changes: Any) -> dict[str, Any]:
    nodes = {
        "3": ("KSampler", {
            "seed": 7, "steps": 12, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
            "latent_image": ["5", 0],
        }),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5.safetensors"}),
        "5": ("EmptyLatentImage", {"width": 512, "height": 640, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": "a (red:1.2) fox, NaN", "clip": ["11", 0]}),
        "7": ("CLIPTextEncode", {"text": "bad", "clip": ["11", 0]}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("SaveImage", {"filename_prefix": "x", "images": ["8", 0]}),
        "10": ("LoraLoader", {
            "lora_name": "sub\\ink.safetensors", "strength_model": 0.7, "strength_clip": 0.7,
            "model": ["4", 0], "clip": ["4", 1],
        }),
        "11": ("CLIPSetLastLayer", {"stop_at_clip_layer": -2, "clip": ["10", 1]}),
        "20": ("CLIPTextEncode", {"text": "left over", "clip": ["4", 1]}),
    } | changes  # fmt: skip
    made = {
        n: {"class_type": k, "inputs": v, "is_changed": [float("nan")]}
        for n, (k, v) in nodes.items()
    }
    return made


def comfy(**changes: Any) -> Request:
    return read(picture(prompt=json.dumps(graph(**changes)), workflow="{}"))


def test_comfyui_s_graph():
    lora()
    request = comfy()
    assert (request.prompt, request.negative) == ("a (red:1.2) fox, NaN", "bad")
    assert request.seeds == (7,) and request.loras == (("ink.safetensors", 0.7),)
    assert request.settings == {
        "steps": 12, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 6.5,
        "size": (512, 640), "clip_skip": 2, "prompt_syntax": "comfy",
    }  # fmt: skip
    assert request.missed == ()


def test_texts_and_numbers_of_other_nodes():
    lora()
    changes = {
        "30": ("PrimitiveStringMultiline", {"value": "a blue owl"}),
        "31": ("PrimitiveInt", {"value": 99}),
        "6": ("CLIPTextEncode", {"text": ["30", 0], "clip": ["4", 1]}),
        "3": ("KSampler", graph()["3"]["inputs"] | {"seed": ["31", 0], "model": ["4", 0]}),
    }
    request = comfy(**changes)
    assert request.prompt == "a blue owl" and request.seeds == (99,) and request.missed == ()


def test_what_of_a_graph_is_not_understood_is_listed():
    changes = {
        "12": ("KSampler", graph()["3"]["inputs"] | {"latent_image": ["3", 0], "denoise": 0.5}),
        "8": ("VAEDecode", {"samples": ["12", 0], "vae": ["13", 0]}),
        "13": ("VAELoader", {"vae_name": "x"}),
        "14": ("ControlNetApply", {"conditioning": ["6", 0], "strength": 1.0, "image": ["15", 0]}),
        "15": ("LoadImage", {"image": "x.png"}),
        "3": (
            "KSampler",
            graph()["3"]["inputs"] | {"positive": ["14", 0], "sampler_name": "res_x"},
        ),
    }
    request = comfy(**changes)
    said = missed(request)
    for word in ("1 more passes", "VAELoader", "ControlNetApply", "sampler res_x", "LoRA ink"):
        assert word in said
    assert request.prompt == "a (red:1.2) fox, NaN" and "sampler" not in request.settings


def test_a_graph_that_starts_from_a_picture():
    changes = {
        "5": ("VAEEncode", {"pixels": ["15", 0], "vae": ["4", 2]}),
        "15": ("LoadImage", {"image": "x.png"}),
        "3": ("KSampler", graph()["3"]["inputs"] | {"denoise": 0.6}),
    }
    request = comfy(**changes)
    assert request.settings["strength"] == 0.6 and "init" in dict(request.missed)


def test_the_sampler_of_parts():
    parts = {
        "3": ("SamplerCustomAdvanced", {
            "noise": ["21", 0], "guider": ["22", 0], "sampler": ["23", 0], "sigmas": ["24", 0],
            "latent_image": ["5", 0],
        }),
        "21": ("RandomNoise", {"noise_seed": 11}),
        "22": ("CFGGuider", {"cfg": 3.5, "positive": ["6", 0], "negative": ["7", 0]}),
        "23": ("KSamplerSelect", {"sampler_name": "euler"}),
        "24": ("BasicScheduler", {"scheduler": "simple", "steps": 9, "denoise": 1.0}),
        "6": ("CLIPTextEncode", {"text": "a fox", "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "", "clip": ["4", 1]}),
    }  # fmt: skip
    request = comfy(**parts)
    assert request.seeds == (11,) and request.prompt == "a fox" and request.missed == ()
    assert request.settings["guidance"] == 3.5 and request.settings["schedule"] == "simple"
    assert request.settings["steps"] == 9 and request.settings["sampler"] == "euler"


def test_a_graph_whose_nodes_are_linked_without_end_is_refused():
    sampler = {"seed": 1, "sampler_name": "euler"}
    nodes = {
        str(n): {"class_type": "KSampler", "inputs": sampler | {"model": [str(n + 1), 0]}}
        for n in range(9_000)
    }
    with pytest.raises(InputError) as caught:
        from_graph(json.dumps(nodes), "a picture")
    assert caught.value.why == "its nodes are linked without end"


def test_comfyui_s_webp():
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = f"prompt:{json.dumps(graph())}", "workflow:{}"
    Image.new("RGB", (8, 8)).save("x.webp", exif=exif)
    assert read(Path("x.webp")).seeds == (7,)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "x",
        "{",
        "null",
        '{"1": {"class_type": "SaveImage", "inputs": {}}}',
        "[" * 99_999,
    ],
    ids=range(7),
)
def test_graphs_that_are_none_are_refused(text):
    with pytest.raises(InputError):
        read(picture(prompt=text))


# --- others ----------------------------------------------------------------------------------

INVOKE = {
    "app_version": "5.4.0", "generation_mode": "txt2img", "positive_prompt": "a fox",
    "negative_prompt": "bad", "width": 512, "height": 640, "seed": 3, "rand_device": "cpu",
    "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30, "scheduler": "dpmpp_2m_k",
    "clip_skip": 1, "seamless_x": False, "controlnets": [], "model": {"name": "sd-1", "hash": "x"},
    "loras": [{"model": {"name": "ink", "key": "k"}, "weight": 0.5}], "vae": {"name": "v"},
    "hrf_enabled": True,
}  # fmt: skip


def test_invokeai():
    lora()
    request = read(picture(invokeai_metadata=json.dumps(INVOKE)))
    assert (request.prompt, request.negative, request.seeds) == ("a fox", "bad", (3,))
    assert request.settings == {
        "size": (512, 640), "guidance": 7.5, "steps": 30, "sampler": "dpmpp_2m",
        "schedule": "karras", "clip_skip": 2, "guidance_rescale": 0.0, "prompt_syntax": "compel",
    }  # fmt: skip
    assert request.loras == (("ink.safetensors", 0.5),)
    assert [option for option, _ in request.missed] == ["vae", ""]
    assert "hrf_enabled" in missed(request)


def test_invokeai_of_old():
    image = {
        "prompt": [{"prompt": "a fox [bad]", "weight": 1}], "steps": 50, "cfg_scale": 7.5,
        "height": 512, "width": 512, "seed": 9, "type": "txt2img", "sampler": "k_lms",
        "variations": [], "threshold": 0, "perlin": 0.1,
    }  # fmt: skip
    request = read(picture(**{"sd-metadata": json.dumps({"app_id": "invoke", "image": image})}))
    assert request.prompt == "a fox [bad]" and request.settings["sampler"] == "lms"
    assert missed(request) == "perlin 0.1"


@pytest.mark.parametrize(
    "options", ["-s 50 -S 9 -W 512 -H 640 -C 7.5 -A k_lms", "-s50 -S9 -W512 -H640 -C7.5 -Ak_lms"]
)
def test_invokeai_s_commands(options):
    request = read(picture(Dream=f'"a fox [bad]" {options} -G0.5'))
    assert (request.prompt, request.seeds) == ("a fox [bad]", (9,))
    assert request.settings == {
        "steps": 50, "size": (512, 640), "guidance": 7.5, "sampler": "lms",
        "prompt_syntax": "compel",
    }  # fmt: skip
    assert missed(request) == "G 0.5"


def test_novelai():
    said = {
        "prompt": "{fox}, hill", "uc": "bad", "steps": 28, "height": 832, "width": 512,
        "scale": 5.0, "seed": 77, "n_samples": 1, "noise_schedule": "karras",
        "sampler": "k_euler_ancestral", "sm": True, "sm_dyn": False, "cfg_rescale": 0.0,
        "request_type": "PromptGenerateRequest", "signed_hash": "x",
    }  # fmt: skip
    texts = {"Software": "NovelAI", "Description": "{fox}, hill", "Comment": json.dumps(said)}
    request = read(picture(**texts))
    assert (request.prompt, request.negative, request.seeds) == ("{fox}, hill", "bad", (77,))
    assert request.settings["sampler"] == "euler_a" and request.settings["schedule"] == "karras"
    assert request.settings["guidance"] == 5.0 and missed(request) == "sm True"
    assert request.settings["prompt_syntax"] == "novelai" and request.template == "{fox}, hill"
    del said["prompt"]
    request = read(picture(**texts | {"Comment": json.dumps(said)}))
    assert request.prompt == "{fox}, hill"


def test_json_in_the_place_of_a1111_s_text():
    swarm = {"prompt": "a fox", "negativeprompt": "", "seed": 4, "steps": 20, "cfgscale": 7.0,
             "width": 512, "height": 512, "sampler": "euler", "scheduler": "normal", "model": "m",
             "refinermethod": "x", "swarm_version": "0.9"}  # fmt: skip
    request = read(picture(parameters=json.dumps({"sui_image_params": swarm})))
    assert request.seeds == (4,) and request.settings["schedule"] == "normal"
    assert missed(request) == "refinermethod x"
    fooocus = {"prompt": "a fox", "seed": "12", "steps": 30, "guidance_scale": 4.0, "sharpness": 2,
               "resolution": "(896, 1152)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras",
               "loras": [["pen.safetensors", 0.1, "ab"]], "version": "Fooocus v2"}  # fmt: skip
    request = read(picture(parameters=json.dumps(fooocus)))
    assert request.seeds == (12,) and request.settings["size"] == (896, 1152)
    assert request.settings["sampler"] == "dpmpp_2m_sde" and "pen" in missed(request)


MUTANTS = [
    *(None, True, [], {}, "x", -1, 1e300, "9" * 5000, {"prompt": {"1": 2}}, ["a", 0], "\ud800"),
]


@pytest.mark.parametrize("value", MUTANTS, ids=range(len(MUTANTS)))
def test_whatever_stands_there_is_read_or_refused(value):
    """No value of any key is a traceback."""
    dialects = {
        "invokeai_metadata": INVOKE,
        "prompt": graph()["3"]["inputs"],
        "parameters": {"prompt": "x", "seed": 1, "loras": [], "resolution": "", "steps": 3},
    }
    for keyword, values in dialects.items():
        for name in values:
            changed = values | {name: value}
            if keyword == "prompt":
                changed = graph() | {"3": {"class_type": "KSampler", "inputs": changed}}
            try:
                read(picture(**{keyword: json.dumps(changed)}))
            except DifftoolError:
                continue


def test_a_packed_text_that_is_damaged_is_refused():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xD1FF] = b"difftool\0" + struct.pack("<I", 7)
    Image.new("RGB", (8, 8)).save("x.jpg", exif=exif)
    with pytest.raises(InputError):
        read(Path("x.jpg"))
