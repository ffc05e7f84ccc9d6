"""Run the parts of `bench gpu`: a process each, its time, what it printed, its outcome as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from latentds_tools.bench.gpu_parts import GpuPart
from latentds_tools.bench.harness import child, last_words, write_report
from latentds_tools.reports.commands import tell

# Of a part: done; cut when its time was over, what it had left kept; failed; skipped.
DONE, CUT, FAILED, SKIPPED = "done", "cut", "failed", "skipped"
LEAST_S = 5.0  # less than a process takes to start
VERDICT = re.compile(r"^\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)")
SHOWN_REASON = 400


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
    status = CUT if code is None else DONE if code == 0 and not all_failed(report) else FAILED
    reason = ""
    if status == CUT:
        reason = f"its time was over; {'what it had left is kept' if report else 'nothing is left'}"
    elif status == FAILED:
        said = [path.read_text(errors="replace") for path in (log, printed)]
        reason = never_engaged(report) or all_failed(report) or last_words(*said, most=SHOWN_REASON)
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


def never_engaged(report: Any) -> str:
    """What a decode bench's rows say of options that never ran, with what decoder; or nothing."""
    rows = report.get("rows", []) if isinstance(report, dict) else []
    told = [f"{row['decoder']}, {row['options']}: {row['error']}" for row in rows
            if "never_engaged" in row]  # fmt: skip
    return "; ".join(told)[:SHOWN_REASON]


def all_failed(report: Any) -> str:
    """The first error of a report of which no row came to figures; nothing where one did."""
    rows = report.get("results", []) if isinstance(report, dict) else []
    errors = [str(row["error"]) for row in rows if "error" in row]
    return errors[0][:SHOWN_REASON] if errors and len(errors) == len(rows) else ""
