"""Published augmentations as fields of MultiCrop."""

from __future__ import annotations

from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision's, as most timm backbones have them
IMAGENET_STD = (0.229, 0.224, 0.225)

OFF: dict[str, Any] = {
    "turns": False,
    "jitter_p": 0.0,
    "grey": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}
PRESETS: dict[str, dict[str, Any]] = {
    # facebookresearch/dino main_dino.py, DataAugmentationDINO and its default scales; its blur is
    # Pillow's, of a radius of 0.1 to 2
    "dino": {"turns": False, "global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4)},
    # facebookresearch/dinov2 data/augmentations.py and ssl_default_config.yaml, blur as it is
    # meant to be: dinov2_compat_blur=True is what its code does
    "dinov2": {"turns": False},
    # MedARC-AI/OpenMidnight dinov2/data/augmentations.py at 36a4355: global crops are cut without
    # resizing, stain shifts and torchvision's default resizing of local crops, no solarize
    "openmidnight": {
        "turns": False,
        "local_px": 98,
        "global_scale": None,
        "local_scale": (0.08, 1.0),
        "interpolation": "bilinear",
        "stain_shift": 0.05,
        "stain_p": (0.0, 0.0, 1.0),
        "dinov2_compat_blur": True,
        "solarize": (0.0, 0.0, 0.0),
    },
    # facebookresearch/mae main_pretrain.py
    "mae": {**OFF, "globals": 1, "locals": 0, "global_scale": (0.2, 1.0)},
    # ours, of a training with labels: HED-light and HSV-light of Tellez et al. 2019, "Quantifying
    # the effects of data augmentation and stain color normalization", brightness and contrast too
    "supervised": {
        **OFF,
        **{"globals": 1, "locals": 0, "global_scale": (0.6, 1.0), "ratio": (0.9, 10 / 9)},
        **{"turns": True, "stain": 0.05, "jitter": (0.2, 0.2, 0.1, 0.1), "jitter_p": 0.8},
        **{"mean": None, "std": None},
    },
    # the patch resized, of one that is not square its central square
    "none": {
        **OFF,
        **{"globals": 1, "locals": 0, "global_scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
        **{"flip": 0.0, "mean": None, "std": None},
    },
}
