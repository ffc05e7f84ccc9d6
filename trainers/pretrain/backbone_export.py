"""The backbone that a pretraining leaves: OUT/backbone, a model of timm with a card.

timm.create_model("local-dir:OUT/backbone", pretrained=True)
latentds features SET --embedder timm-dir:OUT/backbone --out FEATURES
latentds publish-model OUT/backbone ORG/NAME --license ID
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentds_trainers.engine.checkpoints import package_versions
from torch import nn

from latentds.embedders.backbone_record import CODEBOOK
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.models.backbone_folder import write_backbone
from latentds.quantizers.codebook_files import StoredCodebook, save_codebook

FOLDER = "backbone"


def export_backbone(
    folder: Path,
    backbone: nn.Module,
    *,
    arch: str,
    record: Mapping[str, Any],
    stem: LatentStemConfig | None = None,
    codebook: StoredCodebook | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    input_px: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the backbone of a run as a folder that timm and latentds load; returns the folder.

    arch       timm's name of it
    record     what it was trained on: sets, latent_id, decoder, method, steps, images, ...
    stem       of a network that reads latents
    codebook   that its latents were rounded to, as pictures are then before they go in
    mean, std  of the normalization of the views
    input_px   edge that its pictures are to have; None takes the one the network is laid out for
    overwrite  replace another backbone in the folder; the same one may be written again
    raises     InputError where another backbone lies there, or timm would build another network
    """
    trained = {"recipe": "pretrain", **record, "versions": package_versions()}
    written = write_backbone(
        folder,
        backbone,
        arch=arch,
        trained=trained,
        input_px=input_px,
        mean=mean,
        std=std,
        stem=stem,
        overwrite=overwrite,
    )
    if codebook is not None:
        save_codebook(codebook, written / CODEBOOK)
    return written
