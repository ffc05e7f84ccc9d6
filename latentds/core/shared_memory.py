"""Shared memory through which workers send, and what is said where there is too little of it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentds.errors import WorkerError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHM = Path("/dev/shm")
REMEDY = (
    "give the machine more (docker run --shm-size=2g or --ipc=host; in Kubernetes an emptyDir of "
    "medium Memory on /dev/shm), or take fewer num_workers, a smaller prefetch_factor or batch, or "
    "num_workers=0; 'latentds doctor' looks at it"
)


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
    """What was sealed."""
    with sharing():
        return pickle.load(io.BytesIO(content))


def shared_buffer(size: int) -> Tensor:
    """uint8 (size,) in shared memory; WorkerError where there is too little."""
    import torch

    buffer = torch.empty(0, dtype=torch.uint8)
    with sharing(size):
        buffer.set_(torch.UntypedStorage._new_shared(size))  # type: ignore[no-untyped-call]
    return buffer


def shared_zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros (size,) that forked and spawned workers see change; WorkerError as above."""
    import torch

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
            f"({describe_shm()}; {first_line(error)}); {REMEDY}"
        ) from error


def describe_shm() -> str:
    """How large and how full /dev/shm is."""
    if not SHM.is_dir():
        return f"{SHM} is not there"
    usage = shutil.disk_usage(SHM)
    return f"{SHM} has {usage.total / 2**20:,.1f} MiB, {usage.free / 2**20:,.1f} free"


def first_line(error: BaseException) -> str:
    """The start of an error's text."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def of_dead_worker(error: RuntimeError) -> WorkerError | None:
    """The error of a worker that died, None for any other; torch only says by which signal."""
    text = first_line(error)
    if not text.startswith("DataLoader worker"):
        return None
    return WorkerError(
        f"{text}: a loader's worker died (process {os.getpid()} is its consumer; "
        f"{describe_shm()}). Killed by the system it lacked memory; take fewer num_workers"
    )
