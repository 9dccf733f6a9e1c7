"""Files for fuzz.py: small sound ones, made by code, and what changes them."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import ldm_models
import tiny
import torch
import yaml
from conversions import convert
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from difftool.config.layers import load_preset
from difftool.config.validate import to_values
from difftool.formats import open_model

SOUND: dict[str, dict[str, bytes]] = {}
"""What `build` makes: for every name the files, by their paths; "" is a single file."""

DIGITS = "@digits@"
"""Stands for a number of 5,000 digits, which Python does not print, in what becomes JSON."""
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "255", "256", "1e308", "-1e308", "1e400", "1e-320", "nan"),
    *("inf", "-inf", "1e18", "0.1", "-0", "2147483647", "2147483648", "4294967296", "1_000"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "1000000000"),
    *("18446744073709551616", "1000000000000000000", "16384", "16385", "1000000", "0x10", "٣"),
    "9" * 400, "9" * 5000, "0." + "3" * 5000, "1e" + "9" * 5000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 10**6, 10**9, 10**18, 2**31, 2**63, 2**64, 0.5, -0.5, 1e308, 1e-308),
    *(float("nan"), float("inf"), True, False, None, "", " ", "0", "a", [], {}, [[]], [0], [1, 2]),
    *([-1, -1], {"kind": "vae"}, {"a": {}}, [None], "auto", "none", [1e18] * 3, [8] * 100),
    *({"": ""}, ["a"] * 1000, 10**400, DIGITS, "a" * 70_000, "../../evil", "/evil", "evil\0"),
)
TEXTS = (
    *("", " ", "a", "-", "--", "-1", "..", ".", "/", "../evil", "~", "*", "a fox", "{}", "[]"),
    *("𝕏" * 50, "é", "e\u0301" * 40, "\u202egnp.", "\ufeffa", "\ud800", "\udcff", "a\nb"),
    "\x1b[2J",
    *("\0", "\u2028", "👩‍👩‍👧‍👦" * 30, "a" * 300, "b/" * 300, "c" * 70_000, "(" * 500),
    "[a:b:" * 300,
    *("((a:1.5):9e9)", "(a:" + "9" * 5000 + ")", "{a|b}" * 400, "<lora:x:1>", "embedding:evil"),
    *("[seed]", "[prompt][index]", "[" * 200, "CON", "a:b", "out.png", "out.gif", "here/", "a,b,c"),
    *("1,2,5-10", "5-1", "0-999999", "16x16", "8x24", "16384x16384", "0x0", "16x", "512", "1x1"),
    *("red", "#fff", "#12345678", "rgb(1,2,3)", "hsl(9e99,1%,1%)", "cpu", "cuda:99", "meta", "xla"),
    *("fp16", "bf16", "fp8", "linear", "cosine", "edm", "flow", "500MB", "9e9GiB", "0", "1e999GB"),
    *("-inf,inf", "nan,nan", "2,-4", "diffusers", "difftool", "ldm", "png", "webp", "csv", "html"),
)  # fmt: skip
KEYS = (
    *("unet.channels", "unet.blocks", "unet.groups", "unet.heads", "unet.head_dim", "unet.depth"),
    *("unet.in_channels", "unet.out_channels", "unet.num_classes", "unet.context_dim", "unet.kind"),
    *("unet.mid_depth", "unet.mid_blocks", "unet.vector_dim", "unet.guidance_dim", "codec.kind"),
    *("codec.widths", "codec.block", "codec.scale", "text", "path", "path.kind", "path.steps"),
    *("path.beta_start", "path.betas", "path.zero_snr", "target", "classes", "size_numbers"),
    *("sample.size", "sample.steps", "sample.sampler_options", "sample.schedule_options", "sample"),
    *("sample.sampler_options.order", "sample.schedule_options.rho", "sample.guidance_interval"),
    *("train.size", "train.steps", "train.betas", "train.ema_lengths", "train.time_options"),
    *("train.warmup", "train.lora_rank", "train.ema", "parts", "data.background", "scheduler"),
    *("data.bucket_step", "name", "path.cosine", "sample.clip_skip", "path.eps", "train.seed", ""),
)
A1111 = (
    "a fox, (red:1.2)\nNegative prompt: bad\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 7, "
    'Seed: 1, Size: 16x16, Model hash: 0123456789, Model: tiny, Lora hashes: "x: 1234", '
    "Denoising strength: 0.5, Clip skip: 2, Version: v1.10"
)
GRAPH: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["7", 1]}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 1, "steps": 2, "cfg": 7.5, "sampler_name": "euler", "scheduler": "karras",
            "denoise": 1, "model": ["7", 0], "positive": ["2", 0], "negative": ["3", 0],
            "latent_image": ["4", 0],
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "x.safetensors", "strength_model": 1, "strength_clip": 1,
            "model": ["1", 0], "clip": ["1", 1],
        },
    },
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "invokeai_metadata": {
        "positive_prompt": "a", "negative_prompt": "b", "steps": 2, "seed": 1, "width": 16,
        "height": 16, "cfg_scale": 7, "scheduler": "euler", "model": {"name": "x"}, "loras": [],
    },
    "Dream": 'a fox" -s 2 -S 1 -W 16 -H 16 -C 7.5 -A k_euler',
    "Comment": {"prompt": "a", "uc": "b", "steps": 2, "seed": 1, "sampler": "k_euler", "scale": 5},
    "sui_image_params": {"prompt": "a", "steps": 2, "seed": 1, "cfgscale": 7, "width": 16},
    "fooocus_scheme": "fooocus",
}  # fmt: skip
CHUNK: dict[str, Any] = {
    "schema": 1, "prompt": "a fox", "negative": "b", "seed": 1, "size": [16, 16], "steps": 2,
    "sampler": "euler", "guidance": 2.0, "model": "tiny", "loras": [["x.safetensors", 0.5]],
    "sampler_options": {"eta": 0.5}, "schedule": "karras", "schedule_options": {"rho": 7},
    "init": "../init.png", "mask": "/mask.png", "strength": 0.5,
}  # fmt: skip


# --- values ----------------------------------------------------------------------------------


def number(rng: random.Random) -> str:
    return rng.choice(NUMBERS)


def word(rng: random.Random) -> str:
    """A value of an option."""
    kind = rng.randrange(4)
    if kind == 0:
        return number(rng)
    if kind == 1:
        return dumped(rng.choice(VALUES))[:100_000]
    return text(rng)


def text(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    return "".join(rng.choice(TEXTS)[:100] for _ in range(rng.randint(1, 5)))


def value(rng: random.Random) -> Any:
    """A value of any type, as JSON can have it."""
    kind = rng.randrange(8)
    if kind == 0:
        return text(rng)
    if kind == 1:
        return nested(rng.choice([5, 70, 400]))
    if kind == 2:
        return [value(rng) for _ in range(rng.randint(0, 4))]
    return deepcopy(rng.choice(VALUES))


def nested(depth: int) -> Any:
    made: Any = 1
    for turn in range(depth):
        made = [made] if turn % 2 else {"a": made}
    return made


def dumped(tree: Any) -> str:
    """As JSON, with numbers of any length."""
    return json.dumps(tree).replace(f'"{DIGITS}"', "9" * 5000)


# --- what changes files -----------------------------------------------------------------------


def changed(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Bytes of which some are others; within: the first so many, where it matters."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        end = min(len(made), within or len(made))
        if not end:
            break
        at = rng.randrange(end)
        match rng.randrange(8):
            case 0:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at] = rng.choice(b'\0\xff\x7f\x80019{}[]",:-e')
            case 2:
                del made[at:]
            case 3:
                del made[at : at + rng.randint(1, 64)]
            case 4:
                made[at:at] = made[rng.randrange(end) :][: rng.randint(1, 64)]
            case 5:
                size = rng.choice([1, 2, 4, 8])
                extreme = rng.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 10])
                made[at : at + size] = extreme.to_bytes(size, rng.choice(["little", "big"]))
            case 6:
                made[at:at] = bytes([made[at]]) * rng.choice([10, 1000, 100_000])
            case 7:
                made[at:at] = rng.choice(NUMBERS).encode()
    return bytes(made)


def altered(tree: Any, rng: random.Random) -> Any:
    """A value of which a part is another: what a file says, with something wrong."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        holder: Any = tree
        while True:
            if not isinstance(holder, dict | list) or not holder:
                break
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = rng.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
                holder = inner
                continue
            if isinstance(inner, str) and inner[:1] == "{" and rng.random() < 0.8:
                try:
                    holder[key] = dumped(altered(json.loads(inner), rng))
                    break
                except (ValueError, RecursionError):
                    pass
            match rng.randrange(6):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[text(rng)] = holder.pop(key)
                case 2 if isinstance(inner, list):
                    holder[key] = inner * rng.choice([0, 2, 300])
                case 3 if isinstance(inner, int | float):
                    holder[key] = rng.choice([-inner, inner + 1, inner * 1000, str(inner), [inner]])
                case _:
                    holder[key] = value(rng)
            break
    return tree


