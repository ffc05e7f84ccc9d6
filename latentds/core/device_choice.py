"""Which device a name means, and what is said where there is none or a slow one."""

from __future__ import annotations

import functools
import logging
import os

import torch

from latentds.errors import InputError

logger = logging.getLogger(__name__)


def choose_device(name: torch.device | str = "auto") -> torch.device:
    """The device of that name, a GPU with its number; auto is the GPU where there is one, else cpu.

    name    auto, cpu, cuda, cuda:1, mps, or a torch.device. "cuda" is this rank's own GPU: the one
            made current by `torch.cuda.set_device`, else the launcher's LOCAL_RANK-th
    raises  InputError where it is not available, with what is
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"device {str(name)!r} is not available here ({reason}); {', '.join(available())} is"
        ) from error
    if device.type != "cuda" or device.index is not None:
        return device
    current, local = torch.cuda.current_device(), int(os.environ.get("LOCAL_RANK", "0"))
    # With one visible GPU a process, every rank's own is number 0.
    use_local = current == 0 and local < torch.cuda.device_count()
    return torch.device("cuda", local if use_local else current)


def available() -> list[str]:
    """Names of the devices of this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    others = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(f"cuda:{number}" for number in range(gpus)), *others]


@functools.cache
def warn_of_slow_decoding() -> None:
    """Say, once a process, what decoding pixels on a CPU costs."""
    # turbo-s in bfloat16: 40 patches/s on two cores, 44,820 on an H200; docs/benchmarks.md
    logger.warning(
        "pixels are decoded on a CPU, some 1,000 times slower than on a GPU and 50 times slower "
        "than JPEG: take a machine with one (device='auto' finds it) or decode='latents'; for sets "
        "of tiny-v2 decoder='tiny-v2-cpu' is some ten times as fast as their own"
    )
