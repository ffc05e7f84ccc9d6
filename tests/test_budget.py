"""The plugin that holds tests to little CPU time and to ending what they start."""

from __future__ import annotations

import subprocess
import threading

import pytest

from tests import budget

BUSY = """
import time
import pytest

{marks}
def test_busy():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
"""
LEAVES_A_THREAD = """
import threading
from tests import test_budget

def test_left():
    threading.Thread(target=test_budget.released.wait, name="left").start()
"""
LEAVES_A_CHILD = """
import subprocess
from tests import test_budget

def test_left():
    test_budget.children.append(subprocess.Popen(["sleep", "600"]))
"""
released = threading.Event()  # what the thread waits for
children: list[subprocess.Popen[bytes]] = []


@pytest.fixture
def run(pytester):
    """Runs a test file under the plugin, whose limit is 0.05 s meanwhile."""

    def run(text: str, slowness: float = 1.0) -> pytest.RunResult:
        pytester.makepyfile(text)
        plugins = ("no:cacheprovider", "no:xdist", "no:unraisableexception")  # looks for garbage
        options = (word for name in ("tests.budget", *plugins) for word in ("-p", name))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(budget, "CPU_SECONDS", 0.05)
            patched.setattr(budget, "CPU_SECONDS_A_MODULE", 0.0)
            patched.setattr(budget, "PATIENCE_S", 0.1)
            patched.setattr(budget, "slowness", lambda: slowness)
            return pytester.runpytest_inprocess(*options)

    return run


def test_a_test_beyond_its_cpu_time_fails_with_advice(run):
    result = run(BUSY.format(marks=""))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["took 0.? s of CPU time*mark it slow, share what it makes*"])


@pytest.mark.parametrize("mark", budget.UNBOUND)
def test_marked_tests_may_take_longer(run, mark):
    run(BUSY.format(marks=f"@pytest.mark.{mark}")).assert_outcomes(passed=1)


def test_a_slow_machine_gives_more_time(run):
    run(BUSY.format(marks=""), slowness=40.0).assert_outcomes(passed=1)


def test_more_time_for_the_same_work_is_slowness(monkeypatch):
    work = budget.reference_work
    monkeypatch.setattr(budget, "REFERENCE_TIMES", 3)
    monkeypatch.setattr(budget, "reference_work", lambda: [work() for _ in range(10)])
    assert budget.slowness() > 3  # 10, on a machine as the constant's


def test_a_fast_machine_gives_no_less(monkeypatch):
    monkeypatch.setattr(budget, "reference_work", lambda: None)
    assert budget.slowness() == 1


def test_the_limit_grows_with_the_machines_slowness_and_with_modules(monkeypatch):
    monkeypatch.setattr(budget, "slowness", lambda: 3.0)
    slow = 3 * budget.MARGIN
    assert budget.allowance(0) == slow * budget.CPU_SECONDS
    more = slow * budget.CPU_SECONDS_A_MODULE * 100
    assert budget.allowance(100) == pytest.approx(slow * budget.CPU_SECONDS + more)


def test_a_thread_that_is_left_fails_the_test(run):
    try:
        result = run(LEAVES_A_THREAD)
    finally:
        released.set()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["left behind: thread left; end what the test starts"])


def test_a_process_that_is_left_fails_the_test(run):
    try:
        result = run(LEAVES_A_CHILD)
    finally:
        for child in children:
            child.kill()
            child.wait()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["left behind: process * (sleep 600 ); end what the test starts"])
