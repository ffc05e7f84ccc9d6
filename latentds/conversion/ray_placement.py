"""Room for workers on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.prepared import MAX_WORKERS

Node = dict[str, Any]  # CPU, GPU: how many it has


def cpus_of_worker(config: ConvertConfig, nodes: Sequence[Node]) -> float:
    """CPUs of a worker: asked for, a GPU's share of its node, or the encoder's threads."""
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    if not config.gpus_per_worker:
        return float(torch.get_num_threads())
    shares = [node.get("CPU", 1) / node["GPU"] for node in nodes if node.get("GPU")]
    share: float = min(shares, default=4.0) * config.gpus_per_worker // 1
    return max(1.0, min(MAX_WORKERS, share))


def room(config: ConvertConfig, nodes: Sequence[Node]) -> int:
    """How many workers the nodes have room for."""
    wanted = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    return sum(
        # Fractions: 0.3 goes into 0.9 three times.
        min(int(node.get(name, 0) / count + 1e-6) for name, count in wanted.items() if count)
        for node in nodes
    )


def no_room(config: ConvertConfig, nodes: Sequence[Node]) -> str:
    """That no node has room for a worker, in words."""
    sizes = [f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes]
    return (
        f"no node of the Ray cluster has room for a worker of {config.cpus_per_worker:g} CPUs and "
        f"{config.gpus_per_worker:g} GPUs (nodes: {', '.join(sizes) or 'none'})"
    )
