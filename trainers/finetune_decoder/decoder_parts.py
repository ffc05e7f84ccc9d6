"""What a decoder fine-tuning run is made of: what it reads, codebooks, the networks it trains."""
# V held-out pictures, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from latentds_trainers.engine.checkpoints import complete_checkpoints
from latentds_trainers.engine.ranks import from_first, on_all_ranks
from latentds_trainers.finetune_decoder.config import ADAM_BETAS, FinetuneConfig
from latentds_trainers.finetune_decoder.decoder_losses import PatchDiscriminator
from latentds_trainers.finetune_decoder.pairs import (
    MAX_PX,
    Pair,
    PicturePairs,
    ShardPairs,
    find_pictures,
    list_pictures,
    size_of,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.decoders import architecture_of
from latentds.autoencoders.students import build_student
from latentds.conversion.prepared import CodebookSample
from latentds.embedders import Embedder, load_embedder
from latentds.errors import InputError
from latentds.loading.decoding import find_autoencoder
from latentds.quantizers.codebooks import (
    StoredCodebook,
    load_codebook,
    load_matching,
    save_codebook,
    shipped_records,
    sized_book,
    tiny_codebook,
)
from latentds.quantizers.scalar import AnyCodebook, dequantize, quantize
from latentds.sources.originals import pixels_of
from latentds.store.reader import ShardSet

CODEBOOK_CROPS = 256
ENCODED_AT_ONCE = 4
VALIDATED = ("val", "test")  # splits taken where none is named, the first there is


def check_sizes(config: FinetuneConfig, factor: int) -> None:
    for name in ("crop_px", "validate_px"):
        edge = getattr(config, name)
        if edge is not None and (edge < factor or edge % factor):
            option = name.replace("_", "-")
            raise InputError(f"--{option} {edge}: no multiple of the autoencoder's factor {factor}")


def open_autoencoder(config: FinetuneConfig) -> NetworkAutoencoder:
    """The one of --autoencoder, else the set's own, else tiny-v1."""
    if config.autoencoder is not None or config.data is None:
        return load_autoencoder(config.autoencoder or "tiny-v1")
    found = find_autoencoder(ShardSet(config.data))
    assert isinstance(found, NetworkAutoencoder)  # what names stand for
    return found


def open_codebook(
    config: FinetuneConfig, base: NetworkAutoencoder, pairs: PicturePairs
) -> AnyCodebook:
    """The codebook that latents made on the fly are rounded with. Collective.

    Of --codebook, else what ships with the latents (tables of entropy-coded records, of a size in
    proportion to the crops), else one fitted to crops.
    """
    card = base.card
    cells = pairs.crop_px // card.factor
    shape = (card.channels, cells, cells)

    def known() -> StoredCodebook | None:
        if config.codebook is not None:
            return load_matching(config.codebook, card.latent_id, card.name)
        levels = tiny_codebook() if card.latent_id == tiny_codebook().latent_id else None
        return shipped_records(card.latent_id, shape, None) or levels

    stored = on_all_ranks(known) or fitted_codebook(config, card.latent_id, pairs)
    return on_all_ranks(lambda: sized_book(stored.codebook, shape))


def fitted_codebook(config: FinetuneConfig, latent_id: str, pairs: PicturePairs) -> StoredCodebook:
    """One fitted to crops of the training pictures by rank 0, in OUT/codebook. Collective.

    Fitted again unless there is a checkpoint to go on from: it might be of another run.
    """
    path = config.out / "codebook.safetensors"

    def fit() -> StoredCodebook:
        if path.exists() and complete_checkpoints(config.out):
            return load_codebook(path)
        sample = CodebookSample(CODEBOOK_CROPS, seed=config.seed)
        for latents, _ in pairs.sample(CODEBOOK_CROPS):
            sample.add(latents)
        codebook, fitted = sample.fit()
        made = {"origin": "fitted while fine-tuning"} | fitted
        save_codebook(StoredCodebook(codebook=codebook, latent_id=latent_id, made=made), path)
        return load_codebook(path)

    stored: StoredCodebook = from_first(fit)
    return stored


def read_validation(
    config: FinetuneConfig, base: NetworkAutoencoder, pairs: PicturePairs | ShardPairs
) -> Pair | None:
    """Held-out latents (V, C, h, w), as stored, and images (V, 3, H, W); None for none."""
    if isinstance(pairs, ShardPairs) and not config.validate_on:
        return read_split(config, pairs)
    images = read_held_out(config)
    if images is None:
        return None
    codebook = pairs.loader.contract.codebook if isinstance(pairs, ShardPairs) else pairs.codebook
    images = images.to(base.device)
    latents = torch.cat([base.encode(part) for part in torch.split(images, ENCODED_AT_ONCE)])
    if codebook is not None:
        channels, rows, columns = latents.shape[1:]
        book = sized_book(codebook, (channels, rows, columns))
        latents = dequantize(quantize(latents, book), book)
    return Pair(latents, images)


def read_held_out(config: FinetuneConfig) -> Tensor | None:
    """Centre crops (V, 3, H, W) in [0, 1] of held-out pictures, spread evenly; None for none."""
    edge, paths = config.validate_px, []
    if config.held_out is not None:
        pattern = re.compile(config.held_out)
        for folder in config.pictures:
            matching = find_pictures(folder, lambda name: bool(pattern.search(name)))
            paths += [path for path in matching if min(size_of(path)) >= edge]
        if not paths:
            raise InputError(f"--held-out {config.held_out!r} matches no picture of {edge} px")
    for folder in config.validate_on:
        paths += list_pictures(folder, edge)
    if not paths:
        return None
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, config.validate_crops).astype(int)]
    crops = [centre_crop(pixels_of(path, MAX_PX), edge) for path in dict.fromkeys(chosen)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def centre_crop(picture: np.ndarray, edge: int) -> np.ndarray:
    y, x = ((side - edge) // 2 for side in picture.shape[:2])
    return picture[y : y + edge, x : x + edge]


def read_split(config: FinetuneConfig, pairs: ShardPairs) -> Pair | None:
    """Whole patches of the split to validate on; None where there is none."""
    splits = pairs.loader.dataset.shards.manifest.splits
    others = [name for name in VALIDATED if name in splits and name != config.split]
    split = config.validate_split or next(iter(others), None)
    if split is None:
        try:
            config.refuse_unvalidated("give --validate-on, or --validate-split")
        except ValueError as error:
            raise InputError(str(error)) from error
        return None
    parts = list(pairs.spread(split, config.validate_crops))
    return Pair(
        torch.cat([part.latents for part in parts]), torch.cat([part.images for part in parts])
    )


def open_decoder(
    config: FinetuneConfig, base: NetworkAutoencoder, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to be trained, and what it is built from.

    raises  InputError where its BatchNorm does not go with the settings
    """
    network, architecture = untrained_decoder(config, base)
    if config.precision == "bf16" and any(isinstance(m, _BatchNorm) for m in network.modules()):
        raise InputError(
            "--precision bf16: the decoder has BatchNorm, whose statistics stay in float32; take "
            "--precision autocast"
        )
    if config.batch_norm == "sync":
        if device.type != "cuda":
            raise InputError("--batch-norm sync needs a GPU; take --batch-norm eval")
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        network = convert(network).train()
    return network, architecture


def untrained_decoder(
    config: FinetuneConfig, base: NetworkAutoencoder
) -> tuple[nn.Module, dict[str, Any]]:
    card = base.card
    if config.student is not None:
        student = build_student(config.student, card.channels, card.factor, config.seed)
        return student.eval(), {"class": "student", "name": config.student}
    source = copy.deepcopy(base) if config.teacher else base  # the teacher stays as it is
    # DeepSpeed sends weights as rows of bytes: no channels last.
    network = source.decoder.requires_grad_(True).to(memory_format=torch.contiguous_format)
    return network, architecture_of(source)


def trained_networks(
    config: FinetuneConfig, decoder: nn.Module
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """What the engine trains: the decoder and, where it has a weight, a discriminator."""

    def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in network.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=lr, betas=ADAM_BETAS, weight_decay=0.0)

    found = {"decoder": (decoder, adam(decoder, config.lr))}
    if config.gan_weight > 0:
        generator = torch.Generator().manual_seed(config.seed)
        network = PatchDiscriminator().initialize(generator).train()
        found["discriminator"] = (network, adam(network, config.disc_lr or config.lr))
    return found


def open_embedder(config: FinetuneConfig, device: torch.device) -> Embedder | None:
    """The embedder of the embedding loss; None where the loss has none."""
    if config.embedder is None or not config.embedding_weight:
        return None
    embedder = load_embedder(config.embedder, native=config.embedder_input == "native")
    return embedder.to(device)
