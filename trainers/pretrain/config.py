"""Settings of pretrain. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from latentds_trainers.engine.settings import (
    EngineOptions,
    check_ranges,
    check_schedule,
    refuse_given,
    settled,
)
from latentds_trainers.pretrain.pretrain_options import (
    METHODS,
    OF_DINOS,
    OF_MAE,
    MethodSettings,
    PretrainOptions,
    ProbeConfig,
)

from latentds.sources.cut_options import CutOptions

SUM_TOLERANCE = 1e-6  # of weights that sum to 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(PretrainOptions):
    """Train a foundation model without labels. The method sets the options that are not given."""

    global_batch_size: int | None = None
    """Images of an optimizer step over all ranks; 1024 unless this or --batch-size is given. The
    number of forward passes follows from this, --batch-size and the ranks."""
    batch_size: int | None = None
    """Images of a rank in one forward pass; by default, with --global-batch-size, the largest
    divisor of a rank's share up to 64."""
    accumulation: int | None = None
    """Forward passes of a step without --global-batch-size, from which they follow otherwise."""
    epochs: int | None = None
    """Passes over the patches; 100 unless this or --steps is given."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    lr: float | None = None
    """Learning rate after the warm-up, instead of --base-lr."""
    base_lr: float | None = None
    """Learning rate at --base-images images a step."""
    base_images: int | None = None
    """Images a step to which --base-lr refers."""
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
        ProbeConfig.__post_init__(self)
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
        if not weights:
            return
        seen = " ".join(f"{weight:g}" for weight in weights)
        if len(weights) != len(self.data):
            raise ValueError(
                f"--weights {seen}: {len(weights)} for {len(self.data)} sets of --data; one each"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"--weights {seen}: every one must be above 0; leave out a set instead"
            )
        if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            scaled = " ".join(f"{weight / math.fsum(weights):.9g}" for weight in weights)
            raise ValueError(
                f"--weights {seen}: they sum to {math.fsum(weights):.9g}, not to 1; in the same "
                f"proportions, --weights {scaled}"
            )

    def check_numbers(self) -> None:
        """Refuse counts, shares and rates that make no sense."""
        check_schedule(self)
        least = dict.fromkeys(("global_batch_size", "epochs", "globals", "global_px"), 1)
        least |= dict.fromkeys(("local_px", "probe_every", "hidden_dim", "bottleneck_dim"), 1)
        least |= dict.fromkeys(("mae_dim", "mae_depth", "mae_heads"), 1)
        least |= dict.fromkeys(("locals", "keep_mb", "num_workers", "max_bad"), 0)
        least |= dict.fromkeys(("teacher_temp_steps", "freeze_last_steps"), 0)
        temperatures = ("teacher_temp", "teacher_temp_start")
        check_ranges(self, least, positive=temperatures, shares=("momentum_end", "mask_ratio"))
        settings = self.settings  # refuses what cannot be
        if self.lr is not None:
            settings.check_rate(self.lr, self.schedule)

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
        if self.probe is None and self.probe_every is not None:
            raise ValueError("--probe-every needs a --probe")
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
            near = max(round(self.mae_dim / unit), 1) * unit
            raise ValueError(
                f"mae_dim is {self.mae_dim}; mae_heads {self.mae_heads} needs a multiple of {unit} "
                f"(--mae-dim {near})"
            )
