"""Rank and number of ranks, from torch.distributed or the launcher's environment."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch

PATIENCE = datetime.timedelta(days=14)  # ranks may have slides of very unlike sizes


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks.

    As given, from torch.distributed, or from the launcher.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("pass both rank and world_size, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank = int(os.environ.get("RANK", "0"))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    return rank, world_size


@contextlib.contextmanager
def meeting(world_size: int) -> Iterator[None]:
    """Wait at both ends of the block for torchrun's other ranks, for as long as it takes.

    torchrun ends all ranks where one exits with anything but 0. Others than torchrun's wait for
    nobody.
    """
    if world_size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        torch.distributed.barrier()
        yield
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def gather(values: dict[str, str]) -> dict[str, str]:
    """The union of every rank's dictionary. Collective: every rank has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, values)
    return {key: text for part in parts for key, text in sorted(part.items())}
