"""Which codebook a conversion uses: an earlier run's, a file's, tiny's own, or a new fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from latentds.codebooks import StoredCodebook, load_codebook, save_codebook
from latentds.conversion.config import ConvertConfig
from latentds.conversion.decode import PatchReader
from latentds.conversion.encode import Encoder, sample_latents
from latentds.conversion.plan import Plan, check_budget
from latentds.conversion.workdir import WorkFolder
from latentds.errors import ContractError
from latentds.fit import fit_codebook

MAX_FIT_VALUES = 16_000_000  # latent values held while fitting: 64 MB


def find_codebook(
    config: ConvertConfig, plan: Plan, encoder: Encoder, reader: PatchReader, work: WorkFolder
) -> StoredCodebook:
    """The codebook of an earlier run, of --codebook, shipped with tiny, or fitted to a sample."""
    card = encoder.autoencoder.card
    if config.codebook is not None:
        stored = load_codebook(config.codebook)
    elif work.codebook.is_file():
        stored = load_codebook(work.codebook)
    elif ships_codebook(config, card.name):
        stored = shipped_codebook(card.latent_id)
    else:
        stored = fit_to_sample(config, plan, encoder, reader)
    if stored.latent_id != card.latent_id:
        raise ContractError(
            f"{config.codebook or work.codebook}: fitted to other latents than {card.name!r} "
            "makes; fit one with 'latentds fit-codebook'"
        )
    save_codebook(stored, work.codebook)
    return stored


def ships_codebook(config: ConvertConfig, name: str) -> bool:
    """Whether the embedded codebook is what the options ask for."""
    return name == "tiny-v1" and config.quantizer == "kmeans" and config.levels == 256


def shipped_codebook(latent_id: str) -> StoredCodebook:
    """The codebook that ships with tiny-v1."""
    from latentds.autoencoders.tiny import tiny_codebook

    return StoredCodebook(
        codebook=tiny_codebook(), latent_id=latent_id, made={"origin": "ships with tiny-v1"}
    )


def fit_to_sample(
    config: ConvertConfig, plan: Plan, encoder: Encoder, reader: PatchReader
) -> StoredCodebook:
    """A codebook fitted to patches drawn from the training split (the first if there is none)."""
    split = "train" if "train" in plan.splits else next(iter(plan.splits))
    start, stop = plan.splits[split]
    rng = np.random.default_rng([config.seed, 1])
    count = min(config.fit_patches, stop - start)
    rows = np.sort(rng.choice(np.arange(start, stop), count, replace=False))
    cells = max(16, MAX_FIT_VALUES // (encoder.autoencoder.card.channels * count))
    with tqdm(total=count, desc="codebook", unit="patch", delay=1) as bar:
        chunks = sample_chunks(reader, rows, encoder.batch)
        samples = sample_latents(encoder, chunks, cells, rng, bar.update)
    codebook, report = fit_codebook(samples, config.quantizer, config.levels, config.seed)
    made = {"origin": "fitted to a sample of the input", "split": split, "patches": count,
            "seed": config.seed} | report.to_json()  # fmt: skip
    return StoredCodebook(
        codebook=codebook, latent_id=encoder.autoencoder.card.latent_id, made=made
    )


def sample_chunks(reader: PatchReader, rows: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Pixels of the readable patches at `rows`, at most a batch at a time."""
    held = np.zeros((0, *reader.plan.patch_px, 3), np.uint8)
    bad = dict(reader.plan.bad)
    for chunk in reader.chunks((int(row), int(row) + 1) for row in rows):
        bad.update(chunk.bad)
        check_budget(reader.config, list(bad.items()))  # they will fail later too: say so now
        held = np.concatenate([held, chunk.pixels])
        if len(held) >= batch:
            yield held[:batch]
            held = held[batch:]
    yield held
