"""Import latents that others made: their scale recorded, quantized, written as a data set."""
# N patches, C latent channels, h w latent cells

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder, AutoencoderCard, latent_cells
from latentds.conversion.prepared import CodebookSample, draw_rows, versions
from latentds.core.display import progress
from latentds.core.storage import write_atomically
from latentds.edit.layouts import ForeignPatch, ImportOptions, LatentFiles, list_latents
from latentds.edit.outputs import check_new, new_data_set
from latentds.edit.recoding import Distortion
from latentds.errors import ContractError, InputError, ShapeError
from latentds.quantizers.codebooks import load_matching
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, Codebook, dequantize, quantize
from latentds.store.composing import Composer, Part, complete
from latentds.store.format import GOLDEN, MAX_PATCH_BYTES, SPLIT_PATTERN, Contract, patch_key
from latentds.store.golden import choose_rows, decode_pixels, encode_golden, latents_pixels
from latentds.store.manifest import Manifest
from latentds.store.packs import SCHEMA

logger = logging.getLogger(__name__)
MAX_NAMED, MAX_NAME = 16, 64  # arrays not taken that are named, letters of a name


def import_latents(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    autoencoder: Autoencoder | str | os.PathLike[str],
    options: ImportOptions | None = None,
    overwrite: bool = False,
) -> Manifest:
    """A data set of the latents in `source`.

    autoencoder  whose they are, to be loaded: its weights tell what latents mean, and its decoder
                 makes the golden patches
    raises       InputError for files that are not what their layout says, that differ in shape or
                 hold NaN, or whose meaning is not told; ContractError for an autoencoder or
                 codebook of other latents
    """
    source, out, options = Path(source), Path(out), options or ImportOptions()
    check_new(out, overwrite, [source])
    if isinstance(autoencoder, (str, os.PathLike)):
        autoencoder = load_autoencoder(autoencoder)
    layout, patches = list_latents(source, options)
    logger.info("%s: %d patches, read as layout %r", source, len(patches), layout)
    check_patches(patches)
    base = source.parent if source.is_file() else source
    with LatentFiles(base, layout, patches[0], options) as files:
        contract, made = decide(files, patches, autoencoder.card, options)
        with new_data_set(out, overwrite, [source]):
            composer, ordered = Composer(out, contract), arrange(patches, options)
            loss = write_shards(composer, files, ordered, options)
            manifest = composer.tables(made | {"quantization": loss.to_json()})
            rows = [patch for chosen in ordered.values() for patch in chosen]
            golden = make_golden(files, rows, contract, autoencoder, options.seed)
            write_atomically(out / GOLDEN, golden)
            return complete(out, manifest)


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
        stored = load_matching(options.codebook, card.latent_id, card.name)
        if files.dtype == "uint8" and is_scaled:
            raise InputError("bytes are either codes of --codebook or scaled; pass one of the two")
        return stored.codebook, stored.made
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
) -> tuple[AnyCodebook, dict[str, Any]]:
    """A codebook fitted to patches drawn from the training split, the first where there is none."""
    splits: dict[str, list[int]] = {split: [] for split in sorted({p.split for p in patches})}
    for row, patch in enumerate(patches):
        splits[patch.split].append(row)
    rows, drawn = draw_rows(splits, options.fit_patches, options.seed, shuffled=False)
    sample = CodebookSample(len(rows), seed=options.seed)
    for row in progress(rows, desc="codebook"):
        sample.add(torch.from_numpy(files.latents(patches[row]))[None])
    codebook, fitted = sample.fit(quantizer=options.quantizer, levels=options.levels)
    return codebook, {"origin": "fitted to a sample of the imported latents"} | drawn | fitted


def write_shards(
    composer: Composer,
    files: LatentFiles,
    ordered: dict[str, list[ForeignPatch]],
    options: ImportOptions,
) -> Distortion:
    """Write the shards of every split; returns what quantizing did."""
    loss, contract = Distortion(), composer.contract
    total = sum(len(patches) for patches in ordered.values())
    with progress(total=total, desc="patches", unit="patch") as bar:
        for split, patches in ordered.items():
            packs = read_packs(files, patches, contract, options.pack_size, loss, bar)
            composer.add_packs(split, contract, packs, options.shard_bytes)
    return loss


