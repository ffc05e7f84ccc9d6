"""Run a loader in a process of its own and watch it: time, CPU, memory, bytes read from disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentds_tools.bench.harness import child, last_words

from latentds.core.extras import is_here
from latentds.errors import InputError

TOOLS = Path(__file__).parents[1]
SAMPLE_S = 0.2
GIVE_UP_S = 600  # without an event


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget a folder's files, so that they are read from disk again."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                with contextlib.suppress(OSError):
                    os.fsync(file.fileno())  # pages not yet written cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def importable() -> Iterator[dict[str, str]]:
    """Environment variables by which any Python finds this package, and nothing beside it."""
    with tempfile.TemporaryDirectory() as names:
        Path(names, "latentds_tools").symlink_to(TOOLS, target_is_directory=True)
        paths = [names, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def words_of(python: str, module: str, spec: dict[str, Any]) -> list[str]:
    """The command that runs a module of this folder."""
    return [python, "-m", f"latentds_tools.bench.{module}", json.dumps(spec)]


def measure_loader(spec: dict[str, Any], python: str) -> dict[str, Any]:
    """Figures of one run of a loader; InputError with its last words where it dies."""
    drop_page_cache(Path(spec["folder"]))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors, importable() as env:
        words = words_of(python, "peers", spec)
        with child(words, stderr=errors, env=env, **pipes) as process:
            figures = follow(process)
        errors.seek(0)
        if figures is None:
            raise InputError(f"{spec['peer']}: {last_words(errors.read())}")
    return figures


def follow(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Read a loader's events and note CPU and bytes between them; None where it dies early."""
    assert process.stdout is not None and process.stdin is not None
    figures: dict[str, Any] = {"ceilings": []}
    timer = threading.Timer(GIVE_UP_S, process.kill)
    timer.start()
    with Watch(process.pid) as watch:
        before = watch.counters()
        for line in process.stdout:
            if not line.startswith('{"event"'):
                continue  # a library's own talk
            event = json.loads(line)
            now = watch.counters()
            note(figures, event, {name: now[name] - before[name] for name in now})
            before = watch.counters()
            process.stdin.write("\n")
            process.stdin.flush()
    timer.cancel()
    figures["peak_mb"] = watch.peak / 1e6
    return figures if process.wait() == 0 and "warm" in figures else None


def note(figures: dict[str, Any], event: dict[str, Any], spent: dict[str, float]) -> None:
    name = event.pop("event")
    if name == "counted":
        figures["counters"] = event
    elif name == "ceiling":
        figures["ceilings"].append(event)
    elif name in ("cold", "warm"):
        patches, seconds = event["patches"], event.pop("seconds")
        figures[name] = event | {
            "patches_per_s": patches / seconds,
            "cpu_s_per_1000": spent["cpu_s"] / patches * 1000,
            "cores": spent["cpu_s"] / seconds,
            "bytes_read_per_patch": spent["bytes_read"] / patches,
        }


class Watch:
    """Samples a process and all below it: peak memory (proportional, shared pages once).

    Figures are NaN without psutil.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0.0 if is_here("psutil") else math.nan
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def sample(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            self.peak = max(self.peak, self.total(memory_of))

    def counters(self) -> dict[str, float]:
        """CPU seconds and bytes read from disk so far, of the processes that live."""
        return {"cpu_s": self.total(cpu_of), "bytes_read": self.total(bytes_of)}

    def total(self, figure: Any) -> float:
        if math.isnan(self.peak):
            return math.nan
        import psutil

        total = 0.0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += figure(process)
        return total


def memory_of(process: Any) -> float:
    """Proportional set size where the system tells it, resident size elsewhere."""
    full = process.memory_full_info()
    return float(getattr(full, "pss", full.rss))


def cpu_of(process: Any) -> float:
    """User and system seconds, those of children that ended included."""
    return float(sum(process.cpu_times()[:4]))


def bytes_of(process: Any) -> float:
    """Bytes that came from disk; NaN where the system does not tell."""
    counters = getattr(process, "io_counters", None)  # not on macOS
    return float(counters().read_bytes) if counters else math.nan
