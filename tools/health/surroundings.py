"""What is here and what is missing: packages, devices, the Hub, disks, shared memory, limits."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentds_tools.bench.harness import last_words, usable_cores

from latentds.store.cache import CacheConfig

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROBE = (sys.executable, "-m", "latentds_tools.health.device_probe")
DRIVER = Path("/proc/driver/nvidia/version")  # there where NVIDIA's kernel module is loaded
SHM = Path("/dev/shm")
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A transfer is about 4 MiB, and each of 8 workers has two on the way: 64 MiB, Docker's default,
# would be full. Twice that is not, and ranks that talk through NCCL take some more.
ENOUGH_SHM = 256 << 20
# A rank maps up to 256 shards (store.open_files.MAX_OPEN_SHARDS), each an open file, and so does
# each worker; what workers send is a file a tensor until it is received.
ENOUGH_FILES = 1024
ENOUGH_DISK = 10 << 30  # the default cache may grow to 50 GB; SD's and DC-AE's weights are 1.3 GB
PACKAGE = "latentds"
REINSTALL = "pip install latentds, or 'pip install .' in a checkout, into this Python"
FOR_DEVELOPERS = ("dev", "all")  # extras that no user of the library lacks


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    group    heading it stands under
    state    ok; missing: something optional is not here; problem: something does not work, or will
             not
    remedy   what to do; empty where nothing is to be done
    is_base  whether the base install needs it: a problem with it makes the exit code 1
    """

    group: str
    name: str
    state: Literal["ok", "missing", "problem"]
    text: str
    remedy: str = ""
    is_base: bool = False

    @property
    def breaks_base(self) -> bool:
        return self.is_base and self.state == "problem"


def finding(
    group: str,
    name: str,
    text: str,
    bad: Literal["missing", "problem", ""] = "",
    remedy: str = "",
    *,
    is_base: bool = False,
) -> Finding:
    """A finding; where nothing is bad it is ok and has no remedy."""
    return Finding(group, name, bad or "ok", text, remedy if bad else "", is_base)


def examine_hub(timeout_s: float) -> Iterator[Finding]:
    """Whether the Hub answers and whether there is a token, which is not shown."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return  # told among the base requirements
    endpoint = str(constants.ENDPOINT)
    offline = CacheConfig(limit=1).resolve()[2]  # a limit: the user's may be no number, told below
    failure = "told to stay offline (HF_HUB_OFFLINE or LATENTDS_OFFLINE)" if offline else ""
    failure = failure or ask(endpoint, timeout_s)
    yield finding(
        "hub", endpoint.partition("://")[2], failure or "answers", "missing" if failure else "",
        "`tiny`, local sets and local weights work without; fetch the others on a machine that has "
        "the Hub, or set HTTPS_PROXY or HF_ENDPOINT",
    )  # fmt: skip
    has_token = bool(get_token())
    yield finding(
        "hub", "token", "one is there (not shown, not tried)" if has_token else "none",
        "" if has_token else "missing",
        "'hf auth login' where you publish, or fetch what asks for a licence to be accepted",
    )  # fmt: skip


def ask(endpoint: str, timeout_s: float) -> str:
    """Why the Hub cannot be used; empty where it answers."""
    import requests

    try:
        status = requests.head(endpoint, timeout=timeout_s, allow_redirects=True).status_code
    except (requests.RequestException, OSError, ValueError) as error:
        return f"cannot be reached ({type(error).__name__})"
    return f"answers with status {status}" if status >= 400 else ""


def examine_disks() -> Iterator[Finding]:
    """Room where fetched sets and weights go."""
    try:
        folder, limit, _ = CacheConfig().resolve()
    except ValueError as error:
        yield finding("disk", "cache", str(error), "problem", "mend LATENTDS_CACHE_LIMIT")
        return
    yield room("cache of sets", folder, f" (limit {limit / 1e9:,.0f} GB)")
    try:
        from huggingface_hub import constants
    except ImportError:
        return
    yield room("cache of weights", Path(constants.HF_HUB_CACHE), "")


def room(name: str, folder: Path, note: str) -> Finding:
    """Free bytes of the disk a folder is on, or would be; whether it can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text, problem = f"{folder}: {free / 1e9:,.1f} GB free{note}", ""
    if not os.access(there, os.W_OK):
        problem = ", cannot be written to"
    elif free < ENOUGH_DISK:
        problem = ", little for sets and weights of the Hub"
    return finding(
        "disk", name, text + problem, "problem" if problem else "",
        "set LATENTDS_CACHE (sets) or HF_HOME (weights) to a folder you may write to, on a larger "
        "disk of this machine",
    )  # fmt: skip