def check_patches(patches: Sequence[ForeignPatch]) -> None:
    """Refuse two patches of one key, and splits that no shard can be named after."""
    first: dict[str, ForeignPatch] = {}
    for patch in patches:
        key = patch_key(patch.source, patch.x, patch.y)
        other = first.setdefault(key, patch)
        if other is not patch:
            raise InputError(f"{other.path} and {patch.path} have one key, {key!r}; rename one")
        if not SPLIT_PATTERN.fullmatch(patch.split):
            raise InputError(f"{patch.path}: split {patch.split!r}; a split is a-z, 0-9 and _")


def arrange(
    patches: Sequence[ForeignPatch], options: ImportOptions
) -> dict[str, list[ForeignPatch]]:
    """The patches of every split, sorted, in their order on disk."""
    rng = np.random.default_rng([options.seed, 0])
    ordered = {}
    for split in sorted({patch.split for patch in patches}):
        chosen = [patch for patch in patches if patch.split == split]
        if options.order == "shuffle":
            chosen = [chosen[place] for place in rng.permutation(len(chosen))]
        ordered[split] = chosen
    return ordered


def read_packs(
    files: LatentFiles,
    patches: Sequence[ForeignPatch],
    contract: Contract,
    pack_size: int,
    loss: Distortion,
    bar: tqdm[Any],
) -> Iterator[Part]:
    for start in range(0, len(patches), pack_size):
        part = patches[start : start + pack_size]
        codes = np.stack([read_codes(files, patch, contract, loss) for patch in part])
        if files.dtype == "uint8":
            check_intact(codes, part, contract.codebook)
        names = ("label", "slide", "x", "y", "mpp", "size_px", "source")
        columns: dict[str, Any] = {n: [getattr(patch, n) for patch in part] for n in names}
        columns["source_encoding"] = [p.source_encoding or files.encoding(p) for p in part]
        yield codes, pa.table(columns, schema=SCHEMA)
        bar.update(len(part))


def check_intact(codes: np.ndarray, patches: Sequence[ForeignPatch], codebook: AnyCodebook) -> None:
    """Refuse records that are not what their codebook's encoder writes: files have no checksum."""
    if not isinstance(codebook, EntropyCodebook):
        return
    intact = codebook.integers(torch.from_numpy(codes)).intact
    if not bool(intact.all()):
        patch = patches[int((~intact).nonzero()[0, 0])]
        raise InputError(
            f"{patch.path}: a damaged record, or one of other tables than {codebook.codebook_id}; "
            "export it anew"
        )


def read_codes(
    files: LatentFiles, patch: ForeignPatch, contract: Contract, loss: Distortion
) -> np.ndarray:
    """Codes uint8 of a patch: its bytes where they are codes, else its nearest levels."""
    if files.dtype == "uint8":
        codes = files.stored(patch)
        if (fault := contract.codebook.find_fault(codes[None])) is not None:
            raise InputError(f"{patch.path}: {fault}")
        return codes
    latents = files.latents(patch)
    found = quantize(torch.from_numpy(latents)[None], contract.codebook)
    loss.add(latents, dequantize(found, contract.codebook)[0].numpy())
    nearest: np.ndarray = found[0].numpy()
    return nearest


def make_golden(
    files: LatentFiles,
    patches: Sequence[ForeignPatch],
    contract: Contract,
    autoencoder: Autoencoder,
    seed: int,
) -> bytes:
    """The golden file; what a thumbnail shows is decoded from the latents before they were bytes.

    Nobody has the pictures.
    """
    rows = choose_rows(len(patches), seed)
    chosen = [patches[row] for row in rows]
    codes = np.stack([read_codes(files, patch, contract, Distortion()) for patch in chosen])
    decoded = decode_pixels(codes, [contract.codebook], autoencoder, contract.patch_px)
    if files.dtype == "uint8":
        return encode_golden(rows, codes, list(decoded), decoded)
    latents = [torch.from_numpy(files.latents(patch))[None] for patch in chosen]
    pictures = [latents_pixels(x, autoencoder, contract.patch_px) for x in latents]
    return encode_golden(rows, codes, pictures, decoded)
