"""What every method of `pretrain` has by default, and where the numbers are from."""

from __future__ import annotations

import dataclasses
from typing import Literal

from latentds_trainers.engine.settings import check_ranges


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
            {"base_images": 1, "out_dim": 0},
            positive=("base_lr", "layer_decay"),
            not_negative=("min_lr", "stem_lr", "weight_decay", "weight_decay_end"),
            shares=("momentum", "drop_path", "beta2"),
        )

    def check_rate(self, lr: float, schedule: str) -> None:
        """ValueError for a learning rate that would rise to its end."""
        if schedule == "cosine" and lr < self.min_lr:
            raise ValueError(
                f"lr is {lr:g} and min_lr {self.min_lr:g}: the cosine would rise; a --min-lr of "
                f"{lr:g} at most"
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
# Options that other methods have no use for.
OF_DINOS = (
    *("momentum", "momentum_end", "teacher_temp", "teacher_temp_start", "teacher_temp_steps"),
    *("freeze_last_steps", "out_dim", "hidden_dim", "bottleneck_dim"),
    *("globals", "locals", "local_px", "local_scale"),  # mae takes one crop
)
OF_MAE = ("mask_ratio", "mae_dim", "mae_depth", "mae_heads")
GLOBAL_BATCH = 1024  # where neither size is given
LARGEST_BATCH = 64  # images of a forward pass where batch_size is not given: DINO's of a GPU
LEAST_BATCH = 8  # less is refused where it only comes of how a step divides
EPOCHS = 100  # where neither epochs nor steps are given
