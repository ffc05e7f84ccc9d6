"""Embedders that are backbones trained on latents: images are encoded first, nothing is decoded.

`latent-dir:FOLDER[@AUTOENCODER]`, FOLDER as `pretrain --input latents` leaves its backbone.
"""
# B batch, D embedding dimensions, C latent channels, H W pixels, h w latent cells

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder, hash_tensors, short
from latentds.autoencoders.foreign_networks import check_hash
from latentds.autoencoders.tiny import load_tiny
from latentds.embedders.backbone_record import (
    CODEBOOK,
    RECORD,
    WEIGHTS,
    BackboneRecord,
    read_record,
)
from latentds.embedders.embedder import EmbedderCard, NetworkEmbedder, Preparation
from latentds.embedders.exported import LATENT_PREFIX as PREFIX
from latentds.embedders.exported import create_foreign
from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.embedders.weights import fill, read_weights
from latentds.errors import ContractError, ShapeError, WeightsError
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, sized_book, tiny_codebook
from latentds.quantizers.scalar import AnyCodebook, dequantize, quantize


class LatentInput(nn.Module):
    """Normalized latents (B, C, h, w) of images (B, 3, H, W) in [0, 1], not resized or cropped.

    As a data set would give them: encoded, quantized where there is a codebook, normalized.
    """

    def __init__(
        self,
        card: EmbedderCard,
        stem: LatentStemConfig,
        autoencoder: Autoencoder,
        codebook: AnyCodebook | None,
    ) -> None:
        super().__init__()
        self.check = Preparation(card)
        self.stem, self.autoencoder, self.codebook = stem, autoencoder, codebook

    def forward(self, images: Tensor) -> Tensor:
        latents = self.autoencoder.encode(self.check(images)).float()
        if self.codebook is not None:
            channels, rows, columns = latents.shape[1:]
            book = sized_book(self.codebook, (channels, rows, columns))
            latents = dequantize(quantize(latents, book), book)
        return self.stem.normalize(latents)


