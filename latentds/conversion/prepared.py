"""What a conversion settles before it runs: batch, codebook, contract, and how it is recorded."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, AutoencoderCard
from latentds.conversion.conversion_plan import Plan, check_budget, input_stamp, plan_shards
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.shard_writing import Conversion, Encoder, PlanReader, device_model
from latentds.conversion.workdir import WorkFolder, by_region, stored_bytes
from latentds.core.display import progress
from latentds.core.processes import choose_device
from latentds.core.storage import check_room
from latentds.errors import ContractError, InputError, ShapeError
from latentds.quantizers.additive import MAX_PLANES
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.codebooks import (
    StoredCodebook,
    check_latents,
    load_matching,
    shipped_records,
    sized,
    tiny_codebook,
)
from latentds.quantizers.entropy.record_fit import MAX_FIT_PATCHES, fit_entropy_codebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook
from latentds.quantizers.scalar_fit import fit_codebook
from latentds.store.format import Contract, main_split

logger = logging.getLogger(__name__)
MAX_SAMPLE_VALUES = 1 << 24  # held while fitting, 64 MB: 512 patches of 32 x 32 x 32
CPU_BATCH = 16
CUDA_BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # the largest that fits is chosen


def input_identity(config: ConvertConfig, plan: Plan) -> str:
    """What tells an input from another; under a key where names are hidden by it."""
    return config.hide(plan.digest())


def prepare(
    config: ConvertConfig,
    reader: PlanReader,
    autoencoder: Autoencoder,
    work: WorkFolder,
    codebook: StoredCodebook | None = None,
) -> Conversion:
    """Batch, codebook, contract and shards; from the work folder where an earlier run left them."""
    plan, device = reader.plan, choose_device(config.device)
    asked = {
        "input": plan.digest(),
        "input_files": input_stamp(plan, config),
        "made": {"options": config.recorded()},
    }
    work.compare(asked, config.overwrite)  # before time is spent on a codebook
    earlier = work.read_plan()
    check_not_too_small(plan, autoencoder)
    batch = config.encode_batch or earlier.get("encode_batch")
    make = functools.partial(
        Encoder, autoencoder, device, steps=config.refine, dtype=config.encode_dtype
    )
    encoder = make(batch or choose_batch(make, device, plan.patch_px))
    latents_shape = encoder.check_shape(plan.patch_px)
    stored = find_codebook(config, codebook, encoder, reader, earlier)
    card = autoencoder.card
    contract = Contract(
        latent_id=card.latent_id,
        decoder_id=card.decoder_id,
        codebook=stored.codebook,
        autoencoder=card.to_json(),
        patch_px=plan.patch_px,
        codes_shape=stored.codebook.codes_shape_of(latents_shape),
    )
    made = describe(config, plan, encoder, stored)
    settled = {"encode_batch": encoder.batch, "contract": contract.to_json(), "made": made}
    wanted = len(plan.regions) * contract.bytes_per_patch
    check_room(config.out, wanted - stored_bytes(config.out))  # of a killed run, or overwritten
    work.write_plan(asked | settled, config.overwrite)
    return Conversion(
        config=config,
        plan=plan,
        encoder=encoder,
        reader=reader,
        work=work,
        contract=contract,
        shards=plan_shards(plan, config, contract.bytes_per_patch),
        made=made,
    )


def choose_batch(
    make: Callable[[int], Encoder], device: torch.device, patch_px: tuple[int, int]
) -> int:
    """Encode batch for this machine: 16 on a CPU, else the largest of 256, 128, ... that fits.

    make  an encoder of a batch
    """
    if device.type != "cuda":
        return CPU_BATCH
    for batch in CUDA_BATCHES:
        try:
            make(batch).check_shape(patch_px)
            return batch
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.info("an encode batch of %d does not fit; trying half", batch)
    raise ContractError(f"{device}: not even one patch of {patch_px} can be encoded in its memory")


def check_not_too_small(plan: Plan, autoencoder: Autoencoder) -> None:
    """Refuse patches that cannot be reflected up to the autoencoder's factor."""
    factor, (height, width) = autoencoder.card.factor, plan.patch_px
    if any(-edge % factor >= edge for edge in plan.patch_px):
        raise InputError(
            f"{plan.pictures[0].source}: patches of {width}x{height} px are too small for "
            f"{autoencoder.card.name} (factor {factor}); use --resize --patch-size {2 * factor} or "
            "more"
        )


