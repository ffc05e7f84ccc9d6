"""The codebook of every encoding of latentds/1, the one place that knows them all.

From and to files (safetensors whose metadata tell kind, latents and fit), some of which ship; sized
for patches, normalized by mean and spread of every latent channel.
"""
# C latent channels, R K rows and levels of a codebook, S sets

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentds.core.storage import parse_json, write_atomically
from latentds.errors import ContractError, FormatError, InputError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.entropy.record_model import LEAST_SIDE, MAX_RECORD_BYTES, lanes_for
from latentds.quantizers.scalar import AnyCodebook, Codebook
from latentds.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

ENCODINGS: dict[str, type[Codebook] | type[AdditiveCodebook] | type[EntropyCodebook]] = {
    book.encoding: book for book in (Codebook, AdditiveCodebook, EntropyCodebook)
}
DIGITS = 7  # what a float32 holds
WEIGHTS = "latentds.autoencoders"  # what ships lies beside the networks whose latents it codes
USUAL_BYTES, USUAL_CELLS = 4096, 1024  # of a record of a patch of 256 px
RECORDS = tuple(f"tiny-v2/records-{size}.safetensors" for size in (4096, 2048, 8192, 1024))


def unknown_encoding(value: object, where: str, made_by: object = None) -> FormatError:
    """The error of codes that are packed in a way this reader does not know.

    made_by  version of latentds that wrote them, where a manifest tells
    """
    known = ", ".join(map(repr, ENCODINGS))
    needed = f" to {made_by:.40} or later, which made them" if isinstance(made_by, str) else ""
    return FormatError(
        f"{where}: codes are encoded as {value!r}, this reader (latentds {__version__}) knows "
        f"{known}; upgrade latentds{needed}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCodebook:
    """A codebook, the latents it was fitted to, and how (sample size, seed, distortion, origin)."""

    codebook: AnyCodebook
    latent_id: str
    made: dict[str, Any]

    @property
    def scalar(self) -> Codebook:
        """The codebook where it is of levels; ContractError for an additive one."""
        if isinstance(self.codebook, Codebook):
            return self.codebook
        raise ContractError(
            f"the codebook is {self.codebook.kind}, of vectors; levels of single values are needed "
            "here: fit them with 'latentds fit-codebook --kind scalar'"
        )


def sized(
    stored: StoredCodebook, latents_shape: tuple[int, int, int], patch_bytes: int | None = None
) -> StoredCodebook:
    """The codebook for patches of these latents; see `sized_book`."""
    return dataclasses.replace(
        stored, codebook=sized_book(stored.codebook, latents_shape, patch_bytes)
    )


def sized_book(
    book: AnyCodebook, latents_shape: tuple[int, int, int], patch_bytes: int | None = None
) -> AnyCodebook:
    """The codebook for patches of these latents (C, h, w).

    patch_bytes  of the codes; None for what they take, of entropy-coded records in proportion to
                 the cells, or the least that those can be coded in. Records alone can be made of
                 other bytes than a codebook's own, by another step with the same tables
    raises       ShapeError for other channels; InputError for bytes that the codes cannot have,
                 with those that they can
    """
    if isinstance(book, EntropyCodebook):
        return sized_records(book, latents_shape, patch_bytes)
    taken = math.prod(book.codes_shape_of(latents_shape))
    if patch_bytes not in (None, taken):
        raise InputError(
            f"--bytes {patch_bytes}: codes of this codebook ({book.text}) take {taken} a patch; "
            "leave --bytes, or fit another codebook"
        )
    return book


@functools.lru_cache(maxsize=16)  # tables on devices are kept by a codebook's identity
def sized_records(
    book: EntropyCodebook, latents_shape: tuple[int, int, int], record_bytes: int | None
) -> EntropyCodebook:
    """The same model and tables for other patches or records; see `sized_book`."""
    from latentds.quantizers.entropy.record_encoding import least_record, most_bytes

    own, cells = math.prod(book.latents_shape[1:]), math.prod(latents_shape[1:])
    if latents_shape[0] != book.latents_shape[0]:
        book.codes_shape_of(latents_shape)  # says so
    small = InputError(
        f"patches of {latents_shape[1]} x {latents_shape[2]} latent cells are too small for "
        "entropy-coded records; take --codebook scalar or larger patches"
    )
    if min(latents_shape[1:]) < LEAST_SIDE:
        raise small
    usual = book.record_bytes * cells // own
    if (latents_shape, record_bytes or usual) == (book.latents_shape, book.record_bytes):
        return book
    most = most_bytes(latents_shape)

    def of_bytes(size: int) -> EntropyCodebook:
        lanes = lanes_for(size, cells)
        return dataclasses.replace(
            book, latents_shape=latents_shape, lanes=lanes, record_bytes=MAX_RECORD_BYTES
        )

    least = least_record(of_bytes(record_bytes or usual))
    least = max(least, least_record(of_bytes(least)))  # more bytes may have more lanes
    if least > most:
        raise small
    wanted = record_bytes or min(max(usual, least), most)
    if not least <= wanted <= most:
        raise InputError(
            f"--bytes {wanted}: by these tables a patch of {cells:,} cells takes {least:,} to "
            f"{most:,}"
        )
    return dataclasses.replace(of_bytes(wanted), record_bytes=wanted)


def tiny_codebook() -> StoredCodebook:
    """The codebook that ships with `tiny-v1`."""
    return shipped_codebook("tiny-v1-codebook.safetensors")


def shipped_records(
    latent_id: str, latents_shape: tuple[int, int, int], record_bytes: int | None
) -> StoredCodebook | None:
    """The entropy codebook that ships with these latents; None where none does.

    record_bytes  of a patch; None for 4,096 a patch of 256 px, in proportion to other patches' area
    raises        InputError for bytes that these latents cannot be coded in
    """
    books = [shipped_codebook(name) for name in RECORDS]
    if latent_id != books[0].latent_id:
        return None
    cells = latents_shape[1] * latents_shape[2]
    usual = USUAL_BYTES * cells // USUAL_CELLS
    share = (record_bytes or usual) / usual * USUAL_BYTES  # of a patch of 256 px
    sizes = [math.prod(book.codebook.codes_shape_of((32, 32, 32))) for book in books]
    nearest = min(range(len(books)), key=lambda place: abs(math.log(sizes[place] / share)))
    return sized(books[nearest], latents_shape, record_bytes)


@functools.cache
def shipped_codebook(name: str) -> StoredCodebook:
    """The codebook of a file that ships, the latents it belongs to, and how it was fitted."""
    with resources.as_file(resources.files(WEIGHTS) / "weights" / name) as path:
        return load_codebook(path)


def save_codebook(stored: StoredCodebook, path: Path) -> None:
    """Write a codebook file: its tensors are the codebook's tables by name."""
    metadata = {
        "kind": stored.codebook.kind,
        "latent_id": stored.latent_id,
        "codebook_id": stored.codebook.codebook_id,
        "made": json.dumps(stored.made, sort_keys=True),
    }
    if stored.codebook.encoding != Codebook.encoding:  # files of before there were others say none
        metadata["encoding"] = stored.codebook.encoding
    # safetensors writes the memory of an array that is not contiguous, whatever its order.
    arrays = {n: np.ascontiguousarray(v) for n, v in stored.codebook.to_arrays().items()}
    write_atomically(path, save(arrays, metadata))


def load_codebook(path: Path) -> StoredCodebook:
    """Read a codebook file; FormatError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such codebook file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            encoding = metadata.get("encoding", Codebook.encoding)
            if encoding not in ENCODINGS:
                raise unknown_encoding(encoding, str(path))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            codebook = ENCODINGS[encoding].from_arrays(arrays, metadata["kind"])
        return StoredCodebook(
            codebook=codebook,
            latent_id=metadata["latent_id"],
            made=dict(parse_json(metadata["made"].encode(), str(path))),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: not a codebook file ({error}); make one with 'latentds fit-codebook'"
        ) from error


def load_matching(path: Path, latent_id: str, autoencoder: str) -> StoredCodebook:
    """The codebook of a file, whose name is in `made`; ContractError for one of other latents."""
    stored = load_codebook(path)
    check_latents(stored, latent_id, autoencoder, path)
    made = {"origin": "from a codebook file", "file": path.name, "fit": stored.made}
    return dataclasses.replace(stored, made=made)


def check_latents(stored: StoredCodebook, latent_id: str, autoencoder: str, where: object) -> None:
    """ContractError where a codebook was fitted to other latents than the autoencoder makes.

    latent_id  empty while the autoencoder's weights are not loaded: then nothing is known of them
    """
    if latent_id and stored.latent_id != latent_id:
        raise ContractError(
            f"{where}: fitted to other latents than {autoencoder!r} makes; fit one with "
            "'latentds fit-codebook'"
        )


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of every channel of dequantized latents.

    mean, std  (C,), in units of the unscaled latents; a channel that never changes has std 0
    count      values of a channel that were counted; 0 where that is not known
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    @property
    def divisors(self) -> tuple[float, ...]:
        """What to divide by: the standard deviations, 1 for a channel that never changes."""
        return tuple(std if std > 0 else 1.0 for std in self.std)

    def normalized(self, codebook: AnyCodebook) -> AnyCodebook:
        """A codebook that gives normalized latents.

        Where latents are looked up, in another table: normalizing costs nothing there.
        """
        mean, std = np.array(self.mean), np.array(self.divisors)
        if isinstance(codebook, Codebook):
            levels = (codebook.levels - mean[:, None]) / std[:, None]
            return Codebook(levels.astype(np.float32), codebook.kind)
        if isinstance(codebook, AdditiveCodebook):
            tables = codebook.tables / std
            tables[0] -= mean / std
            return AdditiveCodebook(tables.astype(np.float32), codebook.kind)
        return Normalized(codebook, self)


class Normalized:
    """A codebook's latents, normalized after they were decoded; it does not quantize."""

    def __init__(self, codebook: AnyCodebook, statistics: ChannelStatistics) -> None:
        self.codebook, self.statistics = codebook, statistics

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.codebook, name)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Normalized latents float32 (B, C, h, w) of codes uint8 (B, *codes_shape)."""
        import torch

        latents = self.codebook.dequantize(codes)
        mean, std = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1)
            for values in (self.statistics.mean, self.statistics.divisors)
        )
        return (latents - mean) / std


def rounded(value: float) -> float:
    """A number to as many digits as a float32 holds."""
    return float(f"{value:.{DIGITS}g}")


def pool(parts: Sequence[ChannelStatistics], weights: Sequence[float]) -> ChannelStatistics:
    """The statistics of draws from several sets of one latent_id, by how often each is drawn.

    weights  positive, in any unit
    """
    shares = np.array(weights, np.float64) / math.fsum(weights)
    means = np.array([part.mean for part in parts])
    squares = np.array([part.std for part in parts]) ** 2 + means**2
    mean = (shares[:, None] * means).sum(0)
    std = np.sqrt(np.maximum((shares[:, None] * squares).sum(0) - mean**2, 0))
    count = sum(part.count for part in parts)
    return ChannelStatistics(
        tuple(map(rounded, mean.tolist())), tuple(map(rounded, std.tolist())), count
    )
