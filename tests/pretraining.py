"""What the tests of `pretrain` share: small settings, runs that die, logs, feeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentds_trainers.pretrain.__main__ import main
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.data_sources import open_source
from latentds_trainers.pretrain.feeds import FeedBatch
from latentds_trainers.pretrain.schedules import settle_batch
from latentds_trainers.pretrain.task import PretrainTask

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "arch": "test_vit", "global_px": 64, "num_workers": 0, "global_batch_size": 8, "steps": 4,
    "save_every": 2, "log_every": 1, "lr": 1e-3, "warmup_steps": 0,
}  # fmt: skip
DINO: dict[str, Any] = {
    "local_px": 32, "locals": 2, "out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16,
}  # fmt: skip
MAE: dict[str, Any] = {"mae_dim": 32, "mae_depth": 1, "mae_heads": 4}


def options_of(**changes: Any) -> dict[str, Any]:
    """Small settings of a method, changed."""
    return SMALL | (MAE if changes.get("method") == "mae" else DINO) | changes


def config_of(out: Path, **changes: Any) -> PretrainConfig:
    """The same as a config."""
    values = options_of(**changes)
    data = values.get("data", ())
    return PretrainConfig(**values | {"out": out, "data": tuple(map(str, data))})


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["model/loss"] for line in log_of(out)]


class Killed(Exception):
    """What stops a run in a test."""


def run_until(config: PretrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train up to a step, then die."""
    take = PretrainTask.step

    def dying(self: PretrainTask, number: int) -> Any:
        if number == step:
            raise Killed
        return take(self, number)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PretrainTask, "step", dying)
        main(config)


def patches_of(config: PretrainConfig, rank: int, ranks: int, state: Any = None) -> Any:
    """A feed on one of several ranks, going on from a state."""
    feed = open_source(settle_batch(config, ranks), CPU, rank, ranks).feed
    if state is not None:
        feed.load_state_dict(state)
    return feed


def steps_of(feed: Any, count: int) -> list[FeedBatch]:
    return [groups[0] for groups, _ in zip(feed, range(count), strict=False)]
