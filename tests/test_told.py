"""Thirty pictures of each tool, written as its own code writes them: all that they say is read."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from difftool.errors import InputError
from difftool.sampling.metadata.files import read
from difftool.sampling.metadata.shown import lines, shown


class Made(NamedTuple):
    """How a picture was made."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str
    schedule: str
    clip_skip: int
    model: str


SAMPLERS = {  # ours: A1111's, ComfyUI's, InvokeAI's, NovelAI's, stable-diffusion.cpp's
    "euler": ("Euler", "euler", "euler", "k_euler", "euler"),
    "euler_a": ("Euler a", "euler_ancestral", "euler_a", "k_euler_ancestral", "euler_a"),
    "heun": ("Heun", "heun", "heun", "k_heun", "heun"),
    "dpmpp_2m": ("DPM++ 2M", "dpmpp_2m", "dpmpp_2m", "k_dpmpp_2m", "dpm++2m"),
    "dpmpp_2s_a": ("DPM++ 2S a", "dpmpp_2s_ancestral", None, "k_dpmpp_2s_ancestral", "dpm++2s_a"),
    "dpmpp_sde": ("DPM++ SDE", "dpmpp_sde", "dpmpp_sde", "k_dpmpp_sde", None),
    "dpm_fast": ("DPM fast", "dpm_fast", None, "k_dpm_fast", None),
    "restart": ("Restart", None, None, None, None),
    "er_sde": (None, "er_sde", None, None, None),
    "lcm": ("LCM", "lcm", "lcm", None, "lcm"),
}
SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform"}
WORDS = 'a fox, (hill:1.2) \u72d0 [snow] red; blue: "quoted" green \\\\ oil BREAK paint'.split(" ")


def made(number: int, column: int) -> Made:
    """The number-th picture, of a sampler that the tool of that column has."""
    dice = random.Random(1000 * column + number)
    text = " ".join(dice.choices(WORDS, k=dice.randrange(1, 12)))
    negative = " ".join(dice.choices(WORDS, k=dice.randrange(0, 6)))
    return Made(
        text + "\nsecond line" * (number % 5 == 4), negative, dice.randrange(2**32),
        dice.randrange(1, 60), dice.choice((1.0, 4.5, 7.0, 7.25)),
        (64 * dice.randrange(4, 20), 64 * dice.randrange(4, 20)),
        dice.choice([ours for ours, names in SAMPLERS.items() if names[column]]),
        dice.choice(list(SCHEDULES)), dice.choice((1, 2)), dice.choice(("v1-5", "a, model: x")),
    )  # fmt: skip


def named(each: Made, column: int) -> str:
    name = SAMPLERS[each.sampler][column]
    assert name is not None
    return name


def save(path: Path, texts: Mapping[str, str], mode: str = "RGB") -> Path:
    """A PNG with texts, as Pillow writes it for all these tools."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    Image.new(mode, (8, 8)).save(path, pnginfo=info)
    return path


def quoted(value: object) -> str:
    """A1111's quote()."""
    text = str(value)
    special = "," in text or "\n" in text or ":" in text
    return json.dumps(text, ensure_ascii=False) if special else text


def a1111_text(each: Made, version: str, **more: object) -> str:
    """create_infotext: prompt, negative prompt, and words with commas between."""
    words: dict[str, object] = {
        "Steps": each.steps, "Sampler": named(each, 0),
        "Schedule type": SCHEDULES[each.schedule], "CFG scale": each.guidance, "Seed": each.seed,
        "Size": "x".join(map(str, each.size)), "Model hash": "6ce0161689", "Model": each.model,
        "Clip skip": each.clip_skip if each.clip_skip > 1 else None, **more, "Version": version,
    }  # fmt: skip
    line = ", ".join(
        k if k == v else f"{k}: {quoted(v)}" for k, v in words.items() if v is not None
    )
    negative = f"\nNegative prompt: {each.negative}" if each.negative else ""
    return f"{each.prompt}{negative}\n{line}".strip()


def a1111(each: Made, path: Path) -> Path:
    return save(path, {"parameters": a1111_text(each, "v1.10.1")})


