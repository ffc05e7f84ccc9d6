"""MultiCrop: global and local crops of every patch, augmented on the patches' device."""
# B patches, G global crops, L local crops, V views of one kind, N = V * B, H W pixels of a patch

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from latentds.errors import ShapeError, unknown_name
from latentds.views.boxes import Draws, draw_boxes, native_boxes
from latentds.views.colour import PAINTED, Paint, Three, Two, compiled
from latentds.views.resampling import SUPPORT, resized_crops
from latentds.views.view_batch import COUNTS, Rule, Views, check_fields, is_chance

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
CHUNK_BYTES = 1 << 28  # of crops in float32 that are augmented at once; temporaries are some more


CHANCES = "probabilities lie between 0 and 1"
RULES: tuple[Rule, ...] = (
    COUNTS,
    ("global_px local_px", lambda px: px >= 1, "at least 1"),
    ("stain_p blur solarize mean std", lambda values: len(values) == 3, "three numbers"),
    ("flip jitter_p grey", is_chance, CHANCES),
    ("stain_p blur solarize", lambda values: all(map(is_chance, values)), CHANCES),
    (
        "global_scale local_scale ratio blur_sigma",
        lambda ends: 0 < ends[0] <= ends[1],
        "(from, to) with 0 < from <= to",
    ),
    ("global_scale local_scale", lambda ends: ends[1] <= 1, "(from, to) with to <= 1.0"),
    ("stain stain_shift", lambda strength: strength >= 0, "strengths are 0 (off) or more"),
    ("jitter", lambda values: all(s >= 0 for s in values), "strengths are 0 (off) or more"),
    ("jitter", lambda values: values[3] <= 0.5, "hue turns by at most 0.5, half a circle"),
    ("std", lambda values: min(values) > 0, "above 0"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Augmented crops of every patch, each drawn from the patch's own seed.

    Call it with images float (B, 3, H, W) in [0, 1] on any device and seeds int64 (B,)
    (`batch.seeds`): `Views` of the images' dtype. Order: crop, mirror, turn; stain; brightness,
    contrast, saturation, hue; grey; blur; solarize; normalize. What is given for the first global,
    further global and local crops is written (first, further, local).
    """

    globals: int = 2
    """Global crops of a patch."""
    locals: int = 8
    """Local crops of a patch."""
    global_px: int = 224
    """Edge of a global crop."""
    local_px: int = 96
    """Edge of a local crop."""
    global_scale: Two | None = (0.32, 1.0)
    """Part of the patch's area that a global crop shows, from and to; None: cut, not resized."""
    local_scale: Two | None = (0.05, 0.32)
    """The same of a local crop."""
    ratio: Two = (3 / 4, 4 / 3)
    """Width to height of what a crop shows, from and to."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How crops are resized, antialiased as torchvision does it."""
    flip: float = 0.5
    """Probability of a mirror image."""
    turns: bool = True
    """Turn crops by 0, 90, 180 or 270 degrees: tissue has no upper side."""
    stain: float = 0.0
    """Haematoxylin, eosin and DAB densities are multiplied by 1 - this to 1 + this."""
    stain_shift: float = 0.0
    """The same densities are shifted by up to this, in skimage's unit."""
    stain_p: Three = (1.0, 1.0, 1.0)
    """Probability of stain changes (first, further, local)."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue changes, as ColorJitter's."""
    jitter_p: float = 0.8
    """Probability of them."""
    grey: float = 0.2
    """Probability of a grey crop."""
    blur: Three = (1.0, 0.1, 0.5)
    """Probability of blur (first, further, local)."""
    blur_sigma: Two = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the crop, from and to."""
    dinov2_compat_blur: bool = False
    """Blur with 1 - p in place of p, as DINOv2's code does: its first global crop never is."""
    solarize: Three = (0.0, 0.2, 0.0)
    """Probability of inverted bright pixels (first, further, local)."""
    mean: Three | None = IMAGENET_MEAN
    """Taken off the channels at the end; None leaves crops in [0, 1]."""
    std: Three | None = IMAGENET_STD
    """What the channels are divided by at the end."""
    compile: bool = False
    """Fuse the colour arithmetic with torch.compile; no part of the augmentation's identity."""

    reads: ClassVar[str] = "pixels"  # what of a batch it takes: LatentLoader's `decode`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # a record's lists, or a caller's
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        check_fields(self, RULES)
        if self.interpolation not in SUPPORT:
            raise ValueError(f"interpolation={self.interpolation!r}; one of {', '.join(SUPPORT)}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MultiCrop:
        """A recipe: dino, dinov2, openmidnight, mae, supervised or none; `changes` override it."""
        if name not in PRESETS:
            raise unknown_name("preset of views", name, PRESETS)
        return cls(**(PRESETS[name] | changes))

    def record(self) -> dict[str, Any]:
        """The augmentation's identity: plain JSON values, equal where the views are."""
        values = {"kind": type(self).__name__, **dataclasses.asdict(self)}
        del values["compile"]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    def __call__(self, images: Tensor, seeds: Tensor) -> Views:
        """Views of images float (B, 3, H, W) in [0, 1], drawn from seeds int64 (B,)."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(f"views are made of float images (B, 3, H, W), not of {images.dtype} "
                             f"{tuple(images.shape)}")  # fmt: skip
        if seeds.shape != (len(images),):
            raise ShapeError(f"{len(images)} images with seeds of shape {tuple(seeds.shape)}; pass "
                             "batch.seeds, one a patch")  # fmt: skip
        size = (images.shape[2], images.shape[3])
        if not all(size):
            raise ShapeError(f"views of patches of {size[1]}x{size[0]} px; at least one pixel")
        names = [f"global {number}" for number in range(self.globals)]
        names += [f"local {number}" for number in range(self.locals)]
        draws = Draws.of(seeds.to(images.device), names)
        own, rest = draws.part(slice(self.globals)), draws.part(slice(self.globals, None))
        working, dtype = images.to(working_dtype(images)), images.dtype
        with torch.autocast(images.device.type, enabled=False):  # a trainer's own may be around us
            return Views(
                self.views(working, dtype, own, self.global_px, self.global_scale, is_local=False),
                self.views(working, dtype, rest, self.local_px, self.local_scale, is_local=True),
            )

    def views(
        self, images: Tensor, dtype: torch.dtype, draws: Draws, edge_px: int, scale: Two | None,
        *, is_local: bool,
    ) -> Tensor:  # fmt: skip
        """Augmented crops (V, B, 3, P, P) of one kind and of a dtype, some views at a time."""
        size = (images.shape[2], images.shape[3])
        if scale is None:
            boxes = native_boxes(draws, size, edge_px, self.flip, self.turns)
        else:
            boxes = draw_boxes(draws, size, scale, self.ratio, self.flip, self.turns)
        number = len(draws.values)
        step = max(CHUNK_BYTES // max(12 * len(images) * edge_px**2, 1), 1)
        parts = [images.new_empty((0, len(images), 3, edge_px, edge_px), dtype=dtype)]
        for start in range(0, number, step):
            part = slice(start, min(start + step, number))
            shown = boxes.part(part)
            crops = resized_crops(images, shown, edge_px, self.interpolation).clamp_(0, 1)
            if crops.numel():
                places = [2 if is_local else min(view, 1) for view in range(part.start, part.stop)]
                paint = self.paint(places)
                change, numbers = compiled(paint) if self.compile else paint, draws.part(part)
                crops = change(crops, *(numbers[name] for name in PAINTED))
            parts.append(crops.to(dtype))
        return torch.cat(parts) if len(parts) != 2 else parts[1]

    def paint(self, places: Sequence[int]) -> Paint:
        """Changes of colour of views, each the first global (0), a further one (1), or local."""
        blur = [1 - p for p in self.blur] if self.dinov2_compat_blur else self.blur
        return Paint(
            stain=self.stain,
            stain_shift=self.stain_shift,
            stain_p=tuple(self.stain_p[place] for place in places),
            jitter=self.jitter,
            jitter_p=self.jitter_p,
            grey=self.grey,
            blur=tuple(blur[place] for place in places),
            blur_sigma=self.blur_sigma,
            solarize=tuple(self.solarize[place] for place in places),
            mean=self.mean,
            std=self.std,
        )


def working_dtype(images: Tensor) -> torch.dtype:
    """float32; float16 for half precision on a GPU.

    Its tensor cores multiply float16 without float32's cost, and between 0 and 1 it is eight times
    finer than bfloat16.
    """
    is_half = images.dtype in (torch.float16, torch.bfloat16)
    return torch.float16 if is_half and images.device.type == "cuda" else torch.float32
