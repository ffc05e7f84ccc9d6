"""Foreign descriptions of networks: refused beyond any network's size, held to their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentds.errors import WeightsError

MAX_NUMBER = 16_384  # of a config: no known decoder is wider
MAX_LAYERS, MAX_ENTRIES, MAX_DEPTH = 64, 64, 6
# What networks and diffusers raise for values that do not fit.
BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)


def check_bounded(value: Any, where: str, limit: float = MAX_NUMBER, depth: int = 0) -> None:
    """Refuse numbers and lists no decoder has: they would cost memory and time before any error."""
    if depth > MAX_DEPTH:
        raise WeightsError(f"{where}: nested more than {MAX_DEPTH} deep; refused")
    if isinstance(value, Mapping | list) and len(value) > MAX_ENTRIES:
        raise WeightsError(f"{where}: {len(value)} entries; at most {MAX_ENTRIES}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            counts = "layers" in key or ("num_" in key and "blocks" in key)
            check_bounded(entry, f"{where}.{key}"[:100], MAX_LAYERS if counts else limit, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            check_bounded(entry, where, limit, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= limit:
        raise WeightsError(f"{where}: {value!r:.40} is more than any decoder has ({limit})")


def check_placed(
    expected: Mapping[str, Tensor], shapes: Mapping[str, list[int]], where: str
) -> None:
    """Refuse tensors that are missing, left over, or of another shape than the architecture's."""
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r:.80} left over"
        raise WeightsError(
            f"{where}: {what} ({len(missing)} tensors missing, {len(extra)} left over); not of the "
            "architecture given"
        )
    for name, tensor in expected.items():
        if list(tensor.shape) != shapes[name]:
            raise WeightsError(
                f"{where}: {name} is {shapes[name]}, the architecture has {list(tensor.shape)}"
            )
