"""A second device for tests: memory of the CPU that does not mix with the CPU's own.

Where no accelerator is at hand, this one shows what would fail on one: tensors of two devices in
one operation, numbers of a dtype that the device lacks (Apple's MPS has no float64), waits of the
host for the device, and memory that gives out. It is installed once a process, so this file is also
a program: it runs commands on the CPU and on the device, and says of each what came of it.

    python second_device.py [--no-doubles] COMMANDS.json

COMMANDS.json is a list of {"words", "refuses"}, the second as REFUSES.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
WAITS: Counter[str] = Counter()
"""How often the host waited for the device, by operation."""
DOUBLES = True
"""Whether the device has float64."""

REFUSES: dict[str, int] = {}
"""What a convolution on the device has no memory for: more pictures than "batch", or more "rows"
of each."""
REFUSED: Counter[str] = Counter()
"""How often it had none."""

_ACROSS = ("_to_copy", "copy_", "_copy_from")
_WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
_HALVED = ("conv2d", "linear", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention")
_WHOLE = ("group_norm", "layer_norm", "softmax.int", "mse_loss")
"""Of autocast on a GPU: what is computed in the smaller type, and what in fp32."""


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.raw!r})"

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: OnDevice) -> None:
        self.raw = other.raw

    def tolist(self) -> Any:
        WAITS["tolist"] += 1
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _wrap(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
        if value.dtype == torch.float64 and not DOUBLES:
            raise TypeError(f"a tensor of {NAME} cannot be float64: the device has none")
        return OnDevice(value)
    return value


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of all that arguments have in them."""
    if isinstance(value, dict):
        return {key: _map(function, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(function, each) for each in value)
    return function(value)


def _run(func, args, kwargs):
    name = func.overloadpacket.__name__
    tensors: list[torch.Tensor] = []
    _map(lambda v: tensors.append(v) if isinstance(v, torch.Tensor) else None, (args, kwargs))
    ours = [v for v in tensors if isinstance(v, OnDevice)]
    if name in _WAITING:
        WAITS[name] += 1
    _check_room(name, args)
    if name.startswith("index") and ours:
        _map(_count_index, args[1])
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == NAME
    if to_device:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain = _map(_raw, args), _map(_raw, kwargs)
    if name in _ACROSS:
        return _across(func, args, kwargs, to_device, (plain_args, plain))
    foreign = [v for v in tensors if not isinstance(v, OnDevice) and v.dim()]
    if ours and foreign and not name.startswith(("index", "_index")):
        raise RuntimeError(f"{name}: tensors of two devices, {NAME} and {foreign[0].device}")
    out = func(*plain_args, **plain)
    if not ours and not to_device:
        return out
    back = {id(v.raw): v for v in ours}  # what is changed in place stays the same tensor
    return _map(lambda v: back.get(id(v)) if id(v) in back else _wrap(v), out)


def _across(func, args, kwargs, to_device: bool, plain):
    """What brings a tensor from one device to another, or to another type where it is."""
    if func.overloadpacket.__name__ != "_to_copy":
        target, source = args[0], args[1]
        later = (*args, False)[2] or kwargs.get("non_blocking", False)
        to_host = not isinstance(target, OnDevice)
        if to_host == isinstance(source, OnDevice) and (to_host or not later):
            WAITS["to the host" if to_host else "to the device"] += 1
        func(*plain[0], **plain[1])
        return target
    device = kwargs.get("device")
    ours = isinstance(args[0], OnDevice)
    if ours and device is not None and not to_device:
        WAITS["to the host"] += 1
    if not ours and to_device and not kwargs.get("non_blocking"):
        WAITS["to the device"] += 1
    out = func(*plain[0], **plain[1])
    return _wrap(out) if to_device or (ours and device is None) else out


def _check_room(name: str, args: tuple[Any, ...]) -> None:
    """torch.OutOfMemoryError for what the device refuses."""
    if name != "convolution" or not isinstance(args[0], OnDevice) or args[0].dim() != 4:
        return
    sizes = {"batch": args[0].shape[0], "rows": args[0].shape[2]}
    for kind, most in REFUSES.items():
        if sizes[kind] > most:
            REFUSED[kind] += 1
            raise torch.OutOfMemoryError(f"{NAME} is out of memory: {sizes[kind]} {kind}")


def _count_index(index: Any) -> None:
    """What has to be looked at, or brought to the device, before it is used."""
    if isinstance(index, torch.Tensor) and (
        index.dtype == torch.bool or (index.dim() > 0 and not isinstance(index, OnDevice))
    ):
        WAITS["indices"] += 1


def _autocast() -> None:
    """Autocast on the device as CUDA's is: each operation in the one type or the other."""
    for name in (*_HALVED, *_WHOLE):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        _AUTOCAST.impl(name, _in_type(op, whole=name in _WHOLE), "AutocastPrivateUse1")


def _in_type(op: Any, *, whole: bool) -> Callable[..., Any]:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if whole else torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating and value.device.type == NAME else value

        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*_map(cast, args), **_map(cast, kwargs))

    return run


