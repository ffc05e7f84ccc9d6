"""The words of the format latentds/1: names, tables, contract, npy header.

No IO; docs/format.md is the text.
"""
# N patches of a pack, C latent channels, h w latent cells, H W pixels, R K rows and levels of a
# codebook

from __future__ import annotations

import binascii
import dataclasses
import functools
import hashlib
import io
import math
import re
import tokenize
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from latentds.autoencoders.autoencoder import AutoencoderCard, short
from latentds.core.storage import Kind, check_kinds
from latentds.errors import ContractError, FormatError
from latentds.quantizers.codebooks import ENCODINGS, unknown_encoding
from latentds.quantizers.scalar import AnyCodebook

FORMAT = "latentds/1"
LEVELS = "u8"  # one byte a latent value: the encoding whose latents have the shape of its codes
CODES, MASKS, PATCHES = "codes.npy", "masks.parquet", "patches.parquet"
MEMBERS = (CODES, MASKS, PATCHES)  # in the order they stand in a shard
SIDECARS = ".latentds"  # a dot folder: `datasets` and the Hub's viewer leave it alone
MANIFEST = f"{SIDECARS}/manifest.json"
INPUT_STAMP = f"{SIDECARS}/input_files"  # of the copy that a conversion read; no part of the set
PACKS_TABLE = f"{SIDECARS}/packs.npy"
PATCHES_TABLE = f"{SIDECARS}/patches.npy"
DIGESTS = f"{SIDECARS}/digests.npy"
CHECKSUMS = f"{SIDECARS}/checksums.npy"
GOLDEN = f"{SIDECARS}/golden.parquet"
SLIDES_TABLE = f"{SIDECARS}/slides.parquet"  # beside the set, no part of it
HEADER_PREFIX = "LATENTDS."
# What numpy raises for headers that are none, hostile ones included.
NPY_ERRORS = (
    *(ValueError, EOFError, SyntaxError, TypeError, KeyError),
    *(MemoryError, RecursionError, tokenize.TokenError),
)
# What a contract says of its autoencoder, where it is shown or counted with.
CARD_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("name", "class_name", "licence", "repository", "subfolder"), str),
    **dict.fromkeys(("revision", "encoder"), str),
    **dict.fromkeys(("channels", "factor"), int),
    "gated": bool,
}
NO_LABEL = -1
MAX_PATCH_AREA_PX = 1 << 26  # 8192x8192
MAX_PATCH_BYTES = 1 << 26
TABLE_HEAD_BYTES = 4096
MAX_BLOCK_ROWS = 1 << 20  # of a table that are checked as one
SHA256_BYTES = 16  # of a block's sha256 that the manifest has: as hard to forge as 2^128 tries
SPLIT_PATTERN = re.compile(r"[a-z0-9_]{1,32}")
SHARD_PATTERN = re.compile(r"data/[a-z0-9_]{1,32}-\d{6}\.tar")
MEMBER_PATTERN = re.compile(r"([A-Za-z0-9_-]{1,80})\.([a-z0-9.]{1,40})")

