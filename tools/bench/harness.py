"""What all benches share: machine, clocks, rounds in turn, medians, costs, children, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import signal
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentds_tools.reports.markdown import table

from latentds.core.storage import write_atomically
from latentds.errors import InputError

if TYPE_CHECKING:
    import torch

    from latentds.loading.decoding import Decoder

CPUINFO = Path("/proc/cpuinfo")
AnyConfig = TypeVar("AnyConfig", bound=Any)
Column = tuple[str, str | Callable[[Any], str]]
TOLD = (str, int)  # of what a case's head says, while it is measured

logger = logging.getLogger(__name__)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: str) -> dict[str, Any]:
    """CPU model, cores this process may use, GPU of the device if it is one, Python, torch."""
    import torch

    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_text(where: Mapping[str, Any]) -> str:
    return (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores ({where['torch_threads']} threads "
        f"of torch), torch {where['torch']}"
    )


def on_device(config: AnyConfig) -> AnyConfig:
    """The config with `auto` settled; InputError where a CUDA graph is asked for elsewhere."""
    from latentds.core.processes import choose_device

    device = str(choose_device(config.device))
    if getattr(config, "cuda_graph", False) and not device.startswith("cuda"):
        raise InputError(f"--cuda-graph needs a CUDA device, not {device}; leave it")
    return dataclasses.replace(config, device=device)


def for_device(
    config: AnyConfig, is_gpu: bool, gpu: Mapping[str, Any], cpu: Mapping[str, Any]
) -> AnyConfig:
    """The config with what suits the device where nothing is given."""
    chosen = gpu if is_gpu else cpu
    missing = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def report_of(config: Any, **rest: Any) -> dict[str, Any]:
    recorded = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {"machine": machine(getattr(config, "device", "cpu")), "config": recorded, **rest}


def write_report(path: Path | None, report: Any) -> None:
    """Write JSON, where a file was asked for."""
    if path is not None:
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


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
    shown = (f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
             for name, value in counters.items())  # fmt: skip
    return f"counted: {', '.join(shown)}"


def versions_of(python: str, distributions: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed in a Python."""
    script = (
        "import importlib.metadata as m, json, sys; "
        "there = {d.name.lower(): d.version for d in m.distributions()}; "
        "print(json.dumps({n: there[n] for n in sys.argv[1:] if n in there}))"
    )
    command = [python, "-c", script, *distributions]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


@contextlib.contextmanager
def child(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, ended with all that it started."""
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(*said: str, most: int = 300) -> str:
    """The last line of the first of these texts that has one."""
    lines = [text.strip().splitlines()[-1] for text in said if text.strip()]
    return lines[0][:most] if lines else "no message"


def rate_of(work: Callable[[], object], seconds: float, count: int) -> float:
    """Things a second that `work` does, `count` a call, called at least once."""
    done, started = 0, time.perf_counter()
    while (now := time.perf_counter() - started) < seconds or not done:
        work()
        done += count
    return done / now


def sustained(
    work: Callable[[], object], seconds: float, count: int, device: str = "cpu"
) -> dict[str, float]:
    """`rate_of` behind a first call, and seconds that one took; a GPU is waited for."""

    def waited() -> None:
        work()
        synchronize(device)

    started = time.perf_counter()
    waited()
    first = time.perf_counter() - started
    return {"patches_per_s": rate_of(waited, seconds, count), "first_batch_s": first}


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
        return [figures for figures in self.rounds if "error" not in figures]

    @property
    def seconds(self) -> float:
        """A step's, of the middle round, of a case that is `timed`."""
        return float(statistics.median(figures["seconds"] for figures in self.rounds))

    def row(self) -> dict[str, Any]:
        """Head and medians, or the first error where no round is sound."""
        return self.head | (medians(self.sound) if self.sound else self.rounds[0])


def run_cases(cases: Sequence[Case], rounds: int, note: Callable[[], object] = int) -> None:
    """Measure all in turn; every second round runs backwards, so that drift cancels.

    note  called after every measurement, for what is to be left of a run that is cut short
    """
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            head = case.head.items()
            told = [v if isinstance(v, str) else f"{k} {v:,}" for k, v in head if type(v) in TOLD]
            logger.info("%s", ", ".join([f"round {number + 1} of {rounds}", *told[:3]]))
            case.rounds.append(case.once())
            note()


def timed(
    work: Callable[[], object], device: str | torch.device, *, steps: int = 1, lead: int = 0
) -> dict[str, float]:
    """Seconds a step takes, and bytes of GPU memory at most, all that the bench holds included.

    lead  steps before the clock starts
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(lead):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        work()
    synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated(device) if on_gpu else 0}


def timed_cases(
    works: Mapping[str, Callable[[], object]], device: torch.device, **options: int
) -> dict[str, Case]:
    """A case that is `timed` for each of the works, by name."""
    return {
        name: Case({"what": name}, functools.partial(timed, work, device, **options))
        for name, work in works.items()
    }


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every figure; of what is no figure, the first round's."""
    return {
        name: statistics.median(found[name] for found in rounds)
        if isinstance(first, (int, float))
        else first
        for name, first in rounds[0].items()
    }


def extent(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def cost(slower: Case, base: Case) -> dict[str, Any]:
    """Percent that one case takes more than another: of the middle round, least and greatest."""
    pairs = zip(slower.rounds, base.rounds, strict=True)
    percents = [100 * (one["seconds"] / other["seconds"] - 1) for one, other in pairs]
    return {"percent": statistics.median(percents), "percent_range": extent(percents)}


def report_text(head: str, header: Sequence[str], rows: Iterable[Sequence[str]], *rest: str) -> str:
    """A bench's report: what was measured where, the table, and what follows from it."""
    return "\n".join([head, "", table(header, rows), *rest])


def row_cells(columns: Mapping[str, Column], row: Mapping[str, Any], main: str = "") -> list[str]:
    """A row's cells, empty where it has no figure.

    columns  heading: a key of the row with a format of its value, or with a function of the row
    main     the key in whose place an error stands
    """
    cells = []
    for key, form in columns.values():
        if key == main and "error" in row:
            cells.append(str(row["error"]))
        elif row.get(key) is None:
            cells.append("")
        else:
            cells.append(format(row[key], form) if isinstance(form, str) else form(row))
    return cells
