"""The loaders that are compared, each as its documentation has it.

Imported by any Python that has torch, numpy and the peer: it imports nothing else of this package.
"""
# C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import functools
import io
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

SCAN_AHEAD = {"prefetch_limit": 1, "range_size_limit": 128 << 20}  # documentation of datasets

Spec = dict[str, Any]
Labelled = tuple[torch.Tensor, torch.Tensor]


def loader_of(source: Any, spec: Spec, **options: Any) -> DataLoader[Any]:
    """A DataLoader with the run's workers, which stay alive between epochs."""
    workers, pin = spec["workers"], spec["device"].startswith("cuda")
    return DataLoader(
        source, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, **options
    )


def files_of(spec: Spec, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path(spec["folder"]).glob(pattern))


def latentds_loader(spec: Spec) -> Any:
    from latentds import LatentLoader
    from latentds.loading.decoding import Decode

    return LatentLoader(
        spec["folder"],
        spec["split"],
        batch_size=spec["batch_size"],
        shuffle=True,
        device=spec["device"],
        decode="stored" if spec["decode"] == "codes" else spec["decode"],  # as its peers' bytes
        num_workers=spec["workers"],
        autoencoder=spec["autoencoder"],
        dtype=getattr(torch, spec["dtype"]),
        decoding=Decode(**spec["decoding"]),
        resident=spec["peer"] == "latentds-resident",
    )


def webdataset_loader(spec: Spec) -> Any:
    """One patch a sample, a buffer of samples shuffled, as its documentation has it."""
    import webdataset as wds

    urls = files_of(spec, "*.tar")
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(spec["buffer"])
    if spec["images"]:
        data = data.decode("rgb8").to_tuple("jpg", "cls")
    else:
        data = data.decode().to_tuple("npy", "cls")
    return loader_of(data.batched(spec["batch_size"], collation_fn=stack), spec, batch_size=None)


def stack(samples: list[Any]) -> Labelled:
    """A batch of (array, label) samples; pictures (H, W, 3) become (3, H, W)."""
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images, torch.tensor([int(label) for _, label in samples])


class Pooled(IterableDataset[Labelled]):
    """Packs of patches unpacked and shuffled: the best that a user of a packed peer could write.

    unpack  makes codes (n, C, h, w) and labels (n,) of one of the packs, in a worker
    """

    def __init__(
        self, packs: Iterable[Any], unpack: Callable[[Any], tuple[Any, Any]], spec: Spec
    ) -> None:
        self.packs, self.unpack = packs, unpack
        self.batch, self.pool = spec["batch_size"], spec["buffer"]

    def __iter__(self) -> Iterator[Labelled]:
        rng = np.random.default_rng(torch.initial_seed() % 2**32)
        codes: list[Any] = []
        labels: list[Any] = []
        count = 0
        for part, part_labels in map(self.unpack, self.packs):
            codes.append(part)
            labels.append(part_labels)
            count += len(part)
            if count >= 2 * self.pool:
                joined = shuffle_together(codes, labels, rng)
                keep = yield from self.batches(*joined, count - self.pool)
                codes, labels = [joined[0][keep:]], [joined[1][keep:]]
                count -= keep
        if count:
            joined = shuffle_together(codes, labels, rng)
            yield from self.batches(*joined, count)

    def batches(self, codes: Any, labels: Any, count: int) -> Any:
        """Whole batches out of the first `count` patches; returns how many were used."""
        used = count - count % self.batch
        for start in range(0, used, self.batch):
            part = slice(start, start + self.batch)
            yield torch.from_numpy(codes[part]), torch.from_numpy(labels[part])
        return used


def shuffle_together(codes: list[Any], labels: list[Any], rng: Any) -> tuple[Any, Any]:
    joined, numbers = np.concatenate(codes), np.concatenate(labels)
    order = rng.permutation(len(joined))
    return joined[order], numbers[order]


