"""What a run took: seconds waited for patches, seconds of probes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from latentds_trainers.pretrain.feeds import Feed, FeedBatch

TOTALS = ("waited_s", "aside_s")


class TimeLedger:
    """A feed whose costs are counted: the engine's loader, so that they outlast a kill.

    Totals are means of the ranks; a run that goes on adds to those of its checkpoint.
    """

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self.feed, self.device = feed, device
        self.before = dict.fromkeys(TOTALS, 0.0)
        self.waited_s = self.aside_s = 0.0

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
        start = time.perf_counter()
        yield
        self.aside_s += time.perf_counter() - start

    def totals(self) -> dict[str, float]:
        """Seconds so far, this run's and those before it. Collective."""
        own = torch.tensor([self.waited_s, self.aside_s], dtype=torch.float64, device=self.device)
        dist.all_reduce(own)
        means = zip(TOTALS, (own / dist.get_world_size()).tolist(), strict=True)
        return {name: self.before[name] + seconds for name, seconds in means}

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
