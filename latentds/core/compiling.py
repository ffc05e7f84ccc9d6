"""Compiled: a function under torch.compile that falls back to eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


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
            reason = " ".join(str(error).split())[:120]
            warnings.warn(f"torch.compile failed, running eagerly ({reason})", stacklevel=2)
            self.function = self.eager
            return self.function(*values)
