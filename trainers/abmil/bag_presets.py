"""What bag classifiers are made with where nothing else is said: presets with published names.

Source of each: `clam` CLAM's main.py and models/model_clam.py, `patho-bench` Patho-Bench's
configs/finetune/abmil.yaml, `ilse` AMLab's AttentionDeepMIL.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from latentds_trainers.engine.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class BagSettings:
    """Settings that a preset has and any of which may be given instead; see `AbmilConfig`.

    hidden       None for a layer as wide as the features
    max_patches  None for all of a bag
    raises       ValueError for counts, rates and shares that make no sense
    """

    hidden: int | None = None
    attention: int
    dropout: float
    gated: bool
    attention_dropout: float
    activation: Literal["relu", "gelu"] = "relu"
    post_attention: bool = False
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float
    weight_decay: float
    schedule: Literal["constant", "cosine"] = "constant"
    epochs: int = 20
    min_epochs: int = 20
    patience: int = 20
    select: Literal["best", "last"] = "last"
    balance: Literal["draws", "loss", "none"]
    max_patches: int | None = None

    def __post_init__(self) -> None:
        counts = ("hidden", "attention", "epochs", "min_epochs", "patience", "max_patches")
        check_ranges(
            self,
            dict.fromkeys(counts, 1),
            positive=("lr",),
            not_negative=("weight_decay",),
            below_one=("dropout", "attention_dropout"),
        )

    @property
    def layers(self) -> dict[str, Any]:
        """Those that are the network's, by the names of its arguments."""
        names = ("hidden", "attention", "dropout", "gated")
        more = ("attention_dropout", "activation", "post_attention")
        return {name: getattr(self, name) for name in (*names, *more)}


PRESETS = {
    "clam": BagSettings(
        hidden=512, attention=256, dropout=0.25, gated=True, attention_dropout=0.25,
        lr=1e-4, weight_decay=1e-5, epochs=200, min_epochs=50, select="best", balance="draws",
    ),
    "patho-bench": BagSettings(
        attention=512, dropout=0.1, gated=False, attention_dropout=0.25,
        activation="gelu", post_attention=True, optimizer="adamw", lr=3e-4, weight_decay=1e-5,
        schedule="cosine", balance="loss", max_patches=2048,
    ),
    "ilse": BagSettings(
        hidden=500, attention=128, dropout=0.0, gated=True, attention_dropout=0.0,
        lr=5e-4, weight_decay=1e-4, balance="none",
    ),
}  # fmt: skip
