"""Read a data set: rows of its tables, and codes of any patches in any order, all of it checked."""
# N patches asked for, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import contextlib
import functools
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentds.errors import DamagedPackError, FormatError
from latentds.store.cache import CacheConfig
from latentds.store.format import CHECKSUMS, CODES
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.open_files import Extent, LocalFiles, OpenFile, Signature, Table, wait_for
from latentds.store.pack_columns import PackColumns
from latentds.store.remote_files import RemoteFiles
from latentds.store.tables import CodeChecks, Files, PackTable, check_rows, check_sizes, open_table

logger = logging.getLogger(__name__)

MAX_NEAR = 256  # packs that the system was asked to read: two windows of the order


class ShardSet:
    """The shards, tables and manifest of a data set.

    folder       local folder, or location: hf://datasets/ORG/NAME@REVISION, s3://, https://
    check_codes  compare a patch's checksum the first time it is read, and again when its shard has
                 changed; see CodeChecks
    manifest     instead of the folder's own, while it is not yet written
    cache        where and how much of a location is kept
    reads_parts  single patches will be read rather than many of a pack

    packs, digests  rows by pack, read where they are wanted
    first_patch     row of every pack's first patch

    Opening costs the manifest and one `stat` a shard, whatever the number of patches (of packs that
    are not of one size, also the pack table; of a location small tables, once); it raises
    FormatError for anything that contradicts the manifest. Pickles without its files and tables, so
    workers may carry it.
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
        self.manifest = manifest or manifest_of(self.files)
        self.check_codes, self.reads_parts = check_codes, reads_parts
        signatures: list[Signature] = []
        if isinstance(self.files, LocalFiles):
            self.files.reads_parts = reads_parts
            signatures = check_sizes(self.files.folder, self.manifest)
        self.open_tables()
        self.checks = CodeChecks(self.pack_table.first_patches, signatures)
        if not self.is_local:
            self.digests  # noqa: B018  # fetched with the others, for a time without connection
        if manifest is None:
            warn_of_older(self.folder, self.manifest, self.patches)

    def open_tables(self) -> None:
        self.pack_table = PackTable(self.files, self.manifest)
        self.packs, self.first_patch = self.pack_table.rows, self.pack_table.spans
        self.first_pack, self.shards_of = self.pack_table.first_pack, self.pack_table.shards_of
        self.books = np.array(self.manifest.codebook_numbers, np.int64)
        check = functools.partial(check_rows, manifest=self.manifest, where=self.folder)
        self.patches = self.pack_table.open_patches(check)
        self.checksums = None  # of patches, where those are read one by one
        if CHECKSUMS in self.manifest.tables and self.reads_parts and self.is_local:
            self.checksums = open_table(self.files, self.manifest, CHECKSUMS)
        self.near: dict[int, Extent] = {}  # codes of packs that were wanted last

    @property
    def is_local(self) -> bool:
        """Whether shards lie in a folder, rather than packs in a cache."""
        return isinstance(self.files, LocalFiles)

    @functools.cached_property
    def columns(self) -> PackColumns:
        return PackColumns(self.pack_table, self.read_sound)

    @property
    def digests(self) -> Table | None:
        """sha256 of every pack's members, DIGEST_DTYPE; None in sets without."""
        return self.pack_table.digests

    def begin_epoch(self, epoch: int) -> None:
        """Tell the number of an epoch: every few of them all is checked again."""
        self.checks.begin_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        own = (
            *("pack_table", "packs", "first_patch", "first_pack", "shards_of"),
            *("patches", "checksums", "near", "columns"),
        )
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open_tables()

    def __len__(self) -> int:
        return self.manifest.patches

    def __repr__(self) -> str:
        manifest, contract = self.manifest, self.manifest.contract
        splits = ", ".join(f"{name} {count:,}" for name, count in manifest.splits.items())
        height, width = contract.patch_px
        return (
            f"ShardSet({self.folder}: {len(self):,} patches ({splits}) of {width}x{height} px, "
            f"{len(manifest.slides):,} slides, {len(manifest.classes)} classes, "
            f"{contract.bytes_per_patch:,} bytes a patch)"
        )

    def patch_range(self, split: str) -> tuple[int, int]:
        """First row of a split in the patch table, and one past its last."""
        return self.manifest.patch_range(split)

    def read_codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes uint8 (N, C, h, w) of the patches at `rows` of the patch table, in that order."""
        size = self.manifest.contract.bytes_per_patch
        codes = np.empty((len(rows), *self.manifest.contract.codes_shape), np.uint8)
        if not len(rows):
            return codes
        packs = self.packs_of(rows)
        self.prepare(rows, packs, size)
        doubtful = self.doubtful(rows, packs)
        target = codes.reshape(-1).data
        self.copy_codes(rows, packs, target, size)
        if self.checksums is not None and self.check_codes:
            self.check_patches(rows, packs, doubtful, target)
        return codes

    def prepare(self, rows: np.ndarray, packs: np.ndarray, size: int) -> None:
        """Have the system, or the network, fetch what will be read, side by side."""
        wanted = dict.fromkeys(np.unique(packs).tolist())
        new = [pack for pack in wanted if pack not in self.near]
        if new:
            self.look_up(np.array(new))
            # What this batch wants stays, however many packs it touches.
            excess = max(0, len(self.near) - MAX_NEAR)
            for pack in [pack for pack in self.near if pack not in wanted][:excess]:
                del self.near[pack]
        # A part has no hash of its own: from a location whole packs come, which have one.
        if self.is_local and (self.checksums is not None or not self.check_codes):
            self.files.fetch(self.parts(rows, packs, size))
        elif new:
            self.pack_table.fetch(np.array(new))

    def look_up(self, new: np.ndarray) -> None:
        """Note where packs' codes are, and have what the tables say of their patches at hand."""
        firsts, counts = self.first_patch[new], self.first_patch.counts(new)
        if self.is_local:
            for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
                self.patches.will_need(first, count)
        else:
            self.pack_table.bring(new)
            wait_for(self.patches.bring(firsts, counts))
        self.near.update(zip(new.tolist(), self.pack_table.extents(new, CODES), strict=True))

    def doubtful(self, rows: np.ndarray, packs: np.ndarray) -> np.ndarray:
        """Places of patches to check when they are read; packs that are read whole are checked now.

        A pack is found damaged by whoever touches it first, whichever patch of it that wants: so
        every rank and worker replaces it alike (`max_bad`).
        """
        places = np.arange(len(rows))
        if self.is_local and self.check_codes:
            touched, where = np.unique(self.shards_of(packs), return_index=True)
            for shard, pack in zip(touched.tolist(), packs[where].tolist(), strict=True):
                self.checks.look_at(shard, self.open(pack, CODES)[0].signature())
            places = self.checks.doubtful(rows)
        if self.checksums is None and self.check_codes:
            for pack in np.unique(packs[places]).tolist():
                self.check_pack(pack)
        return places

    def check_pack(self, pack: int) -> None:
        """Check the codes of a pack, of a location whenever its file in the cache is opened."""
        if self.is_local or not self.open(pack, CODES)[0].is_sound:
            self.read_sound(pack, CODES)
            self.open(pack, CODES)[0].is_sound = True
        if self.is_local:
            self.checks.found_sound(np.arange(*self.first_patch[[pack, pack + 1]]))

    def copy_codes(
        self, rows: np.ndarray, packs: np.ndarray, target: memoryview, size: int
    ) -> None:
        """Read patches into `target`, neighbours in one go."""
        edges = np.flatnonzero((np.diff(rows) != 1) | (np.diff(packs) != 0)) + 1
        starts = np.concatenate([[0], edges])
        stops = (np.append(edges, len(rows)) * size).tolist()
        offsets = (rows[starts] - self.first_patch[packs[starts]]) * size
        files, begins = self.places_of(packs[starts])
        read, place = os.preadv, 0
        for number, (file, offset, stop) in enumerate(
            zip(files, (begins + offsets).tolist(), stops, strict=True)
        ):
            part = target[place:stop]
            try:
                count = read(file.fd, (part,), offset)
            except OSError:
                count = 0  # asked once more, by what says what is wrong
            if count != len(part):
                with self.blaming(int(packs[starts[number]])):
                    file.read_into(part, offset)
            place = stop

    def places_of(self, packs: np.ndarray) -> tuple[list[OpenFile], np.ndarray]:
        """The file with each pack's codes, and where in it they begin, int64."""
        distinct, which = np.unique(packs, return_inverse=True)
        files, begins, opened = [], np.zeros(len(distinct), np.int64), dict[str | int, OpenFile]()
        for place, pack in enumerate(distinct.tolist()):
            extent = self.extent(pack, CODES)
            name = extent.shard if self.is_local else pack  # a shard's file is all its packs'
            if name not in opened:
                opened[name] = self.open(pack, CODES)[0]
            files.append(opened[name])
            begins[place] = extent.offset if self.is_local else 0
        return [files[place] for place in which.tolist()], begins[which]

    def check_patches(
        self, rows: np.ndarray, packs: np.ndarray, places: np.ndarray, target: memoryview
    ) -> None:
        """Compare the checksums of patches at `places`."""
        assert self.checksums is not None
        size = self.manifest.contract.bytes_per_patch
        expected = self.checksums[rows[places]].tolist()
        crc32 = zlib.crc32
        for place, recorded in zip(places.tolist(), expected, strict=True):
            part = target[place * size : (place + 1) * size]
            if crc32(part) != recorded:
                raise self.damaged(int(packs[place]), CODES)
        self.checks.found_sound(rows[places])

    @contextlib.contextmanager
    def blaming(self, pack: int) -> Iterator[None]:
        """Give an error of reading the pack it is of: `max_bad` can replace that."""
        try:
            yield
        except FormatError as error:
            key = self.pack_table.key(pack)
            raise DamagedPackError(f"key {key}: {error}", self, pack) from error

    def open(self, pack: int, kind: str) -> tuple[OpenFile, int]:
        """The file with a pack's codes, columns or masks, and where in it they begin."""
        with self.blaming(pack):
            return self.files.open(self.extent(pack, kind))

    def codebook_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which of the manifest's codebooks each patch at `rows` has, int64 (N,)."""
        if len(self.manifest.codebooks) == 1:
            return np.zeros(len(rows), np.int64)
        return np.asarray(self.books[self.shards_of(self.packs_of(rows))])

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

    def packs_of(self, rows: np.ndarray | int) -> np.ndarray:
        """The packs that hold rows of the patch table, int64, of the shape of `rows`."""
        return np.asarray(self.first_patch.find(rows))

    def read(self, pack: int, extent: Extent) -> memoryview:
        """A pack's codes, columns or masks, as they are."""
        with self.blaming(pack):
            file, start = self.files.open(extent)
            return file.read(start, extent.size)

    def read_sound(self, pack: int, kind: str) -> memoryview:
        """A pack's codes, columns or masks, of the recorded checksum, read anew where that helps.

        raises  DamagedPackError
        """
        extent = self.extent(pack, kind)
        content = self.read(pack, extent)
        if zlib.crc32(content) != extent.crc32 and self.files.drop(extent):
            content = self.read(pack, extent)
        if zlib.crc32(content) != extent.crc32:
            raise self.damaged(pack, kind)
        return content

    def damaged(self, pack: int, kind: str) -> DamagedPackError:
        """The error of a pack that is not what was recorded."""
        return DamagedPackError(
            f"{self.pack_table.where(pack)}: {kind} does not have the recorded checksum; the shard "
            "is damaged, fetch it anew ('latentds verify' lists all damage)",
            self,
            pack,
        )

    def extent(self, pack: int, kind: str) -> Extent:
        """Where a pack's codes, columns or masks lie."""
        if kind == CODES and pack in self.near:
            return self.near[pack]
        return self.pack_table.extents([pack], kind)[0]

    def prefetch(self, rows: np.ndarray) -> None:
        """Start to fetch what `rows` of the patch table will need, and return at once."""
        if not self.is_local:  # a disk needs no head start
            packs = np.unique(self.packs_of(rows))
            self.pack_table.bring(packs, ahead=True)
            # Those whose rows are on their way have their turn when the next batch is asked for.
            packs = packs[self.pack_table.has(packs)]
            counts = self.first_patch.counts(packs)
            self.patches.bring(self.first_patch[packs], counts, ahead=True)
            self.pack_table.fetch(packs, ahead=True)

    def read_columns(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of Parquet columns (key, source, source_encoding, ...) of patches at `rows`."""
        return self.columns.read(rows, names)

    def table(self, split: str | None = None, columns: Sequence[str] = ()) -> Any:
        """The patches as a pyarrow.Table, `.to_pandas()` away from a data frame.

        split    one split; None takes all
        columns  among key, source, source_encoding: what the shards hold besides, which reads them

        Columns row (int64, what `Select(rows=...)` takes), split, label, slide, x, y (pixels of
        level 0), mpp, size_px (of level 0); null where unknown.
        """
        from latentds.store.pack_columns import patch_columns

        rows = np.arange(*(self.patch_range(split) if split else (0, len(self))))
        table = patch_columns(rows, self.patches[rows], self.manifest)
        for name, values in self.read_columns(rows, columns).items():
            table = table.append_column(name, [values])
        return table

    def read_masks(self, rows: np.ndarray, *, required: bool = False) -> np.ndarray:
        """Masks uint8 (N, H, W) of the patches at `rows`; zeros where a patch has none.

        required  InputError for a patch that has none instead
        """
        return self.columns.masks(rows, required)


def open_files(folder: str | os.PathLike[str], cache: CacheConfig | None = None) -> Files:
    """A folder's files, or a location's (anything with ://)."""
    if "://" in str(folder):
        return RemoteFiles(str(folder), cache or CacheConfig())
    return LocalFiles(Path(folder))


def manifest_of(files: Files) -> Manifest:
    """The checked manifest of a set's files."""
    return read_manifest(files.folder) if isinstance(files, LocalFiles) else files.manifest()


def warn_of_older(where: str, manifest: Manifest, patches: Table) -> None:
    """Say what is not checked of sets of before there were all checksums."""
    if patches.sums is None or not manifest.has_digest or CHECKSUMS not in manifest.tables:
        logger.warning(
            "%s: of a time before tables, patches and the manifest had checksums of their own: "
            "damage may go unnoticed, and checking reads whole packs; 'latentds verify' finds all "
            "damage, 'latentds repack' writes a set that has them", where,
        )  # fmt: skip
