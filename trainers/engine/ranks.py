"""Meeting the other ranks, and coming to the same end on all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from latentds_trainers.engine.launching import same_on_all_ranks
from latentds_trainers.engine.wrapping import load_deepspeed

from latentds.core.processes import choose_device, launched_rank
from latentds.errors import InputError, LatentdsError

Made = TypeVar("Made")


def join_ranks() -> torch.device:
    """Meet the other ranks, unless that is done; returns this rank's device.

    A GPU where there is one, unless DS_ACCELERATOR, which DeepSpeed reads too, says "cpu".
    """
    deepspeed = load_deepspeed()
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = choose_device("cuda")
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if "RANK" not in os.environ and not dist.is_initialized():  # no launcher: one rank, no port
        launched_rank()  # raises where a scheduler started several, each of which would train alone
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's, though not in its list
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return device


def gathered(own: Any) -> list[Any]:
    """What every rank has, in their order. Collective."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def failure_of(write: Callable[[], None]) -> str | None:
    """Do it; what any rank's file system refused, the same on every rank. Collective."""
    own = None
    try:
        write()
    except OSError as error:
        own = str(error)
    return next((text for text in gathered(own) if text is not None), None)


def from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, or its error, on every rank. Collective.

    raises  what rank 0 did; InputError for an OSError
    """
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except LatentdsError as error:
            made[0] = error
        except OSError as error:
            made[0] = InputError(str(error))
    dist.broadcast_object_list(made)
    if isinstance(made[0], LatentdsError):
        raise same_on_all_ranks(made[0])
    return made[0]


def on_all_ranks(make: Callable[[], Made]) -> Made:
    """What every rank makes for itself, without meeting the others. Collective.

    raises  this rank's error, InputError for an OSError; or InputError that names the rank that
            failed. Either is told once
    """
    own: LatentdsError | None = None
    try:
        made = make()
    except LatentdsError as error:
        own = error
    except OSError as error:
        own = InputError(str(error))
    texts = gathered(None if own is None else str(own))
    if own is not None:
        raise same_on_all_ranks(own)
    for rank, text in enumerate(texts):
        if text is not None:
            raise same_on_all_ranks(InputError(f"rank {rank}: {text}"))
    return made
