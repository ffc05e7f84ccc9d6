"""Views: several crops of every patch of a batch, crop-major; checks of what makes them."""
# B patches, G global crops, L local crops, C channels, H W and h w pixels (or cells) of a crop

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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


def is_chance(value: float) -> bool:
    return 0 <= value <= 1


Rule = tuple[str, Callable[[Any], bool], str]  # fields, whether a value is right, what is right
COUNTS: Rule = ("globals locals", lambda count: count >= 0, "at least 0")


def check_fields(views: Any, rules: Sequence[Rule]) -> None:
    """ValueError for the first field whose value is not right; None is right everywhere."""
    for names, is_right, words in rules:
        for name in names.split():
            value = getattr(views, name)
            if value is not None and not is_right(value):
                raise ValueError(f"{name}={value}; {words}")
    if views.globals + views.locals == 0:
        raise ValueError("globals=0 and locals=0; at least one view")
