"""One rank of a loader that is stopped or resumed, in a process of its own: what it delivers.

Run by path, with any Python that has torch and the peer: only its own loader imports this package.
"""

from __future__ import annotations

import json
import operator
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

AHEAD = 2  # batches a run still gets between its checkpoint and its end
SEED = 0
LENGTH_LIMIT = 3  # epochs' worth of samples, behind which a loader is taken to be endless

Spec = dict[str, Any]
Batches = list[list[int]]


def main() -> None:
    """Run a phase as the JSON in the first argument says."""
    spec = json.loads(sys.argv[1])
    distributed = spec["ranks"] > 1
    if distributed:
        torch.distributed.init_process_group("gloo")
    delivered = run_phase(spec)
    Path(spec["out"]).write_text(json.dumps(delivered))
    if distributed:
        torch.distributed.barrier()  # a rank that ends early must not take the others along
    if spec["phase"] == "stopped":
        os.kill(os.getpid(), signal.SIGKILL)


def run_phase(spec: Spec) -> Batches:
    """Sample numbers of every batch that counts: none behind a checkpoint."""
    torch.manual_seed(SEED)
    loader, numbers_of = BUILDERS[spec["peer"]](spec)
    state_dict = getattr(loader, "state_dict", None)  # DataLoader has none
    if spec["phase"] == "resumed" and state_dict:
        loader.load_state_dict(torch.load(spec["state"], weights_only=False))
    stop = spec["stop"] if spec["phase"] == "stopped" else None
    delivered: Batches = []
    for number, batch in enumerate(loader, 1):
        if stop is None or number <= stop:
            delivered.append([int(sample) for sample in numbers_of(batch)])
        if number == stop and state_dict:
            torch.save(state_dict(), spec["state"])
        is_endless = sum(map(len, delivered)) > LENGTH_LIMIT * spec["samples"]
        if is_endless or (stop is not None and number >= stop + AHEAD):
            break
    return delivered


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def latentds_loader(spec: Spec) -> Any:
    from latentds import LatentLoader, Order

    loader = LatentLoader(
        spec["folder"],
        shuffle=True,
        seed=SEED,
        order=Order(global_batch_size=spec["batch_size"] * spec["ranks"]),
        device="cpu",
        decode="stored",
        num_workers=spec["workers"],
    )
    return loader, lambda batch: batch.rows[batch.valid]


def plain_loader(kind: Callable[..., Any], source: Any, spec: Spec, **options: Any) -> Any:
    """A DataLoader, or StatefulDataLoader, of batches that are lists of numbers."""
    return kind(
        source,
        batch_size=spec["batch_size"],
        num_workers=spec["workers"],
        collate_fn=list,
        **options,
    )


def webdataset_loader(spec: Spec) -> Any:
    """Without a state, as webdataset has none: a resumed run begins anew.

    Or in torchdata's loader, which reads again and throws away what was delivered.
    """
    import webdataset as wds
    from torch.utils.data import DataLoader

    kind: Any = DataLoader
    if spec["peer"] == "webdataset-stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        kind = StatefulDataLoader
    urls = sorted(str(path) for path in Path(spec["folder"]).glob("*.tar"))
    options = {"shardshuffle": len(urls), "detshuffle": True, "seed": SEED}
    data = wds.WebDataset(urls, nodesplitter=wds.split_by_node, **options)
    shuffled = data.compose(wds.filters.detshuffle(spec["buffer"], seed=SEED))
    samples = shuffled.decode().to_tuple("cls").map(operator.itemgetter(0))
    return plain_loader(kind, samples, spec), list


def datasets_loader(spec: Spec) -> Any:
    """Streamed Parquet in torchdata's loader, as its documentation has it."""
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    files = sorted(str(path) for path in Path(spec["folder"]).glob("*.parquet"))
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=SEED, buffer_size=spec["buffer"])
    rows = split_dataset_by_node(rows, rank=rank(), world_size=spec["ranks"])
    return plain_loader(StatefulDataLoader, rows, spec), lambda batch: [
        row["label"] for row in batch
    ]


def torchdata_loader(spec: Spec) -> Any:
    """A map-style data set, whose whole order is the sampler's."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    numbers = range(spec["samples"])
    sampler = StatefulDistributedSampler(
        numbers, num_replicas=spec["ranks"], rank=rank(), seed=SEED
    )
    return plain_loader(StatefulDataLoader, numbers, spec, sampler=sampler), list


def mds_loader(spec: Spec) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset

    options = {"batch_size": spec["batch_size"], "shuffle_seed": SEED}
    data = StreamingDataset(local=spec["folder"], shuffle=True, **options)
    # Its own collating: the state counts the samples of a batch by the form that this gives.
    options = {"batch_size": spec["batch_size"], "num_workers": spec["workers"]}
    return StreamingDataLoader(data, **options), operator.itemgetter("label")


def litdata_loader(spec: Spec) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(spec["folder"], shuffle=True, seed=SEED, drop_last=False)
    options = {"batch_size": spec["batch_size"], "num_workers": spec["workers"], "shuffle": True}
    return StreamingDataLoader(data, **options), operator.itemgetter("label")


BUILDERS: dict[str, Callable[[Spec], Any]] = {
    "latentds": latentds_loader,
    "webdataset": webdataset_loader,
    "webdataset-stateful": webdataset_loader,
    "datasets": datasets_loader,
    "torchdata": torchdata_loader,
    "mds": mds_loader,
    "litdata": litdata_loader,
}


if __name__ == "__main__":
    main()
