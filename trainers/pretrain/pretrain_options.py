"""Settings of pretrain that stay as they are given. No heavy import."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import EngineOptions
from latentds_trainers.pretrain.probe_config import ProbeConfig

from latentds.sources.cut_options import CutOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(CutOptions, ProbeConfig, EngineOptions):
    """What a pretraining's settings and what they come to have in common."""

    data: tuple[str, ...] = ()
    """Data sets of latents: folders, hf://datasets/ORG/NAME[@REVISION], s3://..."""
    weights: tuple[float, ...] = ()
    """Share of every data set among the patches; they sum to 1. By number of patches where not
    given."""
    split: str = "train"
    """Split of --data to train on."""
    originals: Path | None = None
    """Instead of --data: pictures, slides or archives as 'latentds convert' takes them, with its
    options (--patch-size to --max-px)."""
    codec: str = "original"
    """What --originals go through: original (nothing), jpeg@4096, tiny+kmeans, ..."""
    codebook: Path | None = None
    """Codebook of a codec such as tiny+kmeans, instead of one fitted to a sample."""
    paired_with: str | None = None
    """Take --originals in the order and with the random numbers that this data set, converted from
    them, would have as --data: runs that differ in nothing but the pixels."""
    keep_mb: int = 2048
    """Pixels of --originals kept in memory for the next epoch, in MB."""
    num_workers: int = 4
    """Processes that read latents, or threads that read originals."""
    max_bad: int = 0
    """Damaged packs of --data to replace by others before giving up."""
    method: Literal["dino", "dinov2", "mae"] = "dino"
    """dino: self-distillation of crops; dinov2: with iBOT's masked patches and KoLeo besides; mae:
    a masked autoencoder."""
    arch: str = "vit_small_patch16_224"
    """A plain ViT of timm."""
    input: Literal["images", "latents"] = "images"
    """images: decoded pixels; latents: the latents themselves, through a stem of their own."""
    decoder: tuple[str, ...] = ()
    """Decode with this decoder instead of the recorded one: its folder, an autoencoder's name,
    ORG/NAME[@REVISION]; several for sets of several kinds of latents."""
    allow_mixed_mpp: bool = False
    """Mix sets whose patches show fields of unlike size, in micrometres."""
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that latents are decoded in; bfloat16 for speed on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    momentum_end: float = 1.0
    """At the last step, half a cosine away."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's outputs after its warm-up."""
    teacher_temp_start: float = 0.04
    """At the first step."""
    hidden_dim: int = 2048
    """Width of the heads' hidden layers."""
    bottleneck_dim: int = 256
    """Width before the heads' last layers."""
    mask_ratio: float = 0.75
    """Share of the tokens that mae masks."""
    mae_dim: int = 512
    """Width of mae's decoder."""
    mae_depth: int = 8
    """Blocks of mae's decoder."""
    mae_heads: int = 16
    """Attention heads of mae's decoder."""
    local_px: int | None = None
    """Edge of the local crops."""
    globals: int | None = None
    """Global crops of a patch."""
    locals: int | None = None
    """Local crops of a patch."""
    global_scale: tuple[float, float] | None = None
    """Share of a patch's area that a global crop has, from and to."""
    local_scale: tuple[float, float] | None = None
    """The same of local crops."""
    turns: bool | None = None
    """Turn crops by right angles."""
    stain: float | None = None
    """Strength of stain changes: 0 for none, 0.1 for a tenth more or less of each stain."""
    probe_every: int | None = None
    """Steps between probes, a multiple of --save-every; at every checkpoint where not given."""
