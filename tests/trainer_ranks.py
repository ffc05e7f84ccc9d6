"""Ranks of a trainer in processes of their own, met without a launcher and without a port."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def run_ranks(
    processes: ForkServerContext, main: Callable[[Any], None], config: Any, ranks: int
) -> None:
    """Run `main(config)` on so many ranks on the CPU; `processes` is the fixture."""
    rendezvous = config.out.with_name(f"{config.out.name}.rendezvous")
    started = [
        processes.Process(target=rank_of, args=(rendezvous, rank, ranks, main, config))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()  # a rank that waits for others in vain is ended by gloo's own timeout
    assert [process.exitcode for process in started] == [0] * ranks


def rank_of(
    rendezvous: Path, rank: int, ranks: int, main: Callable[[Any], None], config: Any
) -> None:
    """One rank: what a launcher tells it, then the trainer."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    main(config)
    torch.distributed.destroy_process_group()
