"""A1111's `parameters` text: prompt, negative prompt, and one line of settings. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from difftool.diffusion.samplers import SAMPLERS, spelled
from difftool.errors import InputError
from difftool.sampling.metadata.found import Found, needs_a1111
from difftool.sampling.requests import Request, request_of
from difftool.sampling.settings import A1111_WORDS, Values
from difftool.version import __version__

ORDER = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model"),
    *("Image CFG scale", "Denoising strength", "Clip skip", "Refiner", "Lora hashes"),
    *("Hires upscale", "Hires steps", "Hires upscaler"),
    *("Mask mode", "Masked content", "Mask blur", "Inpaint area", "Masked area padding"),
    *("Variation seed", "Variation seed strength", "RNG", "ENSD", "Token merging ratio"),
    *("Class", "Tiling", "Template", "Negative Template", "Version"),
)
"""Of the words on the line; any other comes after them."""
NEGATIVE = "Negative prompt:"


def parameters(values: Values) -> str:
    """The text of a picture of these values."""
    words: dict[str, Any] = {
        "Model hash": values["model_hash"] or None,
        "Version": f"difftool-{__version__}",
    }
    for word, (row, dialect) in A1111_WORDS.items():
        value = values.get(row.name)
        if value is not None and (row.effect is None or row.effect(values)):
            words[word] = dialect.write(value)
    if values["hires"] > 1 and values["init"] is None:
        words["Denoising strength"] = values["hires_strength"]
    if (eta := values["sampler_options"].get("eta")) is not None:
        words["Eta DDIM" if values["sampler"] == "ddim" else "Eta"] = f"{eta:g}"
    known = [word for word in ORDER if word in words]
    known += [word for word in words if word not in ORDER]
    line = ", ".join(f"{word}: {_quoted(v)}" for word in known if (v := words[word]) is not None)
    negative = f"{NEGATIVE} {values['negative']}" if values["negative"] else ""
    return "\n".join(part for part in (values["prompt"], negative, line) if part)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


# As A1111 reads the line back, but that a word has an end: a long text without a colon would be
# gone through again from each of its letters.
_PARAMETER = re.compile(r'(\w[\w \-/]{1,80}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


_STEPS = re.compile(r"Steps: \d")
_TEMPLATE = re.compile(r"^((?:Negative )?Template): ?", re.M)


def parse_parameters(text: str) -> dict[str, str]:
    """The text as values by word; "Prompt" and "Negative prompt" are among them.

    Settings begin at the last line that begins with "Steps:", and may go on over several, or are
    the last line, if it has any. The extension of dynamic prompts adds its templates behind them.
    """
    text, *templates = _TEMPLATE.split(text.strip())
    lines = text.split("\n")
    begin = max((i for i, line in enumerate(lines) if _STEPS.match(line)), default=len(lines) - 1)
    pairs = _PARAMETER.findall("\n".join(lines[begin:]))
    if len(pairs) < 3:
        begin, pairs = len(lines), []
    lines = lines[:begin]
    pairs += zip(templates[::2], templates[1::2], strict=True)
    cut = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    values = {
        "Prompt": "\n".join(lines[:cut]).strip(),
        "Negative prompt": "\n".join(lines[cut:]).removeprefix(NEGATIVE).strip(),
    }
    return values | {word: _unquoted(value.strip()) for word, value in pairs}


def _unquoted(value: str) -> str:
    try:
        return json.loads(value, strict=False) if value.startswith('"') else value
    except ValueError:
        return value


def from_parameters(text: str, source: str) -> Request:
    """The request in the text; what is not understood is listed in it. InputError if it is none of
    A1111's."""
    words, found = parse_parameters(text), Found(source)
    read: dict[str, Any] = {}
    for word, (row, dialect) in A1111_WORDS.items():
        if dialect.read is None or word not in words:
            continue
        value = None
        with suppress(ValueError):
            value = dialect.read(words[word])
        if value is not None:
            read[row.name] = value
        elif words[word]:
            found.miss(f"{word}: {words[word][:60]}")
    if "seed" not in read:
        why = f"its settings have no seed ({words['Seed'][:60]})" if "Seed" in words else None
        why = why or f'it is not text of A1111\'s: "{text[:60]}"'
        raise InputError(f"the parameters of {source} cannot be read", why)
    if "strength" in read and read.get("hires", 1.0) > 1:
        read["hires_strength"] = read.pop("strength")
    read |= {"prompt": words["Prompt"], "negative": words["Negative prompt"]}
    if not words.get("Version", "").startswith("difftool"):
        _as_a1111(words, read, found)
    request = request_of(spelled(read), model_hash=words.get("Model hash", ""))
    return replace(
        request, missed=tuple(found.missed), loras=tuple(found.loras), named=tuple(found.named),
        sought=tuple(found.sought),
        made_by=_tool(words.get("Version", "")), model=words.get("Model", ""),
    )  # fmt: skip


