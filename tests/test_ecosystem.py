"""Under other people's loops: torchdata's StatefulDataLoader, a DeepSpeed engine's checkpoint."""

import json
import socket

import pytest
import torch

from latentds.dataset import LatentDataset
from latentds.loader import LatentLoader

OPTIONS = {"global_batch_size": 40, "shuffle": True, "seed": 2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 12])
def test_stateful_dataloader_resumes_exactly(shared_dataset, workers, stop):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        data = LatentDataset(shared_dataset, **OPTIONS)
        return torchdata.StatefulDataLoader(data, batch_size=None, num_workers=workers)

    whole = [batch.rows.tolist() for batch in loader()]
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


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A DeepSpeed engine on the CPU, a process on its own."""
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.ops import __compatible_ops__

    # Otherwise the first start compiles a shared-memory collective for minutes.
    monkeypatch.setitem(__compatible_ops__, "deepspeed_shm_comm", False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in (launcher | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    model = torch.nn.Linear(48, 2)
    config = {"train_micro_batch_size_per_gpu": 40, "zero_allow_untested_optimizer": True}
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config=config,
        dist_init_required=True,
    )
    yield made
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_deepspeed_checkpoint_carries_the_loader(shared_dataset, engine, tmp_path):
    whole = [
        batch.rows.tolist() for batch in LatentLoader(shared_dataset, decode="codes", **OPTIONS)
    ]
    loader, seen = LatentLoader(shared_dataset, decode="codes", **OPTIONS), []
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
    resumed = LatentLoader(shared_dataset, decode="codes", **OPTIONS)
    resumed.load_state_dict(client["loader"])
    assert seen + [batch.rows.tolist() for batch in resumed] == whole