ROWS_CRC32 = "reserved"  # the field's name in every set, which the table's header has
PACK_DTYPE = np.dtype(
    [
        ("first_patch", "<u8"),  # row of the pack's first patch in the patch table
        ("codes_offset", "<u8"),  # of the first code byte, from the start of the shard
        ("patches_offset", "<u8"),  # of the Parquet bytes
        ("masks_offset", "<u8"),  # 0 where the pack has no masks
        ("shard", "<u4"),  # index into the manifest's shards
        ("count", "<u4"),  # N
        ("patches_bytes", "<u4"),
        ("masks_bytes", "<u4"),
        ("codes_crc32", "<u4"),  # zlib's, of the N*C*h*w code bytes
        ("patches_crc32", "<u4"),  # of the Parquet bytes: a parser is never fed damaged ones
        ("masks_crc32", "<u4"),
        (ROWS_CRC32, "<u4"),  # of the pack's rows in the patch table; 0 in sets of before
    ]
)
DIGEST_DTYPE = np.dtype(  # sha256 of what CRC-32 stands for above; zeros for masks a pack has not
    [("codes", "u1", (32,)), ("patches", "u1", (32,)), ("masks", "u1", (32,))]
)
CHECKSUM_DTYPE = np.dtype("<u4")  # CRC-32 (zlib's) of a patch's code bytes
PATCH_DTYPE = np.dtype(
    [
        ("label", "<i4"),  # index into the manifest's classes, -1 for none
        ("slide", "<i4"),  # index into the manifest's slides, -1 for none
        ("x", "<i4"),  # left and top in pixels of level 0 (of the source picture for plain images)
        ("y", "<i4"),
        ("mpp", "<f4"),  # micrometres a pixel of the patch, NaN where unknown
        ("size_px", "<u4"),  # edge of the region (its width), in the pixels x and y count
    ]
)
TABLES = {
    PACKS_TABLE: PACK_DTYPE,
    PATCHES_TABLE: PATCH_DTYPE,
    DIGESTS: DIGEST_DTYPE,
    CHECKSUMS: CHECKSUM_DTYPE,
}
OF_PATCHES = (PATCHES_TABLE, CHECKSUMS)  # tables of a row a patch


def pack_key(split: str, shard: int, pack: int) -> str:
    """Key of a pack: dot-free ASCII, unique over the data set."""
    return f"{split}-{shard:06d}-{pack:06d}"


def shard_name(split: str, shard: int) -> str:
    """Path of a shard relative to the data set's folder."""
    return f"data/{split}-{shard:06d}.tar"


def main_split(splits: Iterable[str]) -> str:
    """The split that is shown, and fitted to, where none is named: train, else the first."""
    names = list(splits)
    return "train" if "train" in names else names[0]