def examine_limits() -> Iterator[Finding]:
    """Cores, shared memory and open files: what trips training loops up."""
    yield examine_cores()
    if SHM.is_dir():
        yield examine_shm(shutil.disk_usage(SHM).total)
    yield examine_files()


def examine_cores() -> Finding:
    """Cores this process may use, by its affinity and by its container's share of time."""
    cores, share = usable_cores(), cgroup_cores()
    text = f"{cores} of {os.cpu_count()} cores"
    if share is None or share >= cores:
        return finding("limits", "cores", text)
    text += f", but the container gets the time of {share:g}: threads and workers counted by cores "
    text += "get in each other's way"
    remedy = f"OMP_NUM_THREADS={max(1, int(share))}, and no more workers than that"
    return finding("limits", "cores", text, "problem", remedy)


def cgroup_cores(root: Path = CGROUP, own: Path = OWN_CGROUP) -> float | None:
    """Cores' worth of time that control groups (version 2) allow; None without a limit."""
    lines = own.read_text().splitlines() if own.is_file() else []
    inside = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    shares = []
    for folder in (root / inside, *(root / inside).parents):
        if folder.is_relative_to(root) and (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text().split()
            if limit != "max":
                shares.append(int(limit) / int(period))
    return min(shares, default=None)


def examine_shm(size: int) -> Finding:
    """Shared memory, through which workers and ranks send."""
    small = size < ENOUGH_SHM
    text = f"{size / 2**20:,.0f} MiB{': workers may find no room for batches' if small else ''}"
    return finding(
        "limits", "/dev/shm", text, "problem" if small else "",
        "docker run --shm-size=2g (or --ipc=host), in Kubernetes an emptyDir of medium Memory on "
        "/dev/shm; or num_workers=0",
    )  # fmt: skip


def examine_files() -> Finding:
    import resource  # not on Windows, where nothing else of this package works either

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    small = not unlimited and soft < ENOUGH_FILES
    text = "no limit" if unlimited else f"{soft:,} at once"
    remedy = f"ulimit -n {65536 if hard < 0 else min(hard, 65536)}"
    return finding("limits", "open files", text, "problem" if small else "", remedy)


def examine_installed() -> Iterator[Finding]:
    """Python, latentds, its base requirements with versions, and its extras."""
    from packaging.requirements import Requirement

    python = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    yield finding("base", "python", python)
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield base_problem(PACKAGE, "not installed: Python knows no metadata of it", REINSTALL)
        return
    yield finding("base", PACKAGE, importlib.metadata.version(PACKAGE))
    requirements = [one for one in needs if one.name != PACKAGE]  # 'all' refers to itself
    for requirement in requirements:
        if is_wanted(requirement, ""):
            name, lack = requirement.name, lack_of(requirement)
            if lack:
                yield base_problem(name, lack, f"pip install '{name}{requirement.specifier}'")
            else:
                yield finding("base", name, str(installed_version(name)))
    yield from examine_extras(requirements)


def examine_extras(requirements: list[Requirement]) -> Iterator[Finding]:
    """A finding an extra: its packages with versions, or those that are missing."""
    metadata = importlib.metadata.metadata(PACKAGE)
    for extra in metadata.get_all("Provides-Extra") or ():
        wanted = [r for r in requirements if is_wanted(r, extra) and not is_wanted(r, "")]
        if extra in FOR_DEVELOPERS or not wanted:
            continue
        lacks = [f"{one.name} {lack}" for one in wanted if (lack := lack_of(one))]
        here = [f"{one.name} {installed_version(one.name)}" for one in wanted if not lack_of(one)]
        text, remedy = ", ".join(lacks or here), f"pip install 'latentds[{extra}]'"
        yield finding("extras", extra, text, "missing" if lacks else "", remedy)


def is_wanted(requirement: Requirement, extra: str) -> bool:
    """Whether this Python and system need it for an extra; "" asks for the base."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def lack_of(requirement: Requirement) -> str:
    """What is wrong with a package, in words; empty where it fits."""
    version = installed_version(requirement.name)
    if version is None:
        return "not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is not {requirement.specifier}"
    return ""


def installed_version(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def base_problem(name: str, text: str, remedy: str) -> Finding:
    """Something the base install cannot do without."""
    return finding("base", name, text, "problem", remedy, is_base=True)


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
        out, words = ended.stdout, last_words(ended.stderr.decode(errors="replace"))
        failure = f"exit code {ended.returncode}: {words}" if ended.returncode else ""
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
