"""Settings of the probe of a pretraining. No heavy import."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from latentds_trainers.engine.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a pretraining's settings inherit; it calls `ProbeConfig.__post_init__` in its own."""

    probe: str | None = None
    """Labelled data set, or originals in class folders, whose features are probed while training:
    nearest neighbours and a linear probe. Its train split is fitted to and its test split scored;
    without a test split, a fifth of the groups is held out."""
    probe_groups: Path | None = None
    """CSV of what must stay together in the probe: a column slide, source, bag or path, and one of
    group, patient, case_id or tma_core. By default TCGA patients or slides, where they are
    known."""
    probe_decoder: str | None = None
    """Decode the probe's latents with this decoder instead of the recorded one."""
    probe_patches: int = 4096
    """Patches of the probe at most, half of them to fit to, half to score: always the same ones."""
    probe_neighbours: int = 20
    """Nearest neighbours that vote."""

    def __post_init__(self) -> None:
        check_ranges(self, {"probe_patches": 4, "probe_neighbours": 1})
        for name in ("probe_groups", "probe_decoder"):
            if self.probe is None and getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} without a --probe")
