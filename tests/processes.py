"""Functions in processes of their own, forked from one that has torch: a start imports nothing."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOADED = [
    "tests.conftest",
    "latentds.loading.loader",
    "latentds.hub.set_upload",
    "pyarrow.parquet",
    "tests.rank_imports",
]


def new_context() -> ForkServerContext:
    """What starts the processes; its server lives as long as this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def call_apart(context: ForkServerContext, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in another process; what it raises is raised as RuntimeError."""
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        is_good, value = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"ended with {process.exitcode} and without an answer") from None
    process.join()
    if not is_good:
        raise RuntimeError(value)
    return value


def answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        told = True, function(*args)
    except Exception as error:
        told = False, f"{type(error).__name__}: {error}"
    connection.send(told)


def limit_file_size(size: int) -> None:
    """Let this process write no larger file: what a full disk does, as far as a write is told."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # a cut .pyc would end every later process that imports it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
