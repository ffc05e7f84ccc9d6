"""Files that appear whole or not at all, their hashes, and a lock a killed process gives back."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from latentds.errors import InputError

READ_BYTES = 1 << 20
LOCK_POLL_S = 0.2


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the file it happened to: a write that finds the disk full does not say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, sync, rename: readers see the old file or the whole new one."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write all of them under temporary names, then rename in their order.

    Where the disk is full every old file stays.
    """
    temporaries = {path: path.with_name(f"{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), temporaries[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            rename_durably(temporary, path)
    except OSError:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename, and sync the folder: a power failure leaves the old name or the new."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on `path`; a killed process gives it back, its holder may delete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    while (file := try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise InputError(f"{path.parent}: another run is writing here; wait for it")
        time.sleep(LOCK_POLL_S)
    with file:
        yield


@contextlib.contextmanager
def passing_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """`exclusive_lock` whose file is gone afterwards."""
    with exclusive_lock(path, patience_s):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def try_lock(path: Path) -> IO[str] | None:
    """The locked file; None where it is held, or deleted by a holder that has just ended."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except BlockingIOError:
        pass
    file.close()
    return None
