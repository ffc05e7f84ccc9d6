"""Compose a data set of codes that are there already: packs, shards, tables, card, manifest."""
# n patches of a part, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentds.autoencoders.autoencoder import short
from latentds.core.display import code_span, markdown
from latentds.core.storage import sha256_file, write_atomically
from latentds.errors import InputError
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.channel_statistics import measure_statistics
from latentds.store.format import (
    CHECKSUMS,
    CODES,
    DIGESTS,
    FORMAT,
    GOLDEN,
    MANIFEST,
    MASKS,
    PACKS_TABLE,
    PATCHES,
    PATCHES_TABLE,
    SIDECARS,
    SPLIT_PATTERN,
    TABLES,
    Contract,
    main_split,
    pack_key,
    shard_name,
)
from latentds.store.index import (
    ShardIndex,
    even_size,
    index_shard,
    save_index,
    summarize_blocks,
    summarize_patches,
    write_tables,
)
from latentds.store.manifest import Manifest
from latentds.store.packs import Pack, ShardWriter, encode_masks, encode_table
from latentds.store.reader import ShardSet

Part = tuple[np.ndarray, pa.Table]  # codes and columns; a column mask_png becomes the masks member
PACK_PATCHES = 256
SHARD_BYTES = 256 * 1_000_000  # of codes, as `convert --shard-mb` has it

# Lines that turn `codes` into `latents`, by encoding.
DEQUANTIZE = {
    "u8": """\
book = contract["codebook"]
values = np.frombuffer(base64.b64decode(book["values_f32le_base64"]), "<f4")
levels = values.reshape(book["rows"], book["levels"])
channels = np.arange(codes.shape[1])[:, None, None]
latents = levels[channels % len(levels), codes]  # (N, C, h, w), unscaled means""",
    "u8-sum": """\
book = contract["codebook"]
values = np.frombuffer(base64.b64decode(book["values_f32le_base64"]), "<f4")
tables = values.reshape(book["planes"], book["levels"], book["channels"])
sums = sum(table[codes[:, plane]] for plane, table in enumerate(tables))
latents = sums.transpose(0, 3, 1, 2)  # (N, C, h, w), unscaled means""",
    "rans": """\
import torch
from latentds.store.format import Contract

book = Contract.from_json(contract, path).codebook
latents = book.dequantize(torch.from_numpy(codes))  # (N, C, h, w), unscaled means
integers = book.integers(torch.from_numpy(codes)).integers  # what the records hold""",
}
READING = """\
import base64
import io
import json

import datasets
import numpy as np
import pyarrow.parquet

rows = datasets.load_dataset("{place}", split="{split}", streaming=True{revision})
row = next(iter(rows))
codes = np.asarray(row["codes.npy"], np.uint8)  # (N, {codes_shape})
columns = pyarrow.parquet.read_table(io.BytesIO(row["patches.parquet"])).to_pylist()  # label, ...

path = {path}
with open(path) as file:
    contract = json.load(file)["contract"]
{dequantize}"""
# A README that pins the features for the Hub and shows how to read a pack.
CARD = """---
{front_matter}---

# {patches:,} pathology patches as {format} latents

Each patch of {width}x{height} px is {bytes_per_patch:,} bytes: the latents of the autoencoder
{autoencoder} (latent_id {latent_id}), encoded as `{encoding}` by a codebook of {summary}
({kind}; {codebook_origin}). Decoding loses detail. Not for diagnosis.

| split | patches |
|---|---|
{splits}
{labels}
## Load

    from latentds import LatentLoader
    for batch in LatentLoader("this folder", split="{split}", batch_size=64):
        batch.images  # float (B, 3, {height}, {width}) in [0, 1]; \
batch.labels, batch.slides, batch.coords

Without the loader, a row is a pack of N patches:

{reading}

Check with `latentds verify`. The format is described in latentds' docs/format.md.
"""


def compose(
    out: Path,
    contract: Contract,
    splits: dict[str, Iterable[Part]],
    made: dict[str, Any],
    golden: bytes,
) -> Manifest:
    """Write a whole data set.

    out      a folder that is not there yet, or empty
    splits   split to its patches, in any parts: codes uint8 (n, C, h, w) and their columns
    made     how they came about, for the manifest
    golden   bytes of the golden patches' file
    """
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; choose another folder")
    composer = Composer(out, contract)
    for split, parts in sorted(splits.items()):
        composer.add_packs(split, contract, cut(parts, PACK_PATCHES))
    manifest = composer.tables(made)
    shutil.rmtree(composer.work)
    write_atomically(out / GOLDEN, golden)
    return complete(out, manifest)