def a1111_jpeg(each: Made, path: Path) -> Path:
    """piexif's UserComment: UNICODE, and UTF-16 of big-endian order."""
    exif = Image.Exif()
    text = a1111_text(each, "v1.10.1").encode("utf-16-be")
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text
    path = path.with_suffix(".jpg" if each.seed % 2 else ".webp")
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


def forge(each: Made, path: Path) -> Path:
    more = {"Module 1": "ae", "Beta schedule alpha": None}
    version = "f2.0.1v1.10.1-previous-669-gdfdcbab6"
    return save(path, {"parameters": a1111_text(each, version, **more)})


def comfy(each: Made, path: Path) -> Path:
    """SaveImage: the graph as it was sent, and the workflow of the page."""
    graph = {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": each.seed, "steps": each.steps, "cfg": each.guidance,
            "sampler_name": named(each, 1), "scheduler": each.schedule, "denoise": 1.0,
            "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
            "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": each.model}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {
            "width": each.size[0], "height": each.size[1], "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": each.prompt, "clip": ["9", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": each.negative, "clip": ["9", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "CLIPSetLastLayer", "inputs": {
            "stop_at_clip_layer": -each.clip_skip, "clip": ["10", 1]}},
        "10": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "ink.safetensors", "strength_model": 0.7, "strength_clip": 0.7,
            "model": ["4", 0], "clip": ["4", 1]}},
        "11": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
    }  # fmt: skip
    return save(path, {"prompt": json.dumps(graph), "workflow": json.dumps({"nodes": []})})


