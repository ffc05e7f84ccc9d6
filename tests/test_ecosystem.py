"""Under other people's loops: torchdata's StatefulDataLoader, a DeepSpeed engine's checkpoint."""

import json

import pytest
import torch

from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from tests.loaders import grouped

OPTIONS = {"global_batch_size": 40, "shuffle": True, "seed": 2}


@pytest.fixture(scope="module")
def whole(shared_dataset) -> list[list[int]]:
    """The rows of every batch of an epoch."""
    return [batch.rows.tolist() for batch in LatentDataset(shared_dataset, **grouped(**OPTIONS))]


@pytest.mark.parametrize(
    ("stop", "workers"),
    [(1, 0), (5, 0), (12, 0), (1, 2), pytest.param(5, 2, marks=pytest.mark.slow), (12, 2)],
)
def test_stateful_dataloader_resumes_exactly(shared_dataset, whole, workers, stop):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        data = LatentDataset(shared_dataset, **grouped(**OPTIONS))
        return torchdata.StatefulDataLoader(data, batch_size=None, num_workers=workers)

    assert len(whole) == 13
    stopped, batches = loader(), []
    for batch in stopped:
        batches.append(batch.rows.tolist())
        if len(batches) == stop:
            break
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert batches + [batch.rows.tolist() for batch in resumed] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_saved_at_an_epochs_end_goes_on(shared_dataset, whole, workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        data = LatentDataset(shared_dataset, **grouped(**OPTIONS))
        return torchdata.StatefulDataLoader(data, batch_size=None, num_workers=workers)

    ended = loader()
    assert len(list(ended)) == len(whole)
    resumed = loader()
    resumed.load_state_dict(ended.state_dict())
    assert [batch.rows.tolist() for batch in resumed] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_taken_before_an_epochs_first_batch_is_that_epochs_start(shared_dataset, workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        data = LatentDataset(shared_dataset, **grouped(**OPTIONS))
        options = {"batch_size": None, "num_workers": workers, "persistent_workers": workers > 0}
        return data, torchdata.StatefulDataLoader(data, **options)

    data, stopped = loader()
    next(batches := iter(stopped)), next(batches)
    data.set_epoch(1)
    batches = iter(stopped)
    state = stopped.state_dict()
    following = [batch.rows.tolist() for batch in batches]
    _, resumed = loader()
    resumed.load_state_dict(state)
    assert [batch.rows.tolist() for batch in resumed] == following and len(following) == 13


@pytest.fixture
def engine(monkeypatch):
    """A DeepSpeed engine on the CPU, a process on its own.

    The process group stays, as DeepSpeed keeps groups of its own that end with it for good.
    """
    pytest.importorskip("deepspeed")
    from latentds_trainers.engine.ranks import join_ranks
    from latentds_trainers.engine.wrapping import load_deepspeed

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    join_ranks()
    model = torch.nn.Linear(48, 2)
    config = {"train_micro_batch_size_per_gpu": 40, "zero_allow_untested_optimizer": True}
    made, *_ = load_deepspeed().initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )
    return made


@pytest.mark.slow
def test_a_deepspeed_checkpoint_carries_the_loader(shared_dataset, engine, tmp_path):
    whole = [
        batch.rows.tolist()
        for batch in LatentLoader(shared_dataset, **grouped(decode="codes", **OPTIONS))
    ]
    loader, seen = LatentLoader(shared_dataset, **grouped(decode="codes", **OPTIONS)), []
    for batch in loader:
        seen.append(batch.rows.tolist())
        loss = torch.nn.functional.cross_entropy(
            engine(batch.codes.flatten(1).float() / 255), batch.labels
        )
        engine.backward(loss)
        engine.step()
        if len(seen) == 4:
            break
    engine.save_checkpoint(str(tmp_path), client_state={"loader": loader.state_dict()})
    _, client = engine.load_checkpoint(str(tmp_path))
    json.dumps(client["loader"])
    resumed = LatentLoader(shared_dataset, **grouped(decode="codes", **OPTIONS))
    resumed.load_state_dict(client["loader"])
    assert seen + [batch.rows.tolist() for batch in resumed] == whole
