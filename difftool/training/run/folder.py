"""The folder of a run at work; storage/runs.py says what lies where in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from difftool.config.schema import Preset
from difftool.config.validate import to_yaml
from difftool.errors import UsageError
from difftool.images.formats import OWN
from difftool.images.write import write_png
from difftool.storage import runs
from difftool.storage.commit import sweep, write_whole
from difftool.storage.locks import Lock
from difftool.training.metrics import Metrics
from difftool.training.report.page import write_report
from difftool.training.run.stages import is_used
from difftool.training.step import parallel


class RunFolder:
    """The files of a run, locked until it is closed: two runs in one folder would destroy each
    other. Of several processes the first writes; the others' calls do nothing."""

    def __init__(self, path: Path, *, fresh: bool = False, root: Path | None = None):
        """fresh: it must hold nothing yet. root: the run folder that this one, of a part, is in;
        None: itself. UsageError where another run is at work or has been."""
        self.path, self.metrics, self.root = path, path / runs.METRICS, root or path
        self._unwritten = ""  # lines that the disk has not taken
        self.writes = parallel.is_main()
        self._lock: Lock | None = None
        if not self.writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / runs.LOCK, f"another run is at work in {path}")
        for folder in (path, *(p for p in path.iterdir() if p.is_dir())):
            sweep(folder)
        if fresh and is_used(path):
            self.close()
            raise UsageError(f"another run has begun in {path}", hint="give another --out")

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_config(self, preset: Preset) -> None:
        """Write what the run is made by."""
        if self.writes:
            write_whole(self.path / runs.CONFIG, to_yaml(preset), overwrite=True)

    # --- measures ----------------------------------------------------------------------------

    def append(self, *lines: dict[str, Any]) -> None:
        """Lines into metrics.jsonl, all at once, and those before that failed to be written."""
        if not self.writes:
            return
        self._unwritten += "".join(json.dumps(line) + "\n" for line in lines)
        with self.metrics.open("ab") as file:
            size = file.tell()
            try:
                file.write(self._unwritten.encode("utf-8"))
                file.flush()
            except OSError:
                file.truncate(size)
                raise
        self._unwritten = ""

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and half a line at the end."""
        if not self.writes or not self.metrics.exists():
            return
        kept = [x for x in Metrics.read(self.metrics).lines if x["step"] <= step]
        text = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: len(kept)]
        write_whole(self.metrics, "".join(text), overwrite=True)

    def last_shown(self) -> int:
        """The step that was measured and shown last; 0 = there is none."""
        lines = Metrics.read(self.metrics).lines
        return max((line["step"] for line in lines if "loss" not in line), default=0)

    # --- what is shown -----------------------------------------------------------------------

    def facts(self) -> dict[str, Any] | None:
        """What run.json holds."""
        path = self.path / runs.FACTS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write run.json."""
        if self.writes:
            text = json.dumps(facts, indent=1, ensure_ascii=False)
            write_whole(self.path / runs.FACTS, text, overwrite=True)

    def write_sheet(self, step: int, image: Image.Image) -> None:
        """Write the samples of a step."""
        path = self.path / runs.SAMPLES / f"{runs.step_name(step)}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(image, path, OWN, overwrite=True)

    def write_report(self) -> None:
        """Write the plot and the report, from the other files."""
        write_report(self.path)
