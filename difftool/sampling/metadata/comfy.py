"""ComfyUI's `prompt`: the graph of nodes that made a picture, of which the usual ones are read.
Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from difftool.errors import InputError
from difftool.sampling.metadata.found import Found
from difftool.sampling.requests import Request
from difftool.storage.strict_json import parse_json

KNOWN = frozenset(
    "KSampler KSamplerAdvanced SamplerCustom SamplerCustomAdvanced RandomNoise CFGGuider "
    "BasicGuider KSamplerSelect BasicScheduler KarrasScheduler CheckpointLoaderSimple "
    "CheckpointLoader UNETLoader CLIPLoader DualCLIPLoader CLIPTextEncode "
    "CLIPTextEncodeSDXL EmptyLatentImage LoraLoader "
    "LoraLoaderModelOnly CLIPSetLastLayer VAEDecode VAEDecodeTiled VAEEncode LoadImage SaveImage "
    "PreviewImage SaveAnimatedWEBP PrimitiveNode PrimitiveInt PrimitiveFloat PrimitiveString "
    "PrimitiveStringMultiline Reroute Note".split()
)
"""The nodes that are understood."""
SCHEDULERS = {"KarrasScheduler": "karras"}
MAX_NODES = 10_000
MAX_LINKS = 1_000_000
"""Followed in reading one graph; a large one of a person's has a hundredth."""


class _Graph:
    """Nodes by name, each with its class and its inputs: values, or links to nodes."""

    def __init__(self, nodes: Mapping[str, Any], source: str):
        self.source, self.followed = source, 0
        self.nodes = {
            str(name): (str(node.get("class_type")), node["inputs"])
            for name, node in nodes.items()
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        }
        if not self.nodes or len(self.nodes) > MAX_NODES:
            raise InputError(f"the ComfyUI graph of {source} cannot be read", f"{len(nodes)} nodes")

    def linked(self, value: Any) -> str | None:
        """The node that a value links to."""
        link = value[0] if isinstance(value, list) and len(value) == 2 else None
        return str(link) if str(link) in self.nodes else None

    def above(self, *starts: str | None) -> Iterator[str]:
        """Nodes and all that they are made of, the nearest to the first one first."""
        seen: set[str] = set()
        for start in starts:
            ahead = deque([start])
            while ahead:
                name = ahead.popleft()
                if name is None or name in seen:
                    continue
                seen.add(name)
                yield name
                self.followed += len(self.nodes[name][1]) + 1
                if self.followed > MAX_LINKS:
                    what = f"the ComfyUI graph of {self.source} cannot be read"
                    raise InputError(what, "its nodes are linked without end")
                ahead += [self.linked(value) for value in self.nodes[name][1].values()]

    def value(self, start: str, *keys: str, kind: Any = object) -> Any:
        """The first input of such a name and type, of a node or of what it is made of."""
        for name in self.above(start):
            for key in keys:
                value = self.nodes[name][1].get(key)
                if isinstance(value, kind) and not isinstance(value, bool | list):
                    return value
        return None

    def input(self, name: str, *keys: str, kind: Any = object) -> Any:
        """An input of that node, which may be linked to a node of a single value."""
        inputs = self.nodes[name][1]
        for key in keys:
            value = inputs.get(key)
            if (link := self.linked(value)) is not None:
                value = self.value(link, key, "value", "text", "string", "int", "float", kind=kind)
            if isinstance(value, kind) and not isinstance(value, bool | list):
                return value
        return None


def from_graph(text: str, source: str) -> Request:
    """The request in a graph; InputError for one in which nothing samples."""
    nodes = parse_json(text, f"the ComfyUI graph of {source}", infinite=True, lenient=True)
    graph = _Graph(nodes if isinstance(nodes, dict) else {}, source)
    found = Found(source, made_by="ComfyUI")
    ends = [n for n, (kind, _) in graph.nodes.items() if kind.startswith(("Save", "Preview"))]
    used = dict.fromkeys(graph.above(*(ends or graph.nodes)))
    samplers = [name for name in used if _samples(graph.nodes[name][1])]
    if not samplers:
        what = f"the ComfyUI graph of {source} cannot be read"
        raise InputError(what, "no node of it is a sampler that is known")
    alone = (s for s in samplers if not {*graph.above(s)} & ({*samplers} - {s}))
    first = next(alone, samplers[0])
    _sampling(graph, first, found)
    _prompts(graph, first, found)
    _start(graph, first, found)
    _model(graph, first, found)
    if len(samplers) > 1:
        found.miss(f"{len(samplers) - 1} more passes of a sampler")
    for name in used:
        if (kind := graph.nodes[name][0]) not in KNOWN and name not in samplers:
            found.miss(f"the node {kind[:40]}", "vae" if kind == "VAELoader" else "")
    return found.request()


