"""One rank of a probe, started by test_pretrain_probe: the figures of a network, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import torch


class Colours(torch.nn.Module):
    """Mean and deviation of every channel, (B, 2C)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def save_figures(data: Path, out: Path) -> None:
    """What this rank found, saved as OUT/RANK.json."""
    from latentds_trainers.pretrain.config import PretrainConfig
    from latentds_trainers.pretrain.probe import Probe

    config = PretrainConfig(out=out, data=("in",), probe=str(data), probe_neighbours=3)
    figures = Probe(config, torch.device("cpu"))(Colours(), lambda images: images)
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(figures))
    torch.distributed.barrier()
