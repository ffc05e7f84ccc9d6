"""Settings of pretrain, and those of its methods with their sources.

No heavy import: its `--help` is built from this.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import (
    EngineOptions,
    check_ranges,
    check_schedule,
    refuse_given,
    settled,
)

from latentds.sources.cut_options import CutOptions

SUM_TOLERANCE = 1e-6  # of weights that sum to 1
GLOBAL_BATCH = 1024  # where neither size is given
LARGEST_BATCH = 64  # images of a forward pass where batch_size is not given: DINO's of a GPU
EPOCHS = 100  # where neither epochs nor steps are given
# Options that other methods have no use for.
OF_DINOS = (
    *("momentum", "momentum_end", "teacher_temp", "teacher_temp_start", "teacher_temp_steps"),
    *("freeze_last_steps", "out_dim", "hidden_dim", "bottleneck_dim"),
    *("globals", "locals", "local_px", "local_scale"),  # mae takes one crop
)
OF_MAE = ("mask_ratio", "mae_dim", "mae_depth", "mae_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(CutOptions, EngineOptions):
    """What a pretraining's settings and what they come to have in common."""

    data: tuple[str, ...] = ()
    """Data sets of latents: folders, hf://datasets/ORG/NAME[@REVISION], s3://..."""
    weights: tuple[float, ...] = ()
    """Share of every data set among the patches; shares sum to 1. By default every patch is drawn
    equally often."""
    split: str = "train"
    """Split of --data to train on."""
    originals: Path | None = None
    """Pictures, slides or archives instead of --data, as 'latentds convert' takes them, with its
    options (--patch-size to --max-px)."""
    codec: str = "original"
    """Codec for --originals: original (none), jpeg@4096, tiny+kmeans, ..."""
    codebook: Path | None = None
    """Codebook of a codec such as tiny+kmeans; by default fitted to a sample."""
    paired_with: str | None = None
    """Data set that was converted from --originals. They take its order and the random numbers that
    it has as --data, so two runs differ in nothing but the pixels."""
    keep_mb: int = 2048
    """Pixels of --originals kept in memory for the next epoch, in MB."""
    num_workers: int = 4
    """Processes that read latents, or threads that read originals."""
    max_bad: int = 0
    """Damaged packs of --data that may be replaced before the run fails."""
    method: Literal["dino", "dinov2", "mae"] = "dino"
    """dino: self-distillation of crops; dinov2: also iBOT's masked patches and KoLeo; mae: a masked
    autoencoder."""
    arch: str = "vit_small_patch16_224"
    """Name of a plain ViT of timm."""
    input: Literal["images", "latents"] = "images"
    """images: decoded pixels; latents: the stored latents, through their own stem."""
    decoder: tuple[str, ...] = ()
    """Decoder instead of the recorded one: its folder, an autoencoder's name, or
    ORG/NAME[@REVISION]; one for each kind of latents among the sets."""
    allow_mixed_mpp: bool = False
    """Permit sets whose patches differ in their field of view in micrometres."""
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of decoding; bfloat16 is faster on a GPU."""
    cuda_graph: bool = False
    """Replay decoding and views from CUDA graphs: one launch in place of hundreds, on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    momentum_end: float = 1.0
    """Momentum of the teacher at the last step, after half a cosine."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's outputs after its warm-up."""
    teacher_temp_start: float = 0.04
    """Temperature of the teacher's outputs at the first step."""
    hidden_dim: int = 2048
    """Width of the heads' hidden layers."""
    bottleneck_dim: int = 256
    """Width before the heads' last layers."""
    mask_ratio: float = 0.75
    """Share of tokens that mae masks."""
    mae_dim: int = 512
    """Width of mae's decoder."""
    mae_depth: int = 8
    """Blocks of mae's decoder."""
    mae_heads: int = 16
    """Attention heads of mae's decoder."""
    local_px: int | None = None
    """Edge of the local crops in pixels."""
    globals: int | None = None
    """Global crops of a patch."""
    locals: int | None = None
    """Local crops of a patch."""
    global_scale: tuple[float, float] | None = None
    """Smallest and largest share of a patch's area in a global crop."""
    local_scale: tuple[float, float] | None = None
    """Smallest and largest share of a patch's area in a local crop."""
    turns: bool | None = None
    """Turn crops by right angles."""
    stain: float | None = None
    """Strength of stain changes: 0 for none, 0.1 for a tenth more or less of each stain."""
    probe: str | None = None
    """Labelled data set, or originals in class folders, to probe during training by nearest
    neighbours and a linear probe. The train split is fitted to and the test split scored; without a
    test split, a fifth of the groups is held out."""
    probe_groups: Path | None = None
    """CSV of the probe's groups, which stay together: a column slide, source, bag or path, and one
    of group, patient, case_id or tma_core. By default TCGA patients, or slides if they are
    known."""
    probe_patches: int = 4096
    """Patches of the probe at most, always the same: half to fit to, half to score."""
    probe_neighbours: int = 20
    """Nearest neighbours that vote."""
    probe_every: int | None = None
    """Steps between probes, a multiple of --save-every; by default every checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings that a method has and most of which may be given instead; see `PretrainConfig`.

    warmup_share, freeze_last_share, teacher_temp_share   of the steps, where counts of steps are
                                                          not given
    raises   ValueError for numbers that make no sense
    """

    views: Literal["dino", "dinov2", "openmidnight", "mae", "none"]
    base_lr: float
    base_images: int = 256
    lr_rule: Literal["linear", "sqrt"] = "linear"
    min_lr: float = 1e-6
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float | None = 3.0
    beta2: float = 0.999
    layer_decay: float = 1.0
    stem_lr: float = 1.0
    drop_path: float
    momentum: float
    out_dim: int = 65_536
    warmup_share: float = 0.1
    freeze_last_share: float = 0.01
    teacher_temp_share: float = 0.3  # 30 epochs of 100 in both DINOs

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"out_dim": 0},
            positive=("base_lr", "layer_decay"),
            not_negative=("min_lr", "stem_lr", "weight_decay", "weight_decay_end"),
            shares=("momentum", "drop_path", "beta2"),
        )


