"""Read a data set's folder: memory-mapped tables, and codes of any patches in any order."""
# N patches asked for, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentds.cache import CacheConfig
from latentds.errors import DamagedPackError, FormatError, InputError, unknown_name
from latentds.files import Extent, LocalFiles, open_files
from latentds.format import (
    CODES,
    DIGEST_DTYPE,
    DIGESTS,
    MASKS,
    PACK_DTYPE,
    PACKS_TABLE,
    PATCH_DTYPE,
    PATCHES,
    PATCHES_TABLE,
    pack_key,
    patch_key,
)
from latentds.manifest import Manifest
from latentds.opening import open_picture
from latentds.tables import MappedTable

MAX_VIEWS = 256  # packs at hand without a look into the tables: two windows of the order
MAX_CACHED_TABLES = 256  # Parquet members that stay parsed


class ShardSet:
    """The shards, tables and manifest of a data set.

    folder       local folder, or location: hf://datasets/ORG/NAME@REVISION, s3://, https://
    check_codes  compare a pack's checksum the first time it is read from
    manifest     instead of the folder's own, while it is not yet written
    cache        where and how much of a location is kept
    revision     commit or manifest that a location resolved to; None for a local folder

    Opening costs the manifest and one `stat` a shard, whatever the number of patches (of a location
    also the tables, once); it raises FormatError for anything that contradicts the manifest.
    Pickles without its maps, so workers may carry it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        check_codes: bool = True,
        manifest: Manifest | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        self.files = open_files(folder, cache)
        self.folder, self.revision = self.files.where, self.files.revision
        self.manifest = manifest or self.files.manifest()
        self.check_codes = check_codes
        if isinstance(self.files, LocalFiles):
            self.files.reads_parts = not check_codes
            check_sizes(self.files.folder, self.manifest)
        self.open_tables()
        # Shared with workers: a pack that one of them has checked need not be checked by all.
        self.share_checks(torch.zeros(len(self.packs), dtype=torch.bool).share_memory_())  # type: ignore[no-untyped-call]

    def open_tables(self) -> None:
        """Map the tables and check what opening checks."""
        packs, patches = self.manifest.packs, self.manifest.patches
        self.packs = self.open_table(PACKS_TABLE, PACK_DTYPE, packs)
        self.patch_table = MappedTable(
            self.files.table(PATCHES_TABLE, self.manifest), PATCH_DTYPE, patches
        )
        self.patches = self.patch_table.rows
        self.digests = None
        if DIGESTS in self.manifest.tables:
            self.digests = self.open_table(DIGESTS, DIGEST_DTYPE, packs)
        # A field of the table is strided: a binary search on it would copy it for every batch.
        self.first_patch = np.ascontiguousarray(self.packs["first_patch"])
        self.first_pack = np.cumsum([0, *(shard.packs for shard in self.manifest.shards)])
        self.books = np.array(self.manifest.codebook_numbers, np.int64)
        self.check_boundaries()
        self.views: dict[int, memoryview] = {}
        self.tables: OrderedDict[tuple[int, str], dict[str, list[Any]]] = OrderedDict()

    def open_table(self, name: str, dtype: np.dtype[Any], rows: int) -> np.ndarray:
        """A table, mapped."""
        return MappedTable(self.files.table(name, self.manifest), dtype, rows).rows

    def check_boundaries(self) -> None:
        """Refuse a pack table whose shards do not start and end where the manifest counts say."""
        shards = self.manifest.shards
        first_patch = np.cumsum([0, *(shard.patches for shard in shards)])
        starts, ends = self.first_pack[:-1], self.first_pack[1:] - 1
        numbers = np.arange(len(shards))
        last = self.packs[ends]
        if not (
            np.array_equal(self.packs["shard"][starts], numbers)
            and np.array_equal(last["shard"], numbers)
            and np.array_equal(self.first_patch[starts], first_patch[:-1])
            and np.array_equal(last["first_patch"] + last["count"], first_patch[1:])
        ):
            raise FormatError(
                f"{self.folder}/{PACKS_TABLE}: shards do not start and end where the manifest "
                "says; fetch both anew"
            )

    def share_checks(self, marks: torch.Tensor) -> None:
        """Keep in `marks` (bool, a pack) which packs were found sound."""
        self.marks, self.checked = marks, marks.numpy()

    def __getstate__(self) -> dict[str, Any]:
        maps = ("packs", "patches", "patch_table", "digests", "first_patch", "checked", "views",
                "tables")  # fmt: skip
        return {name: value for name, value in self.__dict__.items() if name not in maps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open_tables()
        self.share_checks(state["marks"])

    def __len__(self) -> int:
        return self.manifest.patches

    def key(self, pack: int) -> str:
        """Key of a pack: split, shard number and place in the shard."""
        shard = self.manifest.shards[int(self.packs["shard"][pack])]
        number = int(shard.name.removesuffix(".tar").rpartition("-")[2])
        first = int(self.first_pack[self.packs["shard"][pack]])
        return pack_key(shard.split, number, pack - first)

    def patch_range(self, split: str) -> tuple[int, int]:
        """First row of a split in the patch table, and one past its last."""
        first_pack, end_pack = self.manifest.pack_range(split)
        last = self.packs[end_pack - 1]
        return int(self.packs["first_patch"][first_pack]), int(last["first_patch"] + last["count"])

    def read_codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes uint8 (N, C, h, w) of the patches at `rows` of the patch table, in that order."""
        contract = self.manifest.contract
        size = contract.bytes_per_patch
        codes = np.empty((len(rows), *contract.codes_shape), np.uint8)
        packs = self.packs_of(rows)
        starts = ((rows - self.first_patch[packs].astype(np.int64)) * size).tolist()
        touched = np.unique(packs).tolist()
        new = [pack for pack in touched if pack not in self.views]
        self.fetch(new)
        for pack in new:
            self.patch_table.will_need(int(self.first_patch[pack]), int(self.packs["count"][pack]))
        if not self.check_codes and isinstance(self.files, LocalFiles):
            self.files.fetch(self.parts(rows, packs, size))
        views = {pack: self.pack_bytes(pack) for pack in touched}
        # A loop of memory copies: 3 times as fast as indexing every pack's few patches as an array.
        target, place = codes.reshape(-1).data, 0
        for pack, start in zip(packs.tolist(), starts, strict=True):
            target[place : place + size] = views[pack][start : start + size]
            place += size
        return codes

    def codebook_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which of the manifest's codebooks each patch at `rows` has, int64 (N,)."""
        if len(self.manifest.codebooks) == 1:
            return np.zeros(len(rows), np.int64)
        numbers: np.ndarray = self.books[self.packs["shard"][self.packs_of(rows)]]
        return numbers

    def parts(self, rows: np.ndarray, packs: np.ndarray, size: int) -> list[Extent]:
        """The bytes of just these patches, neighbours as one."""
        order = np.argsort(rows, kind="stable")
        rows, packs = rows[order], packs[order]
        edges = np.flatnonzero((np.diff(rows) > 1) | (np.diff(packs) > 0)) + 1
        found = []
        for first, last in zip([0, *edges], [*edges, len(rows)], strict=True):
            whole, pack = self.extent(int(packs[first]), CODES), int(packs[first])
            offset = whole.offset + (int(rows[first]) - int(self.first_patch[pack])) * size
            length = (int(rows[last - 1]) - int(rows[first]) + 1) * size
            found.append(whole._replace(offset=offset, size=length))
        return found

    def packs_of(self, rows: np.ndarray) -> np.ndarray:
        """The packs that hold rows of the patch table; FormatError where the tables disagree."""
        packs = np.searchsorted(self.first_patch, rows.astype(np.uint64), side="right") - 1
        beyond = rows - self.first_patch[packs].astype(np.int64) >= self.packs["count"][packs]
        if beyond.any():
            pack = int(packs[np.argmax(beyond)])
            raise FormatError(f"{self.folder}/{PACKS_TABLE}: rows of pack {pack} do not add up")
        return packs

    def group_by_pack(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(pack, places in `rows` that it serves) for every pack that is touched."""
        if not len(rows):
            return []
        packs = self.packs_of(rows)
        order = np.argsort(packs, kind="stable")
        touched, starts = np.unique(packs[order], return_index=True)
        places = np.split(order, starts[1:])
        return [(int(pack), place) for pack, place in zip(touched, places, strict=True)]

    def pack_view(self, pack: int) -> np.ndarray:
        """Codes of a pack, uint8 (N, C*h*w), without a copy."""
        size = self.manifest.contract.bytes_per_patch
        return np.frombuffer(self.pack_bytes(pack), np.uint8).reshape(-1, size)

    def pack_bytes(self, pack: int) -> memoryview:
        """Codes of a pack as they lie in the file; checked when they are first touched."""
        content = self.views.get(pack)
        if content is not None:
            return content
        content = self.read(pack, CODES)
        if self.check_codes and not self.checked[pack]:
            content = self.check(pack, CODES, content)
            self.checked[pack] = True
        if len(self.views) >= MAX_VIEWS:
            self.views.pop(next(iter(self.views)))
        self.views[pack] = content
        return content

    def read(self, pack: int, kind: str) -> memoryview:
        """A pack's codes, columns or masks, as they are."""
        try:
            return self.files.read(self.extent(pack, kind))
        except DamagedPackError as error:  # a location sends wrong bytes
            raise DamagedPackError(f"key {self.key(pack)}: {error}", self, pack) from error

    def check(self, pack: int, kind: str, content: memoryview) -> memoryview:
        """The bytes, if they have the recorded checksum, read anew where that may help."""
        extent = self.extent(pack, kind)
        if zlib.crc32(content) != extent.crc32 and self.files.drop(extent):
            content = self.read(pack, kind)
        if zlib.crc32(content) != extent.crc32:
            raise DamagedPackError(
                f"{self.shard_path(pack)}, key {self.key(pack)}: {kind} does not have the recorded "
                "checksum; the shard is damaged, fetch it anew ('latentds verify' lists all "
                "damage)",
                self,
                pack,
            )
        return content

    def extent(self, pack: int, kind: str) -> Extent:
        """Where a pack's codes, columns or masks lie."""
        row, shards = self.packs[pack], self.manifest.shards
        if row["shard"] >= len(shards):
            raise FormatError(
                f"{self.folder}/{PACKS_TABLE}: pack {pack} names shard {row['shard']}; refused"
            )
        field = {CODES: "codes", PATCHES: "patches", MASKS: "masks"}[kind]
        size = int(row["count"]) * self.manifest.contract.bytes_per_patch
        size = size if kind == CODES else int(row[f"{field}_bytes"])
        shard, offset = shards[int(row["shard"])], int(row[f"{field}_offset"])
        if offset + size > shard.bytes:
            raise FormatError(
                f"{self.folder}/{PACKS_TABLE}: pack {pack} lies at {offset}..{offset + size}, its "
                f"shard has {shard.bytes} bytes; fetch the table anew"
            )
        sha256 = None if self.digests is None else self.digests[field][pack].tobytes()
        return Extent(shard.name, offset, size, int(row[f"{field}_crc32"]), sha256)

    def fetch(self, packs: Sequence[int], ahead: bool = False) -> None:
        """Have the codes of packs at hand, many at once; whole packs, where whole ones are read."""
        if packs and (self.check_codes or not isinstance(self.files, LocalFiles)):
            self.files.fetch([self.extent(pack, CODES) for pack in packs], ahead)

    def prefetch(self, rows: np.ndarray) -> None:
        """Start to fetch what `rows` of the patch table will need, and return at once."""
        if not isinstance(self.files, LocalFiles):  # a disk needs no head start
            self.fetch(np.unique(self.packs_of(rows)).tolist(), ahead=True)

    def pack_of(self, row: int) -> int:
        """The pack that holds a row of the patch table."""
        return int(np.searchsorted(self.first_patch, np.uint64(row), side="right")) - 1

    def shard_path(self, pack: int) -> str:
        """A pack's shard, for messages."""
        return f"{self.folder}/{self.manifest.shards[int(self.packs['shard'][pack])].name}"

    def read_columns(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of Parquet columns (key, source, source_encoding, ...) of patches at `rows`."""
        values: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
        for pack, places in self.group_by_pack(rows):
            columns = self.pack_columns(pack)
            first = int(self.packs["first_patch"][pack])
            for name in names:
                if name not in columns:
                    raise unknown_name("column", name, columns)
                for place in places:
                    values[name][place] = columns[name][int(rows[place]) - first]
        return values

    def pack_columns(self, pack: int) -> dict[str, list[Any]]:
        """All Parquet columns of a pack, and the key that follows from them."""
        from latentds.columns import SCHEMA

        columns = self.read_table(pack, PATCHES, SCHEMA)
        if "key" not in columns:
            places = zip(columns["source"], columns["x"], columns["y"], strict=True)
            columns["key"] = [patch_key(*place) for place in places]
        return columns

    def read_table(self, pack: int, kind: str, schema: Any) -> dict[str, list[Any]]:
        """A Parquet member of a pack as lists, parsed once and kept for a while."""
        from latentds.columns import decode_table

        table = self.tables.pop((pack, kind), None)
        if table is None:
            where = f"{self.shard_path(pack)}, {self.key(pack)}.{kind}"
            content = self.check(pack, kind, self.read(pack, kind))
            table = decode_table(
                bytes(content), where, schema, int(self.packs["count"][pack])
            ).to_pydict()
            if len(self.tables) >= MAX_CACHED_TABLES:
                self.tables.popitem(last=False)
        self.tables[pack, kind] = table
        return table

    def read_masks(self, rows: np.ndarray, *, required: bool = False) -> np.ndarray:
        """Masks uint8 (N, H, W) of the patches at `rows`; zeros where a patch has none.

        required  InputError for a patch that has none instead
        """
        from latentds.columns import MASK_SCHEMA

        height, width = self.manifest.contract.patch_px
        masks = np.zeros((len(rows), height, width), np.uint8)
        for pack, places in self.group_by_pack(rows):
            if not self.packs["masks_bytes"][pack]:
                if required and len(places):
                    raise no_mask(f"{self.shard_path(pack)}, {self.key(pack)}")
                continue
            encoded = self.read_table(pack, MASKS, MASK_SCHEMA)["mask_png"]
            first, where = int(self.first_patch[pack]), f"{self.shard_path(pack)}, {self.key(pack)}"
            for place in places:
                png = encoded[int(rows[place]) - first]
                if png is not None:
                    masks[place] = decode_mask(png, (height, width), where)
                elif required:
                    raise no_mask(f"{where}, patch {int(rows[place]) - first}")
        return masks


def no_mask(where: str) -> InputError:
    """The error of a patch without a mask where every one needs it: zeros would be a class."""
    return InputError(f"{where} has no mask; give it one, or leave the patch out")


def decode_mask(encoded: bytes, size_px: tuple[int, int], where: str) -> np.ndarray:
    """A mask (H, W) from its PNG bytes, size checked before a pixel is decoded."""
    try:
        with open_picture(io.BytesIO(encoded), ["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Refuse missing, truncated or grown shards before anything is read from them."""
    for shard in manifest.shards:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError as error:
            raise FormatError(
                f"{folder / shard.name}: missing; the manifest lists it, fetch it"
            ) from error
        if size != shard.bytes:
            raise FormatError(
                f"{folder / shard.name}: {size} bytes, the manifest says {shard.bytes}; truncated "
                "or replaced, fetch it anew"
            )
