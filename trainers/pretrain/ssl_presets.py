"""What every method of `pretrain` has by default, and where the numbers are from."""

from __future__ import annotations

from typing import Any

# dino: main_dino.py of facebookresearch/dino (Caron et al. 2021), its advice for ViT-S included.
# dinov2: ssl_default_config.yaml of facebookresearch/dinov2 (Oquab et al. 2024).
# mae: section A of He et al. 2022. Epochs of theirs are shares of the steps here.
METHODS: dict[str, dict[str, Any]] = {
    "dino": {
        "views": "dino",
        "base_lr": 5e-4, "base_images": 256, "lr_rule": "linear", "min_lr": 1e-6,
        "warmup": 0.1, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip": 3.0,
        "beta2": 0.999, "layer_decay": 1.0, "stem_lr": 1.0, "drop_path": 0.1,
        "momentum": 0.996, "freeze_last": 0.01, "out_dim": 65_536,
    },
    "dinov2": {
        "views": "dinov2",
        "base_lr": 4e-3, "base_images": 1024, "lr_rule": "sqrt", "min_lr": 1e-6,
        "warmup": 0.1, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip": 3.0,
        "beta2": 0.999, "layer_decay": 0.9, "stem_lr": 0.2, "drop_path": 0.3,
        "momentum": 0.992, "freeze_last": 0.01, "out_dim": 65_536,
    },
    "mae": {
        "views": "mae",
        "base_lr": 1.5e-4, "base_images": 256, "lr_rule": "linear", "min_lr": 0.0,
        "warmup": 0.05, "weight_decay": 0.05, "weight_decay_end": 0.05, "clip": None,
        "beta2": 0.95, "layer_decay": 1.0, "stem_lr": 1.0, "drop_path": 0.0,
        "momentum": 1.0, "freeze_last": 0.0, "out_dim": 0,
        "freeze_last_steps": 0, "teacher_temp_steps": 0,
    },
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
