"""Settings of classify_patches. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import check_ranges, refuse_given

from latentds.evaluation.patchsets.patch_set import PatchInput

# When a run goes on: where things lie, how they are read, what is shown. Of batch_size and
# accumulation only the images of an optimizer step matter.
MAY_CHANGE = frozenset(
    {
        *("out", "data", "test_data", "groups", "slides", "root", "masks", "max_px", "keep_mb"),
        *("device", "workers", "save_every", "log_every", "tensorboard", "json"),
        *("batch_size", "accumulation"),
    }
)
# What only one probe has.
OF_PROBES: dict[str, tuple[str, ...]] = {
    "linear": ("penalty",),
    "knn": ("neighbours",),
    "finetune": (
        *("weights", "epochs", "lr", "weight_decay", "warmup_steps", "schedule", "jitter"),
        *("augment", "accumulation", "clip", "zero_stage", "tensorboard"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig(PatchInput):
    """Classify patches: a probe of frozen features, or a network of timm trained as a whole."""

    out: Path
    """Folder of the run. The same command run again goes on, and skips folds that are finished.
    With several nodes, a folder all of them see."""
    probe: Literal["linear", "eva", "knn", "finetune"] = "linear"
    """linear: logistic regression of an embedder's features, as UNI's authors do; eva: a linear
    layer trained by AdamW and stopped by validation, as the eva benchmark does; knn: nearest
    neighbours of the features; finetune: all of a network of timm."""
    embedder: str | None = None
    """Whose features are probed: uni, phikon-v2, efficientnet-lite0, timm:NAME, nic:FILE, ..., each
    with @PATH for local weights; or a backbone's folder, as 'pretrain' leaves it."""
    input: Literal["images", "latents"] = "images"
    """latents: the network reads latents, nothing is decoded. With --probe finetune a ViT of timm
    behind a latent stem; else a backbone that was pretrained on latents. Colour histograms are of
    decoded pixels all the same."""
    protocol: Literal["kfold", "val7k", "intra100k"] = "kfold"
    """kfold: every patch is tested once. val7k: trained on all folds but one, tested on the test
    split or --test-data each time, as with CRC-VAL-HE-7K. intra100k: kfold without the test
    split."""
    test_data: Path | None = None
    """Test set of --protocol val7k where it is a folder of its own; all of --data is trained on."""
    folds: int = 10
    """Folds; classes balanced over them, groups kept together. With --probe eva the fold after the
    tested one validates; under val7k the one that is left out does."""
    seed: int = 0
    """Seed of the folds, the first weights and the draws."""
    penalty: Literal["norm", "squared"] = "norm"
    """Penalty of --probe linear, with cost = features * classes / 100. norm: mean cross-entropy +
    |W| / (2 cost), as UNI's code has it. squared: + |W|^2 / (2 cost), scikit-learn's with
    C = cost / patches."""
    standardize: bool = False
    """Bring features to mean 0 and deviation 1 over the training patches first; UNI does not."""
    neighbours: int = 20
    """Neighbours that vote in --probe knn; UNI's authors take 20."""
    arch: str | None = None
    """With --probe finetune: resnet18, vit_small_patch16_224, or any other network of timm."""
    weights: str = "random"
    """What --probe finetune starts from: random, timm (its pretrained weights, from the Hub), or a
    file (.safetensors, or a torch file of tensors). The head is always new. The options from here
    to --zero-stage, but for --batch-size, are of --probe finetune too."""
    epochs: int = 10
    """Passes over a fold's training patches; the last weights are tested."""
    lr: float = 3e-4
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = 0.05
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine to zero at the last step."""
    jitter: float = 0.1
    """Share by which brightness, contrast and saturation of training images change at most. They
    are flipped, and turned by right angles, besides; nothing else is done to latents."""
    augment: bool = True
    """Change training images at all."""
    batch_size: int = 64
    """Images a rank takes at once, in training and to make features."""
    accumulation: int = 1
    """Forward passes whose gradients are averaged into one step."""
    clip: float | None = None
    """Gradient norm beyond which gradients are scaled down to it."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed spreads over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3
    weights too."""
    precision: Literal["fp32", "autocast"] = "fp32"
    """autocast: operations in bfloat16 where torch holds that safe, of the embedder too."""
    save_every: int = 1000
    """Steps between checkpoints of a fold."""
    log_every: int = 10
    """Steps between lines of a fold's log.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events of every fold as well."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        PatchInput.__post_init__(self)
        least = {"folds": 2, "neighbours": 1, "epochs": 1, "batch_size": 1, "accumulation": 1}
        check_ranges(
            self,
            least | {"save_every": 1, "log_every": 1, "warmup_steps": 0},
            positive=("lr", "clip"),
            not_negative=("weight_decay",),
            below_one=("jitter",),
        )
        self.check_choices()

    def check_choices(self) -> None:
        """Refuse a probe without its network, and test sets that no protocol uses."""
        if self.probe == "finetune" and self.arch is None:
            raise ValueError("--probe finetune needs --arch, such as resnet18")
        if self.probe == "finetune" and self.embedder is not None:
            raise ValueError("--embedder is for probes of its features; leave it with finetune")
        if self.probe != "finetune" and self.embedder is None:
            raise ValueError(f"--probe {self.probe} needs an --embedder, such as uni")
        if self.probe != "finetune" and self.arch is not None:
            raise ValueError(f"--arch is for --probe finetune; leave it with {self.probe}")
        for probe, names in OF_PROBES.items():
            if probe != self.probe:
                refuse_given(self, names, f"is of --probe {probe}; leave it with {self.probe}")
        if self.probe == "eva" and self.protocol != "val7k" and self.folds < 3:
            raise ValueError(f"--probe eva validates on a fold; folds is {self.folds}, at least 3")
        if self.input == "latents":
            words = "changes colours, which latents have not; leave it"
            refuse_given(self, ("jitter",), words)
        if self.test_data is not None and self.protocol != "val7k":
            raise ValueError("--test-data is for --protocol val7k")
        if self.split is not None and self.test_data is None and self.protocol != "kfold":
            raise ValueError(f"--protocol {self.protocol} needs train and test; leave --split")

    @property
    def model(self) -> str:
        """What the run's table calls the classifier."""
        return f"finetune:{self.arch}" if self.probe == "finetune" else self.probe