def describe(
    config: ConvertConfig, plan: Plan, encoder: Encoder, stored: StoredCodebook
) -> dict[str, Any]:
    """How the run is made, for the manifest: nothing that names a place, a host or a person."""
    modes = Counter(header.mode for header in plan.headers if header.mode != "RGB")
    encodings = Counter(header.encoding for header in plan.headers)
    is_told = plan.notes and config.anonymize is None  # notes are sentences, which have names
    noted = {"notes": list(plan.notes)} if is_told else {}
    return {
        "options": config.recorded(),
        "input": input_identity(config, plan),
        "encode_batch": encoder.batch,
        "threads": torch.get_num_threads(),
        "device": device_model(encoder.device),
        "versions": versions(),
        "codebook": stored.made,
        "masks": any(header.mask_bytes for header in plan.headers),
        "source": {"kind": plan.source.kind, **plan.source.facts(), **noted},
        "converted_to_rgb": dict(sorted(modes.items())),
        "source_encodings": dict(sorted(encodings.items())),
        "ignored_files": plan.ignored,
    }


def versions() -> dict[str, str]:
    """Versions of what decides about bytes."""
    from latentds.version import __version__

    return {"latentds": __version__, "torch": torch.__version__, "numpy": np.__version__}


def find_codebook(
    config: ConvertConfig,
    codebook: StoredCodebook | None,
    encoder: Encoder,
    reader: PlanReader,
    earlier: dict[str, Any],
) -> StoredCodebook:
    """The one given, that of the run that is resumed, shipped with the autoencoder, or fitted.

    raises  what `choose_codes` raises
    """
    if earlier and codebook is None and config.codebook_file is None:
        contract = Contract.from_json(earlier["contract"], "plan.json")
        return StoredCodebook(
            codebook=contract.codebook,
            latent_id=contract.latent_id,
            made=earlier["made"]["codebook"],
        )
    shape = encoder.check_shape(reader.plan.patch_px)
    there, kind, size = choose_codes(config, encoder.autoencoder.card, shape, codebook)
    return there or fit_to_sample(config, encoder, reader, kind, size)


def choose_codes(
    config: ConvertConfig,
    card: AutoencoderCard,
    shape: tuple[int, int, int],
    codebook: StoredCodebook | None = None,
) -> tuple[StoredCodebook | None, str, int]:
    """The codebook given or shipped, None for one to be fitted; kind and bytes of a patch's codes.

    codebook  an object that the caller gave
    raises    ContractError for a file fitted to other latents, InputError for bytes that the
              latents or the codebook cannot have, with those that they can
    """
    kind, size = config.codebook_kind, config.bytes
    is_usual = config.quantizer == "kmeans" and config.levels == 256
    there = given_codebook(config, codebook, card, shape)
    if there is None and (kind == "rans" or (kind is None and is_usual)):
        there = shipped_records(card.latent_id, shape, size)
    kind = kind or ("scalar" if size is None else "additive")
    is_tiny = tiny_codebook().latent_id == card.latent_id
    if there is None and kind == "scalar" and is_usual and is_tiny:
        there = tiny_codebook()
    if there is not None:
        return there, kind, math.prod(there.codebook.codes_shape_of(shape))
    if kind == "scalar":
        return None, kind, math.prod(shape)
    if size is None:
        raise InputError(f"--codebook {kind} needs --bytes, how many a patch is to take")
    if kind == "additive":
        planes_of(size, shape[0], shape[1] * shape[2])
    return None, kind, size


def given_codebook(
    config: ConvertConfig,
    codebook: StoredCodebook | None,
    card: AutoencoderCard,
    shape: tuple[int, int, int] | None = None,
) -> StoredCodebook | None:
    """The caller's own codebook, or that of --codebook FILE; None where there is none.

    shape   of the latents; where it is known the codebook is made to fit them and --bytes
    raises  ContractError for one fitted to other latents, InputError for two, or where it cannot
            fit
    """
    where = str(config.codebook_file or "codebook")
    if codebook is not None and config.codebook is not None:
        raise InputError(f"a codebook, and --codebook {config.codebook}; give one of them")
    if codebook is not None:
        check_latents(codebook, card.latent_id, card.name, where)
    elif config.codebook_file is not None:
        codebook = load_matching(config.codebook_file, card.latent_id, card.name)
    else:
        return None
    return codebook if shape is None else fitting(codebook, where, shape, config.bytes)


def fitting(
    stored: StoredCodebook, path: Path | str, shape: tuple[int, int, int], patch_bytes: int | None
) -> StoredCodebook:
    """The codebook of a file for these latents and --bytes; errors name the file or object."""
    try:
        return sized(stored, shape, patch_bytes)
    except (ShapeError, InputError) as error:
        raise InputError(f"{path}: {error}") from error


