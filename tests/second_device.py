"""A second device for tests: memory of the CPU that does not mix with the CPU's own.

Where no accelerator is at hand, this one shows what would fail on one: tensors of two devices in
one operation, numbers of a dtype that the device lacks (Apple's MPS has no float64), and waits of
the host for the device. It is installed once a process, so this file is also a program: it runs
commands on the CPU and on the device, and says of each what came of it.

    python second_device.py [--no-doubles] COMMANDS.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
WAITS: Counter[str] = Counter()
"""How often the host waited for the device, by operation."""
DOUBLES = True
"""Whether the device has float64."""

_ACROSS = ("_to_copy", "copy_", "_copy_from")
_WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


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


def _run(func, args, kwargs):
    name = func.overloadpacket.__name__
    flat = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
    ours = [v for v in flat if isinstance(v, OnDevice)]
    if name in _WAITING:
        WAITS[name] += 1
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == NAME
    if to_device:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain = tree_map(_raw, (args, kwargs))
    if name in _ACROSS:
        if name != "_to_copy":
            target, source = args[0], args[1]
            if not isinstance(target, OnDevice) and isinstance(source, OnDevice):
                WAITS[name] += 1
            func(*plain_args, **plain)
            return target
        stays = isinstance(args[0], OnDevice) and device is None
        to_host = device is not None and torch.device(device).type == "cpu"
        if isinstance(args[0], OnDevice) and to_host:
            WAITS["to the host"] += 1
        out = func(*plain_args, **plain)
        return _wrap(out) if to_device or stays else out
    foreign = [v for v in flat if not isinstance(v, OnDevice) and v.dim()]
    if ours and foreign and not name.startswith(("index", "_index")):
        raise RuntimeError(f"{name}: tensors of two devices, {NAME} and {foreign[0].device}")
    out = func(*plain_args, **plain)
    if not ours and not to_device:
        return out
    back = {id(v.raw): v for v in ours}  # what is changed in place stays the same tensor
    return tree_map(lambda v: back.get(id(v)) if id(v) in back else _wrap(v), out)


def install(*, doubles: bool = True) -> None:
    """Have torch know the device of this name. Once a process."""
    global DOUBLES, _LIBRARY
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
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        # torch asserts inside for devices of this kind.
        out = made(data, **options)
        return out if device is None else out.to(device)

    torch.tensor = tensor
    # Otherwise a module that is moved to another memory layout keeps the numbers in the old one.
    torch.__future__.set_swap_module_params_on_conversion(True)


_LIBRARY: torch.library.Library | None = None


def _ran(command: list[str], device: str) -> int:
    from difftool.cli.app import main

    sys.argv = ["difftool", *(word.format(device=device) for word in command), "--device", device]
    WAITS.clear()
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    raise AssertionError("a command ends by an exit code")


if __name__ == "__main__":
    torch.set_num_threads(1)
    install(doubles="--no-doubles" not in sys.argv)
    report = []
    for command in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")):
        codes = [_ran(command, "cpu"), _ran(command, NAME)]
        report.append({"command": command, "codes": codes, "waits": dict(WAITS)})
    Path("report.json").write_text(json.dumps(report), encoding="utf-8")
