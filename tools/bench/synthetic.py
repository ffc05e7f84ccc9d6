"""Sets of random patches written whole, and sets of any size over files that are holes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (32, 8, 8)  # 2,048 bytes: DC-AE-f32's latents of a 256 px patch
PACK, SHARD_PATCHES = 256, 256 * 488  # the default 256 MB of codes a shard
PATCHES_A_SLIDE = 5000
MAX_SLIDES = 30_000  # TCGA has as many
CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")  # NCT-CRC's nine
MADE: dict[str, Any] = {"synthetic": True}


def random_contract(shape: tuple[int, int, int] = SHAPE, patch_px: int = 256) -> Any:
    """A contract that names no real autoencoder."""
    from latentds.quantizers.scalar import Codebook
    from latentds.store.format import Contract

    return Contract(
        latent_id="sha256:" + "0" * 64,
        decoder_id="sha256:" + "0" * 64,
        codebook=Codebook(np.linspace(-3, 3, 256, dtype=np.float32)[None], "kmeans"),
        autoencoder={"name": "random"},
        patch_px=(patch_px, patch_px),
        codes_shape=shape,
    )


def write_synthetic(
    out: Path,
    patches: int,
    *,
    shape: tuple[int, int, int] = SHAPE,
    patch_px: int = 256,
    a_slide: int = PATCHES_A_SLIDE,
) -> None:
    """A set of random codes, grouped by slide as pathology data come.

    shape    of a patch's codes
    a_slide  patches a slide
    """
    from latentds.store.composing import compose

    made = MADE | {"patches": patches}
    rng = np.random.default_rng(0)
    parts = filled_parts(
        patches, a_slide, lambda places: rng.integers(0, 256, (len(places), *shape), np.uint8)
    )
    compose(out, random_contract(shape, patch_px), {"train": parts}, made, empty_golden())


def write_repeated(out: Path, folder: Path, patches: int) -> None:
    """A set of as many patches, whose codes are those of another set again and again."""
    from latentds.store.composing import compose
    from latentds.store.reader import ShardSet

    shards = ShardSet(folder)
    codes = shards.read_codes(np.arange(len(shards)))
    parts = filled_parts(patches, PATCHES_A_SLIDE, lambda places: codes[places % len(codes)])
    contract = shards.manifest.contract
    compose(out, contract, {"train": parts}, MADE | {"patches": patches}, empty_golden())


def empty_golden() -> bytes:
    """Golden patches of a set that no decoder reads: none."""
    from latentds.store.golden import SCHEMA
    from latentds.store.packs import encode_table

    return encode_table(SCHEMA.empty_table())


def filled_parts(
    patches: int, a_slide: int, codes_of: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Any]:
    """Codes and columns, a pack at a time.

    codes_of  codes uint8 (n, *shape) of places (n,) in the set
    """
    import pyarrow as pa

    from latentds.store.packs import SCHEMA

    for start in range(0, patches, PACK):
        places = range(start, min(start + PACK, patches))
        slides = [f"slide{place // a_slide:05d}" for place in places]
        columns = {
            "label": [CLASSES[place // a_slide % len(CLASSES)] for place in places],
            "slide": slides,
            "x": [place % 100 * 256 for place in places],
            "y": [place % a_slide // 100 * 256 for place in places],
            "mpp": [0.5] * len(places),
            "size_px": [256] * len(places),
            "source": slides,
            "source_encoding": ["none"] * len(places),
        }
        yield codes_of(np.asarray(places)), pa.table(columns, schema=SCHEMA)


def write_sparse(out: Path, patches: int) -> None:
    """Manifest, and tables and shards that are holes: every code reads as 0 and no disk is needed.

    The tables of patches are holes too: all are of the first class and slide, and the checksums of
    single patches are wrong.
    """
    from latentds.core.storage import write_atomically
    from latentds.store.composing import complete
    from latentds.store.format import GOLDEN
    from latentds.store.manifest import Manifest, ShardRecord

    contract = random_contract()
    records = []
    for number, first in enumerate(range(0, patches, SHARD_PATCHES)):
        count = min(SHARD_PATCHES, patches - first)
        path = out / "data" / f"train-{number:06d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = count * contract.bytes_per_patch + 10240
        with path.open("wb") as file:
            file.truncate(size)
        records.append(
            ShardRecord(
                name=f"data/{path.name}",
                split="train",
                bytes=size,
                sha256=hashlib.sha256(path.name.encode()).hexdigest(),
                codebook_id=contract.codebook.codebook_id,
                packs=-(-count // PACK),
                patches=count,
                labels={},
            )
        )
    write_atomically(out / GOLDEN, empty_golden())
    write_sparse_tables(out, patches, contract.bytes_per_patch)
    count = min(-(-patches // PATCHES_A_SLIDE), MAX_SLIDES)
    slides = tuple(f"slide{number:05d}" for number in range(count))
    made = MADE | {"patches": patches}
    shards = tuple(records)
    manifest = Manifest(
        contract=contract, shards=shards, classes=CLASSES, slides=slides, tables={}, made=made
    )
    complete(out, manifest)


def write_sparse_tables(out: Path, patches: int, patch_bytes: int) -> None:
    """The tables: those of packs whole, those of patches holes."""
    from latentds.store import format as layout
    from latentds.store.index import TableWriter

    first = np.arange(0, patches, PACK)
    packs = np.zeros(len(first), layout.PACK_DTYPE)
    packs["first_patch"], packs["shard"] = first, first // SHARD_PATCHES
    packs["count"] = np.minimum(PACK, patches - first)
    packs["codes_offset"] = first % SHARD_PATCHES * patch_bytes
    digests = np.zeros(len(first), layout.DIGEST_DTYPE)
    row_bytes = layout.PATCH_DTYPE.itemsize
    for count in np.unique(packs["count"]).tolist():
        zeros, same = bytes(count * patch_bytes), packs["count"] == count
        packs["codes_crc32"][same] = zlib.crc32(zeros)
        packs[layout.ROWS_CRC32][same] = zlib.crc32(bytes(row_bytes * count))
        digests["codes"][same] = np.frombuffer(hashlib.sha256(zeros).digest(), np.uint8)
    for name, rows in ((layout.PACKS_TABLE, packs), (layout.DIGESTS, digests)):
        with TableWriter(out / name, rows.dtype, len(rows)) as writer:
            writer.write(rows)
    for name in (layout.PATCHES_TABLE, layout.CHECKSUMS):
        dtype = np.dtype(layout.TABLES[name])
        with TableWriter(out / name, dtype, patches) as writer:
            writer.file.flush()
            writer.file.truncate(writer.file.tell() + patches * dtype.itemsize)
