"""Functions of tensors made faster: compiled (eager where that fails), or replayed from graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from latentds.errors import first_words

R = TypeVar("R")
WARMUP_RUNS = 3  # of a function before its CUDA graph is captured, as PyTorch's notes ask for


class Compiled:
    """A function under torch.compile; eager, with one warning, where the compiler fails."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.eager = function
        self.function: Callable[..., Tensor] = torch.compile(function, dynamic=False)

    def __call__(self, *values: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.function(*values)
        except TorchDynamoException as error:
            reason = f"torch.compile failed, running eagerly ({first_words(error)})"
            warnings.warn(reason, stacklevel=2)
            self.function = self.eager
            return self.function(*values)


class Graphed(Generic[R]):
    """A function of CUDA tensors (B, ...) replayed from a graph, of the largest batch so far.

    A smaller batch takes the first places of the graph's memory, and its time.

    function  never waits for the device; what it gives of a patch depends on that patch alone
    take      the first so many patches of a result, copied: the next replay overwrites it
    """

    def __init__(self, function: Callable[..., R], take: Callable[[R, int], R]) -> None:
        self.function, self.take = function, take
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], R]] = {}
        self.replays = 0

    def __call__(self, *values: Tensor) -> R:
        size, kind = len(values[0]), tuple((value.shape[1:], value.dtype) for value in values)
        if kind not in self.graphs or size > len(self.graphs[kind][1][0]):
            self.graphs.pop(kind, None)  # its memory is free before more is taken
            self.graphs[kind] = self.capture(values)
        graph, sources, result = self.graphs[kind]
        for source, value in zip(sources, values, strict=True):
            source[:size].copy_(value)
        graph.replay()
        self.replays += 1
        return self.take(result, size)

    def capture(self, values: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], R]:
        """Warm up on a side stream, then record: on the GPU of the values, whichever is current."""
        sources = [value.clone() for value in values]
        with torch.cuda.device(sources[0].device):  # work of another would not be recorded
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_RUNS):
                    self.function(*sources)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The thread that pins the next batches allocates meanwhile: a global check refuses it.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self.function(*sources)
        return graph, sources, result