def webdataset_packed_loader(spec: Spec) -> Any:
    """The shards as they are published, read by webdataset."""
    import pyarrow.parquet as pq
    import webdataset as wds

    urls = files_of(spec, f"data/{spec['split']}-*.tar")
    # With fewer shards than workers some would have none to read.
    data = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    number = {name: index for index, name in enumerate(spec["classes"])}

    def unpack(sample: Any) -> tuple[Any, Any]:
        codes = np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False)
        table = pq.read_table(io.BytesIO(sample["patches.parquet"]), columns=["label"])
        names = table["label"].to_pylist()
        return codes, np.array([number.get(name, -1) for name in names])

    return loader_of(Pooled(data, unpack, spec), spec, batch_size=None)


class Rows(Dataset[Any]):
    """A peer addressed by row: `fetch` gives a batch of row numbers, in a worker."""

    def __init__(self, fetch: Callable[[list[int]], Any]) -> None:
        self.fetch = fetch

    def __getitems__(self, rows: list[int]) -> Any:
        return self.fetch(rows)


def replay(fetch: Callable[[list[int]], Any], spec: Spec, collate: Any = None) -> Any:
    """A loader of the recorded rows, in their order, every epoch."""
    order, size = np.load(spec["order"]).tolist(), spec["batch_size"]
    collate = collate or (lambda batch: batch)
    return loader_of(Rows(fetch), spec, batch_size=size, sampler=order, collate_fn=collate)


def latentds_rows_loader(spec: Spec) -> Any:
    from latentds import LatentArray

    stored = {"resident": False, "device": "cpu", "decode": "stored"}
    array = LatentArray(spec["folder"], spec["split"], **stored)
    return replay(lambda rows: (array[rows], array.labels[rows]), spec)


def arrays_loader(open_arrays: Callable[[str], Any], spec: Spec) -> Any:
    """Arrays of all codes and labels, whose rows are read in rising order, as h5py wants them."""
    opened = functools.cache(open_arrays)  # in each worker: an open file does not survive a fork

    def fetch(rows: list[int]) -> Any:
        arrays, order = opened(spec["folder"]), np.argsort(rows)
        rising, back = np.asarray(rows)[order], np.argsort(order)
        return [torch.from_numpy(arrays[name][rising][back]) for name in ("codes", "labels")]

    return replay(fetch, spec)


def open_npy(folder: str) -> Any:
    return {name: np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("codes", "labels")}


def open_hdf5(folder: str) -> Any:
    import h5py

    return h5py.File(f"{folder}/patches.h5")


def stream_parquet(spec: Spec) -> Any:
    """Parquet streamed with the fetching ahead that datasets has since 2025."""
    import pyarrow as pa
    from datasets import load_dataset
    from pyarrow.dataset import ParquetFragmentScanOptions

    ahead = ParquetFragmentScanOptions(cache_options=pa.CacheOptions(**SCAN_AHEAD))
    files = {"data_files": files_of(spec, "*.parquet"), "split": "train"}
    return load_dataset("parquet", **files, streaming=True, fragment_scan_options=ahead)


def datasets_rows_loader(spec: Spec) -> Any:
    """Arrow files mapped into memory."""
    from datasets import load_from_disk

    return replay(load_from_disk(spec["folder"]).__getitems__, spec, collate_rows(spec))


def ray_loader(spec: Spec) -> Any:
    """Ray Data on this machine: files shuffled, then a buffer of patches."""
    import ray
    from ray.data.collate_fn import NumpyBatchCollateFn

    shape = tuple(spec["shape"])

    class Collate(NumpyBatchCollateFn):
        def __call__(self, batch: dict[str, Any]) -> Any:
            return unpacked(batch["codes"], shape), torch.from_numpy(batch["label"].copy())

    # One of its own, whatever Ray runs here besides.
    ray.init("local", num_cpus=spec["workers"], include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(spec["folder"], shuffle="files")
    return rows.iter_torch_batches(
        batch_size=spec["batch_size"],
        local_shuffle_buffer_size=spec["buffer"],
        collate_fn=Collate(),
        drop_last=True,
    )


def stream_mds(spec: Spec, batch_size: int) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=spec["folder"], shuffle=True, batch_size=batch_size, shuffle_seed=0
    )


def mds_rows_loader(spec: Spec) -> Any:
    """Addressed by row, its data set's own order is not used."""
    data = stream_mds(spec, spec["batch_size"])
    return replay(lambda rows: [data[row] for row in rows], spec, collate_rows(spec))


