"""What imported latents mean and how they become bytes: identity, scale, patch size, codebook."""
# C latent channels, h w latent cells, M sample values

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentds.autoencoders.autoencoder import AutoencoderCard, latent_cells
from latentds.conversion.prepared import versions
from latentds.core.display import progress
from latentds.edit.latent_files import LatentFiles
from latentds.edit.layouts import ForeignPatch, ListingOptions
from latentds.errors import ContractError, InputError, ShapeError
from latentds.quantizers.codebooks import load_codebook
from latentds.quantizers.scalar import AnyCodebook, Codebook
from latentds.quantizers.scalar_fit import fit_codebook
from latentds.store.composing import SHARD_BYTES
from latentds.store.format import MAX_PATCH_BYTES, Contract

MAX_SAMPLE_VALUES = 16_000_000  # latent values held while fitting: 64 MB
MAX_NAMED, MAX_NAME = 16, 64  # arrays not taken that are named, letters of a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the files do not say themselves.

    scale, shift  a latent is stored value * scale + shift, unscaled encoder output; None: floats
                  are taken as they are, bytes are refused
    codebook      file: floats are quantized with it, bytes are its codes
    quantizer, levels, fit_patches   of the codebook fitted where none is given
    patch_px      edge of a patch in pixels; None: latent cells times the autoencoder's factor
    shape         (C, h, w) of rows that are stored flat
    order         "shuffle" by the seed, or "path"
    """

    listing: ListingOptions = dataclasses.field(default_factory=ListingOptions)
    scale: float | None = None
    shift: float | None = None
    codebook: Path | None = None
    quantizer: str = "kmeans"
    levels: int = 256
    fit_patches: int = 1000
    patch_px: int | None = None
    shape: tuple[int, int, int] | None = None
    order: Literal["shuffle", "path"] = "shuffle"
    pack_size: int = 256
    shard_bytes: int = SHARD_BYTES
    seed: int = 0


def decide(
    files: LatentFiles,
    patches: Sequence[ForeignPatch],
    card: AutoencoderCard,
    options: ImportOptions,
) -> tuple[Contract, dict[str, Any]]:
    """What the codes will mean, and how that came about."""
    codebook, origin = choose_codebook(files, patches, card, options)
    if files.dtype == "uint8":
        check_codebook(patches, codebook.codebook_id)
    try:
        is_codes = files.dtype == "uint8"
        channels, *cells = codebook.latents_shape_of(files.shape) if is_codes else files.shape
        shape = (channels, cells[0], cells[1])
        codes_shape = codebook.codes_shape_of(shape)
    except ShapeError as error:
        raise InputError(f"{patches[0].path}: {error}; pass another --codebook") from error
    contract = Contract(
        latent_id=card.latent_id,
        decoder_id=card.decoder_id,
        codebook=codebook,
        autoencoder=card.to_json(),
        patch_px=patch_size(shape, card, options.patch_px),
        codes_shape=codes_shape,
    )
    if contract.bytes_per_patch > MAX_PATCH_BYTES:
        raise InputError(f"{patches[0].path}: {files.shape} is more than a patch may have; refused")
    made = {
        "imported": {
            "layout": files.layout,
            "stored_dtype": files.dtype,
            "not_taken": [name[:MAX_NAME] for name in files.not_taken[:MAX_NAMED]],
            "other_arrays": len(files.not_taken[MAX_NAMED:]),
            "scale": files.scale,
            "shift": files.shift,
            "scale_was_given": options.scale is not None,
        },
        "options": {n: getattr(options, n) for n in ("order", "pack_size", "seed")},
        "codebook": origin,
        "versions": versions(),
        "left_out": [],
    }
    return contract, made


def check_codebook(patches: Sequence[ForeignPatch], codebook_id: str) -> None:
    """Refuse codes of another codebook, where a table tells whose they are."""
    for patch in patches:
        if patch.codebook_id not in ("", codebook_id):
            raise ContractError(
                f"{patch.path}: its codes are of the codebook {patch.codebook_id}, the import's is "
                f"{codebook_id}; pass that --codebook, or import each codebook's patches apart"
            )


def patch_size(
    shape: tuple[int, int, int], card: AutoencoderCard, edge: int | None
) -> tuple[int, int]:
    """(H, W) of the patches in pixels; InputError where the latents do not fit the autoencoder."""
    channels, *cells = shape
    if card.channels != channels:
        raise InputError(f"latents have {channels} channels, {card.name} makes {card.channels}; "
                         "another --autoencoder?")  # fmt: skip
    if edge is None:
        return cells[0] * card.factor, cells[1] * card.factor
    if latent_cells((edge, edge), card.factor) != tuple(cells):
        raise InputError(
            f"--patch-size {edge} makes latents of {latent_cells((edge, edge), card.factor)} "
            f"cells, these have {tuple(cells)}"
        )
    return edge, edge


def choose_codebook(
    files: LatentFiles,
    patches: Sequence[ForeignPatch],
    card: AutoencoderCard,
    options: ImportOptions,
) -> tuple[AnyCodebook, dict[str, Any]]:
    """The codebook given, the evenly spaced one that bytes with a scale have, or a fitted one."""
    is_scaled = options.scale is not None or options.shift is not None
    if options.codebook is not None:
        stored = load_codebook(options.codebook)
        if stored.latent_id != card.latent_id:
            raise ContractError(f"{options.codebook}: fitted to other latents; the import's are "
                                f"{card.latent_id}")  # fmt: skip
        if files.dtype == "uint8" and is_scaled:
            raise InputError("bytes are either codes of --codebook or scaled; pass one of the two")
        made = {"origin": "from a codebook file", "file": options.codebook.name, "fit": stored.made}
        return stored.codebook, made
    if files.dtype != "uint8":
        return fit_to_sample(files, patches, options)
    if len(files.shape) == 1:
        raise InputError(
            f"{patches[0].path}: rows of {files.shape[0]} bytes are records, which their codebook "
            "alone can read: pass --codebook (an export holds it as codebook-*.safetensors)"
        )
    if options.scale is None or options.shift is None or options.scale <= 0:
        raise InputError(
            f"{patches[0].path}: bytes do not say what they stand for. Pass --scale (above 0) and "
            "--shift, latent = byte * scale + shift (imagenet.int8's README: 0.0941176 and -12), "
            "or --codebook"
        )
    levels = np.arange(256, dtype=np.float64) * options.scale + options.shift
    book = Codebook(levels.astype(np.float32)[None], "affine")
    return book, {"origin": "bytes kept, evenly spaced by the scale and shift given"}


def fit_to_sample(
    files: LatentFiles, patches: Sequence[ForeignPatch], options: ImportOptions
) -> tuple[Codebook, dict[str, Any]]:
    """A codebook fitted to patches drawn from the training split, the first where there is none."""
    splits = sorted({patch.split for patch in patches})
    split = "train" if "train" in splits else splits[0]
    members = [patch for patch in patches if patch.split == split]
    rng = np.random.default_rng([options.seed, 1])
    count = min(options.fit_patches, len(members))
    drawn = np.sort(rng.choice(len(members), count, replace=False))
    channels, rows, columns = files.shape  # of floats, which are never records
    cells = min(rows * columns, max(16, MAX_SAMPLE_VALUES // (channels * count)))
    samples = np.empty((channels, count * cells), np.float32)
    for place, number in enumerate(progress(drawn, desc="codebook")):
        values = files.latents(members[number]).reshape(channels, -1)
        part = slice(place * cells, (place + 1) * cells)
        samples[:, part] = values[:, rng.permutation(rows * columns)[:cells]]
    codebook, report = fit_codebook(samples, options.quantizer, options.levels, options.seed)
    origin = "fitted to a sample of the imported latents"
    drawn_from = {"split": split, "patches": count, "seed": options.seed}
    return codebook, {"origin": origin} | drawn_from | report.to_json()
