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
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.display import progress
from latentds.core.storage import write_atomically
from latentds.edit.contract import ImportOptions, decide
from latentds.edit.latent_files import LatentFiles
from latentds.edit.layouts import ForeignPatch, list_latents
from latentds.edit.outputs import check_new, new_data_set
from latentds.edit.recoding import Distortion
from latentds.errors import InputError
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, dequantize, quantize
from latentds.store.composing import Composer, Part, complete
from latentds.store.format import GOLDEN, SPLIT_PATTERN, Contract, patch_key
from latentds.store.golden import choose_rows, decode_pixels, encode_golden, latents_pixels
from latentds.store.manifest import Manifest
from latentds.store.packs import SCHEMA

logger = logging.getLogger(__name__)


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
    layout, patches = list_latents(source, options.listing)
    logger.info("%s: %d patches, read as layout %r", source, len(patches), layout)
    check_patches(patches)
    base = source.parent if source.is_file() else source
    scaling = (options.scale, options.shift)
    with LatentFiles(base, layout, patches[0], scaling, options.shape) as files:
        contract, made = decide(files, patches, autoencoder.card, options)
        with new_data_set(out, overwrite, [source]):
            composer, ordered = Composer(out, contract), arrange(patches, options)
            loss = write_shards(composer, files, ordered, options)
            manifest = composer.tables(made | {"quantization": loss.to_json()})
            rows = [patch for chosen in ordered.values() for patch in chosen]
            golden = make_golden(files, rows, contract, autoencoder, options.seed)
            write_atomically(out / GOLDEN, golden)
            return complete(out, manifest)


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
