"""A run of `pretrain` in numbers: its batch, its steps, and what changes from step to step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentds_trainers.engine.checkpoints import read_newest
from latentds_trainers.engine.settings import defaults, plain
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.ssl_presets import (
    EPOCHS,
    GLOBAL_BATCH,
    LARGEST_BATCH,
    LEAST_BATCH,
    METHODS,
)

from latentds.autoencoders.autoencoder import short
from latentds.errors import ContractError, InputError

RECIPE = "pretrain"
TEACHER_TEMP_SHARE = 0.3  # of the steps; 30 epochs of 100 in both DINOs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(PretrainConfig):
    """The settings with nothing left open: what checkpoints are checked against.

    data_id       identity of the patches and their order
    decoder_ids   identity of every set's decoder, empty where nothing is decoded
    views_record  what the augmentation does
    """

    data_id: str = ""
    decoder_ids: tuple[str, ...] = ()
    views_record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def global_images(self) -> int:
        """Images of an optimizer step over all ranks."""
        assert self.global_batch_size is not None
        return self.global_batch_size

    def lr_share(self, step: int) -> float:
        """Share of `lr` that a step takes: a linear rise, then half a cosine down to min_lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        low = (self.min_lr or 0.0) / self.lr
        return cosine(1.0, low, step - self.warmup_steps, self.steps - self.warmup_steps)

    def weight_decay_at(self, step: int) -> float:
        """Of the weights that have one."""
        return cosine(
            self.number("weight_decay"), self.number("weight_decay_end"), step, self.steps
        )

    def momentum_at(self, step: int) -> float:
        """Share of itself that the teacher keeps in a step."""
        return cosine(self.number("momentum"), self.momentum_end, step, self.steps)

    def teacher_temp_at(self, step: int) -> float:
        """Temperature of the teacher's outputs."""
        start, end, steps = self.teacher_temp_start, self.teacher_temp, self.teacher_temp_steps
        assert steps is not None
        return end if step >= steps else start + (end - start) * step / steps

    def is_last_frozen(self, step: int) -> bool:
        """Whether the heads' last layers stay as they are."""
        return step < self.number("freeze_last_steps")

    def number(self, name: str) -> float:
        """A setting that the method has filled in."""
        return float(getattr(self, name))


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from the value of step 0 to the one after the last step."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def settle_batch(config: PretrainConfig, ranks: int) -> PretrainConfig:
    """The config with batch_size, accumulation and global_batch_size.

    raises  InputError where they do not divide, with what would
    """
    wanted, batch = config.global_batch_size, config.batch_size
    if wanted is not None and config.accumulation is not None:
        raise InputError(
            f"accumulation {config.accumulation} follows from global_batch_size {wanted} and "
            "batch_size; leave one of them"
        )
    if wanted is None and (batch is not None or config.accumulation is not None):
        batch, passes = batch or LARGEST_BATCH, config.accumulation or 1
        wanted = batch * passes * ranks
        return dataclasses.replace(
            config, global_batch_size=wanted, batch_size=batch, accumulation=passes
        )
    wanted = wanted or GLOBAL_BATCH
    if wanted % ranks:
        raise InputError(
            f"global_batch_size {wanted} over {ranks} ranks leaves {wanted % ranks} images; take a "
            f"multiple of {ranks}: {', '.join(map(str, multiples_around(wanted, ranks)))}"
        )
    share = wanted // ranks
    if batch is None:
        batch = max(size for size in range(1, LARGEST_BATCH + 1) if share % size == 0)
        if batch < LEAST_BATCH < share:
            raise InputError(
                f"global_batch_size {wanted} leaves {share} images to a rank, in which passes of "
                f"at most {LARGEST_BATCH} would have {batch}; take a multiple of "
                f"{LARGEST_BATCH * ranks}, or give --batch-size"
            )
    if share % batch:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        near = sorted(sorted(fitting, key=lambda size: abs(size - batch))[:3])
        raise InputError(
            f"global_batch_size {wanted} is {share} images for each of {ranks} ranks, which "
            f"batch_size {batch} does not divide; take batch_size {', '.join(map(str, near))}"
        )
    return dataclasses.replace(
        config, global_batch_size=wanted, batch_size=batch, accumulation=share // batch
    )


