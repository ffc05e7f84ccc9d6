"""latentds bench gpu: all that a machine with a GPU can tell, in so many minutes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from latentds_tools.bench.harness import write_report
from latentds_tools.reports.commands import check_free, check_known, listed, show, tell

from latentds.errors import InputError

PATCHES = {True: 65_536, False: 64}  # of the sets that loaders read, by whether there is a GPU


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
    from latentds_tools.bench.gpu_tables import as_text

    outcomes = measure(config)
    show(list(outcomes.values()), config.json, as_text)
    return int(any(one["status"] == "failed" for one in outcomes.values()))


def measure(config: Config) -> dict[str, Any]:
    import torch
    from latentds_tools.bench.gpu_parts import all_parts
    from latentds_tools.bench.gpu_running import run_parts
    from latentds_tools.bench.gpu_tables import SUMMARY

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