def install(*, doubles: bool = True) -> None:
    """Have torch know the device of this name. Once a process."""
    global DOUBLES, _LIBRARY, _AUTOCAST
    DOUBLES = doubles
    module = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, current_device=lambda: 0,
        device_count=lambda: 1, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.zeros(1, dtype=torch.uint8),
        set_rng_state=lambda state, device=None: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )  # fmt: skip
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _LIBRARY = torch.library.Library("_", "IMPL")
    _LIBRARY.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _AUTOCAST = torch.library.Library("aten", "IMPL")
    _autocast()
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        # torch asserts inside for devices of this kind.
        out = made(data, **options)
        return out if device is None else out.to(device)

    torch.tensor = tensor
    # Otherwise a module that is moved to another memory layout keeps the numbers in the old one.
    torch.__future__.set_swap_module_params_on_conversion(True)


_LIBRARY: torch.library.Library | None = None
_AUTOCAST: Any = None


class Told:
    """What is seen of a command's steps: how often each of them waited for the device."""

    def __init__(self) -> None:
        self.waits: list[list[int]] = []
        """Of each batch of pictures, or of a training."""

    def steps(self, generate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The same generator of steps, counted."""

        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            made, waits = generate(*args, **options), []
            self.waits.append(waits)
            while True:
                before = WAITS.total()
                step = next(made, None)
                if step is None:
                    return
                waits.append(WAITS.total() - before)
                yield step

        return counted

    def calls(self, advance: Callable[[Any], None]) -> Callable[[Any], None]:
        """The same method that takes a step, counted."""
        waits: list[int] = []
        self.waits.append(waits)

        def counted(trainer: Any) -> None:
            before = WAITS.total()
            advance(trainer)
            waits.append(WAITS.total() - before)

        return counted


def _ran(words: list[str], device: str, told: Told) -> tuple[int, str]:
    """The exit code of a command on a device, and what it printed."""
    from difftool.cli.app import main
    from difftool.sampling import run
    from difftool.training.run import costs
    from difftool.training.step.loop import Trainer

    costs.speed = lambda device: 1e11  # else a convolution of a GPU's size is timed here
    generate, advance = run.generate, Trainer.advance
    run.generate, Trainer.advance = told.steps(generate), told.calls(advance)  # type: ignore
    sys.argv = ["difftool", *(word.format(device=device) for word in words), "--device", device]
    WAITS.clear()
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            main()
    except SystemExit as stopped:
        return int(stopped.code or 0), out.getvalue()
    finally:
        run.generate, Trainer.advance = generate, advance
    raise AssertionError("a command ends by an exit code")


def _row(words: list[str], refuses: dict[str, int]) -> dict[str, Any]:
    """What came of a command on both devices."""
    started, told = time.process_time(), Told()
    code, out = _ran(words, "cpu", Told())
    REFUSED.clear()
    REFUSES.update(refuses)
    try:
        second, seen = _ran(words, NAME, told)
    finally:
        REFUSES.clear()
    return {
        "words": words, "codes": [code, second], "out": [out, seen], "refused": dict(REFUSED),
        "waits": [waits for waits in told.waits if waits], "kinds": dict(WAITS),
        "seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    install(doubles="--no-doubles" not in sys.argv)
    report = [_row(**row) for row in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))]
    Path("report.json").write_text(json.dumps(report), encoding="utf-8")
