"""Ways to feed a training step, timed in turn, and what follows from their times."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from latentds_tools.bench.step_config import LEAD

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Way:
    """Something to time.

    once     one step of it
    seconds  a step takes, one figure a round
    peak     bytes of GPU memory at most, everything the bench holds included
    """

    name: str
    once: Callable[[], object]
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds a step, of the middle round."""
        return statistics.median(self.seconds)


def run_rounds(ways: Sequence[Way], rounds: int, steps: int, device: torch.device) -> None:
    """Time every way once a round; every second round runs backwards, so that drift cancels."""
    for way in ways:  # kernels are chosen, compiled and captured; pools fill
        run_steps(way, max(LEAD[device.type == "cuda"], 1), device)
    for number in range(rounds):
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            logger.info("round %d of %d: %s", number + 1, rounds, way.name)
            time_way(way, steps, device)


def time_way(way: Way, steps: int, device: torch.device) -> None:
    """One round of one way."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run_steps(way, LEAD[device.type == "cuda"], device)
    started = time.perf_counter()
    run_steps(way, steps, device)
    way.seconds.append((time.perf_counter() - started) / steps)
    if device.type == "cuda":
        way.peak = max(way.peak, torch.cuda.max_memory_allocated(device))


def run_steps(way: Way, steps: int, device: torch.device) -> None:
    """Steps, waited for."""
    for _ in range(steps):
        way.once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(way: Way, batch_size: int) -> dict[str, Any]:
    """Milliseconds a step and patches a second, of the middle round and of all."""
    times = [1000 * seconds for seconds in way.seconds]
    return {
        "ms": statistics.median(times),
        "ms_range": [min(times), max(times)],
        "patches_per_s": batch_size / way.median,
        "peak_gb": way.peak / 1e9 if way.peak else None,
    }


def cost(slower: Way, base: Way) -> dict[str, Any]:
    """Percent that one way takes more than another, round by round."""
    pairs = zip(slower.seconds, base.seconds, strict=True)
    percents = [100 * (one / other - 1) for one, other in pairs]
    return {
        "percent": statistics.median(percents),
        "percent_range": [min(percents), max(percents)],
    }


def overlap(step: Way, loaded: Way, parts: Sequence[Way]) -> dict[str, float]:
    """What would be expected if nothing ran at the same time, and how much of it did.

    step    on views that are there
    loaded  with the loader
    parts   what the loader does, each alone
    """
    alone = sum(part.median for part in parts)
    added = loaded.median - step.median
    return {
        "step_ms": 1000 * step.median,
        "parts_ms": 1000 * alone,
        "one_after_another_ms": 1000 * (step.median + alone),
        "measured_ms": 1000 * loaded.median,
        "hidden_percent": 100 * (1 - added / alone) if alone else 0.0,
    }