def comfy_advanced(each: Made, path: Path) -> Path:
    """KSamplerAdvanced after ControlNet, and a second pass on the enlarged latent."""
    told = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000,
            "return_with_leftover_noise": "disable", "cfg": each.guidance,
            "sampler_name": named(each, 1), "scheduler": each.schedule, "steps": each.steps,
            "model": ["4", 0], "negative": ["7", 0]}  # fmt: skip
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "pose.png", "upload": "image"}},
        "2": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "pose.pth"}},
        "3": {"class_type": "KSamplerAdvanced", "inputs": {
            **told, "noise_seed": each.seed, "positive": ["12", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": each.model}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {
            "width": each.size[0], "height": each.size[1], "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": each.prompt, "clip": ["9", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": each.negative, "clip": ["9", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["14", 0], "vae": ["4", 2]}},
        "9": {"class_type": "CLIPSetLastLayer", "inputs": {
            "stop_at_clip_layer": -each.clip_skip, "clip": ["4", 1]}},
        "11": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
        "12": {"class_type": "ControlNetApply", "inputs": {
            "conditioning": ["6", 0], "control_net": ["2", 0], "image": ["1", 0], "strength": 1}},
        "13": {"class_type": "LatentUpscale", "inputs": {
            "samples": ["3", 0], "width": 2048, "height": 2048, "crop": "disabled",
            "upscale_method": "nearest-exact"}},
        "14": {"class_type": "KSamplerAdvanced", "inputs": {
            **told, "noise_seed": 1, "positive": ["6", 0], "latent_image": ["13", 0]}},
    }  # fmt: skip
    return save(path, {"prompt": json.dumps(graph)})


def invoke(each: Made, path: Path) -> Path:
    """CoreMetadata of version 3 on; it counts the layers that are left out."""
    values = {
        "app_version": "5.6.0", "generation_mode": "txt2img", "positive_prompt": each.prompt,
        "negative_prompt": each.negative, "width": each.size[0], "height": each.size[1],
        "seed": each.seed, "rand_device": "cpu", "cfg_scale": each.guidance,
        "cfg_rescale_multiplier": 0, "steps": each.steps, "seamless_x": False, "seamless_y": False,
        "scheduler": named(each, 2) + ("_k" if each.schedule == "karras" else ""),
        "clip_skip": each.clip_skip - 1, "model": {"key": "k", "hash": "blake3:x",
        "name": each.model, "base": "sd-1", "type": "main"}, "controlnets": [], "ipAdapters": [],
        "loras": [{"model": {"name": "ink", "key": "k"}, "weight": 0.7}], "vae": None,
    }  # fmt: skip
    return save(path, {"invokeai_metadata": json.dumps(values), "invokeai_graph": "{}"})


def novelai_texts(each: Made) -> dict[str, str]:
    values = {
        "prompt": each.prompt, "steps": each.steps, "height": each.size[1], "width": each.size[0],
        "scale": each.guidance, "uncond_scale": 0.0, "cfg_rescale": 0.0, "seed": each.seed,
        "n_samples": 1, "noise_schedule": each.schedule, "legacy_v3_extend": False, "sm": False,
        "sm_dyn": False, "sampler": named(each, 3), "uc": each.negative, "version": 1,
        "request_type": "PromptGenerateRequest", "signed_hash": "x", "legacy": False,
        "v4_prompt": {"caption": {"base_caption": each.prompt, "char_captions": []},
                      "use_coords": False, "use_order": True},
    }  # fmt: skip
    return {
        "Title": "NovelAI generated image", "Description": each.prompt, "Software": "NovelAI",
        "Source": each.model, "Generation time": "3.1", "Comment": json.dumps(values),
    }  # fmt: skip


def novelai(each: Made, path: Path) -> Path:
    return save(path, novelai_texts(each), "RGBA")


def hidden(path: Path, text: str, kind: str = "pngcomp") -> Path:
    """Its texts in the lowest bits of alpha (or of all colours), column by column."""
    data = text.encode()
    data = gzip.compress(data) if kind.endswith("comp") else data
    whole = b"stealth_" + kind.encode() + (8 * len(data)).to_bytes(4, "big") + data
    bits = np.unpackbits(np.frombuffer(whole, np.uint8))
    pixels = np.full((160, 200, 4), 254, np.uint8)  # columns, rows
    bands = pixels[..., 3] if kind.startswith("png") else pixels[..., :3]
    flat = bands.reshape(-1).copy()
    flat[: len(bits)] |= bits
    if kind.startswith("png"):
        pixels[..., 3] = flat.reshape(160, 200)
    else:
        pixels[..., :3] = flat.reshape(160, 200, 3)
    Image.fromarray(pixels.swapaxes(0, 1)).save(path)
    return path


def novelai_hidden(each: Made, path: Path) -> Path:
    return hidden(path, json.dumps(novelai_texts(each)))


def sd_cpp(each: Made, path: Path) -> Path:
    """get_image_params: C++'s numbers, the schedule after the sampler."""
    negative = f"Negative prompt: {each.negative}\n" if each.negative else ""
    text = f"{each.prompt}\n{negative}Steps: {each.steps}, CFG scale: {each.guidance:f}, "
    text += f"Guidance: 3.500000, Eta: 0.000000, Seed: {each.seed}, "
    text += f"Size: {each.size[0]}x{each.size[1]}, Model: v1-5.safetensors, RNG: cuda, "
    text += f"Sampler: {named(each, 4)} karras, "
    text += f"Clip skip: {each.clip_skip}, " if each.clip_skip > 1 else ""
    return save(path, {"parameters": text + "Version: stable-diffusion.cpp"})


def fooocus(each: Made, path: Path) -> Path:
    """FooocusMetadataParser.to_string."""
    values = {
        "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": each.model, "base_model_hash": "6ce01616",
        "clip_skip": each.clip_skip, "full_negative_prompt": [each.negative],
        "full_prompt": [each.prompt], "guidance_scale": each.guidance,
        "loras": [["ink.safetensors", 0.7, "0123456789"]], "metadata_scheme": "fooocus",
        "negative_prompt": each.negative, "performance": "Speed", "prompt": each.prompt,
        "prompt_expansion": "", "refiner_model": "None", "refiner_switch": 0.5,
        "resolution": str(each.size), "sampler": named(each, 1), "scheduler": each.schedule,
        "seed": str(each.seed), "sharpness": 2.0, "steps": each.steps, "styles": "[]",
        "vae": "Default (model)", "version": "Fooocus v2.5.5", "created_by": "me",
    }  # fmt: skip
    return save(path, {"parameters": json.dumps(values), "fooocus_scheme": "fooocus"})


class Tool(NamedTuple):
    write: Callable[[Made, Path], Path]
    column: int
    """In SAMPLERS."""
    made_by: str
    without: frozenset[str] = frozenset()
    """What it does not say of a picture."""
    missed: tuple[str, ...] = ()
    """What of it has to be listed."""


KARRAS = frozenset({"schedule"})
TOOLS: dict[str, Tool] = {
    "a1111": Tool(a1111, 0, "A1111 v1.10.1"),
    "a1111-exif": Tool(a1111_jpeg, 0, "A1111 v1.10.1"),
    "forge": Tool(forge, 0, "Forge f2", missed=("Module 1",)),
    "comfy": Tool(comfy, 1, "ComfyUI", missed=("ink",)),
    "comfy-advanced": Tool(
        comfy_advanced, 1, "ComfyUI",
        missed=("ControlNetApply", "ControlNetLoader", "LatentUpscale", "1 more pass"),
    ),
    "invoke": Tool(invoke, 2, "InvokeAI 5.6.0", KARRAS, ("ink",)),
    "novelai": Tool(novelai, 3, "NovelAI", frozenset({"clip_skip"})),
    "novelai-hidden": Tool(novelai_hidden, 3, "NovelAI", frozenset({"clip_skip"})),
    "sd.cpp": Tool(sd_cpp, 4, "stable-diffusion.cpp", frozenset({"schedule", "model"})),
    "fooocus": Tool(fooocus, 1, "Fooocus v2.5.5", missed=("ink",)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_all_of_thirty_pictures_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tool = TOOLS[name]
    for number in range(30):
        each = made(number, tool.column)
        path = tool.write(each, tmp_path / f"{number}.png")
        request, told = read(path), shown(path)
        settings = {"clip_skip": 1, "schedule": "", **request.settings}
        found = Made(
            request.prompt or "", request.negative or "", (request.seeds or (-1,))[0],
            settings["steps"], settings["guidance"], settings["size"], settings["sampler"],
            settings["schedule"], settings["clip_skip"] or 1, request.model,
        )  # fmt: skip
        for field, value in each._asdict().items():
            if field not in tool.without:
                expected = value.strip() if isinstance(value, str) else value
                assert getattr(found, field) == expected, (number, field)
        if name == "sd.cpp":
            assert (found.schedule, found.model) == ("karras", "v1-5.safetensors")
        if name == "invoke" and each.schedule == "karras":
            assert found.schedule == "karras"
        assert told["made_by"].startswith(tool.made_by) and told["request"]["seed"] == each.seed
        missed = "; ".join(told["missed"])
        assert all(word in missed for word in tool.missed), missed


@pytest.mark.parametrize("kind", ["pnginfo", "pngcomp", "rgbinfo", "rgbcomp"])
def test_a_text_in_the_pixels_is_found(tmp_path, kind):
    text = a1111_text(made(3, 0), "v1.9.0")
    assert read(hidden(tmp_path / "x.png", text, kind)).seeds == (made(3, 0).seed,)


@pytest.mark.parametrize("length", [0, 8, 2**31, 2**32 - 8])
def test_a_length_in_the_pixels_is_not_believed(tmp_path, length):
    pixels = np.full((20, 20, 4), 254, np.uint8)
    bits = np.unpackbits(np.frombuffer(b"stealth_pngcomp" + length.to_bytes(4, "big"), np.uint8))
    pixels[..., 3].reshape(-1)[: len(bits)] |= bits
    Image.fromarray(pixels.swapaxes(0, 1)).save(tmp_path / "x.png")
    with pytest.raises(InputError):
        read(tmp_path / "x.png")


def test_what_is_shown_reads_as_a_line_of_prompts(tmp_path, monkeypatch):
    from difftool.sampling.requests import parse_line

    monkeypatch.chdir(tmp_path)
    told = shown(comfy(made(0, 1), tmp_path / "x.png"))
    again = parse_line(json.dumps(told["request"]))
    assert again is not None and again.seeds == (told["request"]["seed"],)
    shown_lines = dict(lines(told))
    assert shown_lines["made by"] == "ComfyUI" and shown_lines["sampler"] == made(0, 1).sampler
    Image.new("RGB", (8, 4)).save(tmp_path / "plain.png")
    told: Any = shown(tmp_path / "plain.png")
    assert (told["width"], told["height"], told["request"], told["texts"]) == (8, 4, None, {})
    assert dict(lines(told))["made by"] == "it does not say how it was made"