def litdata_loader(spec: Spec) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(spec["folder"], shuffle=True, drop_last=True)
    options = {"num_workers": spec["workers"], "persistent_workers": spec["workers"] > 0}
    size, collate = spec["batch_size"], collate_rows(spec)
    return StreamingDataLoader(data, batch_size=size, collate_fn=collate, **options)


def litdata_rows_loader(spec: Spec) -> Any:
    from litdata import StreamingDataset

    data = StreamingDataset(spec["folder"])
    return replay(lambda rows: [data[row] for row in rows], spec, collate_rows(spec))


def energon_loader(spec: Spec) -> Any:
    """Energon's index over tars of one patch a sample; an epoch is as many batches as fill it."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc,type-arg,unused-ignore]
        def encode_batch(self, batch: Any) -> Labelled:
            return stack(list(zip(batch.image, batch.label, strict=True)))

    data = get_train_dataset(
        spec["folder"],
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=spec["workers"]),
        batch_size=spec["batch_size"],
        batch_drop_last=True,
        shuffle_buffer_size=spec["buffer"] // max(1, spec["workers"]),
        max_samples_per_sequence=100,  # as its documentation has it
        virtual_epoch_length=spec["epoch_patches"] // spec["batch_size"],
        task_encoder=Encoder(),
    )
    return get_loader(data)


def unpacked(members: Iterable[bytes], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(b"".join(members)), np.uint8)).view(-1, *shape)


def collate_rows(spec: Spec) -> Callable[[list[Any]], Labelled]:
    """Batches of rows that have a patch's codes as bytes, and its label."""
    shape = tuple(spec["shape"])
    return lambda members: (
        unpacked(map(operator.itemgetter("codes"), members), shape),
        torch.tensor([int(row["label"]) for row in members]),
    )


def rows_loader(rows: Any, spec: Spec) -> Any:
    """A stream of one patch a row."""
    return loader_of(rows, spec, batch_size=spec["batch_size"], collate_fn=collate_rows(spec))


def packed_rows_loader(rows: Any, spec: Spec) -> Any:
    """One pack a row, unpacked and shuffled in a pool."""
    shape = tuple(spec["shape"])

    def unpack(row: Any) -> tuple[Any, Any]:
        codes = np.frombuffer(row["codes"], np.uint8).reshape(-1, *shape)
        return codes, np.frombuffer(row["labels"], np.int64)

    return loader_of(Pooled(rows, unpack, spec), spec, batch_size=None)


def jpeg_folder_loader(spec: Spec) -> Any:
    """torchvision's ImageFolder, decoded by Pillow in the workers."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    data = ImageFolder(spec["folder"], transform=pil_to_tensor)
    labels = [int(name.removeprefix("class")) for name in data.classes]
    data.target_transform = labels.__getitem__
    places = {int(Path(path).stem): place for place, (path, _) in enumerate(data.samples)}
    return replay(lambda rows: [data[places[row]] for row in rows], spec, stack)


BUILDERS: dict[str, Callable[[Spec], Any]] = {
    "latentds": latentds_loader,
    "latentds-resident": latentds_loader,
    "latentds-rows": latentds_rows_loader,
    "npy": functools.partial(arrays_loader, open_npy),
    "hdf5": functools.partial(arrays_loader, open_hdf5),
    "webdataset": webdataset_loader,
    "webdataset-packed": webdataset_packed_loader,
    "datasets": lambda spec: rows_loader(
        stream_parquet(spec).shuffle(seed=0, buffer_size=spec["buffer"]), spec
    ),
    "datasets-packed": lambda spec: packed_rows_loader(stream_parquet(spec), spec),
    "datasets-rows": datasets_rows_loader,
    "ray": ray_loader,
    "mds": lambda spec: rows_loader(stream_mds(spec, spec["batch_size"]), spec),
    "mds-packed": lambda spec: packed_rows_loader(stream_mds(spec, 1), spec),
    "mds-rows": mds_rows_loader,
    "litdata": litdata_loader,
    "litdata-rows": litdata_rows_loader,
    "energon": energon_loader,
    "jpeg-folder": jpeg_folder_loader,
    "jpeg-webdataset": webdataset_loader,
}
