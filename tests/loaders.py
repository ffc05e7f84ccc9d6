"""Options of loaders as tests list them, flat, in the groups that loaders take; lanes of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentds.loading.decoding import Decode
from latentds.loading.options import Order, Select, Workers

GROUPS = {
    "select": (Select, ("where", "slides", "balance")),
    "order": (Order, ("global_batch_size", "last", "lanes", "rank", "world_size")),
    "decoding": (Decode, ("chunk", "channels_last", "compile", "cuda_graph", "static")),
}


def grouped(**options: Any) -> dict[str, Any]:
    """Arguments of a LatentLoader or LatentDataset."""
    for name, (group, fields) in GROUPS.items():
        found = {field: options.pop(field) for field in fields if field in options}
        if found:
            options[name] = group(**found)
    fields = ("prefetch_factor", "multiprocessing_context")
    found = {field: options.pop(field) for field in fields if field in options}
    if found:
        options["num_workers"] = Workers(count=options.get("num_workers", 0), **found)
    return options


def grouped_mixed(**options: Any) -> dict[str, Any]:
    """Arguments of a MixedLoader, whose global batch and ranks are its own."""
    own = ("global_batch_size", "rank", "world_size")
    kept = {name: options.pop(name) for name in own if name in options}
    return kept | grouped(**options)


class HostLane:
    """The CPU in a stream's place: work is done when `run` returns."""

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> None:
        return None

    def wait(self, event: None) -> None:
        del event


class HostLanes:
    """All work of a DecodeStage on the CPU, in the order of the program."""

    def __init__(self) -> None:
        self.copy = self.decode = HostLane()

    def consumer(self) -> HostLane:
        return self.copy
