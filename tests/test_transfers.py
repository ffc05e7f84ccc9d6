"""What workers send: everything, or an exception that says what to do."""

import contextlib
import itertools
import resource
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from latentds.core.processes import of_worker, shared_zeros, sharing
from latentds.errors import WorkerError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader


@contextlib.contextmanager
def room_for(size: int):
    """Files that may grow to `size`, of which shared memory is one; workers inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cut .pyc would stay
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes


def test_shared_memory_that_is_too_small_raises_and_names_the_remedy(shared_dataset):
    loader = LatentLoader(shared_dataset, batch_size=100, decode="codes", num_workers=2)
    with pytest.raises(WorkerError, match="--shm-size"), room_for(4096):
        list(loader)


def test_a_data_sets_own_workers_raise_too(shared_dataset, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # 5 s
    data = LatentDataset(shared_dataset, batch_size=100)
    with pytest.raises(WorkerError, match="no 0.0 MiB of shared memory"), room_for(4096):
        list(DataLoader(data, batch_size=None, num_workers=1))


def test_memory_for_marks_that_cannot_be_had_is_told():
    with pytest.raises(WorkerError, match="num_workers=0"), room_for(4096):
        shared_zeros(1 << 20, torch.bool)


@pytest.mark.parametrize(
    "lose",
    [
        lambda transfers: itertools.islice(transfers, 2),  # an early end
        lambda transfers: (t for t in transfers if t[0] != 1),  # a gap
    ],
)
def test_an_epoch_that_lacks_batches_raises(shared_dataset, monkeypatch, lose):
    monkeypatch.setattr("latentds.loading.dataset.TRANSFER_BYTES", 1)  # a batch a transfer
    loader = LatentLoader(shared_dataset, batch_size=100, decode="codes")
    whole = loader.transferred
    monkeypatch.setattr(loader, "transferred", lambda: lose(whole()))
    with pytest.raises(WorkerError, match=r"batch [12] of 5 did not come from its worker"):
        list(loader)


def test_a_worker_that_died_is_an_error_of_ours():
    died = of_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."))
    assert died is not None and "pid 7" in str(died) and "num_workers" in str(died)
    another = RuntimeError("another")
    assert of_worker(another) is another


def test_a_temporary_folder_too_deep_for_sockets_is_named():
    words = "folder's path is too long for a socket .* set TMPDIR"
    with pytest.raises(WorkerError, match=words), sharing():
        raise RuntimeError("unable to open shared memory object: AF_UNIX path too long")
