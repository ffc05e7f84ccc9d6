"""Ranks of a trainer in processes of their own, met without a launcher and without a port."""

from __future__ import annotations

import dataclasses
import datetime
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one rank ended: exit code (negative: killed by that signal), stdout and stderr."""

    code: int | None
    text: str


def run_ranks(
    processes: ForkServerContext, main: Callable[[Any], None], config: Any, ranks: int
) -> None:
    """Run `main(config)` to its end on so many ranks on the CPU; `processes` is the fixture."""
    succeed(started_ranks(processes, config.out, ranks, main, config))


def run_words(
    processes: ForkServerContext, out: Path, ranks: int, module: str, *words: str
) -> list[Ended]:
    """Run `python -m module --out OUT words` on so many ranks: what a launcher would start."""
    return started_ranks(processes, out, ranks, by_words, module, "--out", str(out), *words)


def succeed(ended: list[Ended]) -> None:
    """Assert that every rank came to its end."""
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].text[-3000:]


def started_ranks(
    processes: ForkServerContext, out: Path, ranks: int, function: Callable[..., None], *args: Any
) -> list[Ended]:
    """Run a function on so many ranks and wait for all of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rendezvous = out.with_name(f"{out.name}.rendezvous")
    rendezvous.unlink(missing_ok=True)  # of a run before
    started = [
        processes.Process(target=rank_of, args=(rendezvous, rank, ranks, function, args))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()  # a rank that waits for others in vain is ended by gloo's own timeout
    texts = [log_of(rendezvous, rank).read_text(errors="replace") for rank in range(ranks)]
    return [Ended(process.exitcode, text) for process, text in zip(started, texts, strict=True)]


def log_of(rendezvous: Path, rank: int) -> Path:
    return rendezvous.with_name(f"{rendezvous.name}.{rank}.log")


def rank_of(
    rendezvous: Path, rank: int, ranks: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """One rank: what a launcher tells it, then the function."""
    with log_of(rendezvous, rank).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def by_words(module: str, *words: str) -> None:
    """A module started by its command line."""
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
