"""Tables of what `bench gpu` measured, as Markdown for docs/benchmarks.md.

python -m latentds_tools.bench.gpu_tables results/gpu-CARD/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentds_tools.bench import bench_decode, bench_features, bench_loader, bench_step
from latentds_tools.reports.markdown import table

from latentds.core.display import say
from latentds.errors import InputError

SUMMARY = "summary.json"
TEXTS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "decode": bench_decode.as_text,
    "loader": bench_loader.as_text,
    "step": bench_step.as_text,
    "features": bench_features.as_text,
}


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
