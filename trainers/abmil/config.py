"""Settings of abmil. No heavy import: its `--help` is built from this.

Source of each preset: `clam` CLAM's main.py and models/model_clam.py, `patho-bench` Patho-Bench's
configs/finetune/abmil.yaml, `ilse` AMLab's AttentionDeepMIL.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from latentds_trainers.engine.settings import check_ranges, plain, settled

from latentds.evaluation.patchsets.patch_set import PatchInput


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbmilConfig(PatchInput):
    """Classify slides by attention over their patches' features, in a cross-validation.

    The preset sets the options of model and schedule that are not given; `settings` has them all.
    """

    out: Path
    """Folder of the run. The same command continues the run and skips finished folds."""
    bags: Path | None = None
    """Features, one file a slide: a folder of 'latentds features', TRIDENT's job or features
    folder, or CLAM's h5_files folder."""
    data: Path | None = None  # type: ignore[assignment]
    """Patches instead of --bags: originals as 'latentds convert' takes them, or latents. Their
    features are computed once and kept in OUT/features (but see --on-the-fly). With --bags: the
    patches that heat maps show."""
    embedder: str | None = None
    """With --data: the embedder of the features (uni, phikon-v2, efficientnet-lite0, timm:NAME,
    ...). With --bags: which features to take, if the folder has several."""
    on_the_fly: bool = False
    """With --data: write no features to disk. Bags that fit --cache-gb are embedded once and stay
    in memory. Patches of other bags (--max-patches) are embedded at every draw, and all of them at
    every validation."""
    labels: Path | None = None
    """CSV: slide_id (or slide, bag), label, and case_id (or patient, group, tma_core) if known. By
    default the labels recorded in --data, or the labels.csv that 'latentds features' wrote to
    --bags."""
    allow_subset: bool = False
    """Permit slides without a label and labels without a slide, which are refused otherwise."""
    folds: int = 10
    """Folds of the cross-validation; patients stay together, classes are balanced."""
    splits: Path | None = None
    """Splits instead of --folds: a folder of CLAM's splits_<i>.csv, one such file, or Patho-Bench's
    TSV."""
    seed: int = 0
    """Seed of the folds, the first weights and the draws."""
    repeats: int = 1
    """Trainings of every fold on the same split, with seeds from --seed upwards."""
    preset: Literal["clam", "patho-bench", "ilse"] = "clam"
    """clam: gated, hidden 512, attention 256, three dropouts of 0.25, Adam 1e-4, weight decay 1e-5,
    at most 200 epochs, ended after epoch 50 once 20 epochs brought no lower validation loss, best
    weights, classes drawn equally often. patho-bench: not gated, attention 512 between layers of
    GELU as wide as the features, dropouts 0.1, 0.25, 0.1, AdamW 3e-4, cosine, 20 epochs, 2048
    patches a bag, weighted loss, last weights. ilse: gated, hidden 500, attention 128, no dropout,
    Adam 5e-4, weight decay 1e-4, 20 epochs, last weights."""
    hidden: int | None = None
    """Width of the first layer; with patho-bench that of the features."""
    attention: int | None = None
    """Width of the attention layer."""
    dropout: float | None = None
    """Dropout of the first layer, and of the layer after the mean."""
    attention_dropout: float | None = None
    """Dropout of the attention's branches."""
    activation: Literal["relu", "gelu"] | None = None
    """Activation of the first layer, and of the layer after the mean."""
    post_attention: bool | None = None
    """Add a layer between the weighted mean and the logits."""
    gated: bool | None = None
    """Multiply the attention's tanh branch by a sigmoid one."""
    optimizer: Literal["adam", "adamw"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: Literal["constant", "cosine"] | None = None
    epochs: int | None = None
    """Epochs at most; an epoch draws as many bags as the fold trains on."""
    min_epochs: int | None = None
    """Epochs before early stopping may end a fold."""
    patience: int | None = None
    """Epochs without a lower validation loss before early stopping ends a fold."""
    select: Literal["best", "last"] | None = None
    """best: weights of the lowest validation loss, with early stopping; last: weights of the last
    epoch."""
    balance: Literal["draws", "loss", "none"] | None = None
    """How to balance unequal classes: draw bags of each class equally often, or weigh the loss."""
    max_patches: int | None = None
    """Patches of a bag in training, drawn again each time; validation and test take all."""
    batch_size: int = 1
    """Bags of a rank in one forward pass."""
    accumulation: int = 1
    """Forward passes whose gradients are averaged into one step."""
    clip: float | None = None
    """Gradient norm at most; larger gradients are scaled down to it."""
    precision: Literal["fp32", "autocast"] = "fp32"
    """autocast: training in bfloat16 where torch holds that safe; scores are always float32."""
    save_every: int = 10
    """Epochs between checkpoints of a fold."""
    cache_gb: float = 4.0
    """Features that a rank keeps in memory, in GB; other features are read from their files each
    time, or computed again (--on-the-fly)."""
    embed_batch: int = 64
    """Patches embedded at a time, with --data."""
    heat_maps: int = 0
    """Number of tested slides whose attention is drawn to OUT/heat_maps, spread over folds and
    classes."""
    heat_map_slides: tuple[str, ...] = ()
    """Slides whose attention is drawn."""
    tensorboard: bool = False
    """Also write TensorBoard events of every fold."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.data is None and self.bags is None:
            raise ValueError("give --bags, or --data with --embedder")
        if self.data is not None:
            PatchInput.__post_init__(self)
        if self.bags is None and self.embedder is None:
            raise ValueError("--data needs an --embedder to make features with")
        if self.bags is not None and self.on_the_fly:
            raise ValueError("--on-the-fly makes features of --data; --bags has them already")
        least = dict.fromkeys(("repeats", "batch_size", "accumulation", "save_every"), 1)
        least |= {"embed_batch": 1, **({"folds": 2} if self.splits is None else {})}
        not_negative = ("cache_gb", "heat_maps", "seed")
        check_ranges(self, least, positive=("clip",), not_negative=not_negative)
        _ = self.settings  # refuses what cannot be

    @functools.cached_property
    def settings(self) -> BagSettings:
        """The preset, with what is given instead."""
        return settled(PRESETS[self.preset], self)

    def to_json(self) -> dict[str, Any]:
        return plain(self) | plain(self.settings)
