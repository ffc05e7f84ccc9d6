"""What every test is held to: little CPU time, and nothing left behind that it started."""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

CPU_SECONDS = 2.0  # on a core of its own
REFERENCE_S = 0.022  # what `reference_work` takes there: a second is the same work on every machine
REFERENCE_TIMES = 7
MARGIN = 2.0  # the machine may have been busier during the test than when it is timed, after it
# A library is imported by whichever test needs it first: that test may have the import's time.
CPU_SECONDS_A_MODULE = 0.005
UNBOUND = ("slow", "assets", "gpu")  # marks of tests that may take longer
YOUNG_S = 0.1  # most end by themselves, and a look for garbage takes as long
PATIENCE_S = 15.0  # a server's thread or a killed child needs a moment to go
# Started once a process by a library, and meant to stay.
LASTING_THREADS = ("fsspecIO", "tqdm", "pytest_", "execnet", "TMonitor", "asyncio_")
LASTING_CHILDREN = ("resource_tracker", "torch_shm_manager", "forkserver")

FREEZE_MODULES = 400  # new ones since the last time

before_call = pytest.StashKey[tuple[set[int], set[threading.Thread]]]()


def cpu_seconds() -> float:
    """CPU time of this process and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def reference_work() -> None:
    """Some 20 ms of what tests do: a small network learns, objects are made, memory is filled."""
    layer = torch.nn.Conv2d(8, 8, 3, padding=1)
    for _ in range(8):
        layer(torch.ones(4, 8, 32, 32)).square().mean().backward()
        rows = [{"name": f"patch{number}", "place": [number, -number]} for number in range(600)]
        assert len(json.loads(json.dumps(rows))) == len(rows)
        torch.ones(1 << 18).sum()


def slowness() -> float:
    """How much more CPU time the same work takes now than on a core of its own; at least 1.

    A core shared with a neighbour's thread, or an old one, does a second's work in two.
    """
    taken = []
    for _ in range(REFERENCE_TIMES):
        start = time.thread_time()
        reference_work()
        taken.append(time.thread_time() - start)
    return max(1.0, statistics.median(taken) / REFERENCE_S)


def allowance(new_modules: int) -> float:
    """CPU seconds that a test may take on this machine as it is now."""
    return MARGIN * (CPU_SECONDS + CPU_SECONDS_A_MODULE * new_modules) * slowness()


def child_processes() -> set[int]:
    """Process ids of this process's children; none where there is no /proc to tell."""
    found: set[int] = set()
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            found.update(map(int, (task / "children").read_bytes().split()))
        except OSError:  # the thread has ended meanwhile
            continue
    return {pid for pid in found if not any(word in command(pid) for word in LASTING_CHILDREN)}


def command(pid: int) -> str:
    """The command line of a process; empty once it has ended, also as a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def threads() -> set[threading.Thread]:
    """The threads that are alive, libraries' own lasting ones left out."""
    alive = (t for t in threading.enumerate() if not isinstance(t, threading._DummyThread))
    return {t for t in alive if not t.name.startswith(LASTING_THREADS)}


def left_behind(children: set[int], known: set[threading.Thread]) -> list[str]:
    """Who runs now and did not before, in words."""
    started = [f"process {pid} ({command(pid)[:120]})" for pid in child_processes() - children]
    return started + [f"thread {thread.name}" for thread in threads() - known]


def wait_for_the_end(children: set[int], known: set[threading.Thread]) -> list[str]:
    """Who is left after a moment's patience."""
    if not left_after(YOUNG_S, children, known):
        return []
    gc.collect()  # an iterator that a test left half way ends its workers when it is collected
    return left_after(PATIENCE_S, children, known)


def left_after(seconds: float, children: set[int], known: set[threading.Thread]) -> list[str]:
    """Who is left when all have ended or the time is over."""
    deadline = time.monotonic() + seconds
    while (found := left_behind(children, known)) and time.monotonic() < deadline:
        multiprocessing.active_children()  # asks after those that have ended, as nobody else may
        time.sleep(0.01)
    return found


frozen_modules = 0


def freeze_libraries() -> None:
    """Let collections pass over what libraries made when imported: a look at all costs 0.3 s."""
    global frozen_modules
    if len(sys.modules) - frozen_modules >= FREEZE_MODULES:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import what tests need without looks for garbage, a third of the time: it stays anyway."""
    gc.disable()
    try:
        return (yield)
    finally:
        freeze_libraries()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fail a test that is not marked slow and takes more CPU time than the suite can afford."""
    freeze_libraries()
    item.stash[before_call] = child_processes(), threads()
    start, modules = cpu_seconds(), len(sys.modules)
    result = yield
    spent, modules = cpu_seconds() - start, len(sys.modules) - modules
    if spent > CPU_SECONDS and not any(mark.name in UNBOUND for mark in item.iter_markers()):
        fail_beyond(spent, allowance(modules))
    return result


def fail_beyond(spent: float, allowed: float) -> None:
    if spent > allowed:
        pytest.fail(
            f"took {spent:.1f} s of CPU time, a test without a mark has {allowed:.1f} here now: "
            "mark it slow, share what it makes in a fixture, or make less of it",
            pytrace=False,
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    """Fail a test whose call started processes or threads that outlive the test."""
    result = yield
    known = item.stash.get(before_call, None)
    if known is not None and (found := wait_for_the_end(*known)):
        pytest.fail(f"left behind: {', '.join(found)}; end what the test starts", pytrace=False)
    return result
