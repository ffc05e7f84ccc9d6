"""What a pretraining's result.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.pretrain.backbone_export import FOLDER

if TYPE_CHECKING:
    from latentds_trainers.pretrain.task import PretrainTask

FORMAT = "latentds-pretrain/1"


def result_of(task: PretrainTask, totals: dict[str, float]) -> dict[str, Any]:
    """What result.json says of a run whose ledger has these totals."""
    config, facts = task.config, task.source.feed.facts
    images = task.engine.step * config.global_images
    stored = facts["bytes_per_patch"]
    return {
        "format": FORMAT,
        "method": config.method,
        "arch": config.arch,
        "input": config.input,
        "source": facts,
        "views": config.views_record,
        "seed": config.seed,
        "steps": task.engine.step,
        "global_batch_size": config.global_images,
        "images": images,
        "epochs": images / task.source.patches,
        "bytes_of_patches": None if stored is None else round(images * stored),
        "wall_s": task.engine.seconds - totals["aside_s"],
        "probe_s": totals["aside_s"],
        "cpu_s": totals["cpu_s"],
        "waited_s": totals["waited_s"],
        "ranks": task.engine.world_size,
        "device": device_name(task.device),
        "last": last_figures(task.config.out / "log.jsonl"),
        "probe": task.probed,
        "probed": None if task.probe is None else task.probe.facts,
        "backbone": FOLDER,
        "versions": package_versions(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def last_figures(path: Path) -> dict[str, Any]:
    """The log's last line; empty where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found
