"""Compiled: a function under torch.compile that falls back to eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from latentds.errors import first_words


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
