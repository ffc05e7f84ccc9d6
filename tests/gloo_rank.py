"""One rank of a real run: loads, counts, writes what it was handed. Started by test_resume."""

import datetime
import json
from pathlib import Path

import torch

from latentds import LatentLoader, Mixture
from tests.loaders import grouped


def main(task: dict) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{task['rendezvous']}",
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=datetime.timedelta(seconds=120),
    )
    folder = task["folder"]
    if isinstance(folder, dict):
        folder = Mixture(folder, task["epoch_patches"])
    loader = LatentLoader(
        folder,
        **grouped(
            global_batch_size=48,
            shuffle=True,
            seed=5,
            decode="codes",
            num_workers=task["workers"],
            **task["options"],
        ),
    )
    if task["state"] is not None:
        loader.load_state_dict(task["state"])
    batches = []
    if task["stop"]:
        for batch in loader:
            batches.append(entries(batch))
            # Ranks with batches to spare would hang here, and the test would say so.
            torch.distributed.all_reduce(torch.ones(1))
            if len(batches) == task["stop"]:
                break
    record = {"batches": batches, "state": loader.state_dict()}
    Path(f"{task['out']}-{task['rank']}.json").write_text(json.dumps(record))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def entries(batch) -> list[tuple]:
    sets = batch.sets.tolist() if batch.sets is not None else [0] * len(batch)
    codes = [bytes(patch).hex() for patch in batch.codes.numpy().reshape(len(batch), -1)]
    kept = zip(
        sets, batch.rows.tolist(), batch.seeds.tolist(), codes, batch.valid.tolist(), strict=True
    )
    return [entry[:4] for entry in kept if entry[4]]
