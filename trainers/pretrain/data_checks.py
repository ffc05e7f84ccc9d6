"""Which settings of `pretrain` cannot be: every refusal that needs nothing but the settings."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from latentds_trainers.pretrain.ssl_presets import METHODS, OF_DINOS, OF_MAE

from latentds.sources.cut_options import CutOptions

if TYPE_CHECKING:
    from latentds_trainers.pretrain.config import PretrainConfig

SUM_TOLERANCE = 1e-6  # of weights that sum to 1


def check_settings(config: PretrainConfig) -> None:
    """ValueError for what cannot be, with what would."""
    check_inputs(config)
    check_weights(config)
    check_numbers(config)
    check_rates(config)
    check_choices(config)
    check_method(config)


def check_inputs(config: PretrainConfig) -> None:
    """Refuse a choice of inputs that is none or two, and options of the other."""
    if (config.originals is None) == (not config.data):
        raise ValueError("give either --data or --originals")
    if config.originals is None:
        unset = {field.name: field.default for field in dataclasses.fields(CutOptions)}
        unset |= {"codec": "original", "codebook": None, "paired_with": None}
        for name, value in unset.items():
            if getattr(config, name) != value:
                raise ValueError(f"--{name.replace('_', '-')} is of --originals; leave it")
    elif config.input == "latents" or config.decoder:
        raise ValueError("--input latents and --decoder are of --data; leave them")
    if len(set(config.data)) < len(config.data):
        raise ValueError(f"--data {' '.join(config.data)}: each set once")


def check_weights(config: PretrainConfig) -> None:
    """Refuse weights that are not one a set, positive, and 1 together."""
    weights = config.weights
    if not weights:
        return
    seen = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(config.data):
        raise ValueError(
            f"--weights {seen}: {len(weights)} for {len(config.data)} sets of --data; one each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"--weights {seen}: every one must be above 0; leave out a set instead")
    if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
        scaled = " ".join(f"{weight / math.fsum(weights):.9g}" for weight in weights)
        raise ValueError(
            f"--weights {seen}: they sum to {math.fsum(weights):.9g}, not to 1; in the same "
            f"proportions, --weights {scaled}"
        )


def check_numbers(config: PretrainConfig) -> None:
    """Refuse counts and shares that make no sense."""
    least = {"global_batch_size": 1, "epochs": 1, "base_images": 1, "out_dim": 0, "locals": 0}
    least |= {
        "hidden_dim": 1,
        "bottleneck_dim": 1,
        "mae_dim": 1,
        "mae_depth": 1,
        "mae_heads": 1,
    }
    least |= {
        "keep_mb": 0,
        "globals": 1,
        "global_px": 1,
        "local_px": 1,
        "num_workers": 0,
        "max_bad": 0,
        "probe_every": 1,
    }
    for name, smallest in (least | {"teacher_temp_steps": 0, "freeze_last_steps": 0}).items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}; at least {smallest}")
    for name in ("momentum", "momentum_end", "drop_path", "beta2", "mask_ratio"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; from 0 to 1")
    for name in ("base_lr", "teacher_temp", "teacher_temp_start", "layer_decay"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}; a positive number")
    for name in ("min_lr", "stem_lr", "weight_decay", "weight_decay_end"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}; 0 or more")


def check_rates(config: PretrainConfig) -> None:
    """Refuse a learning rate that would rise to its end."""
    low = config.min_lr
    if (
        config.lr is not None
        and low is not None
        and config.lr < low
        and config.schedule == "cosine"
    ):
        raise ValueError(
            f"lr is {config.lr:g} and min_lr {low:g}: the cosine would rise; a --min-lr of "
            f"{config.lr:g} at most"
        )


def check_method(config: PretrainConfig) -> None:
    """Refuse options of another method, and sizes that mae's decoder cannot have."""
    fields, own = type(config).__dataclass_fields__, METHODS[config.method]
    is_mae = config.method == "mae"
    for name in OF_DINOS if is_mae else OF_MAE:
        if getattr(config, name) not in (fields[name].default, own.get(name)):
            raise ValueError(
                f"--{name.replace('_', '-')} is of {'dino and dinov2' if is_mae else 'mae'}; "
                f"--method {config.method} has none, leave it"
            )
    if not is_mae:
        return
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"mask_ratio is {config.mask_ratio}; above 0 and below 1")
    unit = math.lcm(config.mae_heads, 4)  # its positions are sines and cosines of two edges
    if config.mae_dim % unit:
        near = max(round(config.mae_dim / unit), 1) * unit
        raise ValueError(
            f"mae_dim is {config.mae_dim}, with mae_heads {config.mae_heads} a multiple of {unit} "
            f"is wanted: --mae-dim {near}"
        )


def check_choices(config: PretrainConfig) -> None:
    """Refuse settings that exclude each other."""
    if config.steps is not None and config.epochs is not None:
        raise ValueError("give --steps or --epochs, not both")
    if config.method != "mae" and config.precision == "bf16":
        raise ValueError(
            f"--precision bf16 with --method {config.method}: the teacher's moving average lies "
            "below what bfloat16 weights resolve; take autocast"
        )
    if config.method != "mae" and config.zero_stage == 3:
        raise ValueError(
            f"--zero-stage 3 with --method {config.method}: the teacher follows whole weights, "
            "which stage 3 parts; take 0, 1 or 2"
        )
    if config.input == "latents":
        for name in ("sample_every", "global_scale", "local_scale", "stain"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is of pictures; --input latents has none, leave it"
                )
    if config.probe is None and config.probe_every is not None:
        raise ValueError("--probe-every without a --probe")
    if config.probe_every is not None and config.probe_every % config.save_every:
        raise ValueError(
            f"probe_every is {config.probe_every}; a multiple of save_every {config.save_every}"
        )
