"""A run of `pretrain` in numbers: its batch, its steps, and what changes from step to step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from latentds_trainers.engine.checkpoints import read_newest
from latentds_trainers.engine.settings import TrainConfig
from latentds_trainers.pretrain.config import (
    EPOCHS,
    GLOBAL_BATCH,
    LARGEST_BATCH,
    MethodSettings,
    PretrainConfig,
    PretrainOptions,
)

from latentds.errors import ContractError, InputError

RECIPE = "pretrain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizedConfig(PretrainConfig):
    """The settings of a run on so many ranks, with its batch."""

    global_batch_size: int
    batch_size: int
    accumulation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(PretrainOptions, MethodSettings, TrainConfig):
    """The settings with nothing left open: what checkpoints are checked against.

    global_px     pixels that the edge of a global crop stands for
    data_id       identity of the patches and their order
    decoder_ids   identity of every set's decoder, empty where nothing is decoded
    views_record  what the augmentation does
    """

    global_batch_size: int
    global_px: int
    freeze_last_steps: int
    teacher_temp_steps: int
    data_id: str = ""
    decoder_ids: tuple[str, ...] = ()
    views_record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.schedule == "cosine" and self.lr < self.min_lr:
            raise ValueError(
                f"lr is {self.lr:g} and min_lr {self.min_lr:g}: the cosine would rise; a --min-lr "
                f"of {self.lr:g} at most"
            )

    def lr_share(self, step: int) -> float:
        """Share of `lr` that a step takes: a linear rise, then half a cosine down to min_lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        low = self.min_lr / self.lr
        return cosine(1.0, low, step - self.warmup_steps, self.steps - self.warmup_steps)

    def weight_decay_at(self, step: int) -> float:
        """Of the weights that have one."""
        return cosine(self.weight_decay, self.weight_decay_end, step, self.steps)

    def momentum_at(self, step: int) -> float:
        """Share of itself that the teacher keeps in a step."""
        return cosine(self.momentum, self.momentum_end, step, self.steps)

    def teacher_temp_at(self, step: int) -> float:
        start, end, steps = self.teacher_temp_start, self.teacher_temp, self.teacher_temp_steps
        return end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from the value of step 0 to the one after the last step."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def settle_batch(config: PretrainConfig, ranks: int) -> SizedConfig:
    """The config with batch_size, accumulation and global_batch_size.

    raises  InputError where they do not divide, with what would
    """
    images, batch = config.global_batch_size, config.batch_size
    if images is None:
        images = GLOBAL_BATCH if batch is None else batch * ranks
    unit = (batch or 1) * ranks
    if images % unit:
        low = images // unit * unit
        multiples = [str(size) for size in (low, low + unit) if size > 0]
        raise InputError(
            f"global_batch_size {images} is no multiple of {unit}, {ranks} ranks times "
            f"batch_size {batch or 1}; take {' or '.join(multiples)}"
        )
    share = images // ranks
    batch = batch or max(size for size in range(1, LARGEST_BATCH + 1) if share % size == 0)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    batches = {"global_batch_size": images, "batch_size": batch, "accumulation": share // batch}
    return SizedConfig(**given | batches)


def settle(
    config: SizedConfig,
    *,
    epoch_steps: int,
    edge_px: int,
    data_id: str,
    views: dict[str, Any],
    decoder_ids: tuple[str, ...] = (),
) -> RunConfig:
    """The run's settings, all of them.

    epoch_steps  optimizer steps of a pass over the patches
    edge_px      pixels that the edge of a global crop stands for
    raises       InputError for what follows from the batch and cannot be
    """
    steps, own = config.steps or (config.epochs or EPOCHS) * epoch_steps, config.settings
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(PretrainOptions)}
    given |= {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    sizes = ("global_batch_size", "batch_size", "accumulation", "schedule")
    given |= {name: getattr(config, name) for name in sizes}

    def counted(name: str, share: float) -> int:
        count: int | None = getattr(config, name)
        return round(share * steps) if count is None else count

    try:
        return RunConfig(
            **given,
            steps=steps,
            lr=scaled_lr(config.global_batch_size, own) if config.lr is None else config.lr,
            warmup_steps=counted("warmup_steps", own.warmup_share),
            freeze_last_steps=counted("freeze_last_steps", own.freeze_last_share),
            teacher_temp_steps=counted("teacher_temp_steps", own.teacher_temp_share),
            global_px=edge_px,
            data_id=data_id,
            decoder_ids=decoder_ids,
            views_record=views,
        )
    except ValueError as error:
        raise InputError(f"with {config.global_batch_size} images a step, {error}") from error


def scaled_lr(images: int, settings: MethodSettings) -> float:
    ratio = images / settings.base_images
    return settings.base_lr * (ratio if settings.lr_rule == "linear" else math.sqrt(ratio))


def check_steps(config: RunConfig) -> None:
    """ContractError for a checkpoint of another number of steps where schedules run to the last."""
    ends = {
        "the learning rate": config.schedule == "cosine",
        "the weight decay": config.weight_decay != config.weight_decay_end,
        "the teacher's momentum": config.momentum != config.momentum_end,
    }
    moving = [name for name, moves in ends.items() if moves]
    found = read_newest(config.out)
    if found is None or found[1].recipe != RECIPE:  # the engine tells of another recipe
        return
    steps = found[1].config["steps"]
    if steps != config.steps and moving:
        raise ContractError(
            f"{found[0]} was made with steps {steps}, this run has {config.steps}: "
            f"{', '.join(moving)} would jump, as their cosines end at the last step; set it back, "
            "or give this run another --out"
        )
