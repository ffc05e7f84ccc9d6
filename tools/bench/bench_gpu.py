"""latentds bench gpu: all that a machine with a GPU can tell, in so many minutes.

python -m latentds_tools.bench.bench_gpu results/gpu-CARD/ prints its tables, as Markdown for
docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentds_tools.bench import bench_decode, bench_features, bench_loader, bench_step
from latentds_tools.bench.gpu_parts import GpuPart
from latentds_tools.bench.harness import child, last_words, write_report
from latentds_tools.reports.commands import check_free, check_known, listed, show, tell
from latentds_tools.reports.markdown import table

from latentds.core.display import say
from latentds.errors import InputError

PATCHES = {True: 65_536, False: 64}  # of the sets that loaders read, by whether there is a GPU
# Of a part: done; cut when its time was over, what it had left kept; failed; skipped.
DONE, CUT, FAILED, SKIPPED = "done", "cut", "failed", "skipped"
LEAST_S = 5.0  # less than a process takes to start
VERDICT = re.compile(r"^\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)")
SHOWN_REASON = 400
SUMMARY = "summary.json"
TEXTS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "decode": bench_decode.as_text,
    "loader": bench_loader.as_text,
    "step": bench_step.as_text,
    "features": bench_features.as_text,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run every benchmark that a GPU matters for, the most important first.

    Each runs in its own process within its share of the time, and writes its file before the next
    begins. An interrupted run therefore leaves whole files. What failed, was cut or could not be
    run is recorded with its reason. Inputs are made of pictures that ship; nothing is fetched.
    """

    out: Path
    """Folder for a JSON file a part, and summary.json."""
    minutes: float = 8.0
    """Minutes that all parts together may take."""
    device: str = "cuda"
    """cuda, cuda:1; cpu runs a miniature whose figures mean nothing."""
    only: str = ""
    """Comma-separated parts. By default all."""
    overwrite: bool = False
    """Replace what an earlier run left in --out."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes}; more than 0")


def run(config: Config) -> int:
    """Measure, write, print; exit code 1 where a part failed."""
    outcomes = measure(config)
    show(list(outcomes.values()), config.json, as_text)
    return int(any(one["status"] == "failed" for one in outcomes.values()))


def measure(config: Config) -> dict[str, Any]:
    import torch
    from latentds_tools.bench.gpu_parts import all_parts

    from latentds.edit.outputs import refuse_foreign

    is_gpu = config.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():  # opens nothing there: memory is the parts'
        raise InputError(
            f"--device {config.device}: torch sees no GPU; --device cpu runs a miniature"
        )
    refuse_foreign(config.out, SUMMARY)  # what parts write there is deleted below
    check_free([config.out / SUMMARY], config.overwrite)
    work = config.out.absolute() / "work"
    shutil.rmtree(work, ignore_errors=True)
    parts = all_parts(work, config.device, PATCHES[is_gpu])
    parts = chosen(parts, config.only)
    config.out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (config.out / f"{part.name}.json").unlink(missing_ok=True)
    summary = {"parts": [part.name for part in parts], "minutes": config.minutes}
    summary |= {"device": config.device}
    write_report(config.out / SUMMARY, summary)
    try:
        return run_parts(parts, config.out, work, 60 * config.minutes)
    finally:
        shutil.rmtree(work / "sets", ignore_errors=True)
        tell(f"what the parts said lies in {work / 'logs'}")


def chosen(parts: list[Any], only: str) -> list[Any]:
    """The parts asked for and those they read from; UnknownNameError for one there is not."""
    wanted = {*listed(only)}
    check_known("part", wanted, {part.name for part in parts})
    wanted |= {part.uses for part in parts if part.name in wanted}
    return [part for part in parts if not only or part.name in wanted]


def run_parts(parts: list[GpuPart], out: Path, work: Path, seconds: float) -> dict[str, Any]:
    """Outcomes by part; each is in its file before the next part begins.

    What a part leaves of its share is the later ones'.
    """
    ends = time.monotonic() + seconds
    outcomes: dict[str, Any] = {}
    for number, part in enumerate(parts):
        shares = sum(other.share for other in parts[number:])
        limit = (ends - time.monotonic()) * part.share / shares
        tell(f"part {number + 1} of {len(parts)}, {part.name}: at most {limit:.0f} s")
        outcome = outcome_of(part, outcomes, limit, work)
        outcomes[part.name] = outcome
        write_report(out / f"{part.name}.json", outcome)
        tell(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s {outcome['reason']}")
    return outcomes


def outcome_of(part: GpuPart, before: dict[str, Any], limit: float, work: Path) -> dict[str, Any]:
    """What became of a part: status, reason, seconds, command, report."""
    head: dict[str, Any] = {"part": part.name, "title": part.title, "bench": part.bench}
    head |= {"command": part.command, "limit_s": limit, "seconds": 0.0, "report": None}
    reason = part.why_not()
    if part.uses and before[part.uses]["status"] != DONE:
        reason = f"without {part.uses}: {before[part.uses]['reason']}"
    if not reason and limit < LEAST_S:
        reason = f"no time left ({limit:.0f} s); more --minutes"
    if reason:
        return head | {"status": SKIPPED, "reason": reason}
    return head | run_part(part, limit, work)


def run_part(part: GpuPart, limit: float, work: Path) -> dict[str, Any]:
    """Run it in a process of its own, ended with all that it started when its time is over."""
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    printed, log = logs / f"{part.name}.out", logs / f"{part.name}.log"
    started = time.monotonic()
    # What a killed part leaves goes with the folder; one in --out may be too long for sockets.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        printed.open("wb") as out,
        log.open("wb") as err,
    ):
        environment = os.environ | {"TMPDIR": temporary, "HF_HUB_OFFLINE": "1"}
        options = {"stdout": out, "stderr": err, "stdin": subprocess.DEVNULL, "env": environment}
        # Ended with its workers, too, and where this process is interrupted.
        with child([sys.executable, *part.words], **options) as process:
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
    report = read_report(part, printed)
    status, reason = DONE, ""
    if code is None:
        left = "what it had left is kept" if report else "nothing is left"
        status, reason = CUT, f"its time was over; {left}"
    elif code:
        said = [path.read_text(errors="replace") for path in (log, printed)]
        status, reason = FAILED, last_words(*said, most=SHOWN_REASON)
    return {"status": status, "reason": reason, "seconds": time.monotonic() - started,
            "report": report}  # fmt: skip


def read_report(part: GpuPart, printed: Path) -> Any:
    """The JSON a bench printed or left, or counts of tests; None where there is none."""
    text = printed.read_text(errors="replace")
    if part.name == "tests":
        verdicts = [match.groups() for match in map(VERDICT.match, text.splitlines()) if match]
        counts = Counter(verdict.lower() for _, verdict in verdicts)
        bad = [name for name, verdict in verdicts if verdict in ("FAILED", "ERROR")]
        return {"counts": dict(counts), "failed": bad} if verdicts else None
    left = part.partial.read_text() if part.partial and part.partial.is_file() else ""
    for content in (text, left):
        with contextlib.suppress(ValueError):
            return json.loads(content)
    return None


def main(folder: Path) -> None:
    say(as_text(read_outcomes(folder)))


def read_outcomes(folder: Path) -> list[dict[str, Any]]:
    """Outcomes of the parts, in the order they were run; InputError where there are none."""
    summary = folder / SUMMARY
    if not summary.is_file():
        raise InputError(f"{folder}: no {SUMMARY}; 'latentds bench gpu --out {folder}' writes it")
    names = json.loads(summary.read_text())["parts"]
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) for path in files if path.is_file()]


def as_text(outcomes: list[dict[str, Any]]) -> str:
    """What became of every part, then the tables of those that measured."""
    rows = [
        [one["part"], one["status"], f"{one['seconds']:.0f} of {one['limit_s']:.0f}", one["reason"]]
        for one in outcomes
    ]
    parts = [table(("part", "", "s", "why"), rows)]
    parts += [section(one) for one in outcomes if one["report"] is not None]
    return "\n\n".join(parts)


def section(outcome: dict[str, Any]) -> str:
    report = outcome["report"]
    if outcome["bench"]:
        text = TEXTS[outcome["bench"]](report)
    else:
        counts = [f"{count} {name}" for name, count in report["counts"].items()]
        text = ", ".join(counts) + "".join(f"\n- {name}" for name in report["failed"])
    cut = "" if outcome["status"] == "done" else f"\n\n{outcome['status']}: {outcome['reason']}"
    return f"## {outcome['title']}\n\n    {outcome['command']}\n\n{text}{cut}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
