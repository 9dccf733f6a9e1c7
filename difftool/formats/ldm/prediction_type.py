"""What a single file predicts, and whether its noise path ends in pure noise. Torch-free.

No tensor says so for certain. Whatever speaks of it is collected and told; what two sources say
otherwise of is for the user to settle, and what nobody speaks of is the family's usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import pstdev
from typing import Any, NamedTuple

from difftool.config.families import FAMILIES, Family
from difftool.errors import InputError, UsageError
from difftool.formats.model_source import Evidence, Overrides
from difftool.formats.values import MAX_NUMBERS, numbers
from difftool.storage.tensors import Located

WORDS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}
"""Names of targets in metadata and configuration files."""
BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09
"""SD2's v-models have a larger deviation in that tensor, its eps-models a smaller one (ComfyUI)."""

Find = Callable[[str], Located | None]
"""Where the tensor of that name lies."""


class NoiseTable(NamedTuple):
    """What is decided."""

    target: str
    path: dict[str, Any]
    """Over the path of the family's preset."""
    findings: list[Evidence]
    warnings: list[str]


class _Word(NamedTuple):
    source: str
    target: str | None = None
    zero_snr: bool | None = None


def yaml_beside(path: Path) -> dict[str, Any]:
    """model.params of LDM's configuration file beside a checkpoint; empty if there is none."""
    from difftool.storage.yaml import read_yaml

    file = path.with_suffix(".yaml")
    if not file.is_file():
        return {}
    with suppress(InputError):
        match read_yaml(file):
            case {"model": {"params": dict(params)}}:
                return params
    return {}