def altered_json(data: bytes | str, rng: random.Random) -> bytes:
    """A text of JSON with something wrong, in what it says or in its bytes."""
    data = data.encode() if isinstance(data, str) else data
    if rng.random() < 0.25:
        return changed(data, rng)
    return dumped(altered(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def altered_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A file with a header with something wrong, whose length fits."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return changed(data, rng, 8 + length)
    header = json.loads(data[8 : 8 + length])
    told = header.get("__metadata__")
    if told and rng.random() < 0.6:
        header["__metadata__"] = altered(told, rng)
    else:
        header = altered(header, rng)
    made = dumped(header).encode("utf-8", "surrogatepass")
    return len(made).to_bytes(8, "little") + made + data[8 + length :]


def altered_archive(data: bytes, rng: random.Random) -> bytes:
    """An archive of which a file is another."""
    if rng.random() < 0.3:
        return changed(data, rng)
    made = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", method) as new:
        names = old.namelist()
        chosen = next((n for n in names if n.endswith("data.pkl")), None)
        if chosen is None or rng.random() < 0.2:
            chosen = rng.choice(names)
        for name in names:
            inner = old.read(name)
            if name == chosen:
                inner = rng.choice([changed(inner, rng), changed(inner, rng), pickled(rng)])
            new.writestr(name, inner)
    return made.getvalue()


class Evil:
    """What a pickle would run."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


def pickled(rng: random.Random) -> bytes:
    """A pickle that wants to do harm."""
    import os

    doubled: list[Any] = []
    for _ in range(40):
        doubled = [doubled, doubled]
    objects = (
        Evil(os.system, "touch ../evil"), Evil(exec, "open('../evil', 'w')"),
        Evil(torch.zeros, 10**9), Evil(bytearray, 10**10), Evil(torch.load, "x"), doubled,
        {"state_dict": Evil(eval, "1+1")}, {"a" * 10**6: 1}, [None] * 10**5, 10**3000,
    )  # fmt: skip
    raw = (
        b"\x80\x02]q\0" + b"h\0h\0\x86" * 50_000 + b".", b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02]" * 100_000 + b".", b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x80\x02\x8b" + b"\xff\xff\xff\x7f" + b"1" * 100 + b".", b"L" + b"9" * 5000 + b"L\n.",
        b"\x80\x02}" + b"2" * 1000 + b"." , b"cos\nsystem\n(S'touch ../evil'\ntR.",
    )  # fmt: skip
    if rng.random() < 0.4:
        return rng.choice(raw)
    return pickle.dumps(rng.choice(objects), protocol=rng.choice([0, 2, 4]))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """A PNG's chunks: kind, content."""
    found, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in parts:
        made += struct.pack(">I", len(content)) + kind + content
        made += struct.pack(">I", zlib.crc32(kind + content))
    return made


def altered_picture(data: bytes, rng: random.Random) -> bytes:
    """A picture with something wrong, whose sums fit."""
    if data[:4] != b"\x89PNG" or rng.random() < 0.3:
        return changed(data, rng, rng.choice([64, None]))
    parts = chunks(data)
    at = rng.randrange(len(parts))
    kind, content = parts[at]
    match rng.randrange(4):
        case 0:
            parts[at] = (kind, changed(content, rng))
        case 1:
            sides = [rng.choice([0, 1, 16384, 30000, 2**31 - 1]) for _ in range(2)]
            parts[0] = (b"IHDR", struct.pack(">II", *sides) + parts[0][1][8:])
        case 2:
            zeros = zlib.compress(bytes(rng.choice([10**5, 10**8])), 9)
            kind = rng.choice([b"zTXt", b"iCCP", b"IDAT"])
            parts.insert(1, (kind, (b"" if kind == b"IDAT" else b"parameters\0\0") + zeros))
        case 3:
            parts.insert(at, rng.choice(parts))
    return png(parts)


# --- sound files -------------------------------------------------------------------------------


def _folder(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _picture(format: str, mode: str = "RGB", size: tuple[int, int] = (16, 12), **how: Any) -> bytes:
    image = Image.effect_noise(size, 60).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def _text_model() -> tiny.Preset:
    layers = {
        "unet": tiny.TEXT_UNET | {"vector_dim": None, "attention": "transformer"},
        "text": [tiny.TEXT | {"pooled": False, "projection": None}],
    }
    return tiny.preset(**layers)


def _lora() -> dict[str, torch.Tensor]:
    made = {}
    for layer in ("attn1_to_q", "attn2_to_k", "attn2_to_out_0"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}"
        wide = 24 if layer == "attn2_to_k" else 32
        made[f"{name}.lora_down.weight"] = torch.randn(2, wide)
        made[f"{name}.lora_up.weight"] = torch.randn(32, 2)
        made[f"{name}.alpha"] = torch.tensor(2.0)
    return made


def build() -> None:
    """The sound files, which the first call makes."""
    if SOUND:
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tiny.model(tiny.preset()).save(folder / "pixel.safetensors")
        ldm_models.write(folder / "text.safetensors", "sd1")
        for name, kind in (("pixel", "diffusers"), ("text", "diffusers"), ("text", "difftool")):
            source = open_model(folder / f"{name}.safetensors")
            convert(source, folder / f"{name}-{kind}", kind)
        for path in folder.iterdir():
            SOUND[path.stem] = _folder(path)
        tensors = {name: torch.zeros(2) for name in ("model.diffusion_model.x", "other")}
        torch.save({"state_dict": tensors, "global_step": 3}, folder / "small.ckpt")
        SOUND["small"] = _folder(folder / "small.ckpt")
        words = {"string_to_param": {"*": torch.zeros(2, 24)}, "name": "x", "step": 1}
        torch.save(words, folder / "words.pt")
        SOUND["words.pt"] = _folder(folder / "words.pt")
    SOUND["words.safetensors"] = {"": save({"emb_params": torch.zeros(2, 24)})}
    told = {"ss_network_module": "networks.lora", "ss_network_args": '{"a": 1}'}
    SOUND["lora"] = {"": save(_lora(), told)}
    for name in ("pixel-small", "sd15", "text-small", "sd21-v", "pixel-edm", "vae-small", "sdxl"):
        values = json.loads(json.dumps(to_values(load_preset(name))))
        SOUND[f"preset {name}"] = {"": json.dumps(values).encode()}
    SOUND["p.png"] = {"": _picture("PNG")}
    SOUND["alpha.png"] = {"": _picture("PNG", "RGBA")}
    SOUND["palette.png"] = {"": _picture("PNG", "P")}
    SOUND["p.jpg"] = {"": _picture("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")}
    SOUND["p.gif"] = {"": _picture("GIF", "P")}
    SOUND["p.webp"] = {"": _picture("WEBP")}
    SOUND["p.bmp"] = {"": _picture("BMP")}
    SOUND["p.tif"] = {"": _picture("TIFF")}


PICTURES = ("p.png", "alpha.png", "palette.png", "p.jpg", "p.gif", "p.webp", "p.bmp", "p.tif")
MODELS = ("pixel", "pixel-diffusers", "text", "text-diffusers", "text-difftool", "small")


class Files:
    """The files of a case, written as they are asked for."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng, self.folder, self.count = rng, folder, 0

    def write(self, name: str, files: dict[str, bytes]) -> str:
        self.count += 1
        name = f"{self.count}-{name}"
        for path, data in files.items():
            place = self.folder / name / path if path else self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return name

    def any(self) -> str:
        """A file of any kind."""
        makers = (self.model, self.picture, self.preset, self.lora, self.words, self.prompts)
        return self.rng.choice(makers)()

    @property
    def text_model(self) -> str:
        return self.write("text.safetensors", SOUND["text"])

    def model(self, hostile: bool = False) -> str:
        if not hostile:
            return self.write("pixel.safetensors", SOUND["pixel"])
        name = self.rng.choice(MODELS)
        files = dict(SOUND[name])
        path = self.rng.choice(sorted(files))
        if self.rng.random() < 0.1 and len(files) > 1:
            del files[path]
        else:
            files[path] = self._altered(path or name, files[path])
        ending = ".ckpt" if name == "small" else ".safetensors" if "" in files else ""
        if self.rng.random() < 0.05 and "" in files:
            ending, files = ".ckpt", {"": pickled(self.rng)}
        return self.write(name + ending, files)

    def _altered(self, name: str, data: bytes) -> bytes:
        if name.endswith(".json"):
            return altered_json(data, self.rng)
        if data[:2] == b"PK":
            return altered_archive(data, self.rng)
        if data[8:9] == b"{":
            return altered_safetensors(data, self.rng)
        return changed(data, self.rng)

    def lora(self) -> str:
        return self.write(
            "lora.safetensors", {"": altered_safetensors(SOUND["lora"][""], self.rng)}
        )

    def words(self) -> str:
        name = self.rng.choice(["words.pt", "words.safetensors"])
        return self.write(name, {"": self._altered(name, SOUND[name][""])})

    def preset(self) -> str:
        name = self.rng.choice([name for name in SOUND if name.startswith("preset")])
        values = altered(json.loads(SOUND[name][""]), self.rng)
        kind = self.rng.random()
        made = dumped(values)
        if kind < 0.3:
            with suppress(RecursionError):
                made = yaml.safe_dump(values, allow_unicode=True).replace(DIGITS, "9" * 5000)
        data = made.encode(self.rng.choice(["utf-8"] * 8 + ["utf-16", "latin-1"]), "replace")
        return self.write("p.yaml", {"": changed(data, self.rng) if kind > 0.8 else data})

    def prompts(self) -> str:
        lines = []
        for _ in range(self.rng.randint(1, 3)):
            line = {"prompt": "a fox", "seed": 1, "steps": 1, "size": "16x16", "sampler": "euler"}
            line |= {"guidance": 2, "label": None, "n": 1} if self.rng.random() < 0.5 else {}
            if self.rng.random() < 0.2:
                lines.append(text(self.rng).encode("utf-8", "surrogatepass"))
            else:
                lines.append(altered_json(json.dumps(line), self.rng))
        return self.write("p.jsonl", {"": b"\n".join(lines)})

    def picture(self, hostile: bool = False) -> str:
        name = self.rng.choice(PICTURES if hostile else PICTURES[:1])
        data = SOUND[name][""]
        return self.write(name, {"": altered_picture(data, self.rng) if hostile else data})

    def told(self) -> str:
        """A picture that says how it was made, with something wrong in it."""
        rng, info = self.rng, PngInfo()
        kind = rng.choice(["parameters", "prompt", "difftool", *OTHERS])
        sound = {"parameters": A1111, "prompt": GRAPH, "difftool": CHUNK, **OTHERS}[kind]
        if isinstance(sound, str):
            made = changed(sound.encode(), rng).decode("utf-8", "replace")
            pieces = sound.split(", ")
            if rng.random() < 0.6:
                at = rng.randrange(len(pieces))
                key = pieces[at].split(": ")[0]
                pieces[at] = f"{key}: {word(rng)}"
                made = ", ".join(pieces)
            made = made * rng.choice([1, 1, 1, 1, 1000])
        else:
            made = altered_json(json.dumps(sound), rng).decode("utf-8", "replace")
        made = made.encode("utf-8", "replace").decode()[: 1 << 20]
        format = rng.choice(["PNG", "PNG", "JPEG", "WEBP"])
        if format == "PNG":
            info.add_itxt(kind, made, zip=rng.random() < 0.5)
            return self.write("told.png", {"": _picture("PNG", pnginfo=info)})
        exif = Image.Exif()
        exif[0x9286 if rng.random() < 0.5 else 0x010E] = made[:60_000]
        return self.write(f"told.{format.lower()}", {"": _picture(format, exif=exif)})

    def dataset(self, hostile: bool = False) -> str:
        """A folder of pictures, or an archive of one."""
        rng = self.rng
        files = {f"{n}.png": SOUND["p.png"][""] for n in range(3)}
        if not hostile:
            return self.write("set", files)
        table = [{"file_name": f"{n}.png", "text": f"a fox {n}"} for n in range(3)]
        rows = b"\n".join(altered_json(json.dumps(row), rng) for row in table)
        rest: list[Callable[[], tuple[str, bytes]]] = [
            lambda: ("metadata.jsonl", rows),
            lambda: ("metadata.csv", changed(b"file_name,text\n0.png,a\n1.png,b\n", rng)),
            lambda: ("0.txt", changed(b"a fox, red", rng)),
            lambda: ("meta_cap.json", altered_json('{"0": {"caption": "a", "tags": "b"}}', rng)),
            lambda: (
                "set.toml",
                changed(b"[[datasets]]\n[[datasets.subsets]]\nimage_dir='.'", rng),
            ),
            lambda: ("9.jpg", altered_picture(SOUND["p.jpg"][""], rng)),
            lambda: ("8.png", altered_picture(SOUND["p.png"][""], rng)),
            lambda: (text(rng)[:60].replace("/", "").replace("\0", "").strip(".") + ".png", b"x"),
            lambda: ("labels.json", altered_json('{"labels": [["0.png", 1]]}', rng)),
        ]
        for _ in range(rng.randint(1, 3)):
            name, data = rng.choice(rest)()
            files[name.encode("utf-8", "replace").decode()] = data
        kind, buffer = rng.random(), io.BytesIO()
        if kind < 0.7:
            return self.write("set", files)
        if kind < 0.85:
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            return self.write("set.zip", {"": changed(buffer.getvalue(), rng)})
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind > 0.92 else "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return self.write("set.tar", {"": changed(buffer.getvalue(), rng)})


# --- large files -------------------------------------------------------------------------------

LARGE_BYTES = 16 << 20


def _filled(piece: bytes, size: int = LARGE_BYTES) -> bytes:
    return piece * (size // len(piece))


def _header(data: Callable[[], bytes]) -> bytes:
    header = data()
    return len(header).to_bytes(8, "little") + header


def _metadata(data: Callable[[], bytes]) -> bytes:
    text = data()[: LARGE_BYTES - 1000].decode()
    return _header(lambda: b'{"__metadata__":{"difftool.model":%s}}' % json.dumps(text).encode())


def _checkpoint(data: Callable[[], bytes]) -> bytes:
    return _archive({"m/data.pkl": data(), "m/version": b"3\n"})


def _as_json(piece: bytes, opened: bytes = b"[", closed: bytes = b"1]") -> bytes:
    return b'{"a": ' + opened + _filled(piece, LARGE_BYTES - 1000) + closed + b"}"


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


PLACES = (
    *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"),
    *("tokenizer/vocab.json", "tokenizer/tokenizer_config.json"),
)
JSONS: dict[str, Callable[[], bytes]] = {
    "numbers": lambda: _as_json(b"1,"),
    "objects": lambda: _as_json(b"{},"),
    "lists": lambda: _as_json(b"[[[]]],"),
    "texts": lambda: _as_json(b'"",'),
    "floats": lambda: _as_json(b"1e308,"),
    "escapes": lambda: _as_json(b"\\u00e9", b'"', b'"'),
    "one text": lambda: _as_json(b"a", b'"', b'"'),
    "deep": lambda: _as_json(b"["),
    "digits": lambda: _as_json(b"9", b"", b""),
    "keys": lambda: (
        b"{" + b",".join(b'"%d":0' % n for n in range(1_400_000)) + b"}"
    ),
    "tensors": lambda: (
        b"{"
        + b",".join(
            b'"unet.%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n
            for n in range(260_000)
        )
        + b"}"
    ),
    "dimensions": lambda: _as_json(b"1,", b'{"dtype":"F32","data_offsets":[0,4],"shape":[', b"1]}"),
}  # fmt: skip
PICKLES: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b"\x80\x02" + _filled(b"]") + b".",
    "empty": lambda: b"\x80\x02](" + _filled(b"]") + b"e.",
    "memo": lambda: b"\x80\x02]q\0" + _filled(b"h\0h\0\x86"),
    "marks": lambda: b"\x80\x02" + _filled(b"("),
    "tuples": lambda: b"\x80\x02)q\0" + _filled(b"h\0\x85q\0"),
    "joined": lambda: b"\x80\x02)q\0" + _filled(b"h\0h\0\x86q\0") + b".",
    "text": lambda: b"\x80\x02X" + (LARGE_BYTES - 9).to_bytes(4, "little") + _filled(b"a"),
    "digits": lambda: b"\x80\x02L" + _filled(b"9") + b"L\n.",
    "long": lambda: b"\x80\x02\x8b" + (LARGE_BYTES - 9).to_bytes(4, "little") + _filled(b"\x7f"),
    "numbers": lambda: b"\x80\x02](" + _filled(b"K\1") + b"e.",
    "items": lambda: b"\x80\x02}(" + _filled(b"K\1K\1") + b"u.",
}
TEXTS_OF_PICTURES: dict[str, Callable[[], str]] = {
    "commas": lambda: "Steps: 1, " + ", " * 400_000,
    "colons": lambda: "a\nSteps: 1" + ", a: " * 150_000,
    "quotes": lambda: "a\nSteps: 1, x: " + '"' * 800_000,
    "escaped quotes": lambda: 'a\nSteps: 1, x: "' + '\\"' * 400_000,
    "half quotes": lambda: "a\nSteps: 1" + ', x: "a' * 100_000,
    "spaces": lambda: "a\nSteps: 1," + " " * 900_000 + "x",
    "lines": lambda: "\n" * 900_000 + "Steps: 1",
    "negatives": lambda: "Negative prompt: " * 60_000,
    "steps": lambda: "Steps: 1" * 100_000,
    "loras": lambda: "<lora:a:1>" * 90_000 + "\nSteps: 1, Seed: 1",
    "lora starts": lambda: "<lora:" * 150_000 + "\nSteps: 1, Seed: 1",
    "brackets": lambda: "(" * 900_000 + "\nSteps: 1, Seed: 1",
    "digits": lambda: "a\nSteps: " + "9" * 900_000,
    "deep": lambda: '{"1": ' + '{"inputs": ' * 90_000,
    "graph": lambda: json.dumps(
        {str(n): {"class_type": "KSampler", "inputs": {"model": [str(n + 1), 0],
         "positive": [str(n + 1), 0]}} for n in range(9_000)}
    ),
    "ring": lambda: json.dumps(
        {str(n): {"class_type": "X", "inputs": {f"i{k}": [str((n + k) % 99), 0] for k in range(99)}}
         for n in range(99)} | {"s": GRAPH["5"] | {"inputs": {"positive": ["0", 0]}}}
    ),
}  # fmt: skip


def _one_picture() -> dict[str, bytes]:
    return {"0.png": SOUND["p.png"][""]}


TABLES: dict[str, Callable[[], bytes]] = {
    "metadata.jsonl": lambda: _filled(b'{"file_name": "0.png", "text": "a"}\n'),
    "metadata.tsv": lambda: (
        b"file_name\ttext\n" + b"".join(b"0.png\t%d\n" % n for n in range(1_000_000))
    ),
    "metadata.csv": lambda: b"file_name,text\n0.png," + _filled(b'"'),
    "0.txt": lambda: _filled(b"a,"),
    "meta.json": lambda: _as_json(b'{"a":{}},'),
    "meta.toml": lambda: _filled(b"[[datasets]]\n"),
    "metadata.parquet": lambda: b"PAR1" + _filled(b"\0") + b"PAR1",
    "9.png": lambda: b"\x89PNG\r\n\x1a\n" + _filled(b"\0"),
}
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "table": lambda: _archive({"metadata.jsonl": b" " * (400 << 20), **_one_picture()}),
    "rows": lambda: _archive({"metadata.csv": b"a\n" * (200 << 20), **_one_picture()}),
    "parquet": lambda: _archive({"metadata.parquet": bytes(400 << 20), **_one_picture()}),
    "caption": lambda: _archive({"0.txt": b"a" * (400 << 20), **_one_picture()}),
    "picture": lambda: _archive({"1.png": bytes(400 << 20), **_one_picture()}),
    "pictures": lambda: _archive({f"{n}.png": bytes(15 << 20) for n in range(30)}),
    "members": lambda: _archive({f"{n}.png": b"" for n in range(10_000)}),
    "toml": lambda: _archive({"dataset.toml": b"#" * (400 << 20), **_one_picture()}),
    "labels": lambda: _archive({"dataset.json": b"[" * (400 << 20), **_one_picture()}),
}


def large(files: Files) -> dict[str, Callable[[], list[str]]]:
    """Command lines about files of up to 16 MB, by what is in them."""
    made: dict[str, Callable[[], list[str]]] = {}

    def add(name: str, words: Callable[[str], list[str]], file: str, data: Any) -> None:
        made[name] = lambda: words(files.write(file, {"": data()}))

    def inspected(path: str) -> list[str]:
        return ["convert", "--inspect", path]

    def merged(path: str) -> list[str]:
        return ["convert", files.text_model, "out", "--lora", path, "--dry-run"]

    def asked(path: str) -> list[str]:
        return ["sample", "-m", files.model(), "--prompts", path]

    def planned(path: str) -> list[str]:
        return ["train", "shapes", "--preset", path, "--print-config"]

    def learned(path: str) -> list[str]:
        return ["sample", "a", "-m", files.text_model, "--steps", "1", "--embedding", path]

    def in_folder(name: str, data: Callable[[], bytes]) -> list[str]:
        model = files.write("m", {**SOUND["text-diffusers"], name: data()})
        return ["convert", model, "out", "--to", "ldm", "--dry-run"]

    def beside(name: str, data: Callable[[], bytes]) -> list[str]:
        pictures = {f"{k}.png": SOUND["p.png"][""] for k in range(3)}
        return ["train", files.write("set", {**pictures, name: data()}), "--dry-run"]

    for name, data in JSONS.items():
        add(f"header {name}", inspected, "m.safetensors", partial(_header, data))
        add(f"metadata {name}", inspected, "m.safetensors", partial(_metadata, data))
        add(f"lora {name}", merged, "l.safetensors", partial(_header, data))
        add(f"line {name}", asked, "p.jsonl", data)
        add(f"preset {name}", planned, "p.yaml", lambda d=data: d()[: 1 << 20])
        for place in PLACES:
            made[f"{place} {name}"] = partial(in_folder, place, data)
    made["merges"] = partial(in_folder, "tokenizer/merges.txt", lambda: _filled(b"a b\n"))
    for name, data in PICKLES.items():
        add(f"pickle {name}", inspected, "m.ckpt", data)
        add(f"archive {name}", inspected, "m.ckpt", partial(_checkpoint, data))
        add(f"word {name}", learned, "m.pt", partial(_checkpoint, data))
    for name, told in TEXTS_OF_PICTURES.items():
        for key in ("parameters", "prompt", "Comment", "difftool"):
            made[f"{key} {name}"] = partial(_of_picture, files, key, told)
    for name, data in ARCHIVES.items():
        add(f"zip {name}", lambda path: ["train", path, "--dry-run"], "set.zip", data)
    for name, data in TABLES.items():
        made[f"table {name}"] = partial(beside, name, data)
    return made


def _of_picture(files: Files, key: str, told: Callable[[], str]) -> list[str]:
    info = PngInfo()
    info.add_itxt(key, told(), zip=True)
    path = files.write("told.png", {"": _picture("PNG", pnginfo=info)})
    return ["sample", "-m", files.model(), "--from-image", path, "--print-config"]