class Composer:
    """A data set being written, shard by shard: splits in any order, shards numbered as they come.

    out       its folder
    contract  the set's; shards may have contracts that differ in the codebook
    classes   label names in the order that numbers them, where it is not theirs
    """

    def __init__(self, out: Path, contract: Contract, classes: Sequence[str] = ()) -> None:
        self.out, self.contract, self.classes = out, contract, classes
        self.work = out / SIDECARS / "work"
        self.numbers: dict[str, int] = {}
        self.indexes: dict[str, Path] = {}
        self.codebooks: dict[str, AnyCodebook] = {}

    def add_packs(
        self, split: str, contract: Contract, packs: Iterable[Part], shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write packs as shards of at most so many bytes of codes, a pack each at the least."""
        for shard in grouped(packs, shard_bytes // contract.bytes_per_patch):
            self.add_shard(split, contract, functools.partial(write_shard, contract, split, shard))

    def add_shard(
        self, split: str, contract: Contract, write: Callable[[Path, int], None]
    ) -> ShardIndex:
        """Have the split's next shard written by `write(path, number)`, and index it."""
        if not SPLIT_PATTERN.fullmatch(split):
            raise InputError(f"split {split!r}: a split's name is a-z, 0-9 and _, up to 32")
        number = self.numbers.get(split, 0)
        name = shard_name(split, number)
        write(self.out / name, number)
        index = index_shard(self.out, name, contract)
        path = self.work / f"{split}-{number:06d}.index.npz"
        save_index(index, path)
        self.indexes[name], self.numbers[split] = path, number + 1
        self.codebooks[contract.codebook.codebook_id] = contract.codebook
        return index

    def tables(self, made: dict[str, Any]) -> Manifest:
        """Write the tables; returns the manifest, which `complete` writes."""
        if not self.indexes:
            raise InputError(f"{self.out}: no patches to write")
        names = sorted(self.indexes)
        paths = [self.indexes[name] for name in names]
        records, classes, slides = write_tables(self.out, paths, self.classes)
        own = self.codebooks.pop(self.contract.codebook.codebook_id, None)
        if own is None:  # its patches were left out: another shard's takes its place
            own = self.codebooks.pop(records[0].codebook_id)
        return Manifest(
            contract=dataclasses.replace(self.contract, codebook=own),
            shards=records,
            classes=classes,
            slides=slides,
            tables={},
            made=made,
            more_codebooks=tuple(self.codebooks.values()),
        )


def complete(out: Path, manifest: Manifest) -> Manifest:
    """Write the card and, last of all, the manifest, with what lies there described and counted."""
    names = (PACKS_TABLE, DIGESTS, PATCHES_TABLE, CHECKSUMS, GOLDEN)
    tables = {name: describe_file(out / name) for name in names}
    size = even_size(out, manifest)
    tables[PATCHES_TABLE] |= summarize_patches(out, manifest, size)
    if size is not None:
        for name in (PACKS_TABLE, DIGESTS):
            tables[name] |= summarize_blocks(out / name, TABLES[name], manifest.packs, "sha256")
    manifest = dataclasses.replace(manifest, tables=tables, pack_patches=size)
    statistics = measure_statistics(ShardSet(out, manifest=manifest))
    manifest = dataclasses.replace(manifest, statistics=statistics)
    write_atomically(out / "README.md", dataset_card(manifest).encode())
    write_atomically(out / MANIFEST, manifest.to_json().encode())
    return manifest


def describe_file(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_shard(
    contract: Contract, split: str, parts: Iterable[Part], path: Path, number: int
) -> None:
    """Write ready packs as shard `number` of a split, under `path`."""
    with ShardWriter(path, contract) as writer:
        for place, (codes, columns) in enumerate(parts):
            masks = None
            if "mask_png" in columns.schema.names:
                masks = encode_masks(columns["mask_png"])
                columns = columns.drop_columns(["mask_png"])
            patches = encode_table(columns)
            key = pack_key(split, number, place)
            writer.add(Pack(key, codes, patches, masks))
        writer.finish()


def cut(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same patches in parts of `size`; the last may be smaller."""
    codes: list[np.ndarray] = []
    columns: list[pa.Table] = []
    count = 0
    for part_codes, part_columns in parts:
        codes.append(part_codes)
        columns.append(part_columns)
        count += len(part_codes)
        if count >= size:
            joined, table = np.concatenate(codes), pa.concat_tables(columns)
            whole = count - count % size
            for start in range(0, whole, size):
                yield joined[start : start + size], table.slice(start, size)
            codes, columns, count = [joined[whole:]], [table.slice(whole)], count - whole
    if count:
        yield np.concatenate(codes), pa.concat_tables(columns)


def grouped(parts: Iterable[Part], room: int) -> Iterator[Iterator[Part]]:
    """Runs of parts of at most `room` patches together, or of one part that is larger.

    A run is to be consumed before the next is asked for: one part is held at a time.
    """
    number = count = 0

    def run_of(part: Part) -> int:
        nonlocal number, count
        is_full = count > 0 and count + len(part[0]) > room
        number, count = number + is_full, len(part[0]) + (0 if is_full else count)
        return number

    return (run for _, run in itertools.groupby(parts, run_of))


def dataset_card(manifest: Manifest) -> str:
    contract, count = manifest.contract, len(manifest.more_codebooks)
    more = f"; {count} more beside it, a shard's header holds its own" if count else ""
    made = manifest.made.get("codebook", {})
    return CARD.format(
        front_matter=front_matter(manifest),
        patches=manifest.patches,
        format=FORMAT,
        width=contract.patch_px[1],
        height=contract.patch_px[0],
        bytes_per_patch=contract.bytes_per_patch,
        autoencoder=code_span(contract.autoencoder.get("name", "unknown")),
        latent_id=code_span(short(contract.latent_id)),
        encoding=contract.encoding,
        summary=contract.codebook.summary,
        kind=contract.codebook.kind,
        codebook_origin=markdown(made.get("origin") or "origin not recorded") + more,
        splits="\n".join(f"| {name} | {count:,} |" for name, count in manifest.splits.items()),
        labels=label_table(manifest),
        split=main_split(manifest.splits),
        reading=textwrap.indent(
            reading_code(manifest, "this folder", f'"this folder/{MANIFEST}"'), "    "
        ),
    )


def reading_code(manifest: Manifest, place: str, path: str, revision: str = "") -> str:
    """Code that reads packs of a set without latentds, to latents; a test runs it as it stands.

    place, revision  what `datasets` is given, the second as a further argument
    path             of the manifest, as an expression
    """
    contract = manifest.contract
    return READING.format(
        place=place,
        split=main_split(manifest.splits),
        revision=revision,
        codes_shape=", ".join(map(str, contract.codes_shape)),
        path=path,
        dequantize=DEQUANTIZE[contract.encoding],
    )


def label_table(manifest: Manifest) -> str:
    """A Markdown table of patches a class, empty where there are no labels."""
    counts = manifest.labels()
    if not counts:
        return ""
    lines = "\n".join(f"| {markdown(name)} | {count:,} |" for name, count in counts.items())
    return f"\n| label | patches |\n|---|---|\n{lines}\n"


def front_matter(
    manifest: Manifest,
    head: Sequence[str] = (),
    preview: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> str:
    """The card's YAML: configs and pinned features, written out plainly (every value is ours).

    head     lines to start with, such as the licence
    preview  lines of a second config, and of its features
    """
    lines = [*head, "configs:", "- config_name: default", "  data_files:"]
    for split in manifest.splits:
        lines += [f"  - split: {split}", f"    path: data/{split}-*.tar"]
    lines += [*preview[0], "dataset_info:", "- config_name: default", "  features:"]
    lines += [*features(manifest), *preview[1]]
    lines += ["tags:", "- pathology", "- latents", "- webdataset", "library_name: latentds"]
    return "\n".join(lines) + "\n"


def features(manifest: Manifest) -> list[str]:
    """YAML lines of a pack's features: inferred ones would differ between first packs and all."""
    shape = manifest.contract.codes_shape
    lines = [
        f"  - name: {CODES}",
        "    dtype:",
        f"      array{1 + len(shape)}_d:",
        f"        shape: [null, {', '.join(map(str, shape))}]",
        "        dtype: uint8",
    ]
    binaries = [MASKS, PATCHES] if has_masks(manifest.made) else [PATCHES]
    kinds = dict.fromkeys(binaries, "binary") | {"__key__": "string", "__url__": "string"}
    for name, dtype in kinds.items():
        lines += [f"  - name: {name}", f"    dtype: {dtype}"]
    return lines


def has_masks(made: dict[str, Any]) -> bool:
    """Whether the packs carry masks."""
    return bool(made.get("masks"))
