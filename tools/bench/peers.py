"""One loader under measurement, in a process of its own: prints an event as each phase ends.

Run by path, with any Python that has torch, numpy and the peer: it imports nothing of this package.
"""
# B batch, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

COLD_FACTOR = 6
MODULES = {  # webdataset for other peers
    "latentds": "latentds.loading.loader",
    "latentds-resident": "latentds.loading.loader",
    "datasets": "datasets",
    "mds": "streaming",
    "jpeg-folder": "torchvision.datasets",
}
Spec = dict[str, Any]
Labelled = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Measure what the JSON in the first argument describes."""
    spec = json.loads(sys.argv[1])
    if spec["peer"] == "write-mds":
        return write_mds(spec)
    torch.manual_seed(0)
    # What is timed under a name is to be that: a compiler that falls back ends the measurement.
    warnings.filterwarnings("error", message="torch.compile failed")
    # What a builder would import, so that no phase's time has it.
    importlib.import_module(MODULES.get(spec["peer"].removesuffix("-packed"), "webdataset"))
    tell("imported", versions=versions(spec["module"]))
    started = time.perf_counter()
    loader, ready = BUILDERS[spec["peer"]](spec), Ready(spec)
    tell("opened", seconds=time.perf_counter() - started)
    # Opening and starting workers are in the cold phase's time: it needs longer to tell a rate.
    limit = spec["seconds"] * COLD_FACTOR
    cold = run_phase(loader, ready, limit, started, spec["epoch_patches"])
    tell("cold", **cold)
    tell("warm", **run_phase(loader, ready, spec["seconds"], None, None))
    if spec["module"] == "latentds":
        tell("counted", **counted(loader, spec))
    for _ in range(spec["ceiling_rounds"]):
        alone = ready.alone(spec["seconds"])
        whole = run_phase(loader, ready, spec["seconds"], None, None)
        tell("ceiling", decoder=alone, **whole)


def counted(loader: Any, spec: Spec) -> dict[str, Any]:
    """What our loader's parts counted; RuntimeError where what was asked for never engaged."""
    found = {} if loader.decoder is None else loader.decoder.counters()
    if found:
        is_there = found["device"].partition(":")[0] == torch.device(spec["device"]).type
        if not is_there or (spec["decoding"]["cuda_graph"] and not found["graph_replays"]):
            raise RuntimeError(f"never engaged: {spec['decoding']} on {spec['device']}: {found}")
    if spec["resident"]:
        found |= {"gathered": loader.resident.gathered, "held": str(loader.resident.codes.device)}
        if not loader.resident.gathered:
            raise RuntimeError(f"never engaged: nothing was gathered: {found}")
    return found


def tell(event: str, **values: Any) -> None:
    """Print an event and wait for the one who measures to have looked at this process."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def versions(module: str) -> dict[str, str]:
    import importlib.metadata

    found = dict.fromkeys((module, "torch", "numpy"), "?")
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run_phase(
    loader: Iterable[Any],
    ready: Callable[[Any], Labelled],
    seconds: float,
    started: float | None,
    most: int | None,
) -> dict[str, float]:
    """Take batches for `seconds` (through epochs), or until `most` patches came.

    The clock runs from `started`, or from behind the first batch: who fills a buffer at the start
    of an epoch has filled it then.
    """
    patches, first = 0, 0.0
    while True:
        for batch in loader:
            tensors = ready(batch)
            if started is None:
                started = time.perf_counter()
                continue
            patches += len(tensors[0])
            now = time.perf_counter() - started
            first = first or now
            if now >= seconds or (most is not None and patches >= most):
                return {"patches": patches, "seconds": now, "first_batch_s": first}
        if most is not None and started is not None:
            now = time.perf_counter() - started
            return {"patches": patches, "seconds": now, "first_batch_s": first}


class Ready:
    """Batches as a model takes them: codes uint8, latents or images float, on the device."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.device = spec, torch.device(spec["device"])
        self.decode, self.last = spec["decode"], torch.zeros(0)
        if spec["module"] == "latentds" or spec["images"]:
            return
        if self.decode == "latents":
            self.latents = make_lookup(spec, self.device)
        if self.decode == "pixels":
            self.decoder = make_decoder(spec)

    def __call__(self, batch: Any) -> Labelled:
        if self.spec["module"] == "latentds":  # its loader has done all of it
            self.last = batch.codes
            shown = {"codes": batch.codes, "latents": batch.latents, "pixels": batch.images}
            return shown[self.decode], batch.labels
        images, labels = batch
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self.last = images
        if self.spec["images"]:
            return images.float() / 255, labels
        if self.decode == "latents":
            return self.latents(images), labels
        return (self.decoder(images) if self.decode == "pixels" else images), labels

    def alone(self, seconds: float) -> float:
        """Patches a second of decoding the last batch again and again."""
        if not hasattr(self, "decoder"):
            self.decoder = make_decoder(self.spec)
        self.decoder(self.last)
        patches, started = 0, time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            self.decoder(self.last)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            patches += len(self.last)
        return patches / now


