"""Views: several crops of every patch of a batch, crop-major; checks of what makes them."""
# B patches, G global crops, L local crops, C channels, H W and h w pixels (or cells) of a crop

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """Crops of B patches.

    globals  float (G, B, C, H, W), in [0, 1] or normalized
    locals   float (L, B, C, h, w); L may be 0
    """

    globals: Tensor
    locals: Tensor

    def __len__(self) -> int:
        return self.globals.shape[1]

    def __getitem__(self, part: slice) -> Views:
        """The views of consecutive patches."""
        return Views(self.globals[:, part], self.locals[:, part])

    def crops(self) -> list[Tensor]:
        """G + L tensors (B, C, ., .), the global ones first."""
        return [*self.globals.unbind(0), *self.locals.unbind(0)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Views:
        """The views with `change` applied to both tensors."""
        return Views(change(self.globals), change(self.locals))


def at_least(least: int, **values: int) -> None:
    """Refuse a whole number below `least`, by its field."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}; at least {least}")


def probabilities(**values: float | Sequence[float]) -> None:
    """Refuse what is no probability, or are none."""
    for name, value in values.items():
        several = value if isinstance(value, Sequence) else (value,)
        if not all(0 <= one <= 1 for one in several):
            raise ValueError(f"{name}={value}; probabilities lie between 0 and 1")
