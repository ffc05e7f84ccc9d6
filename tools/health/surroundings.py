"""What is around the process: packages, the Hub, disks, shared memory, cores, limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latentds_tools.bench.harness import usable_cores
from latentds_tools.health.finding import Finding, finding, within

from latentds.store.cache import CacheConfig

if TYPE_CHECKING:
    from packaging.requirements import Requirement

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

    def head() -> int:
        return requests.head(endpoint, timeout=timeout_s, allow_redirects=True).status_code

    try:
        status = within(timeout_s, head)  # requests does not count the name's look-up
    except (requests.RequestException, OSError, ValueError) as error:
        return f"cannot be reached ({type(error).__name__})"
    if status is None:
        return f"no answer within {timeout_s:g} s"
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
    """Cores, shared memory, open files and how workers start: what trips training loops up."""
    yield examine_cores()
    if SHM.is_dir():
        yield examine_shm(shutil.disk_usage(SHM).total)
    yield examine_files()
    yield examine_workers()


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
    """Cores' worth of time the control groups allow, versions 2 and 1; None without a limit."""
    shares = [share for path in cgroup_folders(root, own) if (share := quota(path)) is not None]
    return min(shares, default=None)


def cgroup_folders(root: Path, own: Path) -> Iterator[Path]:
    """This process's control group and those above it, then version 1's for CPUs."""
    lines = own.read_text().splitlines() if own.is_file() else []
    inside = [line[3:].strip("/") for line in lines if line.startswith("0::")]
    folder = root / (inside[0] if inside else "")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder
    yield root / "cpu"


def quota(folder: Path) -> float | None:
    """Cores' worth of time of one control group; None where it sets no limit."""
    try:
        if (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


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


def examine_workers() -> Finding:
    """How workers start, and what follows for code of the user's own."""
    import multiprocessing

    method = multiprocessing.get_start_method(allow_none=True)
    method = method or ("fork" if sys.platform == "linux" else "spawn")  # up to Python 3.13
    text = f"started by {method}; those of LatentLoader read codes and never touch a GPU"
    if method == "fork":
        text += ". Code of your own in a worker must not either: a forked process cannot use CUDA. "
        text += "Pass multiprocessing_context='spawn' where it has to"
    return finding("limits", "workers", text)


def examine_installed() -> Iterator[Finding]:
    """Python, latentds, its base requirements with versions, and its extras."""
    python = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    yield finding("base", "python", python)
    try:
        requirements = read_requirements()
    except importlib.metadata.PackageNotFoundError:
        yield base_problem(PACKAGE, "not installed: Python knows no metadata of it", REINSTALL)
        return
    except ImportError as error:
        yield base_problem(str(error.name), "not installed", f"pip install {error.name}")
        return
    yield finding("base", PACKAGE, importlib.metadata.version(PACKAGE))
    for requirement in requirements:
        if is_wanted(requirement, ""):
            name, lack = requirement.name, lack_of(requirement)
            if lack:
                yield base_problem(name, lack, f"pip install '{name}{requirement.specifier}'")
            else:
                yield finding("base", name, str(installed_version(name)))
    yield from examine_extras(requirements)


def read_requirements() -> list[Requirement]:
    """What latentds says it needs, its references to itself ('all') left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    return [requirement for requirement in found if requirement.name != PACKAGE]


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
