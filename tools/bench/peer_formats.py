"""The same patches as every peer keeps them."""
# N patches, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from latentds_tools.bench.harness import last_words
from latentds_tools.bench.measuring_loaders import importable, words_of
from latentds_tools.bench.peer_writers import WRITERS, rows_of
from latentds_tools.bench.synthetic import write_synthetic

from latentds.codecs.formats import save_with_pillow
from latentds.codecs.latent import to_pictures
from latentds.errors import InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.decoding import Decoder, find_autoencoder
from latentds.store.composing import compose
from latentds.store.format import GOLDEN
from latentds.store.packs import SCHEMA
from latentds.store.reader import ShardSet

FILE_BYTES = 64 << 20  # of a peer's file, at most
PACK = 256
JPEG_QUALITY = 75


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """What all formats hold.

    codes   uint8 (N, C, h, w)
    labels  int64 (N,), -1 for none
    files   of a peer, at least: so that workers have some each
    """

    codes: np.ndarray
    labels: np.ndarray
    files: int = 8

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def file_bytes(self) -> int:
        """Codes in every file of a peer."""
        return min(FILE_BYTES, self.codes.nbytes // self.files + 1)

    def runs(self) -> list[range]:
        """The patches of every file of a peer."""
        count = -(-self.codes.nbytes // self.file_bytes)
        edges = np.linspace(0, len(self), count + 1).astype(int).tolist()
        return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]


def read_patches(folder: Path, split: str, count: int | None = None) -> Patches:
    """The first `count` patches of a split, or all."""
    shards = ShardSet(folder)
    rows = np.arange(*shards.patch_range(split))[:count]
    return Patches(shards.read_codes(rows), shards.patches[rows]["label"].astype(np.int64))


def record_order(folder: Path, split: str, size: int) -> np.ndarray:
    """Places in a split of the patches of our first epoch's whole batches, in its order."""
    data = LatentDataset(folder, split, batch_size=size, shuffle=True)
    rows = [batch.rows.numpy() for batch in data if batch.valid.all() and len(batch.rows) == size]
    return np.concatenate(rows) - data.shards.patch_range(split)[0]


def write_own(folder: Path | None, out: Path, split: str, count: int) -> Patches:
    """A latentds set of the first `count` patches of a split, or of random codes; its patches."""
    if folder is None:
        write_synthetic(out, count)
        return read_patches(out, split)
    shards, patches = ShardSet(folder), read_patches(folder, split, count)
    rows = shards.patch_range(split)[0] + np.arange(len(patches))

    def parts() -> Iterator[Any]:
        for start in range(0, len(rows), PACK):
            columns = shards.read_columns(rows[start : start + PACK], SCHEMA.names)
            yield patches.codes[start : start + PACK], pa.table(columns, schema=SCHEMA)

    golden = (Path(folder) / GOLDEN).read_bytes()
    compose(out, shards.manifest.contract, {split: parts()}, shards.manifest.made, golden)
    return patches


def write_format(
    form: str,
    patches: Patches,
    out: Path,
    python: str,
    own: Path | None = None,
    autoencoder: str | None = None,
) -> None:
    """Write the patches as a peer keeps them.

    python       that has the peer's library
    own          the same patches as a set of latentds, for formats of pictures
    autoencoder  that decodes them instead of the recorded one
    """
    kind, _, variant = form.partition("-")
    pack = PACK if variant == "packed" else 1
    if kind == "jpeg" and own is not None:
        write_jpegs(patches, form, out, own, autoencoder)
    elif kind == "parquet":
        write_parquet(patches, out, pack)
    if kind in ("webdataset", "energon"):
        write_webdataset(patches, out, "npy", patches.codes)
    if form in WRITERS:
        write_by(python, form, patches, out, pack)


def write_webdataset(
    patches: Patches, out: Path, kind: str, stored: Sequence[Any] | np.ndarray
) -> None:
    """A sample a patch: what is stored and cls, with the integer mtime that saves a PAX header."""
    for number, run in enumerate(patches.runs()):
        with wds.TarWriter(str(out / f"{number:06d}.tar"), mtime=0) as writer:
            for place in run:
                sample = {"__key__": f"{place:09d}", kind: stored[place]}
                writer.write(sample | {"cls": int(patches.labels[place])})


def write_parquet(patches: Patches, out: Path, pack: int) -> None:
    """A row a patch, or `pack` patches a row."""
    for number, run in enumerate(patches.runs()):
        part = slice(run.start, run.stop)
        rows = pa.Table.from_pylist(list(rows_of(patches.codes[part], patches.labels[part], pack)))
        path = out / f"{number:06d}.parquet"
        pq.write_table(rows, path, row_group_size=max(1, 1000 // pack))


def write_by(python: str, form: str, patches: Patches, out: Path, pack: int) -> None:
    """Have a peer's own library write, or index, what it reads."""
    with tempfile.TemporaryDirectory(dir=out.parent) as work, importable() as env:
        spec: dict[str, Any] = {"format": form, "folder": str(out), "pack": pack}
        spec["file_bytes"] = patches.file_bytes
        for name, values in (("codes", patches.codes), ("labels", patches.labels)):
            spec[name] = f"{work}/{name}.npy"
            np.save(spec[name], values)
        words = words_of(python, "peer_writers", spec)
        run = subprocess.run(words, capture_output=True, text=True, env=env)
    if run.returncode:
        raise InputError(
            f"{python} cannot write {form}: {last_words(run.stderr)}; --peer-python takes another"
        )


def write_jpegs(patches: Patches, peer: str, out: Path, own: Path, autoencoder: str | None) -> None:
    """The patches' decoded pictures as JPEG, in class folders or in tars."""
    encoded = decoded_jpegs(patches, own, autoencoder)
    if peer == "jpeg-webdataset":
        write_webdataset(patches, out, "jpg", encoded)
        return
    for place, content in enumerate(encoded):
        path = out / f"class{patches.labels[place]}" / f"{place:09d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@functools.cache
def decoded_jpegs(patches: Patches, folder: Path, autoencoder: str | None) -> list[bytes]:
    """The decoded pictures as JPEG files, 4:2:0; made once for all peers."""
    shards = ShardSet(folder)
    contract = shards.manifest.contract
    decoder = Decoder(find_autoencoder(shards, autoencoder), [contract.codebook], contract.patch_px)
    return [
        save_with_pillow(picture, "JPEG", quality=JPEG_QUALITY)
        for codes in torch.split(torch.from_numpy(patches.codes), 32)
        for picture in to_pictures(decoder(codes))
    ]