class LatentBackbone(NetworkEmbedder):
    """A backbone that reads latents, as an embedder of images, or of latents that are there.

    stem         what it knows of its latents
    autoencoder  whose encoder images go through
    codebook     that latents are rounded to, as a data set's are; None to leave them
    """

    def __init__(
        self,
        card: EmbedderCard,
        network: nn.Module,
        stem: LatentStemConfig,
        autoencoder: Autoencoder,
        codebook: AnyCodebook | None = None,
    ) -> None:
        self.stem, self.autoencoder = stem, autoencoder
        prepare = LatentInput(card, stem, autoencoder, codebook)
        super().__init__(card, network, prepare)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Embeddings float32 (B, D) of latents float (B, C, h, w), normalized as the stem says.

        raises  ShapeError for latents of another number of channels
        """
        if latents.ndim != 4 or latents.shape[1] != self.stem.channels:
            raise ShapeError(
                f"{self.card.name}: latents of shape {tuple(latents.shape)}; "
                f"(B, {self.stem.channels}, h, w) are wanted"
            )
        embeddings: Tensor = self.network(latents.to(self.device, self.dtype))
        return embeddings.float()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentBackbone:
        """Self, its weights moved; images are encoded in float32 whatever the dtype."""
        super().to(device, dtype)
        self.autoencoder.to(self.device)
        return self


def load_latent_backbone(text: str, autoencoder: Autoencoder | None = None) -> LatentBackbone:
    """The embedder of `latent-dir:FOLDER[@AUTOENCODER]`.

    AUTOENCODER  name or path of what images are encoded with; `tiny` needs not be named
    autoencoder  an object instead
    raises       WeightsError for a folder without such a backbone, or whose autoencoder is not
                 told; ContractError for another autoencoder than its latents are of
    """
    folder, name = parted(text.removeprefix(PREFIX))
    record = read_latent_record(folder)
    stem = LatentStemConfig.from_json(record.stem, str(folder))
    encoder = autoencoder or find_encoder(folder, stem, name)
    if stem.latent_id and encoder.card.latent_id != stem.latent_id:
        raise ContractError(
            f"{folder}: reads latents of latent_id {short(stem.latent_id)}, autoencoder "
            f"{encoder.card.name!r} makes {short(encoder.card.latent_id)}; pass the one that the "
            "training set was made with"
        )
    if record.model_args is None:
        network: Any = build_vit(record.arch, stem=stem, img_px=record.input_px)
    else:
        network = create_foreign(folder / RECORD, record.arch, record.model_args)
    fill(network, read_weights(folder / WEIGHTS), folder / WEIGHTS, record.arch)
    found = hash_tensors(network.state_dict(), {})
    check_hash(folder / WEIGHTS, found, folder / RECORD, record.weights_id)
    stored = find_codebook(folder, encoder)
    card = make_card(f"{PREFIX}{folder}", record, network, stem, encoder, stored)
    return LatentBackbone(card, network, stem, encoder, stored.codebook if stored else None)


def parted(text: str) -> tuple[Path, str]:
    """Folder and autoencoder of FOLDER[@AUTOENCODER]: the longest that is a folder, then a name."""
    places = [place for place, letter in enumerate(text) if letter == "@"]
    for place in (len(text), *reversed(places)):
        if Path(text[:place]).is_dir():
            return Path(text[:place]), text[place + 1 :]
    head, _, name = text.partition("@")
    return Path(head), name


def read_latent_record(folder: Path) -> BackboneRecord:
    """The record of a backbone that reads latents; WeightsError where there is none."""
    try:
        record = read_record(folder)
    except OSError as error:
        raise WeightsError(
            f"{folder}: no backbone there ({error.strerror}); give the folder 'backbone' of a "
            "pretraining with --input latents"
        ) from error
    if record.stem is None:
        raise WeightsError(f"{folder}: this backbone reads pictures; pass 'timm-dir:{folder}'")
    return record


def find_encoder(folder: Path, stem: LatentStemConfig, name: str) -> Autoencoder:
    """The autoencoder of that name; without one `tiny`, where the latents are its."""
    if name:
        return load_autoencoder(name)
    tiny = load_tiny()
    if tiny.card.latent_id != stem.latent_id:
        raise WeightsError(
            f"{folder}: images have to be encoded for it; name the autoencoder that its training "
            f"set was made with: '{PREFIX}{folder}@AUTOENCODER'"
        )
    return tiny


def find_codebook(folder: Path, encoder: Autoencoder) -> StoredCodebook | None:
    """The codebook in the folder, or tiny's own; None where there is neither."""
    stored = None
    if (folder / CODEBOOK).is_file():
        stored = load_codebook(folder / CODEBOOK)
    elif tiny_codebook().latent_id == encoder.card.latent_id:
        stored = tiny_codebook()
    if stored is not None and stored.latent_id != encoder.card.latent_id:
        raise ContractError(
            f"{folder / CODEBOOK}: fitted to other latents than {encoder.card.name!r} makes; "
            "take it away, or export the backbone anew"
        )
    return stored


def make_card(
    name: str,
    record: BackboneRecord,
    network: Any,
    stem: LatentStemConfig,
    encoder: Autoencoder,
    stored: StoredCodebook | None,
) -> EmbedderCard:
    """The card; its identity is of the network, of the encoder before it, and of the codebook."""
    book = stored.codebook.codebook_id if stored else ""
    rounding = "quantized, " if stored else ""
    return EmbedderCard(
        name=name,
        class_name=record.arch,
        dim=record.dim,
        rule=f"whole images, encoded by {encoder.card.name}, {rounding}each channel normalized",
        resize_px=None,
        input_px=None,
        multiple_px=int(network.patch_embed.patch_size[0]) * stem.factor,  # a token, or a cell
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        file=WEIGHTS,
        weights_id=hash_tensors(
            network.state_dict(), {"latent_id": encoder.card.latent_id, "codebook_id": book}
        ),
    )