def network_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What such a file says of the U-Net."""
    for name in ("unet_config", "network_config"):
        match params.get(name):
            case {"params": dict(network)}:
                return network
    return {}


def decide(
    where: str,
    family: Family,
    metadata: Mapping[str, str],
    params: Mapping[str, Any],
    find: Find,
    overrides: Overrides,
) -> NoiseTable:
    """Target and noise path of a single file; InputError if its evidence contradicts itself."""
    path, findings, warnings = {}, [], []
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    if stranger := _architecture_of_another(architecture, family):
        warnings.append(f"modelspec.architecture says {stranger}; its tensors are of {family.id}")
        metadata = {k: v for k, v in metadata.items() if k != "modelspec.architecture"}
    words = [*_words(metadata, params, find)]
    edm = _edm(find)
    target = overrides.prediction or (edm[0] if edm else None)
    if edm and overrides.prediction is None:
        path, findings = edm[1], [Evidence(edm[2], f"target {edm[0]}, path edm")]
    if overrides.prediction:
        findings.append(Evidence("--prediction", f"target {target}"))
    spoken = {word.target: word.source for word in words if word.target}
    if target is None and len(spoken) > 1:
        why = ", ".join(f"{source} says {word}" for word, source in spoken.items())
        flags = " or ".join(f"--prediction {word}" for word in sorted(spoken, key=str))
        hint = f"settle it with {flags}: difftool convert {where} DST --to ldm"
        raise InputError(f"{where} contradicts itself about what it predicts", why, hint)
    findings += [Evidence(w.source, f"target {w.target}") for w in words if w.target]
    target = target or next(iter(spoken), None)
    if target is None:
        target, source, guess = _usual(family, find)
        findings.append(Evidence(source, f"target {target}{', a guess' * guess}"))
        if guess:
            warnings.append(f"that {where} predicts {target} is a guess ({source}): --prediction")

    zero = [word for word in words if word.zero_snr is not None]
    said = {word.zero_snr for word in zero}
    if overrides.zero_snr is None and len(said) > 1:
        why = ", ".join(f"{w.source}: {'zero' if w.zero_snr else 'not zero'}" for w in zero)
        hint = "settle it with --zero-snr or --no-zero-snr"
        raise InputError(f"{where} contradicts itself about its terminal SNR", why, hint)
    findings += [
        Evidence(w.source, f"terminal SNR {'zero' if w.zero_snr else 'not zero'}") for w in zero
    ]
    if not edm and (overrides.zero_snr if overrides.zero_snr is not None else True in said):
        path["zero_snr"] = True
        if target == "eps":
            why = "zero terminal SNR, at which eps says nothing, with target eps"
            hint = "--prediction v or --no-zero-snr settles it"
            if overrides.prediction or overrides.zero_snr:
                raise UsageError("target eps and zero terminal SNR exclude each other", hint=hint)
            raise InputError(f"{where} contradicts itself", why, hint)
    elif not edm and not family.path and (betas := _custom_betas(find)):
        path |= {"kind": "discrete", "betas": betas}
        findings.append(Evidence("alphas_cumprod", "a noise schedule of its own"))
    return NoiseTable(target, path, findings, warnings)


def _architecture_of_another(architecture: str, family: Family) -> str | None:
    """ModelSpec's word for a family of other networks than a file's."""
    for row in FAMILIES.values():
        named = architecture and architecture in (row.modelspec, row.modelspec_v)
        if named and family.id in FAMILIES and row.encoders != family.encoders:
            return architecture
    return None


def _words(metadata: Mapping[str, str], params: Mapping[str, Any], find: Find) -> Iterator[_Word]:
    """What is said outright."""
    if find("v_pred"):
        yield _Word("the tensor v_pred", "v")
    if find("ztsnr"):
        yield _Word("the tensor ztsnr", zero_snr=True)
    if target := WORDS.get(metadata.get("modelspec.prediction_type", "").lower()):
        yield _Word("modelspec.prediction_type", target)
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    if ends := next((e for e in ("v2-768-v", "v2-512") if architecture.endswith(e)), None):
        yield _Word("modelspec.architecture", "v" if ends == "v2-768-v" else "eps")
    if metadata.get("ss_base_model_version", "").endswith("_v"):
        yield _Word("ss_base_model_version", "v")
    if metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        yield _Word("ss_zero_terminal_snr", zero_snr=True)
    if target := WORDS.get(str(params.get("parameterization", "")).lower()):
        yield _Word("the .yaml beside it", target)
    denoiser = str(params.get("denoiser_config", ""))
    for scaling, target in (("VScaling", "v"), ("EpsScaling", "eps")):
        if scaling in denoiser and "EDM" not in denoiser:
            yield _Word("the .yaml beside it", target)
    if (bars := _bars(find)) and bars[-1] < 1e-6:
        yield _Word("alphas_cumprod", zero_snr=True)


def _edm(find: Find) -> tuple[str, dict[str, Any], str] | None:
    """Target, path and source of the models that are trained in EDM's way."""
    if find("edm_mean") and find("edm_std"):  # Playground 2.5
        path = {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        return "edm", path, "the tensors edm_mean, edm_std"
    if (low := find("edm_vpred.sigma_min")) and (high := find("edm_vpred.sigma_max")):  # CosXL
        ends = [*numbers(low), *numbers(high)]
        if len(ends) == 2 and 0 < ends[0] < ends[1]:
            path = {"kind": "edm", "sigma_data": 1.0, "sigma_min": ends[0], "sigma_max": ends[1]}
            return "edm_v", path, "the tensors edm_vpred"
    return None


def _usual(family: Family, find: Find) -> tuple[str, str, bool]:
    """Target, what tells, and whether that is a guess, where nothing is said."""
    usual = family.targets[0]
    if len(family.targets) > 1:
        bias = find(BIAS)
        if bias is not None and (values := numbers(bias)):
            deviation = pstdev(values)
            target = "v" if deviation > V_DEVIATION else "eps"
            return target, f"norm1.bias deviates by {deviation:.3f}", True
        return usual, f"nothing says so, family {family.id} has both", True
    always = "which always has it" if usual == "v" else "unless something says otherwise"
    return usual, f"family {family.id}, {always}", False


def _bars(find: Find) -> list[float]:
    """The cumulative alphas, if they are there whole."""
    place = find("alphas_cumprod")
    if place is None or place.info.dtype not in ("F32", "F64") or len(place.info.shape) != 1:
        return []  # a cast has spoilt others
    bars = numbers(place) if 2 <= place.info.shape[0] <= MAX_NUMBERS else []
    return bars if all(0 <= bar <= 1 for bar in bars) else []


def _custom_betas(find: Find) -> list[float]:
    """The betas of a buffer that is not Stable Diffusion's; empty if it is."""
    from difftool.diffusion.path import build_path

    bars = _bars(find)
    usual = build_path({"kind": "scaled_linear"})
    same = len(bars) == 1000 and all(
        abs(usual.level(t).alpha ** 2 - bar) < 1e-5 for t, bar in enumerate(bars)
    )
    if not bars or same:
        return []
    pairs = zip([1.0, *bars], bars, strict=False)
    betas = [1 - bar / before if before else 1.0 for before, bar in pairs]
    return betas if all(0 < beta < 1 for beta in betas) else []