def fit_to_sample(
    config: ConvertConfig,
    encoder: Encoder,
    reader: PlanReader,
    kind: str = "scalar",
    patch_bytes: int = 0,
) -> StoredCodebook:
    """A codebook fitted to patches drawn from the training split, the first where there is none.

    kind         scalar, additive or rans; the last two take `patch_bytes` a patch
    raises       InputError for bytes that these latents cannot be coded in, with those that they
                 can
    """
    channels, height, width = encoder.check_shape(reader.plan.patch_px)
    size = planes_of(patch_bytes, channels, height * width) if kind == "additive" else patch_bytes
    splits = {name: range(*rows) for name, rows in reader.plan.splits.items()}
    rows, drawn = draw_rows(splits, config.fit_patches, config.seed, shuffled=kind == "rans")
    sample, bad = CodebookSample(len(rows), kind, config.seed), by_region(reader.plan.bad)
    groups = [rows[start : start + encoder.batch] for start in range(0, len(rows), encoder.batch)]
    for chunk in reader.chunks(progress(groups, desc="codebook", unit="batch")):
        bad.update(chunk.bad)
        check_budget(config, bad.values())  # they will fail later too: say so now
        if len(chunk.pixels) and not sample.add(encoder.latents(chunk.pixels)):
            break
    codebook, fitted = sample.fit(size, config.quantizer, config.levels)
    made = {"origin": "fitted to a sample of the input"} | drawn | fitted
    latent_id = encoder.autoencoder.card.latent_id
    return StoredCodebook(codebook=codebook, latent_id=latent_id, made=made)


def planes_of(patch_bytes: int, channels: int, cells: int) -> int:
    """Code planes that take so many bytes a patch; InputError that says what is possible."""
    most = min(MAX_PLANES, channels)  # a byte a value is what scalar codes take, without any search
    planes, rest = divmod(patch_bytes, cells)
    if rest == 0 and 1 <= planes <= most:
        return planes
    possible = ", ".join(f"{n * cells:,}" for n in range(1, min(most, 4)))
    between = ", ..." if most > 4 else ""
    possible = f"{possible}{between} or {most * cells:,}" if possible else f"{cells:,} alone"
    raise InputError(
        f"--bytes {patch_bytes}: additive codes of latents of {channels} channels x "
        f"{cells:,} cells take {possible}, a byte a cell and plane, at most one a value; "
        "entropy-coded records, --codebook rans, are not bound to cells"
    )


def draw_rows(
    splits: Mapping[str, Sequence[int]], count: int, seed: int, *, shuffled: bool, stream: int = 1
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of patches of the training split, the first where there is none, and how they came.

    splits    rows of the patches of every split
    shuffled  in random order, as records need them, whose fit may take the first of them alone;
              else they ascend
    stream    of the seed's random numbers
    """
    split = main_split(splits)
    rows, rng = splits[split], np.random.default_rng([seed, stream])
    places = rng.choice(len(rows), min(count, len(rows)), replace=False)
    drawn = np.array([rows[place] for place in np.sort(places).tolist()])
    return rng.permutation(drawn) if shuffled else drawn, {"split": split, "seed": seed}


class CodebookSample:
    """Latents of patches that a codebook is fitted to.

    Of more than 16 million values some are left out: cells of every patch, or patches of records.

    count  patches there will be, at most
    kind   of the codes: scalar, additive or rans
    """

    def __init__(self, count: int, kind: str = "scalar", seed: int = 0) -> None:
        self.count, self.kind, self.seed = count, kind, seed
        self.rng = np.random.default_rng([seed, 3])
        self.held: list[Tensor] = []

    def add(self, latents: Tensor) -> bool:
        """Hold latents float32 (N, C, h, w); False once no more will be used."""
        patches = latents.cpu()
        if self.kind == "rans":
            most = min(MAX_FIT_PATCHES, max(1, MAX_SAMPLE_VALUES // patches[0].numel()))
            self.held = [*self.held, *patches][:most]
            return len(self.held) < most
        most = max(16, MAX_SAMPLE_VALUES // (patches.shape[1] * self.count))  # cells of a patch
        for values in patches.flatten(2):
            cells = values.shape[1]
            chosen = self.rng.choice(cells, most, replace=False) if most < cells else slice(None)
            self.held.append(values[:, chosen])
        return True

    def fit(
        self,
        size: int = 0,
        quantizer: str = "kmeans",
        levels: int = MAX_LEVELS,
        gains: np.ndarray | None = None,
    ) -> tuple[AnyCodebook, dict[str, Any]]:
        """The codebook, how many patches it was fitted to, and what it does to them.

        size    planes of additive codes, bytes of a record
        gains   of records, see `fit_entropy_codebook`
        raises  InputError for no patch, and for bytes that records of these latents cannot have
        """
        if not self.held:
            raise InputError("none of the patches drawn for the codebook can be read")
        made: dict[str, Any] = {"patches": len(self.held)}
        if self.kind == "rans":
            try:
                records, fitted = fit_entropy_codebook(torch.stack(self.held), size, gains=gains)
            except ValueError as error:
                raise InputError(f"--bytes {size}: {error}") from error
            return records, made | {"record_fit": fitted.to_json()}
        samples = torch.cat(self.held, 1).numpy()
        if self.kind == "additive":
            vectors, of_vectors = fit_additive(samples.T, size, levels=levels, seed=self.seed)
            return vectors, made | of_vectors.to_json()
        codebook, of_levels = fit_codebook(samples, quantizer, levels, self.seed)
        return codebook, made | of_levels.to_json()