def check_format(value: object, where: str) -> None:
    """Refuse anything that is not this format's major version.

    Rule: `latentds/N`; members, columns, header and manifest fields may be added within N, and
    readers ignore those they do not know; whatever an N-reader would misread raises N or gets a new
    encoding name.
    """
    if value == FORMAT:
        return
    if isinstance(value, str) and re.fullmatch(r"latentds/\d+", value):
        raise FormatError(f"{where}: format {value}, this reader knows {FORMAT}; upgrade latentds")
    raise FormatError(f"{where}: format is {value!r}, not {FORMAT}; not a latentds data set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """What the stored bytes mean; it travels in the manifest and in every shard's header.

    latent_id     what the numbers mean: hash of the encoder and of how it was used
    codebook      how they were made small; its `codebook_id` is derived
    decoder_id    how they were meant to be seen; recorded, replaceable by any decoder of
                  `latent_id`
    autoencoder   card of the autoencoder as plain JSON values
    patch_px      (H, W) of a patch in pixels, before padding to the autoencoder's factor
    codes_shape   of a patch: (C, h, w) of u8, (planes, h, w) of u8-sum, (bytes,) of rans
    """

    latent_id: str
    decoder_id: str
    codebook: AnyCodebook
    autoencoder: dict[str, Any]
    patch_px: tuple[int, int]
    codes_shape: tuple[int, ...]

    @property
    def encoding(self) -> str:
        """How codes are packed: the codebook's kind of codes."""
        return self.codebook.encoding

    @functools.cached_property
    def latents_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a patch's latents."""
        return self.codebook.latents_shape_of(self.codes_shape)

    @property
    def bytes_per_patch(self) -> int:
        return math.prod(self.codes_shape)

    def check_decoder(self, card: AutoencoderCard, where: object) -> None:
        """Refuse a decoder of other latents; any of the same latents is welcome."""
        if card.latent_id != self.latent_id:
            raise ContractError(
                f"{where}: stored latents have latent_id {short(self.latent_id)}, autoencoder "
                f"{card.name!r} reads {short(card.latent_id)}; pass the autoencoder they were made "
                "with, or a decoder trained for it"
            )

    def to_json(self) -> dict[str, Any]:
        record = {
            "encoding": self.encoding,
            "latent_id": self.latent_id,
            "decoder_id": self.decoder_id,
            "codebook_id": self.codebook.codebook_id,
            "autoencoder": self.autoencoder,
            "patch_px": list(self.patch_px),
            "codes_shape": list(self.codes_shape),
            "codebook": self.codebook.to_json(),
        }
        if self.encoding != LEVELS:
            record["latents_shape"] = list(self.latents_shape)
        return record

    @staticmethod
    def from_json(record: Any, where: str, made_by: object = None) -> Contract:
        """The contract that `to_json` wrote; FormatError names what is wrong in `where`.

        made_by  version of latentds that wrote it, where a manifest tells
        """
        try:
            encoding = record["encoding"]
            if encoding not in [*ENCODINGS]:
                raise unknown_encoding(encoding, where, made_by)
            contract = Contract(
                latent_id=str(record["latent_id"]),
                decoder_id=str(record["decoder_id"]),
                codebook=ENCODINGS[encoding].from_json(record["codebook"]),
                autoencoder=dict(record["autoencoder"]),
                patch_px=positive(record["patch_px"], 2, 2),
                codes_shape=positive(record["codes_shape"]),
            )
            check_kinds(contract.autoencoder, CARD_KINDS, "autoencoder.")
            latents_shape = contract.latents_shape
            if encoding != LEVELS and list(latents_shape) != list(record["latents_shape"]):
                raise ValueError(f"latents_shape {record['latents_shape']}, not {latents_shape}")
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise FormatError(
                f"{where}: contract is damaged ({error!r}); fetch the file anew"
            ) from error
        if contract.codebook.codebook_id != record.get("codebook_id"):
            raise FormatError(
                f"{where}: codebook does not have the codebook_id beside it; fetch it anew"
            )
        height, width = contract.patch_px
        if height * width > MAX_PATCH_AREA_PX or contract.bytes_per_patch > MAX_PATCH_BYTES:
            raise FormatError(
                f"{where}: patches of {width}x{height} px and {contract.bytes_per_patch} bytes; "
                "more than latentds/1 allows, refused"
            )
        if not isinstance(contract.autoencoder.get("name"), str):
            raise FormatError(f"{where}: the contract's autoencoder has no name; fetch it anew")
        return contract


def positive(values: Any, least: int = 1, most: int = 3) -> Any:
    """`values` as a tuple of positive integers of at most 1,048,576 (ValueError otherwise)."""
    numbers = tuple(values)
    is_positive = all(type(n) is int and 0 < n <= 1 << 20 for n in numbers)
    if not least <= len(numbers) <= most or not is_positive:
        raise ValueError(f"{values} is not {least} to {most} positive integers")
    return numbers


def sorted_names(names: Iterable[str]) -> list[str]:
    """Distinct names in ascending order, as numbers where all are: 10 after 9."""
    found = sorted(set(names))
    are_numbers = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in found)
    return sorted(found, key=int) if are_numbers else found


def alike_names(names: Iterable[str]) -> tuple[str, ...]:
    """Two of the names that differ in case, spaces, hyphens and underscores alone; none if none."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(re.sub(r"[\s_-]+", " ", name.strip()).casefold(), name)
        if other != name:
            return other, name
    return ()


def joined_names(lists: Iterable[Sequence[str]]) -> list[str]:
    """Distinct names of several lists: in the longest one's own order, where one has an order."""
    known = [list(names) for names in lists]
    everything = {name for names in known for name in names}
    if all(names == sorted_names(names) for names in known):
        return sorted_names(everything)
    longest = max(known, key=len)
    return [*longest, *sorted_names(everything - set(longest))]


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a version 1.0 npy file of C-ordered uint8: 128 bytes for any shape of a pack."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def check_npy(head: bytes, member_bytes: int, codes_shape: tuple[int, ...], where: str) -> int:
    """N of a codes member of `member_bytes`, whose first bytes are `head`.

    Nothing is allocated: the header must announce uint8, C order, (N, *codes_shape), and just the
    bytes there are.
    """
    try:
        stream = io.BytesIO(head)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("npy version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except NPY_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{where}: not a version 1.0 npy of codes ({reason})") from error
    if dtype != np.uint8 or fortran:
        raise FormatError(f"{where}: codes are {dtype}, not C-ordered uint8; refused")
    if tuple(shape[1:]) != tuple(codes_shape) or not shape or shape[0] < 1:
        raise FormatError(
            f"{where}: codes have shape {shape}, the contract says (N, *{codes_shape})"
        )
    expected = int(np.prod(shape, dtype=object)) + stream.tell()
    if expected != member_bytes:
        raise FormatError(
            f"{where}: codes of {shape} need {expected} bytes, the member has {member_bytes}"
        )
    return int(shape[0])


