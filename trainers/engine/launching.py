"""From a command line to a rank that runs a recipe: arguments, signals, exit codes.

    deepspeed --num_gpus 2 --module latentds_trainers.train_codec ...   # on a CPU it counts ranks
    torchrun --nproc_per_node 2 -m latentds_trainers.train_codec ...
    python -m latentds_trainers.train_codec ...                         # one rank

Imports neither torch nor DeepSpeed, so that `--help` stays fast. Exit codes: 0 the run reached its
last step; 1 a LatentdsError (one line on stderr); 2 usage; 143 stopped by SIGTERM or Ctrl-C with a
checkpoint saved, so that the same command goes on. SIGTERM may go to a rank, to the launcher, or to
the node launcher that `deepspeed` starts; the launcher's own exit code is then what it makes of it
(SIGTERM kills `deepspeed` itself at once, its node launcher ends with 1). A node launcher kills
ranks that have not ended 30 s after the signal: a step and a checkpoint have to fit in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from latentds.core.display import say, start_logging
from latentds.core.extras import check_extras
from latentds.errors import LatentdsError

if TYPE_CHECKING:
    import psutil

STOPPED = 128 + signal.SIGTERM  # exit code, as a shell tells it
STOPPING = (signal.SIGTERM, signal.SIGINT)
TOLD = b"\nstopping after this step, with a checkpoint; a further Ctrl-C ends at once\n"
TELLING_S = 1.0  # what rank 0 has for telling an error, before a rank's end ends all

Config = TypeVar("Config")


def launch(
    main: Callable[[Config], None],
    config: type[Config],
    description: str | None,
    usual: Sequence[str] = (),
) -> None:
    """Parse the command line into `config` and run `main` on it, as one rank of however many.

    description  the recipe's docstring; its indented command lines become the help's examples
    usual        options that most runs need, shown behind the required ones

    Runs under `deepspeed --module NAME`, under `torchrun -m NAME` and as `python -m NAME`, which is
    a run of one rank. Ends the process with the exit codes above.
    """
    from latentds.core.command_line import check_out, parse

    # DeepSpeed's launcher adds the rank to the arguments; LOCAL_RANK says the same.
    words = [word for word in sys.argv[1:] if not re.match("--local[_-]rank=", word)]
    about, examples = parted(description or "")
    # The file that a launcher runs would stand there else.
    name = None if config.__module__ == "__main__" else config.__module__.removesuffix(".config")
    settings = parse(config, words, prog=name, description=about, usual=usual, examples=examples)
    rank = int(os.environ.get("RANK", "0"))
    level = logging.INFO if rank == 0 else logging.ERROR
    start_logging(level)
    try:
        recipe = config.__module__.rpartition(".")[0].rpartition(".")[2]  # its folder's name
        check_extras(recipe, settings)
        check_out(settings)
        main(settings)
    except LatentdsError as error:
        tell(error, rank)
        # Left to the interpreter's end, the connections' threads may abort the process: exit -6.
        leave_ranks(together=False)
        sys.exit(1)
    leave_ranks()


def take_device(name: str) -> None:
    """Have the engine take the CPU where a recipe's --device says so; others must be there.

    raises  InputError for a device that is not available
    """
    if name == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif name != "auto":
        from latentds.core.processes import choose_device

        choose_device(name)


def parted(docstring: str) -> tuple[str, list[str]]:
    """A docstring's prose, and its indented command lines, continued ones joined."""
    lines = docstring.splitlines()
    examples = "\n".join(line.strip() for line in lines if line.startswith("    "))
    prose = "\n".join(line for line in lines if not line.startswith("    "))
    return re.sub(r"\n{3,}", "\n\n", prose), examples.replace("\\\n", "").splitlines()


def same_on_all_ranks(error: LatentdsError) -> LatentdsError:
    """The error, marked as one that every rank raises: only rank 0 tells it."""
    error.is_on_all_ranks = True  # type: ignore[attr-defined]
    return error


def tell(error: LatentdsError, rank: int) -> None:
    """Print the error's line, once for all ranks where it is every rank's."""
    if rank == 0:
        say(error, file=sys.stderr)
    elif getattr(error, "is_on_all_ranks", False):
        time.sleep(TELLING_S)
    else:
        say(f"rank {rank}: {error}", file=sys.stderr)


def leave_ranks(together: bool = True) -> None:
    """Close the connections to the other ranks, if there were any; by default once all are here."""
    if "torch" in sys.modules:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if together:  # a rank that is still talking must not lose its peer
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()


class StopRequest:
    """Whether this rank has been asked to stop: by a signal, or by the end of its launcher.

    The `deepspeed` command does not pass SIGTERM on; it dies, and its child that started the ranks
    becomes an orphan. The ranks see that and stop as if they had got the signal.
    """

    def __init__(self) -> None:
        self.has_signal, self.process = False, os.getpid()
        self.launcher = deepspeed_launcher()
        self.launchers_parent = self.launcher and self.launcher.ppid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGTERM and Ctrl-C as requests, not as an end, within the block (main thread only).

        Ctrl-C is one only once: whoever does not wait for the checkpoint ends the run by another.
        """
        before = {number: signal.signal(number, self.note) for number in STOPPING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.has_signal = True
        if number == signal.SIGINT and os.getpid() == self.process:  # in no forked reader
            signal.signal(number, signal.default_int_handler)
            if os.environ.get("RANK", "0") == "0":  # not logged: a signal may come within a write
                os.write(2, TOLD)

    def __bool__(self) -> bool:
        if self.launcher is None:
            return self.has_signal
        import psutil

        try:
            return self.has_signal or self.launcher.ppid() != self.launchers_parent
        except psutil.NoSuchProcess:
            return True


def deepspeed_launcher() -> psutil.Process | None:
    """DeepSpeed's node launcher, where it is this process's parent."""
    import psutil

    parent = psutil.Process().parent()
    try:
        is_launcher = parent is not None and "deepspeed.launcher.launch" in parent.cmdline()
    except psutil.Error:  # another user's process
        return None
    return parent if is_launcher else None
