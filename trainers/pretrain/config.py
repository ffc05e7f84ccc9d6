"""Settings of pretrain. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import TrainConfig
from latentds_trainers.pretrain.data_checks import check_settings
from latentds_trainers.pretrain.probe_config import ProbeConfig
from latentds_trainers.pretrain.ssl_presets import METHODS

from latentds.sources.cut_options import CutOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(CutOptions, ProbeConfig, TrainConfig):
    """Train a foundation model without labels. What is not given follows from the method."""

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
    """Of --originals: pixels kept in memory for the next epoch, in MB."""
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

    global_batch_size: int | None = None
    """Images of an optimizer step over all ranks; 1024 where neither this nor --batch-size is
    given. Forward passes a step follow from it, --batch-size and the ranks."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Images a rank takes in one forward pass; with --global-batch-size, the largest divisor of a
    rank's share up to 64 where not given."""
    accumulation: int | None = None  # type: ignore[assignment]
    """Forward passes a step, where --global-batch-size is not given; else it follows."""
    epochs: int | None = None
    """Passes over the patches; 100 where neither this nor --steps is given."""
    steps: int | None = None  # type: ignore[assignment]
    """Optimizer steps, instead of --epochs."""
    lr: float | None = None  # type: ignore[assignment]
    """Learning rate after the warm-up, instead of --base-lr."""
    base_lr: float | None = None
    """Learning rate for --base-images images a step."""
    base_images: int | None = None
    """Images a step that --base-lr is meant for."""
    lr_rule: Literal["linear", "sqrt"] | None = None
    """How the learning rate follows the images of a step: in proportion, or as their root."""
    min_lr: float | None = None
    """Where half a cosine takes the learning rate by the last step."""
    warmup_steps: int | None = None  # type: ignore[assignment]
    """Steps over which the learning rate rises linearly; a tenth of all (mae: a twentieth) where
    not given."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine down to --min-lr."""
    milestones: tuple[()] = ()
    """Of no schedule here."""
    layer_decay: float | None = None
    """Factor of the learning rate from each block of the ViT to the one before it."""
    stem_lr: float | None = None
    """Factor of the learning rate of the patch embedding."""
    weight_decay: float | None = None
    """Of AdamW, at the first step; biases and norms have none."""
    weight_decay_end: float | None = None
    """At the last step, half a cosine away."""
    beta2: float | None = None
    """Of AdamW."""
    drop_path: float | None = None
    """Stochastic depth of the student: share of the last block's residuals left out."""
    clip: float | None = None
    """Gradient norm (of all weights together) beyond which gradients are scaled down to it; 3 for
    dino and dinov2 where not given."""

    momentum: float | None = None
    """Of the teacher, which follows the student: at the first step."""
    momentum_end: float = 1.0
    """At the last step, half a cosine away."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's outputs after its warm-up."""
    teacher_temp_start: float = 0.04
    """At the first step."""
    teacher_temp_steps: int | None = None
    """Steps from one to the other, linearly; three tenths of all where not given."""
    freeze_last_steps: int | None = None
    """Steps in which the heads' last layers stay as they are; a hundredth of all if not given."""
    out_dim: int | None = None
    """Prototypes of the heads; 65,536 where not given."""
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

    views: Literal["dino", "dinov2", "openmidnight", "mae", "none"] | None = None
    """Preset of the augmentation; the method's own where not given."""
    global_px: int | None = None
    """Edge of the global crops in pixels (with --input latents: of what their cells stand for)."""
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

    def __post_init__(self) -> None:
        for name, value in METHODS[self.method].items():
            if name in self.__dict__ and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        ProbeConfig.__post_init__(self)
        TrainConfig.__post_init__(self)
        check_settings(self)
