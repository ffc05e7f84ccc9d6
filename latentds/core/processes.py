"""What a process runs on and with: its device, its rank, the memory through which workers send."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import io
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from latentds.errors import InputError, LatentdsError, WorkerError, first_words

PATIENCE = datetime.timedelta(days=14)  # ranks may have slides of very unlike sizes
SHM = Path("/dev/shm")
REMEDY = (
    "give the machine more (docker run --shm-size=2g or --ipc=host; in Kubernetes an emptyDir of "
    "medium Memory on /dev/shm), or take fewer num_workers, a smaller prefetch_factor or batch, or "
    "num_workers=0; 'latentds doctor' looks at it"
)
logger = logging.getLogger(__name__)


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
            rank, world_size = launched_rank()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    return rank, world_size


def launched_rank() -> tuple[int, int]:
    """Rank and number of ranks in the launcher's environment; 0 of 1 without a launcher."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    # Scripts for Slurm set the number alone: each of their processes would be rank 0.
    rank = os.environ.get("RANK", "0" if ranks == "1" else "")
    try:
        return int(rank), int(ranks)
    except ValueError:
        raise InputError(
            f"RANK={rank!r} and WORLD_SIZE={ranks!r} in the environment; set both, as torchrun "
            "does, or call torch.distributed.init_process_group before"
        ) from None


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


class Sealed:
    """What a worker sends, pickled where an error can still be raised.

    A queue pickles in a thread of its own, which prints what goes wrong and drops what it had: the
    consumer would lack a batch and hear nothing. Bytes it cannot fail to pickle. Who receives this
    has `content` itself.
    """

    def __init__(self, content: Any) -> None:
        with sharing():
            self.content = bytes(ForkingPickler.dumps(content))

    def __reduce__(self) -> tuple[Any, ...]:
        return unseal, (self.content,)


def unseal(content: bytes) -> Any:
    with sharing():
        return pickle.load(io.BytesIO(content))


def shared_buffer(size: int) -> Tensor:
    """uint8 (size,) in shared memory; WorkerError where there is too little."""
    buffer = torch.empty(0, dtype=torch.uint8)
    with sharing(size):
        buffer.set_(torch.UntypedStorage._new_shared(size))  # type: ignore[no-untyped-call]
    return buffer


def shared_zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros (size,) that forked and spawned workers see change; WorkerError as above."""
    with sharing(size * dtype.itemsize):
        zeros: Tensor = torch.zeros(size, dtype=dtype).share_memory_()  # type: ignore[no-untyped-call]
    return zeros


@contextlib.contextmanager
def sharing(size: int | None = None) -> Iterator[None]:
    """Turn what torch says of a full /dev/shm, or of too many open files, into a WorkerError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        wanted = "" if size is None else f"{size / 2**20:,.1f} MiB of "
        if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
            raise WorkerError(
                "batches cannot be sent between processes: too many open files; raise the limit "
                "('ulimit -n 65536') or take fewer num_workers"
            ) from error
        if "AF_UNIX path too long" in str(error):
            raise WorkerError(
                "batches cannot be sent between processes: the temporary folder's path is too long "
                f"for a socket ({tempfile.gettempdir()}); set TMPDIR to a shorter one, as /tmp"
            ) from error
        raise WorkerError(
            f"batches cannot be sent between processes: no {wanted}shared memory "
            f"({describe_shm()}; {first_words(error)}); {REMEDY}"
        ) from error


def describe_shm() -> str:
    if not SHM.is_dir():
        return f"{SHM} is not there"
    usage = shutil.disk_usage(SHM)
    return f"{SHM} has {usage.total / 2**20:,.1f} MiB, {usage.free / 2**20:,.1f} free"


def of_worker(error: Exception) -> Exception:
    """What a worker's error comes to: of a death more than torch's signal, of ours the words alone.

    Torch puts the frames of the worker before the words.
    """
    text = first_words(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return WorkerError(
            f"{text}: a loader's worker died (process {os.getpid()} is its consumer; "
            f"{describe_shm()}). Killed by the system it lacked memory; take fewer num_workers"
        )
    if not isinstance(error, LatentdsError):
        return error
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return type(error)(str(error).rpartition(name)[2].rstrip())


def this_worker() -> tuple[int, int]:
    """Number of this DataLoader worker, and how many there are; (0, 1) in the main process."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def refuse_cuda_in_worker() -> None:
    """Say plainly why a worker that inherited or made a CUDA context will not do."""
    if (
        get_worker_info() is not None
        and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        and not torch.cuda._is_in_bad_fork()
    ):
        raise RuntimeError(
            "a DataLoader worker has a CUDA context; latentds decodes in the main process. Remove "
            "CUDA calls from worker_init_fn and from what the dataset carries"
        )


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
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
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
