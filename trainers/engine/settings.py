"""Settings every recipe has, and the learning rate that follows from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Preset = TypeVar("Preset", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Settings of a run that every recipe has as they are; what follows from others is not here."""

    panel = "engine"

    out: Path
    """Folder of the run: checkpoints/, log.jsonl, config.json, samples/. The same command continues
    from its newest checkpoint. Several nodes need a folder that all of them see."""
    clip: float | None = None
    """Gradient norm at most; larger gradients are scaled down to it."""
    spike: float | None = None
    """Skip a step whose gradient norm exceeds this many times `clip` (ZeRO 0 only)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3
    also weights."""
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    """autocast: float32 weights, operations in bfloat16 where torch holds that safe; bf16: weights
    in bfloat16 with a float32 copy in the optimizer (ZeRO 1 to 3)."""
    seed: int = 0
    save_every: int = 1000
    """Steps between checkpoints, which also compute validation figures."""
    save_minutes: float | None = None
    """Save a checkpoint after so many minutes as well, for jobs with a time limit."""
    keep: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    sample_every: int | None = None
    """Steps between sample pictures; no pictures by default."""
    tensorboard: bool = False
    """Also write TensorBoard events to tensorboard/."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            dict.fromkeys(("save_every", "keep", "log_every"), 1),
            positive=("clip", "spike", "sample_every", "save_minutes"),
        )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3; with 0, take autocast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineOptions):
    """All that the engine reads of a run.

    A recipe inherits this and adds its own; one whose steps, batch or learning rate may follow from
    other settings inherits `EngineOptions` and makes a TrainConfig of what it comes to.
    """

    steps: int
    """Optimizer steps; warm-up, schedule and every `..._every` count in the same steps."""
    batch_size: int
    """Images of a rank in one forward pass."""
    accumulation: int = 1
    """Forward passes whose gradients are averaged into one optimizer step."""
    lr: float
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """After the warm-up: constant, half a cosine to zero at the last step, or divided by 10 at each
    of the milestones."""
    milestones: tuple[int, ...] = ()
    """Steps after which --schedule multistep divides the learning rate by ten."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        check_schedule(self)
        if self.spike is not None and (self.clip is None or self.zero_stage != 0):
            raise ValueError("spike needs clip, and zero_stage 0")

    def lr_share(self, step: int) -> float:
        """Share of `lr` that step `step` (the first is 0) takes."""
        share = 1.0
        if self.warmup_steps:
            share = min(1.0, (step + 1) / self.warmup_steps)
        if self.schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        passed = sum(step >= milestone for milestone in self.milestones)
        if passed:
            share *= 0.1**passed
        return share


def check_ranges(
    settings: object,
    least: Mapping[str, float] | None = None,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
    below_one: Sequence[str] = (),
) -> None:
    """ValueError for a setting that cannot be; None is open, and what settings lack is left out.

    least         the smallest value by name
    positive ...  names; below_one are from 0 to below 1
    """

    def refuse(names: Sequence[str], words: str, fits: Callable[[float], bool]) -> None:
        for name in names:
            value = getattr(settings, name, None)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {value}; {words}")

    for name, smallest in (least or {}).items():
        refuse([name], f"at least {smallest}", functools.partial(operator.le, smallest))
    refuse(positive, "a positive number", lambda value: 0 < value < math.inf)
    refuse(not_negative, "0 or more", lambda value: 0 <= value < math.inf)
    refuse(shares, "a share from 0 to 1", lambda value: 0 <= value <= 1)
    refuse(below_one, "from 0 to below 1", lambda value: 0 <= value < 1)


def refuse_given(settings: object, names: Iterable[str], words: str) -> None:
    """ValueError, `--name words`, for one of these options that is not what it is by default."""
    for name in names:
        if getattr(settings, name) != getattr(type(settings), name):
            raise ValueError(f"--{name.replace('_', '-')} {words}")


def check_schedule(settings: Any) -> None:
    """ValueError for steps, a batch, a learning rate or milestones that cannot be; None is open."""
    least = dict.fromkeys(("steps", "batch_size", "accumulation"), 1)
    check_ranges(settings, {**least, "warmup_steps": 0}, positive=("lr",))
    milestones = getattr(settings, "milestones", ())
    if bool(milestones) != (settings.schedule == "multistep"):
        raise ValueError(f"milestones {milestones} need --schedule multistep")
    if list(milestones) != sorted({step for step in milestones if step > 0}):
        raise ValueError(f"milestones are {milestones}; positive and ascending")


def settled(preset: Preset, given: object) -> Preset:
    """The preset with those of its fields that are given: not None in `given`."""
    names = [field.name for field in dataclasses.fields(preset)]
    own = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    return dataclasses.replace(preset, **own)


def plain(config: DataclassInstance) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: jsonable(value) for name, value in values.items()}


def defaults(config: DataclassInstance) -> dict[str, Any]:
    """What the settings are where nothing is given, as JSON values."""
    fields = dataclasses.fields(config)
    given = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {name: jsonable(value) for name, value in given.items()}


def jsonable(value: Any) -> Any:
    """A setting as a JSON value: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    if isinstance(value, dict):
        return {str(key): jsonable(part) for key, part in value.items()}
    return value
