"""Commands that start processes of their own: none of those outlives the command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
PATIENCE_S = 600  # only against a command that hangs: a loaded machine may take minutes


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def deepspeed_command(ranks: int, module: str, *words: str) -> list[str]:
    """The command line of DeepSpeed's launcher."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*command, "--master_port", free_port(), "--module", module, *words]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, whose processes end with the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | VARIABLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_launched(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; stdout and stderr together."""
    with started(command) as process:
        text, _ = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(command, process.returncode, text)