def patch_key(source: str, x: int | None = None, y: int | None = None) -> str:
    """Dot-free ASCII key of a patch, derived from what is stored.

    Source path without suffix, and its place.

    A hash is added where characters had to change, so that `a b` and `a_b` stay two keys.
    """
    stem = re.sub(r"\.[^./]+$", "", source)
    plain = re.sub(r"[^A-Za-z0-9_/-]", "_", stem)[:160]
    key = plain if plain == stem else f"{plain}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    return key if x is None or y is None else f"{key}_x{x}_y{y}"


class Spans:
    """Rows cut into consecutive spans: packs of a patch table, blocks of any table. Holds no list.

    firsts  first row of every run of spans (a shard's packs), and one past the last, int64 (S + 1,)
    starts  number of every run's first span, and of one past the last, int64 (S + 1,)
    size    rows of a span; the last of every run may have fewer
    """

    def __init__(self, firsts: np.ndarray, starts: np.ndarray, size: int) -> None:
        self.firsts, self.starts, self.size = firsts, starts, size

    @staticmethod
    def even(rows: int, size: int) -> Spans:
        """`rows` cut into spans of `size`, the last shorter."""
        return Spans(np.array([0, rows]), np.array([0, -(-rows // size)]), size)

    @staticmethod
    def listed(edges: np.ndarray) -> Spans:
        """Spans of any sizes by their first rows and one past the last, int64 (P + 1,): held."""
        return Spans(edges, np.arange(len(edges)), int(np.diff(edges).max(initial=1)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, numbers: Any) -> Any:
        """First rows of spans, int64; of number `len(self)`, one past the last row."""
        numbers = np.asarray(numbers, np.int64)
        if len(self.starts) > len(self):  # every run is one span
            return self.firsts[numbers]
        runs = np.searchsorted(self.starts, numbers, side="right") - 1
        return self.firsts[runs] + (numbers - self.starts[runs]) * self.size

    def counts(self, numbers: Any) -> Any:
        """How many rows spans have, int64."""
        return self[np.asarray(numbers, np.int64) + 1] - self[numbers]

    def find(self, rows: Any) -> Any:
        """The spans that rows are in, int64."""
        rows = np.asarray(rows, np.int64)
        runs = np.searchsorted(self.firsts, rows, side="right") - 1
        return self.starts[runs] + (rows - self.firsts[runs]) // self.size

    def group(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(span, places in `rows` that lie in it) for every span that is touched."""
        if not len(rows):
            return []
        spans = self.find(rows)
        order = np.argsort(spans, kind="stable")
        touched, starts = np.unique(spans[order], return_index=True)
        places = np.split(order, starts[1:])
        return [(int(span), place) for span, place in zip(touched, places, strict=True)]

    def part(self, first: int, end: int) -> Spans:
        """The spans [first, end) of whole runs, numbered from 0; rows keep their numbers."""
        begin, last = np.searchsorted(self.starts, (first, end)).tolist()
        runs = slice(begin, last + 1)
        return Spans(self.firsts[runs], self.starts[runs] - first, self.size)

    def unlike(self) -> tuple[int, np.ndarray]:
        """The usual count of a span (the least of the commonest), and the spans that have another.

        At most one a run, or twice as many numbers as there are runs.
        """
        lasts, runs = self.starts[1:] - 1, len(self.starts) - 1
        if len(self) > 2 * runs:  # then no other count is as common
            return self.size, lasts[self.counts(lasts) != self.size]
        counts = self.counts(np.arange(len(self)))
        usual = int(np.bincount(counts).argmax())
        return usual, np.flatnonzero(counts != usual)
