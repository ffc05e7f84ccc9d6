"""One rank of a probe, started by test_pretrain_probe: the figures of a network, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


class Colours(torch.nn.Module):
    """Mean and deviation of every channel, (B, 2C)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def main(data: str, rendezvous: str, rank: int, ranks: int, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    from latentds_trainers.pretrain.probe import Probe
    from latentds_trainers.pretrain.probe_config import ProbeConfig

    config = ProbeConfig(probe=data, probe_neighbours=3)
    figures = Probe(config, torch.device("cpu"))(Colours(), lambda images: images)
    Path(out).write_text(json.dumps(figures))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
