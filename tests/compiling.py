"""Machine code of records, made once in an environment: no test is charged for it.

Workers wait for the one that is first; the process that distributes tests starts one while they
collect.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from latentds.quantizers.entropy import native_rounding
from latentds.quantizers.entropy.record_codebook import EntropyCodebook

GOLDEN = Path(__file__).parent / "golden" / "rans.json"
PATIENCE_S = 300  # of workers: compiling takes 20 s, more on a busy machine
started = pytest.StashKey[subprocess.Popen[bytes]]()


def compile_records() -> None:
    """Compile what codes records, unless it is kept or another process is at it."""
    with at_a_time():
        codebook = EntropyCodebook.from_json(json.loads(GOLDEN.read_text())["codebook"])
        codebook.integers(codebook.quantize(torch.zeros(1, *codebook.latents_shape)))


def at_a_time() -> contextlib.AbstractContextManager[object]:
    """Lets in one process; all of them where code cannot be kept."""
    folder = getattr(getattr(native_rounding.round_all, "stats", None), "cache_path", None)
    if folder is None:
        return contextlib.nullcontext()
    return FileLock(Path(folder) / "compiling.lock", timeout=PATIENCE_S)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile while workers collect: two cores are busy, none compiles the same."""
    distributes = getattr(session.config.option, "numprocesses", None)
    if distributes and not native_rounding.is_kept(native_rounding.round_all):
        command = [sys.executable, "-m", "tests.compiling"]
        session.config.stash[started] = subprocess.Popen(command, cwd=session.config.rootpath)


def pytest_sessionfinish(session: pytest.Session) -> None:
    process = session.config.stash.get(started, None)
    if process is not None:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session", autouse=True)
def compiled_records() -> None:
    compile_records()


if __name__ == "__main__":
    compile_records()
