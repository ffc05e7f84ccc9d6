"""Read a data set: rows of its tables, and codes of any patches in any order, all of it checked."""
# N patches asked for, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentds.cache import CacheConfig
from latentds.codechecks import CodeChecks
from latentds.errors import DamagedPackError, FormatError, InputError, unknown_name
from latentds.files import Extent, LocalFiles, open_files
from latentds.format import (
    CHECKSUM_DTYPE,
    CHECKSUMS,
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
from latentds.openfiles import OpenFile, Signature, signature_of
from latentds.tables import Table, block_sums, read_whole

logger = logging.getLogger(__name__)

MAX_NEAR = 256  # packs that the system was asked to read: two windows of the order
MAX_CACHED_TABLES = 256  # Parquet members that stay parsed
MAX_HASHED_BYTES = 1 << 25  # of a patch table without block checksums: hashed when it is opened


class ShardSet:
    """The shards, tables and manifest of a data set.

    folder       local folder, or location: hf://datasets/ORG/NAME@REVISION, s3://, https://
    check_codes  compare a patch's checksum the first time it is read, and again when its shard has
                 changed; see CodeChecks
    manifest     instead of the folder's own, while it is not yet written
    cache        where and how much of a location is kept
    reads_parts  single patches will be read rather than many of a pack

    Opening costs the manifest, the pack table and one `stat` a shard, whatever the number of
    patches (of a location also the tables, once); it raises FormatError for anything that
    contradicts the manifest. Pickles without its files and tables, so workers may carry it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        check_codes: bool = True,
        manifest: Manifest | None = None,
        cache: CacheConfig | None = None,
        reads_parts: bool = False,
    ) -> None:
        self.files = open_files(folder, cache)
        self.folder, self.revision = self.files.where, self.files.revision
        self.manifest = manifest or self.files.manifest()
        self.check_codes, self.reads_parts = check_codes, reads_parts
        shard_signatures = None
        if isinstance(self.files, LocalFiles):
            self.files.reads_parts = reads_parts
            shard_signatures = check_sizes(self.files.folder, self.manifest)
        self.open_tables()
        self.checks = CodeChecks(self.first_patches(), shard_signatures)
        if manifest is None:
            self.check_patch_table()

    def open_tables(self) -> None:
        """Open the tables and check what opening checks."""
        packs, patches = self.manifest.packs, self.manifest.patches
        self.packs = self.read_table_whole(PACKS_TABLE, PACK_DTYPE, packs)
        # A field of the table is strided: a binary search on it would copy it for every batch.
        self.first_patch = np.ascontiguousarray(self.packs["first_patch"])
        self.first_pack = np.cumsum([0, *(shard.packs for shard in self.manifest.shards)])
        self.books = np.array(self.manifest.codebook_numbers, np.int64)
        self.check_packs()
        self.patches = self.open_table(PATCHES_TABLE, PATCH_DTYPE, patches, self.check_rows)
        self.checksums = None
        if CHECKSUMS in self.manifest.tables:
            self.checksums = self.open_table(CHECKSUMS, CHECKSUM_DTYPE, patches)
        self.near: dict[int, None] = {}
        self.parsed: OrderedDict[tuple[int, str], dict[str, list[Any]]] = OrderedDict()

    @functools.cached_property
    def digests(self) -> np.ndarray | None:
        """sha256 of every pack's members, DIGEST_DTYPE; None in sets without."""
        if DIGESTS not in self.manifest.tables:
            return None
        return self.read_table_whole(DIGESTS, DIGEST_DTYPE, self.manifest.packs)

    def read_table_whole(self, name: str, dtype: np.dtype[Any], rows: int) -> np.ndarray:
        """A table in memory, of the hash that the manifest records; from a location, once anew."""
        sha256 = self.manifest.tables.get(name, {}).get("sha256")
        try:
            return read_whole(self.files.table(name, self.manifest), dtype, rows, sha256)
        except FormatError:
            path = self.files.renew(name, self.manifest)
            if path is None:
                raise
            return read_whole(path, dtype, rows, sha256)

    def open_table(
        self,
        name: str,
        dtype: np.dtype[Any],
        rows: int,
        check: Callable[[np.ndarray], None] = lambda _: None,
    ) -> Table:
        """A table whose rows are read when they are wanted."""
        sums = block_sums(self.manifest.tables.get(name, {}), rows)
        renew = None
        if not isinstance(self.files, LocalFiles):
            renew = functools.partial(self.files.renew, name, self.manifest)
        return Table(self.files.table(name, self.manifest), dtype, rows, sums, renew, check)

    def check_packs(self) -> None:
        """Refuse a pack table that contradicts itself, or the counts and sizes of the manifest."""
        packs, shards = self.packs, self.manifest.shards
        numbers = np.repeat(np.arange(len(shards)), [shard.packs for shard in shards])
        ends = np.cumsum(packs["count"].astype(np.int64))
        shard_ends = np.cumsum([shard.patches for shard in shards])
        room = np.array([shard.bytes for shard in shards], np.uint64)[numbers]
        size = self.manifest.contract.bytes_per_patch
        beyond = past(packs["codes_offset"], packs["count"].astype(np.uint64) * size, room)
        for kind in ("patches", "masks"):
            beyond |= past(packs[f"{kind}_offset"], packs[f"{kind}_bytes"], room)
        if not (
            np.array_equal(packs["shard"], numbers)
            and packs["count"].all()
            and np.array_equal(self.first_patch[1:].astype(np.int64), ends[:-1])
            and np.array_equal(ends[self.first_pack[1:] - 1], shard_ends)
            and not self.first_patch[0]
        ):
            raise FormatError(
                f"{self.folder}/{PACKS_TABLE}: shards do not start and end where the manifest "
                "says; fetch both anew"
            )
        if beyond.any():
            pack = int(np.argmax(beyond))
            raise FormatError(
                f"{self.folder}/{PACKS_TABLE}: pack {pack} lies behind the {room[pack]} bytes of "
                "its shard; fetch the table anew"
            )

    def check_patch_table(self) -> None:
        """Hash a patch table that has no block checksums; say where that would take too long."""
        entry = self.manifest.tables.get(PATCHES_TABLE, {})
        sums = self.patches.sums
        if sums is not None and self.checksums is not None and self.manifest.has_digest:
            return
        logger.warning(
            "%s: of a time before tables, patches and the manifest had checksums of their own: "
            "damage may go unnoticed and checking reads whole packs; 'latentds verify' finds all "
            "damage, 'latentds repack' writes a set that has them", self.folder,
        )  # fmt: skip
        path = self.files.table(PATCHES_TABLE, self.manifest)
        if sums is None and path.stat().st_size <= MAX_HASHED_BYTES:
            read_whole(path, PATCH_DTYPE, len(self), entry.get("sha256"))

    def check_rows(self, table: np.ndarray) -> None:
        """Refuse labels and slides that the manifest does not list: a GPU would die of them."""
        for field, names in (("label", self.manifest.classes), ("slide", self.manifest.slides)):
            least, most = table[field].min(), table[field].max()
            if least < -1 or most >= len(names):
                raise FormatError(
                    f"{self.folder}/{PATCHES_TABLE}: {field} {least if least < -1 else most}, but "
                    f"the manifest lists {len(names)}; damaged, fetch it anew"
                )

    def first_patches(self) -> np.ndarray:
        """Row of every shard's first patch, and one past the last, int64."""
        return np.cumsum([0, *(shard.patches for shard in self.manifest.shards)])

    def begin_epoch(self, epoch: int) -> None:
        """Tell the number of an epoch: every few of them all is checked again."""
        self.checks.begin_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        own = ("packs", "patches", "checksums", "digests", "first_patch", "near", "parsed")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open_tables()

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
        size = self.manifest.contract.bytes_per_patch
        codes = np.empty((len(rows), *self.manifest.contract.codes_shape), np.uint8)
        packs = self.packs_of(rows)
        self.prepare(rows, packs, size)
        doubtful = self.doubtful(rows, packs)
        target = codes.reshape(-1).data
        self.copy_codes(rows, packs, target, size)
        if len(doubtful) and self.checksums is not None:
            self.check_patches(rows, packs, doubtful, target, size)
        return codes

    def prepare(self, rows: np.ndarray, packs: np.ndarray, size: int) -> None:
        """Have the system, or the network, fetch what will be read, side by side."""
        new = [pack for pack in np.unique(packs).tolist() if pack not in self.near]
        for pack in new:
            self.patches.will_need(int(self.first_patch[pack]), int(self.packs["count"][pack]))
            if len(self.near) >= MAX_NEAR:
                self.near.pop(next(iter(self.near)))
            self.near[pack] = None
        if self.reads_parts and isinstance(self.files, LocalFiles):
            self.files.fetch(self.parts(rows, packs, size))
        elif new:
            self.files.fetch([self.extent(pack, CODES) for pack in new])

    def doubtful(self, rows: np.ndarray, packs: np.ndarray) -> np.ndarray:
        """Places of patches to check; where they have no checksums, whole packs are checked now."""
        if not self.check_codes:
            return np.zeros(0, np.int64)
        if isinstance(self.files, LocalFiles):
            for pack in np.unique(
                packs[np.unique(self.packs["shard"][packs], return_index=True)[1]]
            ):
                shard = int(self.packs["shard"][pack])
                self.checks.look_at(shard, self.open(int(pack), CODES)[0].signature())
        places = self.checks.doubtful(rows)
        if self.checksums is None and len(places):
            for pack in np.unique(packs[places]).tolist():
                self.read_sound(pack, CODES)
                first = int(self.first_patch[pack])
                self.checks.found_sound(np.arange(first, first + int(self.packs["count"][pack])))
        return places

    def copy_codes(
        self, rows: np.ndarray, packs: np.ndarray, target: memoryview, size: int
    ) -> None:
        """Read patches into `target`, neighbours in one go."""
        if not len(rows):
            return
        edges = np.flatnonzero((np.diff(rows) != 1) | (np.diff(packs) != 0)) + 1
        starts = np.concatenate([[0], edges])
        stops = (np.append(edges, len(rows)) * size).tolist()
        offsets = ((rows - self.first_patch[packs].astype(np.int64)) * size)[starts].tolist()
        opened = {pack: self.open(pack, CODES) for pack in np.unique(packs).tolist()}
        read = os.preadv
        place = 0
        for pack, offset, stop in zip(packs[starts].tolist(), offsets, stops, strict=True):
            file, start = opened[pack]
            part = target[place:stop]
            try:
                count = read(file.fd, (part,), start + offset)
            except OSError:
                count = 0  # asked once more, by what says what is wrong
            if count != len(part):
                with self.blaming(pack):
                    file.read_into(part, start + offset)
            place = stop

    def check_patches(
        self,
        rows: np.ndarray,
        packs: np.ndarray,
        places: np.ndarray,
        target: memoryview,
        size: int,
    ) -> None:
        """Compare the checksums of patches; where that may help, read those that differ anew."""
        assert self.checksums is not None
        expected = self.checksums[rows[places]].tolist()
        crc32 = zlib.crc32
        for place, recorded in zip(places.tolist(), expected, strict=True):
            part = target[place * size : (place + 1) * size]
            if crc32(part) != recorded:
                pack = int(packs[place])
                if self.files.drop(self.extent(pack, CODES)):
                    self.copy_codes(rows[place : place + 1], packs[place : place + 1], part, size)
                if crc32(part) != recorded:
                    raise self.damaged(pack, CODES)
        self.checks.found_sound(rows[places])

    @contextlib.contextmanager
    def blaming(self, pack: int) -> Iterator[None]:
        """Give an error of reading the pack it is of: `max_bad` can replace that."""
        try:
            yield
        except FormatError as error:
            raise DamagedPackError(f"key {self.key(pack)}: {error}", self, pack) from error

    def open(self, pack: int, kind: str) -> tuple[OpenFile, int]:
        """The file with a pack's codes, columns or masks, and where in it they begin."""
        with self.blaming(pack):
            return self.files.open(self.extent(pack, kind))

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
        """The packs that hold rows of the patch table."""
        return np.searchsorted(self.first_patch, rows.astype(np.uint64), side="right") - 1

    def group_by_pack(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(pack, places in `rows` that it serves) for every pack that is touched."""
        if not len(rows):
            return []
        packs = self.packs_of(rows)
        order = np.argsort(packs, kind="stable")
        touched, starts = np.unique(packs[order], return_index=True)
        places = np.split(order, starts[1:])
        return [(int(pack), place) for pack, place in zip(touched, places, strict=True)]

    def read(self, pack: int, kind: str) -> memoryview:
        """A pack's codes, columns or masks, as they are."""
        file, start = self.open(pack, kind)
        with self.blaming(pack):
            return file.read(start, self.extent(pack, kind).size)

    def read_sound(self, pack: int, kind: str) -> memoryview:
        """A pack's codes, columns or masks, of the recorded checksum, read anew where that helps.

        raises  DamagedPackError
        """
        extent = self.extent(pack, kind)
        content = self.read(pack, kind)
        if zlib.crc32(content) != extent.crc32 and self.files.drop(extent):
            content = self.read(pack, kind)
        if zlib.crc32(content) != extent.crc32:
            raise self.damaged(pack, kind)
        return content

    def damaged(self, pack: int, kind: str) -> DamagedPackError:
        """The error of a pack that is not what was recorded."""
        return DamagedPackError(
            f"{self.shard_path(pack)}, key {self.key(pack)}: {kind} does not have the recorded "
            "checksum; the shard is damaged, fetch it anew ('latentds verify' lists all damage)",
            self,
            pack,
        )

    def extent(self, pack: int, kind: str) -> Extent:
        """Where a pack's codes, columns or masks lie."""
        row, shards = self.packs[pack], self.manifest.shards
        field = {CODES: "codes", PATCHES: "patches", MASKS: "masks"}[kind]
        size = int(row["count"]) * self.manifest.contract.bytes_per_patch
        size = size if kind == CODES else int(row[f"{field}_bytes"])
        shard, offset = shards[int(row["shard"])], int(row[f"{field}_offset"])
        sha256 = None
        if not isinstance(self.files, LocalFiles) and self.digests is not None:
            sha256 = self.digests[field][pack].tobytes()
        return Extent(shard.name, offset, size, int(row[f"{field}_crc32"]), sha256)

    def prefetch(self, rows: np.ndarray) -> None:
        """Start to fetch what `rows` of the patch table will need, and return at once."""
        if not isinstance(self.files, LocalFiles):  # a disk needs no head start
            packs = np.unique(self.packs_of(rows)).tolist()
            self.files.fetch([self.extent(pack, CODES) for pack in packs], ahead=True)

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

        table = self.parsed.pop((pack, kind), None)
        if table is None:
            where = f"{self.shard_path(pack)}, {self.key(pack)}.{kind}"
            content = self.read_sound(pack, kind)
            table = decode_table(
                bytes(content), where, schema, int(self.packs["count"][pack])
            ).to_pydict()
            if len(self.parsed) >= MAX_CACHED_TABLES:
                self.parsed.popitem(last=False)
        self.parsed[pack, kind] = table
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
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error


def past(offsets: np.ndarray, sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Whether stretches of a file end behind its `room`, bool (N,), without overflow; uint64."""
    found: np.ndarray = (offsets > room) | (sizes > room - np.minimum(offsets, room))
    return found


def check_sizes(folder: Path, manifest: Manifest) -> list[Signature]:
    """Every shard's signature; refuses missing, truncated or grown ones before anything is read."""
    found = []
    for shard in manifest.shards:
        try:
            status = (folder / shard.name).stat()
        except FileNotFoundError as error:
            raise FormatError(
                f"{folder / shard.name}: missing; the manifest lists it, fetch it"
            ) from error
        if status.st_size != shard.bytes:
            raise FormatError(
                f"{folder / shard.name}: {status.st_size} bytes, the manifest says {shard.bytes}; "
                "truncated or replaced, fetch it anew"
            )
        found.append(signature_of(status))
    return found