def make_lookup(spec: Spec, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents of codes: by a table of levels, or, of other codes, by latentds itself."""
    if spec["levels"] is not None:
        levels = torch.from_numpy(np.load(spec["levels"])).to(device)
        return functools.partial(look_up, levels)
    from latentds.store.reader import ShardSet

    return ShardSet(spec["set"]).manifest.contract.codebook.dequantize


def look_up(levels: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Latents of codes, `levels` (R, K)."""
    if len(levels) == 1:
        return levels[0][codes.int()]
    rows = torch.arange(len(levels), device=levels.device).view(1, -1, 1, 1)
    return levels.reshape(-1)[codes.int() + levels.shape[1] * rows]


def make_decoder(spec: Spec) -> Callable[[torch.Tensor], torch.Tensor]:
    """The set's own decoder, in a Python that has latentds."""
    from latentds.loading.decoding import Decode, Decoder, find_autoencoder
    from latentds.store.reader import ShardSet

    shards = ShardSet(spec["set"])
    contract = shards.manifest.contract
    autoencoder = find_autoencoder(shards, spec["autoencoder"])
    options = Decode(dtype=getattr(torch, spec["dtype"]), **spec["decoding"])
    return Decoder(autoencoder, [contract.codebook], contract.patch_px, spec["device"], options)


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
        resident=spec["resident"],
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


def stream_parquet(spec: Spec) -> Any:
    from datasets import load_dataset

    files = files_of(spec, "*.parquet")
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def stream_mds(spec: Spec, batch_size: int) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=spec["folder"], shuffle=True, batch_size=batch_size, shuffle_seed=0
    )


def rows_loader(rows: Any, spec: Spec) -> Any:
    """One patch a row: its codes' bytes and its label."""
    shape = tuple(spec["shape"])

    def collate(members: list[Any]) -> Labelled:
        joined = bytearray(b"".join(row["codes"] for row in members))
        codes = np.frombuffer(joined, np.uint8).reshape(-1, *shape)
        return torch.from_numpy(codes), torch.tensor([int(row["label"]) for row in members])

    return loader_of(rows, spec, batch_size=spec["batch_size"], collate_fn=collate)


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
    return loader_of(data, spec, batch_size=spec["batch_size"], shuffle=True)


BUILDERS: dict[str, Callable[[Spec], Any]] = {
    "latentds": latentds_loader,
    "latentds-resident": latentds_loader,
    "webdataset": webdataset_loader,
    "webdataset-packed": webdataset_packed_loader,
    "datasets": lambda spec: rows_loader(
        stream_parquet(spec).shuffle(seed=0, buffer_size=spec["buffer"]), spec
    ),
    "datasets-packed": lambda spec: packed_rows_loader(stream_parquet(spec), spec),
    "mds": lambda spec: rows_loader(stream_mds(spec, spec["batch_size"]), spec),
    "mds-packed": lambda spec: packed_rows_loader(stream_mds(spec, 1), spec),
    "jpeg-folder": jpeg_folder_loader,
    "jpeg-webdataset": webdataset_loader,
}


def write_mds(spec: Spec) -> None:
    """Write codes and labels, one a sample or `pack` a sample, as mosaicml-streaming keeps them."""
    from streaming import MDSWriter

    codes, labels = np.load(spec["codes"], mmap_mode="r"), np.load(spec["labels"])
    name, kind = ("labels", "bytes") if spec["pack"] > 1 else ("label", "int")
    with MDSWriter(out=spec["folder"], columns={"codes": "bytes", name: kind}) as writer:
        for start in range(0, len(codes), spec["pack"]):
            part = slice(start, start + spec["pack"])
            label = labels[part].tobytes() if spec["pack"] > 1 else int(labels[start])
            writer.write({"codes": codes[part].tobytes(), name: label})


if __name__ == "__main__":
    main()
