"""The codebook of every encoding of latentds/1, the one place that knows them all; their files.

Those are safetensors whose metadata tell kind, latents and fit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentds.core.json_text import parse_json
from latentds.core.storage import write_atomically
from latentds.errors import ContractError, FormatError, InputError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.entropy.record_checks import MAX_RECORD_BYTES
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, Codebook
from latentds.version import __version__

ENCODINGS: dict[str, type[Codebook] | type[AdditiveCodebook] | type[EntropyCodebook]] = {
    book.encoding: book for book in (Codebook, AdditiveCodebook, EntropyCodebook)
}


def check_encoding(value: object, where: str, made_by: object = None) -> None:
    """Refuse codes that are packed in a way this reader does not know.

    made_by  version of latentds that wrote them, where a manifest tells
    """
    if not isinstance(value, str) or value not in ENCODINGS:
        known = ", ".join(map(repr, ENCODINGS))
        needed = f" to {made_by:.40} or later, which made them" if isinstance(made_by, str) else ""
        raise FormatError(
            f"{where}: codes are encoded as {value!r}, this reader (latentds {__version__}) knows "
            f"{known}; upgrade latentds{needed}"
        )


def codebook_from_json(encoding: str, record: Any) -> AnyCodebook:
    """The codebook inside a contract's JSON; KeyError, TypeError or ValueError if damaged."""
    return ENCODINGS[encoding].from_json(record)


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
                 the cells. Records alone can be made of other bytes than a codebook's own, by
                 another step with the same tables
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
    from latentds.quantizers.entropy.record_encoding import least_bytes, most_bytes

    own, cells = math.prod(book.latents_shape[1:]), math.prod(latents_shape[1:])
    if latents_shape[0] != book.latents_shape[0]:
        book.codes_shape_of(latents_shape)  # says so
    wanted = record_bytes or max(1, book.record_bytes * cells // own)
    if (latents_shape, wanted) == (book.latents_shape, book.record_bytes):
        return book
    lanes, most = min(book.lanes, max(1, cells // 4)), most_bytes(latents_shape)
    roomy = dataclasses.replace(
        book, latents_shape=latents_shape, lanes=lanes, record_bytes=MAX_RECORD_BYTES
    )
    least = least_bytes(roomy)
    if not least <= wanted <= most:
        raise InputError(
            f"--bytes {wanted}: by these tables a patch of {cells:,} cells takes {least:,} to "
            f"{most:,}"
        )
    return dataclasses.replace(roomy, record_bytes=wanted)


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
            check_encoding(encoding, str(path))
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
