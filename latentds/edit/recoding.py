"""Other codes for the patches of a set, made of its stored latents: no picture is needed."""
# N patches, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.prepared import CodebookSample, draw_rows, fitting, planes_of
from latentds.core.storage import take_paths
from latentds.errors import ContractError, FormatError, InputError
from latentds.loading.decoding import find_autoencoder
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, shipped_records
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, dequantize_each
from latentds.store.composing import Part
from latentds.store.golden import decode_pixels, encode_golden, no_golden, read_golden
from latentds.store.reader import ShardSet

FIT_PATCHES = 1000
BLOCK_PATCHES = 256
Encoding = Literal["u8-sum", "rans"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recoding:
    """What patches are to be coded as.

    encoding     of the new codes; None takes that of `codebook`
    patch_bytes  of the new codes; None where `codebook` tells
    codebook     file; else records take the tables that ship with these latents, and what does not
                 ship is fitted to a sample of the set's own
    autoencoder  whose decoder makes the golden patches, None for the recorded one
    """

    encoding: Encoding | None = None
    patch_bytes: int | None = None
    codebook: Path | None = None
    autoencoder: Autoencoder | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        take_paths(self)
        if self.codebook is None and (self.encoding is None or self.patch_bytes is None):
            lacking = ["--encoding, rans or u8-sum"] if self.encoding is None else []
            lacking += ["--bytes, how many a patch is to take"] if self.patch_bytes is None else []
            raise InputError(f"other codes need {' and '.join(lacking)}, or a --codebook")


class Recoder:
    """Codes of a set's patches made anew, and what that loses.

    stored    the new codebook
    contract  of the new codes
    decoder   what golden patches are decoded with
    loss      what the new codes lose of the stored latents, over all patches coded so far
    """

    def __init__(self, shards: ShardSet, recoding: Recoding, seed: int) -> None:
        self.shards, self.loss = shards, Distortion()
        self.decoder = golden_decoder(shards, recoding)  # first: a codebook may take long to fit
        self.stored = choose_codebook(shards, recoding, seed)
        before, book = shards.manifest.contract, self.stored.codebook
        codes_shape = book.codes_shape_of(before.latents_shape)
        self.contract = dataclasses.replace(before, codebook=book, codes_shape=codes_shape)

    def recoded(self, packs: Iterator[Part], before: AnyCodebook) -> Iterator[Part]:
        for codes, columns in packs:
            blocks = np.split(codes, np.arange(BLOCK_PATCHES, len(codes), BLOCK_PATCHES))
            yield np.concatenate([self.recode(block, before) for block in blocks]), columns

    def recode(self, codes: np.ndarray, before: AnyCodebook) -> np.ndarray:
        """New codes uint8 (N, *codes_shape) of codes of the codebook `before`."""
        book = self.stored.codebook
        if (fault := before.find_fault(codes)) is not None:
            raise FormatError(f"{self.shards.folder}: {fault}; damaged, fetch it anew")
        latents = before.dequantize(torch.from_numpy(codes))
        found = book.quantize(latents)
        self.loss.add(latents.numpy(), book.dequantize(found).numpy())
        recoded: np.ndarray = found.numpy()
        return recoded

    def golden(self, order: np.ndarray) -> bytes:
        """The golden file: the old one's patches that are still there, as the new codes decode.

        order  old rows in the order in which they now stand
        """
        manifest, book = self.shards.manifest, self.stored.codebook
        golden = read_golden(
            Path(self.shards.folder), manifest.contract, manifest.patches, manifest.golden_sha256
        )
        places = [np.flatnonzero(order == row) for row in golden.rows.tolist()]
        kept = sorted((int(place[0]), n) for n, place in enumerate(places) if len(place))
        if not kept:
            return no_golden()
        numbers = [number for _, number in kept]
        latents = latents_of(self.shards, golden.codes[numbers], golden.rows[numbers])
        codes = book.quantize(latents).numpy()
        decoded = decode_pixels(codes, [book], self.decoder, manifest.contract.patch_px)
        thumbnails = [golden.thumbnails[number] for number in numbers]
        return encode_golden(np.array([new for new, _ in kept]), codes, thumbnails, decoded)

    def recorded(self) -> dict[str, Any]:
        """For the manifest: from what to what, and what it lost."""
        ends = {"from": self.shards.manifest.contract, "to": self.contract}
        told = {
            name: {"encoding": contract.encoding, "bytes": contract.bytes_per_patch}
            for name, contract in ends.items()
        }
        return told | {"lost": self.loss.to_json()}


def choose_codebook(shards: ShardSet, recoding: Recoding, seed: int) -> StoredCodebook:
    """The codebook of the new codes: of a file, shipped, or fitted to the set's own latents.

    raises  ContractError for a file fitted to other latents, InputError for codes that cannot be
            made of the set's, with those that can
    """
    contract = shards.manifest.contract
    shape, wanted = contract.latents_shape, recoding.patch_bytes
    if recoding.codebook is not None:
        stored = codebook_of_file(recoding, contract.latent_id, shape)
    else:
        assert recoding.encoding is not None and wanted is not None  # or a codebook was given
        check_fewer(shards, recoding.encoding, wanted)
        shipped = None
        if recoding.encoding == "rans":
            shipped = shipped_records(contract.latent_id, shape, wanted)
        stored = shipped or fit_codebook(shards, recoding.encoding, wanted, seed)
    taken = math.prod(stored.codebook.codes_shape_of(shape))
    check_fewer(shards, stored.codebook.encoding, taken)
    return stored


def codebook_of_file(
    recoding: Recoding, latent_id: str, shape: tuple[int, int, int]
) -> StoredCodebook:
    path = recoding.codebook
    assert path is not None
    stored = load_codebook(path)
    found = stored.codebook.encoding
    if stored.latent_id != latent_id:
        raise ContractError(
            f"{path}: fitted to latents {stored.latent_id}, the set's are {latent_id}; leave "
            "--codebook to fit one to the set's own"
        )
    if found not in ("u8-sum", "rans") or recoding.encoding not in (None, found):
        wanted = recoding.encoding or "u8-sum or rans"
        raise InputError(f"{path}: its codes are encoded as {found!r}, wanted are {wanted}; give "
                         "another --codebook, or leave it")  # fmt: skip
    return fitting(stored, path, shape, recoding.patch_bytes)


def check_fewer(shards: ShardSet, encoding: str, patch_bytes: int) -> None:
    """Refuse codes of the set's own kind that do not take fewer bytes.

    Of another kind they may take more, so that sets of two kinds can be brought together.
    """
    contract = shards.manifest.contract
    stored = contract.bytes_per_patch
    if patch_bytes < stored or contract.encoding != encoding:
        return
    raise InputError(
        f"{shards.folder}: codes of {stored:,} bytes a patch ({contract.encoding}) do not get "
        f"better by {patch_bytes:,} bytes of {encoding}: what they lost is lost; give fewer --bytes"
    )


def fit_codebook(
    shards: ShardSet, encoding: Encoding, patch_bytes: int, seed: int
) -> StoredCodebook:
    """A codebook fitted to patches of the training split, or of the first where there is none."""
    contract, splits = shards.manifest.contract, shards.manifest.splits
    channels, height, width = contract.latents_shape
    kind, size = "rans", patch_bytes
    if encoding == "u8-sum":
        kind, size = "additive", planes_of(patch_bytes, channels, height * width)
    ranges = {split: range(*shards.patch_range(split)) for split in splits}
    rows, drawn = draw_rows(ranges, FIT_PATCHES, seed, shuffled=True, stream=4)
    sample, own = CodebookSample(len(rows), kind, seed), contract.codebook
    for part in np.split(rows, np.arange(BLOCK_PATCHES, len(rows), BLOCK_PATCHES)):
        if not sample.add(latents_of(shards, shards.read_codes(part), part)):
            break
    gains = own.gains if isinstance(own, EntropyCodebook) else None
    codebook, fitted = sample.fit(size, gains=gains)
    origin = "fitted to a sample of the latents that the set had before"
    made = {"origin": origin} | drawn | fitted
    return StoredCodebook(codebook=codebook, latent_id=contract.latent_id, made=made)


def latents_of(shards: ShardSet, codes: np.ndarray, rows: np.ndarray) -> Tensor:
    """Latents float32 (N, C, h, w) of codes at these rows, each by its own codebook."""
    books, numbers = shards.manifest.codebooks, shards.codebook_numbers(rows)
    return dequantize_each(torch.from_numpy(codes), numbers, books)


def golden_decoder(shards: ShardSet, recoding: Recoding) -> Autoencoder:
    """The recorded decoder, for the golden patches; ContractError for another."""
    found = find_autoencoder(shards, recoding.autoencoder)
    decoder_id = shards.manifest.contract.decoder_id
    if found.card.decoder_id != decoder_id:
        raise ContractError(
            f"{shards.folder}: records the decoder {decoder_id}, that of {found.card.name!r} is "
            f"{found.card.decoder_id}; golden patches need the recorded one"
        )
    return found


class Distortion:
    """What coding does to latents: sums for their variance and mean squared error."""

    def __init__(self) -> None:
        self.values, self.sums = 0, np.zeros(3)  # of values, their squares, squared errors

    def add(self, latents: np.ndarray, stored: np.ndarray) -> None:
        """Count latents, and those that the codes stand for, of one shape."""
        exact = latents.astype(np.float64)
        self.values += exact.size
        self.sums += exact.sum(), np.square(exact).sum(), np.square(exact - stored).sum()

    def to_json(self) -> dict[str, Any]:
        """Plain values; no SNR where nothing was lost."""
        if not self.values:
            return {"mse": 0.0, "snr_db": None}
        mean, square, mse = (self.sums / self.values).tolist()
        variance = square - mean * mean
        snr_db = 10 * float(np.log10(variance / mse)) if mse > 0 and variance > 0 else None
        return {"mse": float(f"{mse:.4g}"), "snr_db": None if snr_db is None else round(snr_db, 2)}
