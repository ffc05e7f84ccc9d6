"""What a run took: seconds waited for patches, CPU seconds of all its processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from latentds_trainers.pretrain.feeds import Feed, FeedBatch

TOTALS = ("waited_s", "cpu_s", "aside_s")


class TimeLedger:
    """A feed whose costs are counted: the engine's loader, so that they outlast a kill.

    Totals are over all ranks for CPU seconds, means of the ranks for others; a run that goes on
    adds to those of its checkpoint.
    """

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self.feed, self.device = feed, device
        self.before = dict.fromkeys(TOTALS, 0.0)
        self.waited_s = self.aside_s = self.aside_cpu_s = 0.0
        self.started_cpu_s = cpu_seconds()

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        patches = iter(self.feed)
        while True:
            start = time.perf_counter()
            groups = next(patches)
            self.waited_s += time.perf_counter() - start
            yield groups

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work that is not part of training: probes."""
        start, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.aside_s += time.perf_counter() - start
        self.aside_cpu_s += cpu_seconds() - cpu

    def totals(self) -> dict[str, float]:
        """Seconds so far, this run's and those before it. Collective."""
        cpu_s = cpu_seconds() - self.started_cpu_s - self.aside_cpu_s
        own = torch.tensor([self.waited_s, cpu_s, self.aside_s], dtype=torch.float64)
        own = own.to(self.device)
        dist.all_reduce(own)
        ranks = dist.get_world_size()
        waited_s, cpu_s, aside_s = own.tolist()
        now = {"waited_s": waited_s / ranks, "cpu_s": cpu_s, "aside_s": aside_s / ranks}
        return {name: self.before[name] + now[name] for name in TOTALS}

    def state_dict(self) -> dict[str, Any]:
        """Of the feed, and the totals. Collective."""
        return {"feed": self.feed.state_dict(), **self.totals()}

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on; ContractError where the feed is another."""
        self.feed.load_state_dict(state["feed"], bad_packs)
        self.before = {name: float(state[name]) for name in TOTALS}

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective."""
        return self.feed.gather_bad_packs()


def cpu_seconds() -> float:
    """CPU time of this process, of its children that ended, and of those that run."""
    times = os.times()
    ended = times.user + times.system + times.children_user + times.children_system
    return ended + sum(map(seconds_of, multiprocessing.active_children()))


def seconds_of(child: Any) -> float:
    """CPU time of a child that runs; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{child.pid}/stat").read_text()
    except OSError:
        return 0.0
    words = text.rpartition(")")[2].split()  # the name before may have spaces
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
