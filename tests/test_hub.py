"""Models by their names at the hub: from a cache made here, and from a hub that runs here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT
from conversions import convert
from ldm_models import write

from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.hub.find import find_model
from difftool.hub.hub import HubName, cache_folder, cached, choose, parse_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUNDLED = Path(__file__).parent.parent / "presets/shapes/model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as a folder of diffusers."""
    place = tmp_path_factory.mktemp("model") / "tiny"
    convert(open_model(BUNDLED), place, "diffusers")
    return place


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, without network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def put(cache: Path, repo: str, files: dict[str, Path | bytes], ref: str = "main") -> Path:
    """Lay a repository into the cache as the hub's package does, files as links; its snapshot."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = place / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(COMMIT)
    return snapshot


def listing(folder: Path) -> dict[str, Path | bytes]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


# --- names ------------------------------------------------------------------------------------


def test_names_of_the_hub_are_told_from_files():
    assert parse_name("org/name") == HubName("org/name", "main", None)
    assert parse_name("org/na.me-1@refs/pr/2") == HubName("org/na.me-1", "refs/pr/2", None)
    assert parse_name("org/name:a/b.ckpt") == HubName("org/name", "main", "a/b.ckpt")
    assert parse_name("org/name@v1:b.ckpt") == HubName("org/name", "v1", "b.ckpt")
    for other in (
        *("name", "./name", "a/b/c", "/a/b", "org/m.safetensors", "org/..", "../name", "-a/b"),
        *("org/name@../../x", "org/name:../x", "org/name:a/../../x", "org/name@", r"org\name", ""),
    ):
        assert parse_name(other) is None, other


REPOSITORY = [
    *("model_index.json", "README.md", "sd_xl_base_1.0.safetensors", "handler.py"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"),
    *("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/model.onnx"),
    *("unet/diffusion_pytorch_model-00002-of-00002.safetensors", "unet/custom.py"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"),
    *("vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"),
    *("vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.fp16.safetensors"),
    *("text_encoder/pytorch_model.bin", "safety_checker/model.safetensors"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "scheduler/scheduler_config.json"),
]


def test_only_what_a_model_needs_is_chosen():
    common = {
        "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    }  # fmt: skip
    shards = {name for name in REPOSITORY if "-of-" in name or "index.json" in name}
    chosen = choose(REPOSITORY, None)
    assert chosen.target == ""
    pickled = {"vae/diffusion_pytorch_model.bin"}  # there is nothing else
    assert set(chosen.files) == common | shards | pickled
    halved = {"vae/diffusion_pytorch_model.fp16.bin", REPOSITORY[10]}
    assert set(choose(REPOSITORY, None, half=True).files) == common | halved
    single = choose(REPOSITORY, "sd_xl_base_1.0.safetensors")
    assert single == ("sd_xl_base_1.0.safetensors", ["sd_xl_base_1.0.safetensors"])


def test_variants_of_shards_are_not_mixed():
    names = ["model_index.json", "unet/config.json"]
    stem = "unet/diffusion_pytorch_model"
    names += [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"]
    full = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    half = [f"{stem}.fp16-00001-of-00002.safetensors", f"{stem}-00002-of-00002.fp16.safetensors"]
    chosen = choose([*names, *full, *half], None)
    assert {n for n in chosen.files if "-of-" in n} == set(full)
    chosen = choose([*names, *full, *half], None, half=True)
    assert {n for n in chosen.files if "-of-" in n} == set(half)


def test_single_files_are_chosen_where_there_is_one():
    assert choose(["a.ckpt", "m.safetensors", "README.md"], None).target == "m.safetensors"
    assert choose(["a.ckpt", "b/c.safetensors"], None).target == "a.ckpt"
    native = ["m.safetensors.index.json", "m-00001-of-00001.safetensors"]
    assert choose(native, None) == (native[0], native)
    vae = ["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    assert choose(vae, None) == ("", [vae[0], vae[2]])
    with pytest.raises(UsageError, match=r"several models[\s\S]*a\.safetensors, b\.safetensors"):
        choose(["a.safetensors", "b.safetensors"], None)
    for names, file in ((["README.md"], None), (["a.ckpt"], "b.ckpt")):
        with pytest.raises(UsageError):
            choose(names, file)


# --- the cache --------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache/huggingface/hub"
    for name, value, found in (
        ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
        ("HF_HOME", "/h", "/h/hub"),
        ("HUGGINGFACE_HUB_CACHE", "/old", "/old"),
        ("HF_HUB_CACHE", "/c", "/c"),
    ):
        monkeypatch.setenv(name, value)
        assert cache_folder() == Path(found)


def test_models_in_the_cache_are_opened(cache, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = put(cache, "org/tiny", listing(folder))
    assert find_model("org/tiny") == snapshot
    assert find_model(f"org/tiny@{COMMIT}") == snapshot
    source = open_model(find_model("org/tiny"))
    assert source.values == open_model(folder).values
    put(cache, "org/single", {"a/m.safetensors": BUNDLED}, ref="refs/pr/1")
    where = find_model("org/single@refs/pr/1:a/m.safetensors")
    assert open_model(where).kind == "difftool"
    with pytest.raises(UsageError, match="there is no model"):
        find_model("org/single:a/m.safetensors")  # of no main revision
    with pytest.raises(UsageError, match="there is no model"):
        find_model("org/single@refs/pr/1:other.safetensors")
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert find_model("org/tiny") == Path("org/tiny"), "what is here wins"


def test_a_model_is_called_as_at_the_hub(cache, tmp_path):
    write(tmp_path / "m.safetensors", "sd1")
    convert(open_model(tmp_path / "m.safetensors"), tmp_path / "m", "diffusers")
    files = {n: p for n, p in listing(tmp_path / "m").items() if not n.startswith("difftool_extra")}
    put(cache, "org/some--model", files)
    assert open_model(find_model("org/some--model")).values["name"] == "model"
    put(cache, "org/tiny", files)
    assert open_model(find_model("org/tiny")).values["name"] == "tiny"


@pytest.mark.parametrize(
    "part", ["unet/diffusion", "text_encoder_2/model", "scheduler", "tokenizer"]
)
def test_what_is_not_whole_is_not_taken(cache, folder, part):
    files = {name: path for name, path in listing(folder).items() if not name.startswith(part)}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if part == "tokenizer":
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    put(cache, "org/tiny", files | {"model_index.json": json.dumps(index).encode()})
    assert cached(HubName("org/tiny", "main", None)) is None


def test_what_the_cache_says_leads_nowhere_else(cache, tmp_path):
    put(cache, "org/tiny", {"m.safetensors": BUNDLED})
    (tmp_path / "out").mkdir()
    (cache / "models--org--tiny/refs/main").write_text("../../../out")
    assert cached(HubName("org/tiny", "main", None)) is None


def test_offline_names_that_are_not_there_are_exit_2(difftool, folder):
    ran = difftool("sample", "x", "-m", "org/name", "--offline")
    assert ran.code == 2 and 'there is no model "org/name"' in ran.err
    assert "neither here nor in the hub's cache" in ran.err and len(ran.err.splitlines()) <= 4
    for command in (["convert", "org/name", "--inspect"], ["noise", "--curve", "--model", "o/n"]):
        ran = difftool(*command)
        assert ran.code == 2 and "hub's cache" in ran.err, ran.err
    cache = Path(os.environ["HF_HUB_CACHE"])
    put(cache, "org/tiny", listing(folder))
    ran = difftool("convert", "org/tiny", "--inspect", "--json", "--offline")
    assert ran.code == 0 and ran.object["format"] == "diffusers"
    ran = difftool("sample", "a red circle", "-m", "org/tiny", "--steps", 1, "--offline")
    assert ran.code == 0, ran.err
    Path("nowhere").mkdir()
    ran = difftool("sample", "x", "-m", "nowhere/model")
    assert ran.code == 2 and "it is no name at the hub" in ran.err


# --- the network ------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub as its package asks for."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.asked = folder, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            files = listing(self.server.folder)
            tree = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in files]
            self.answer(json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/org/tiny"):
            names = [{"rfilename": name} for name in listing(self.server.folder)]
            about = {"id": "org/tiny", "sha": COMMIT, "siblings": names, "private": False}
            self.answer(json.dumps(about).encode(), body)
        elif path.startswith("/org/tiny/resolve/"):
            name = path.split("/", 5)[5]
            if body:
                self.server.asked.append(name)
            self.answer((self.server.folder / name).read_bytes(), body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def answer(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(folder) -> Iterator[Hub]:
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def inspect(name: str, where: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's package reads its address once."""
    kept = {k: v for k, v in ENVIRONMENT.items() if "proxy" not in k.lower()}
    environment = kept | {
        "HF_ENDPOINT": address, "HF_HOME": str(where), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(key, None)
    command = [sys.executable, "-m", "difftool", "convert", name, "--inspect", "--json", *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=where)


def test_models_are_downloaded_once(hub, folder, tmp_path):
    (folder / "unet/custom.py").write_text("raise SystemExit('run')")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"never asked for")
    first = inspect("org/tiny", tmp_path, hub.address)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["format"] == "diffusers"
    assert "unet/diffusion_pytorch_model.safetensors" in hub.asked
    assert not [name for name in hub.asked if name.endswith((".py", ".bin"))]
    hub.asked.clear()
    gone = "http://127.0.0.1:9"  # nobody answers there
    again = inspect("org/tiny", tmp_path, gone)
    assert again.stdout == first.stdout and not hub.asked
    unreachable = inspect("org/other", tmp_path, gone)
    assert unreachable.returncode == 2 and "the hub did not give it" in unreachable.stdout
    error = json.loads(unreachable.stdout)["error"]
    assert error["code"] == 2 and 'no model "org/other"' in error["message"]
    unknown = inspect("org/other", tmp_path, hub.address)
    assert unknown.returncode == 2 and "nor at the hub" in unknown.stdout, unknown


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"not installed[\s\S]*pip install 'difftool\[hub\]'"):
        find_model("org/name")