def _samples(inputs: Mapping[str, Any]) -> bool:
    seeded = {"seed", "noise_seed"} & inputs.keys() and {"sampler_name", "sampler"} & inputs.keys()
    return bool(seeded) or {"noise", "guider", "sampler", "sigmas"} <= inputs.keys()


def _sampling(graph: _Graph, sampler: str, found: Found) -> None:
    """Seed, steps, guidance, sampler and schedule."""
    number = int | float
    steps = graph.input(sampler, "steps", kind=number) or graph.value(sampler, "steps", kind=int)
    scheduler = graph.value(sampler, "scheduler", kind=str)
    if scheduler is None:
        kinds = (graph.nodes[name][0] for name in graph.above(sampler))
        scheduler = next((SCHEDULERS[kind] for kind in kinds if kind in SCHEDULERS), None)
    seed = graph.input(sampler, "seed", "noise_seed", kind=int)
    unguided = any(graph.nodes[name][0] == "BasicGuider" for name in graph.above(sampler))
    found.asked |= {
        "seed": graph.value(sampler, "noise_seed", "seed", kind=int) if seed is None else seed,
        "steps": steps,
        "cfg_scale": 1.0 if unguided else graph.value(sampler, "cfg", kind=number),
        "sampler_name": graph.value(sampler, "sampler_name", kind=str),
        "scheduler": scheduler,
        "prompt_syntax": "comfy",
    }
    start, end = (graph.input(sampler, f"{at}_at_step", kind=int) for at in ("start", "end"))
    if start or (end is not None and steps is not None and end < steps):
        found.miss(f"steps from {start or 0} to {end}")


def _prompts(graph: _Graph, sampler: str, found: Found) -> None:
    for key, role in (("prompt", "positive"), ("negative_prompt", "negative")):
        inputs = [graph.nodes[name][1] for name in graph.above(sampler)]
        also = "conditioning" if role == "positive" else role
        links = [graph.linked(each.get(role, each.get(also))) for each in inputs]
        link = next(filter(None, links), None)
        encoders = [] if link is None else [n for n in graph.above(link) if _encodes(graph, n)]
        texts = [
            [t for k in ("text", "text_g", "text_l") if (t := graph.input(n, k, kind=str))]
            for n in encoders
        ]
        told = [text for each in texts for text in dict.fromkeys(each)]
        found.asked[key] = told[0] if told else ""
        for more in dict.fromkeys(told[1:]):
            found.miss(f'the {role} prompt "{more[:40]}"')


def _encodes(graph: _Graph, name: str) -> bool:
    kind, inputs = graph.nodes[name]
    return "clip" in inputs and bool({"text", "text_g"} & inputs.keys()) and "Encode" in kind


def _start(graph: _Graph, sampler: str, found: Found) -> None:
    """Size, or the picture that it starts from."""
    start = graph.linked(graph.nodes[sampler][1].get("latent_image"))
    denoise = graph.value(sampler, "denoise", kind=int | float)
    above = [] if start is None else [*graph.above(start)]
    if any("pixels" in graph.nodes[name][1] for name in above):
        found.started_from(denoise)
    elif start is not None:
        for side in ("width", "height"):
            found.asked[side] = graph.input(start, side, kind=int) or graph.value(
                start, side, kind=int
            )
        if (count := graph.input(start, "batch_size", kind=int) or 1) > 1:
            found.miss(f"which of a batch of {count} it is")
        if denoise is not None and denoise < 1:
            found.miss(f"denoise {denoise:g}")


def _model(graph: _Graph, sampler: str, found: Found) -> None:
    """The model's name, LoRAs, and the layer of the text encoder."""
    for name in graph.above(sampler):
        kind, inputs = graph.nodes[name]
        for key in ("ckpt_name", "unet_name"):
            if not found.model and isinstance(inputs.get(key), str):
                found.model = inputs[key]
        if isinstance(inputs.get("lora_name"), str):
            weight = graph.input(name, "strength_model", kind=int | float)
            found.lora(inputs["lora_name"], 1.0 if weight is None else float(weight))
            clip = graph.input(name, "strength_clip", kind=int | float)
            if clip not in (None, weight):
                found.miss(f"the LoRA's weight {clip:g} in the text encoder")
        if kind == "CLIPSetLastLayer":
            layer = graph.input(name, "stop_at_clip_layer", kind=int)
            found.asked["clip_skip"] = None if layer is None or layer >= 0 else -layer
