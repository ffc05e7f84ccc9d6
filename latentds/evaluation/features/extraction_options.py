"""What a run that extracts features is told and gives back."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

PRECISIONS, SAVED = ("float32", "bfloat16"), ("float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What is extracted, and how.

    batch_size   patches embedded at once; fixed within a slide, for its last bits depend on it
    precision    of the embedder: float32, or bfloat16 for speed
    saved        numbers of the files: float32, or float16 for half the room
    max_patches  at most so many patches a slide, drawn by `seed`; None takes all
    seed         of that choice, which is a function of seed and slide
    clam         CLAM's layout too: pt_files, h5_files and coordinates
    max_bad      slides that may fail, each reported; one more ends the run
    patches      settings that decide which patches there are and how they are decoded, to be
                 recorded: JSON values
    """

    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    saved: Literal["float32", "float16"] = "float32"
    max_patches: int | None = None
    seed: int = 0
    clam: bool = False
    max_bad: int = 0
    patches: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.max_patches is not None and self.max_patches < 1):
            raise ValueError(f"batch_size is {self.batch_size}, max_patches {self.max_patches}; "
                             "at least 1")  # fmt: skip
        if self.precision not in PRECISIONS or self.saved not in SAVED:
            raise ValueError(f"precision {self.precision!r}, saved {self.saved!r}; float32 or "
                             "bfloat16, and float32 or float16")  # fmt: skip
        if self.max_bad < 0:
            raise ValueError(f"max_bad is {self.max_bad}; 0 or more")

    def decisive(self) -> dict[str, Any]:
        """What decides about the numbers, as JSON: a resumed run must have the same."""
        names = ("batch_size", "precision", "saved", "max_patches", "patches")
        found = {name: getattr(self, name) for name in names}
        return found | {"seed": None if self.max_patches is None else self.seed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a rank did.

    slides   names of its slides with features now, sorted
    skipped  how many of them were there before
    patches  embedded in this run
    bad      slides that failed, with the reason
    dim      D
    """

    slides: list[str]
    skipped: int
    patches: int
    bad: dict[str, str]
    dim: int