def _tool(version: str) -> str:
    """The tool of a version: Forge's begins with f, others of A1111's text have their names."""
    name = re.match(r"(difftool|stable-diffusion\.cpp|ComfyUI|Fooocus|InvokeAI)\b-?(.*)", version)
    if name:
        return f"{name[1]} {name[2].strip()}".strip()
    return f"{'Forge' if re.match(r'f[0-9]|neo', version) else 'A1111'} {version}".strip()


SILENT = frozenset(A1111_WORDS) | {
    *("Prompt", "Negative prompt", "Model hash", "Version", "VAE hash", "User", "Hashes"),
    *("TI hashes", "Batch size", "Batch pos", "Time taken", "Civitai resources", "App"),
    *("Civitai metadata", "Created Date", "VAE", "Backend"),
    *("Pipeline", "Operations", "Job timestamp", "Eta", "Eta DDIM"),
}
"""Words that change nothing, or are looked at one by one."""
_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^<>:]+)((?::[^<>:]*)*)>")


def _as_a1111(words: Mapping[str, str], read: dict[str, Any], found: Found) -> None:
    """What A1111's text says beyond the settings that difftool has, taken over or listed."""
    version = re.search(r"v?1\.(\d+)", words.get("Version", ""))
    if "Schedule type" not in words and version and "schedule" not in spelled(read):
        read["schedule"] = "Automatic" if int(version[1]) >= 9 else "normal"
    pairs = (pair.partition(":") for pair in words.get("Lora hashes", "").split(","))
    digests = {name.strip(): digest.strip() for name, _, digest in pairs}
    for kind, name, rest in _NETWORK.findall(read["prompt"]):
        if kind == "hypernet":
            found.miss(f"the hypernetwork {name}")
            continue
        weight, *others = _weights(rest)
        found.lora(name, weight, digests.get(name, ""))
        if any(other != weight for other in others):
            found.miss(f"the weights {rest[1:]} of {name} but the first")
    read["prompt"] = _NETWORK.sub("", read["prompt"]).strip()
    if needs_a1111(read["prompt"], read["negative"]):
        read["prompt_syntax"] = "a1111"
    for word in words.get("TI hashes", "").split(","):
        if name := word.partition(":")[0].strip():
            found.miss(f"the embedding {name}: --embedding", "embedding")
    if words.get("VAE") not in (None, "None", "Automatic"):
        found.miss(f"the VAE {words['VAE']}: --vae", "vae")
    if "strength" in read:
        found.started_from()
    options = SAMPLERS[spelled(read)["sampler"]].options if "sampler" in read else {}
    for word in (word for word in ("Eta", "Eta DDIM") if word in words):
        if "eta" in options and re.fullmatch(r"[01](\.\d+)?", words[word]):
            read["eta"] = float(words[word])
        else:
            found.miss(f"{word}: {words[word]}")
    if version and "RNG" not in words:
        read["rng"] = "gpu"  # which is not written
    if words.get("Refiner"):
        found.miss(f"Refiner: {words['Refiner']}: --refiner", "refiner")
    for word, value in words.items():
        if word not in SILENT and (word, value) != ("Emphasis", "Original"):
            found.miss(f"{word}: {value[:60]}")


def _weights(rest: str) -> list[float]:
    """The numbers of <lora:NAME:0.8:...>; 1 where there are none."""
    texts = [part.rpartition("=")[2] for part in rest.split(":")[1:]]
    numbers = [float(t) for t in texts if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*", t)]
    return numbers or [1.0]
