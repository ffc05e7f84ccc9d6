"""The CPU and the GPUs: what torch sees, and how fast each decodes."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentds_tools.health.finding import Finding, finding

PROBE = (sys.executable, "-m", "latentds_tools.health.device_probe")
DRIVER = Path("/proc/driver/nvidia/version")  # there where NVIDIA's kernel module is loaded


def examine_devices(seconds: float, timeout_s: float) -> Iterator[Finding]:
    """torch's build, and a finding a device.

    seconds    each device decodes for
    timeout_s  for all of it; what has been said by then is kept
    """
    lines, failure = run_probe([*PROBE, str(seconds)], timeout_s)
    for line in lines:
        if "torch" in line:
            yield from examine_build(line)
        elif "device" in line:
            yield examine_device(line)
        else:
            yield from examine_options(line)
    if failure:
        yield finding(
            "devices", "decoding", failure, "problem",
            "reinstall torch and latentds; if it hangs on a GPU, look at nvidia-smi, or hide it "
            "with CUDA_VISIBLE_DEVICES=''",
            is_base=not any("rate" in line for line in lines),
        )  # fmt: skip


def run_probe(command: list[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """The probe's lines, and what went wrong if something did."""
    try:
        ended = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        out, words = ended.stdout, ended.stderr.decode(errors="replace").strip().splitlines()
        failure = (
            f"exit code {ended.returncode}: {words[-1][:300] if words else 'no message'}"
            if ended.returncode
            else ""
        )
    except subprocess.TimeoutExpired as error:
        out, failure = error.stdout or b"", f"no answer within {timeout_s:g} s"
    return parse_lines(out.decode(errors="replace")), failure


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The probe's lines; a library's talk among them, and half a line at the end, are left out."""
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def examine_build(line: dict[str, Any]) -> Iterator[Finding]:
    """Whether torch can use the GPU that is there."""
    has_driver = DRIVER.exists() or shutil.which("nvidia-smi") is not None
    build = f"built for CUDA {line['cuda']}" if line["cuda"] else "built without CUDA"
    text = f"torch {line['torch']}, {build}; GPUs it can use: {line['gpus']}"
    stranded = has_driver and not line["gpus"]
    remedy = "install torch for your driver's CUDA version (https://pytorch.org/get-started)"
    if stranded and line["cuda"]:
        remedy = "look at nvidia-smi (driver too old?) and at CUDA_VISIBLE_DEVICES; in a container "
        remedy += "pass --gpus all"
    text += ", though a driver is here" if stranded else ""
    yield finding("devices", "torch", text, "problem" if stranded else "", remedy)


def examine_device(line: dict[str, Any]) -> Finding:
    name = line["device"]
    if "error" in line:
        remedy = "free its memory, or choose another device"
        is_base = name == "cpu"
        return finding("devices", name, line["error"], "problem", remedy, is_base=is_base)
    if name == "cpu":
        what = f"{line['threads']} threads of torch"
    else:
        memory = f"{line['free'] / 2**30:.1f} of {line['total'] / 2**30:.1f} GiB free"
        what = f"{line['name']} (compute capability {line['capability']}), {memory}"
    text = f"{what}; `tiny` decodes {line['rate']:,.0f} patches of 256 px a second"
    return finding("devices", name, text)


def examine_options(line: dict[str, str]) -> Iterator[Finding]:
    """torch.compile and CUDA graphs on the GPU: both optional."""
    remedies = {
        "compile": "torch.compile needs triton and a C compiler; leave compile=False without",
        "cuda_graph": "leave Decode(cuda_graph=False)",
    }
    for name, remedy in remedies.items():
        if name in line:  # else a library's talk that happens to be JSON
            failure = line[name]
            yield finding("devices", name, failure or "works", "missing" if failure else "", remedy)
