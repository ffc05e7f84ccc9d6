"""What all benches share: the machine's facts, clocks, rounds in turn, medians, costs, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentds_tools.reports.markdown import table

from latentds.errors import InputError

if TYPE_CHECKING:
    import torch

    from latentds.loading.decoding import Decoder

CPUINFO = Path("/proc/cpuinfo")
AnyConfig = TypeVar("AnyConfig", bound=Any)

logger = logging.getLogger(__name__)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The CPU's name, as the system gives it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """CPU model, cores this process may use, GPU of the device if it is one, Python, torch."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_text(where: Mapping[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores ({where['torch_threads']} threads "
        f"of torch), torch {where['torch']}"
    )


def for_device(
    config: AnyConfig, is_gpu: bool, gpu: Mapping[str, Any], cpu: Mapping[str, Any]
) -> AnyConfig:
    """The config with what suits the device where nothing is given."""
    chosen = gpu if is_gpu else cpu
    missing = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def recorded(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def synchronize(device: str | torch.device) -> None:
    """Wait for a GPU's work; nothing elsewhere."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """InputError where compiled code was asked for and eager code would be timed under its name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        try:
            yield
        except UserWarning as warning:
            raise InputError(f"never engaged: {warning}; measure without --compile") from warning


def engaged(decoder: Decoder) -> dict[str, Any]:
    """What a decoder counted; InputError where what its options say never ran, or ran elsewhere."""
    found = decoder.counters()
    if decoder.options.cuda_graph and not found["graph_replays"]:
        raise InputError(f"never engaged: no CUDA graph was replayed ({found}); see the log")
    if str(found["device"]).partition(":")[0] != decoder.device.type:
        raise InputError(f"never engaged: decoding was to be on {decoder.device} ({found})")
    return found


def counters_text(counters: Mapping[str, Any]) -> str:
    """What was counted, in a line."""
    shown = (f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
             for name, value in counters.items())  # fmt: skip
    return f"counted: {', '.join(shown)}"


def sustained(work: Callable[[], object], seconds: float, count: int) -> tuple[float, float]:
    """Things a second that `work` does, `count` a call, and seconds its first call took.

    The first call is not part of the rate; at least one more is made, however long it takes.
    """
    started = time.perf_counter()
    work()
    first = time.perf_counter() - started
    return rate_of(work, seconds, count), first


def rate_of(work: Callable[[], object], seconds: float, count: int) -> float:
    """Things a second that `work` does, `count` a call, called at least once."""
    done, started = 0, time.perf_counter()
    while (now := time.perf_counter() - started) < seconds or not done:
        work()
        done += count
    return done / now


@dataclasses.dataclass
class Case:
    """Something that measures itself.

    head    what its row says of it
    once    the figures of a round; `error` alone where it cannot be measured
    rounds  figures of the rounds so far
    """

    head: dict[str, Any]
    once: Callable[[], dict[str, Any]]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def sound(self) -> list[dict[str, Any]]:
        """Rounds without an error."""
        return [figures for figures in self.rounds if "error" not in figures]

    def row(self) -> dict[str, Any]:
        """Head and medians, or the first error where no round is sound."""
        return self.head | (medians(self.sound) if self.sound else self.rounds[0])


def run_cases(cases: Sequence[Case], rounds: int, note: Callable[[], object] | None = None) -> None:
    """Measure all in turn, round by round.

    note  called after every measurement, for what is to be left of a run that is cut short
    """
    for number in range(rounds):
        for case in cases:
            told = [text for text in case.head.values() if isinstance(text, str)]
            logger.info("round %d of %d: %s", number + 1, rounds, ", ".join(told[:3]))
            case.rounds.append(case.once())
            if note is not None:
                note()


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


def run_rounds(
    ways: Sequence[Way],
    rounds: int,
    device: torch.device,
    *,
    steps: int = 1,
    lead: int = 0,
    title: str = "",
) -> None:
    """Time every way once a round; every second round runs backwards, so that drift cancels.

    lead  steps of a way in every round before the clock starts
    """
    for number in range(rounds):
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            logger.info("%sround %d of %d: %s", title, number + 1, rounds, way.name)
            time_way(way, steps, lead, device)


def time_way(way: Way, steps: int, lead: int, device: torch.device) -> None:
    """One round of one way."""
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    run_steps(way, lead, device)
    started = time.perf_counter()
    run_steps(way, steps, device)
    way.seconds.append((time.perf_counter() - started) / steps)
    if on_gpu:
        way.peak = max(way.peak, torch.cuda.max_memory_allocated(device))


def run_steps(way: Way, steps: int, device: torch.device) -> None:
    """Steps, waited for."""
    for _ in range(steps):
        way.once()
    synchronize(device)


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every figure; of what is no figure, the first round's."""
    return {
        name: statistics.median(found[name] for found in rounds)
        if isinstance(first, (int, float))
        else first
        for name, first in rounds[0].items()
    }


def extent(values: Sequence[float]) -> list[float]:
    """The least and the greatest."""
    return [min(values), max(values)]


def cost_percents(slower: Way, base: Way) -> list[float]:
    """Percent that one way takes more than another, round by round."""
    pairs = zip(slower.seconds, base.seconds, strict=True)
    return [100 * (one / other - 1) for one, other in pairs]


def describe_time(way: Way, count: int) -> dict[str, Any]:
    """Milliseconds a step and things a second, `count` a step, of the middle round and of all."""
    times = [1000 * seconds for seconds in way.seconds]
    return {
        "ms": statistics.median(times),
        "ms_range": extent(times),
        "patches_per_s": count / way.median,
        "peak_gb": way.peak / 1e9 if way.peak else None,
    }


def report_text(head: str, header: Sequence[str], rows: Iterable[Sequence[str]], *rest: str) -> str:
    """A bench's report: what was measured where, the table, and what follows from it."""
    return "\n".join([head, "", table(header, rows), *rest])
