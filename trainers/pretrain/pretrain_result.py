"""What a pretraining leaves: OUT/backbone, a model of timm with a card, and OUT/result.json.

timm.create_model("local-dir:OUT/backbone", pretrained=True)
latentds features SET --embedder timm-dir:OUT/backbone --out FEATURES
latentds publish-model OUT/backbone ORG/NAME --license ID
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.training import Engine
from latentds_trainers.pretrain.feeds import FeedSource
from latentds_trainers.pretrain.schedules import RunConfig
from torch import nn

from latentds.embedders.backbone_record import CODEBOOK
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.models.backbone_folder import write_backbone
from latentds.quantizers.codebooks import StoredCodebook, save_codebook

FOLDER = "backbone"
FORMAT = "latentds-pretrain/1"


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


def result_of(
    config: RunConfig,
    source: FeedSource,
    engine: Engine,
    totals: Mapping[str, float],
    *,
    probed: Mapping[str, float],
    probe_facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What result.json says of a finished run.

    totals  seconds by what they were spent on
    """
    facts = source.feed.facts
    images = engine.step * config.global_batch_size
    stored = facts["bytes_per_patch"]
    return {
        "format": FORMAT,
        "method": config.method,
        "arch": config.arch,
        "input": config.input,
        "source": facts,
        "views": config.views_record,
        "seed": config.seed,
        "steps": engine.step,
        "global_batch_size": config.global_batch_size,
        "images": images,
        "epochs": images / source.patches,
        "bytes_of_patches": None if stored is None else round(images * stored),
        "wall_s": engine.seconds - totals["aside_s"],
        "probe_s": totals["aside_s"],
        "waited_s": totals["waited_s"],
        "ranks": engine.world_size,
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "last": last_figures(config.out / "log.jsonl"),
        "probe": probed,
        "probed": probe_facts,
        "backbone": FOLDER,
        "versions": package_versions(),
    }


def last_figures(path: Path) -> dict[str, Any]:
    """The log's last line; empty where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found
