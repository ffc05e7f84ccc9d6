"""Functions of tensors made faster: compiled (eager where that fails), or replayed from graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from latentds.errors import first_words

WARMUP_RUNS = 3  # of a decoder before its CUDA graph is captured, as PyTorch's notes ask for


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


class Graphed:
    """A function of CUDA tensors replayed from a graph, one a shape.

    The result is a copy: the graph's own output is overwritten by its next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.replays = 0

    def __call__(self, values: Tensor) -> Tensor:
        if values.shape not in self.graphs:
            self.graphs[values.shape] = self.capture(values)
        graph, source, result = self.graphs[values.shape]
        source.copy_(values)
        graph.replay()
        self.replays += 1
        return result.clone()

    def capture(self, values: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Warm up on a side stream, then record."""
        source, side = values.clone(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                self.function(source)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the next batches allocates meanwhile, which a global check refuses.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(source)
        return graph, source, result