def multiples_around(number: int, divisor: int) -> list[int]:
    """The multiples next to a number."""
    low = number // divisor * divisor
    return [size for size in (low, low + divisor) if size > 0]


def settle(
    config: PretrainConfig,
    *,
    epoch_steps: int,
    edge_px: int,
    data_id: str,
    views: dict[str, Any],
    decoder_ids: tuple[str, ...] = (),
) -> RunConfig:
    """The run's settings, all of them.

    config       one that `settle_batch` made
    epoch_steps  optimizer steps of a pass over the patches
    edge_px      pixels that the edge of a global crop stands for
    raises       InputError for what follows from the batch and cannot be
    """
    steps = config.steps or (config.epochs or EPOCHS) * epoch_steps
    own = METHODS[config.method]
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shares = {
        "warmup_steps": own["warmup"],
        "freeze_last_steps": own["freeze_last"],
        "teacher_temp_steps": TEACHER_TEMP_SHARE,
    }
    counts = {name: round(share * steps) for name, share in shares.items() if given[name] is None}
    lr = scaled_lr(config) if config.lr is None else config.lr
    found = given | counts | {"steps": steps, "epochs": None, "lr": lr, "global_px": edge_px}
    try:
        return RunConfig(**found, data_id=data_id, decoder_ids=decoder_ids, views_record=views)
    except ValueError as error:
        raise InputError(f"with {config.global_batch_size} images a step, {error}") from error


def scaled_lr(config: PretrainConfig) -> float:
    """The learning rate of a step of so many images."""
    images, base_images, base_lr = config.global_batch_size, config.base_images, config.base_lr
    assert images is not None and base_images is not None and base_lr is not None
    ratio = images / base_images
    return base_lr * (ratio if config.lr_rule == "linear" else math.sqrt(ratio))


def check_before(config: RunConfig) -> None:
    """ContractError where OUT holds another run, naming first what makes it another."""
    found = read_newest(config.out)
    if found is None or found[1].recipe != RECIPE:
        return  # the engine tells of another recipe
    folder, before = found[0], defaults(config) | found[1].config
    own = plain(config)
    same = ("method", "arch", "input", "weights", "global_batch_size")
    names = {name: name for name in same} | {"data_id": "data", "decoder_ids": "decoder"}
    pairs = [(shown, before.get(name), own[name]) for name, shown in names.items()]
    views = {name: record["views_record"] for name, record in (("old", before), ("new", own))}
    pairs += [
        (f"views' {name}", views["old"].get(name), views["new"].get(name))
        for name in sorted(views["old"].keys() | views["new"].keys())
    ]
    for shown, old, new in pairs:
        if old != new:
            if shown == "data":
                old, new = (f"{where['data'] or where['originals']}" for where in (before, own))
                shown, new = "the patches of", f"others in {new}"
            if shown == "decoder":
                old, new = (told_decoder(where) for where in (before, own))
            raise ContractError(
                f"{folder} was made with {shown} {old}, this run has {new}; set it back, or give "
                "this run another --out"
            )
    check_steps(folder, before, config)


def told_decoder(settings: Mapping[str, Any]) -> str:
    """What decodes a run's sets: as it was given, and the weights' identities."""
    given = " ".join(settings["decoder"]) or "as recorded"
    known = dict.fromkeys(short(identity) for identity in settings["decoder_ids"])
    return f"{given} ({', '.join(known)})"


def check_steps(folder: Path, before: Mapping[str, Any], config: RunConfig) -> None:
    """ContractError for another number of steps where schedules run to the last one."""
    ends = {
        "the learning rate": config.schedule == "cosine",
        "the weight decay": config.weight_decay != config.weight_decay_end,
        "the teacher's momentum": config.momentum != config.momentum_end,
    }
    moving = [name for name, moves in ends.items() if moves]
    if before.get("steps") != config.steps and moving:
        raise ContractError(
            f"{folder} was made with steps {before.get('steps')}, this run has {config.steps}: "
            f"{', '.join(moving)} would jump, as their cosines end at the last step; set it back "
            f"(--steps {before.get('steps')}), or give this run another --out"
        )