# dino: main_dino.py of facebookresearch/dino (Caron et al. 2021), its advice for ViT-S included.
# dinov2: ssl_default_config.yaml of facebookresearch/dinov2 (Oquab et al. 2024).
# mae: section A of He et al. 2022. Epochs of theirs are shares of the steps here.
METHODS = {
    "dino": MethodSettings(views="dino", base_lr=5e-4, drop_path=0.1, momentum=0.996),
    "dinov2": MethodSettings(
        views="dinov2", base_lr=4e-3, base_images=1024, lr_rule="sqrt",
        layer_decay=0.9, stem_lr=0.2, drop_path=0.3, momentum=0.992,
    ),
    "mae": MethodSettings(
        views="mae", base_lr=1.5e-4, min_lr=0.0, weight_decay=0.05, weight_decay_end=0.05,
        clip=None, beta2=0.95, drop_path=0.0, momentum=1.0, out_dim=0,
        warmup_share=0.05, freeze_last_share=0.0, teacher_temp_share=0.0,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(PretrainOptions):
    """Train a foundation model without labels. The method sets the options that are not given."""

    global_batch_size: int | None = None
    """Images of an optimizer step over all ranks; 1024 unless this or --batch-size is given. The
    number of forward passes follows from this, --batch-size and the ranks."""
    batch_size: int | None = None
    """Images of a rank in one forward pass; by default, with --global-batch-size, the largest
    divisor of a rank's share up to 64."""
    epochs: int | None = None
    """Passes over the patches; 100 unless this or --steps is given."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    lr: float | None = None
    """Learning rate after the warm-up, instead of --base-lr."""
    base_lr: float | None = None
    """Learning rate at 256 images a step (dinov2: at 1,024)."""
    lr_rule: Literal["linear", "sqrt"] | None = None
    """Growth of the learning rate with the images of a step: in proportion, or as their root."""
    min_lr: float | None = None
    """Learning rate at the last step, at the end of half a cosine."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly; by default a tenth of all steps (mae: a
    twentieth)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine down to --min-lr."""
    layer_decay: float | None = None
    """Factor of the learning rate from each block of the ViT to the block before."""
    stem_lr: float | None = None
    """Factor of the learning rate of the patch embedding."""
    weight_decay: float | None = None
    """Weight decay of AdamW at the first step; biases and norms have none."""
    weight_decay_end: float | None = None
    """Weight decay at the last step, after half a cosine."""
    beta2: float | None = None
    """Second beta of AdamW."""
    drop_path: float | None = None
    """Stochastic depth of the student: dropped share of the last block's residuals."""
    clip: float | None = None
    """Gradient norm at most, of all weights together; larger gradients are scaled down. By default
    3 for dino and dinov2."""
    momentum: float | None = None
    """Momentum of the teacher at the first step; the teacher is a moving average of the student."""
    teacher_temp_steps: int | None = None
    """Steps of the teacher's temperature warm-up; by default three tenths of all steps."""
    freeze_last_steps: int | None = None
    """Steps in which the heads' last layers are frozen; by default a hundredth of all steps."""
    out_dim: int | None = None
    """Prototypes of the heads; 65,536 by default."""
    views: Literal["dino", "dinov2", "openmidnight", "mae", "none"] | None = None
    """Preset of the augmentation; by default that of the method."""
    global_px: int | None = None
    """Edge of the global crops in pixels (with --input latents: in pixels that the cells cover)."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        self.check_inputs()
        self.check_weights()
        self.check_numbers()
        self.check_choices()
        self.check_method()

    @functools.cached_property
    def settings(self) -> MethodSettings:
        """The method's, with what is given instead."""
        return settled(METHODS[self.method], self)

    def check_inputs(self) -> None:
        """Refuse a choice of inputs that is none or two, and options of the other."""
        if (self.originals is None) == (not self.data):
            raise ValueError("give either --data or --originals")
        if self.originals is None:
            cut = [field.name for field in dataclasses.fields(CutOptions)]
            names = [*cut, "codec", "codebook", "paired_with"]
            refuse_given(self, names, "belongs to --originals; leave it out")
        elif self.input == "latents" or self.decoder:
            raise ValueError("--input latents and --decoder belong to --data; leave them out")
        if len(set(self.data)) < len(self.data):
            raise ValueError(f"--data {' '.join(self.data)}: name each set once")

    def check_weights(self) -> None:
        """Refuse weights that are not one a set, positive, and 1 together."""
        weights = self.weights
        is_right = len(weights) == len(self.data) and all(weight > 0 for weight in weights)
        if weights and not (is_right and abs(math.fsum(weights) - 1) <= SUM_TOLERANCE):
            raise ValueError(
                f"--weights {' '.join(f'{weight:g}' for weight in weights)}: give one for each of "
                f"the {len(self.data)} sets of --data, above 0 and 1 together"
            )

    def check_numbers(self) -> None:
        """Refuse counts, shares and rates that make no sense."""
        check_schedule(self)
        least = dict.fromkeys(("global_batch_size", "epochs", "globals", "global_px"), 1)
        least |= dict.fromkeys(("local_px", "probe_every", "hidden_dim", "bottleneck_dim"), 1)
        least |= dict.fromkeys(("mae_dim", "mae_depth", "mae_heads"), 1)
        least |= dict.fromkeys(("locals", "keep_mb", "num_workers", "max_bad"), 0)
        least |= dict.fromkeys(("teacher_temp_steps", "freeze_last_steps"), 0)
        least |= {"probe_patches": 4, "probe_neighbours": 1}
        temperatures = ("teacher_temp", "teacher_temp_start")
        check_ranges(self, least, positive=temperatures, shares=("momentum_end", "mask_ratio"))
        _ = self.settings  # refuses what cannot be

    def check_choices(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give --steps or --epochs, not both")
        if self.method != "mae" and self.precision == "bf16":
            raise ValueError(
                f"--precision bf16 with --method {self.method}: the teacher's moving average lies "
                "below what bfloat16 weights resolve; take autocast"
            )
        if self.method != "mae" and self.zero_stage == 3:
            raise ValueError(
                f"--zero-stage 3 with --method {self.method}: the teacher follows whole weights, "
                "which stage 3 divides; take 0, 1 or 2"
            )
        if self.input == "latents":
            names = ("sample_every", "global_scale", "local_scale", "stain")
            refuse_given(self, names, "belongs to pictures; leave it out with --input latents")
        if self.probe is None:
            refuse_given(self, ("probe_groups", "probe_every"), "needs a --probe")
        if self.probe_every is not None and self.probe_every % self.save_every:
            raise ValueError(
                f"probe_every is {self.probe_every}, no multiple of save_every {self.save_every}"
            )

    def check_method(self) -> None:
        """Refuse options of another method, and sizes that mae's decoder cannot have."""
        is_mae = self.method == "mae"
        names, owner = (OF_DINOS, "dino and dinov2") if is_mae else (OF_MAE, "mae")
        words = f"belongs to {owner}; leave it out with --method {self.method}"
        refuse_given(self, names, words)
        if not is_mae:
            return
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; take a share above 0 and below 1")
        unit = math.lcm(self.mae_heads, 4)  # its positions are sines and cosines of two edges
        if self.mae_dim % unit:
            raise ValueError(
                f"mae_dim is {self.mae_dim}; mae_heads {self.mae_heads} needs a multiple of {unit}"
            )
