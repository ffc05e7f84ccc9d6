"""Settings of classify_patches. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import check_ranges, refuse_given

from latentds.evaluation.patchsets.patch_set import PatchInput

# What only one probe has.
OF_PROBES: dict[str, tuple[str, ...]] = {
    "linear": ("penalty",),
    "knn": ("neighbours",),
    "finetune": (
        *("arch", "weights", "epochs", "lr", "weight_decay", "warmup_steps", "schedule", "jitter"),
        *("augment", "accumulation", "clip", "zero_stage", "tensorboard"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyConfig(PatchInput):
    """Classify patches: a probe of frozen features, or a network of timm trained as a whole."""

    out: Path
    """Folder of the run. The same command continues the run and skips finished folds. Several nodes
    need a folder that all of them see."""
    probe: Literal["linear", "eva", "knn", "finetune"] = "linear"
    """linear: logistic regression of an embedder's features, as UNI's authors do; eva: a linear
    layer trained by AdamW and stopped by validation, as the eva benchmark does; knn: nearest
    neighbours of the features; finetune: a whole network of timm."""
    embedder: str | None = None
    """Embedder whose features are probed: uni, phikon-v2, efficientnet-lite0, timm:NAME, nic:FILE,
    ..., each with @PATH for local weights; or a backbone folder of 'pretrain'."""
    input: Literal["images", "latents"] = "images"
    """latents: the network reads latents without decoding: with --probe finetune a ViT of timm
    behind a latent stem, else a backbone that was pretrained on latents. Colour histograms still
    use decoded pixels."""
    protocol: Literal["kfold", "val7k", "intra100k"] = "kfold"
    """kfold: every patch is tested once. val7k: each fold trains on all folds but one and tests on
    the test split or --test-data, as with CRC-VAL-HE-7K. intra100k: kfold without the test
    split."""
    test_data: Path | None = None
    """Test set of --protocol val7k, if it is a separate folder; training then uses all of
    --data."""
    folds: int = 10
    """Folds; classes are balanced, groups stay together. With --probe eva the fold after the tested
    one validates; under val7k the fold that is left out validates."""
    seed: int = 0
    """Seed of the folds, the first weights and the draws."""
    penalty: Literal["norm", "squared"] = "norm"
    """Penalty of --probe linear, with cost = features * classes / 100. norm: mean cross-entropy +
    |W| / (2 cost), as in UNI's code. squared: + |W|^2 / (2 cost), scikit-learn's with C = cost /
    patches."""
    standardize: bool = False
    """First scale features to mean 0 and deviation 1 over the training patches; UNI does not."""
    neighbours: int = 20
    """Neighbours that vote in --probe knn; UNI's authors take 20."""
    arch: str | None = None
    """Network of timm for --probe finetune: resnet18, vit_small_patch16_224, ..."""
    weights: str = "random"
    """First weights of --probe finetune: random, timm (its pretrained weights, from the Hub), or a
    file (.safetensors, or a torch file of tensors). The head is always new. The options from here
    to --zero-stage, except --batch-size, also belong to --probe finetune."""
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
    """Largest share by which brightness, contrast and saturation of training images change. Images
    are also flipped and turned by right angles; latents are only flipped and turned."""
    augment: bool = True
    """Augment training images."""
    batch_size: int = 64
    """Images of a rank in one forward pass, in training and for features."""
    accumulation: int = 1
    """Forward passes whose gradients are averaged into one step."""
    clip: float | None = None
    """Gradient norm at most; larger gradients are scaled down to it."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3
    also weights."""
    precision: Literal["fp32", "autocast"] = "fp32"
    """autocast: operations in bfloat16 where torch holds that safe, of the embedder too."""
    save_every: int = 1000
    """Steps between checkpoints of a fold."""
    log_every: int = 10
    """Steps between lines of a fold's log.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events of every fold."""
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
        if self.probe == "finetune":
            refuse_given(self, ("embedder",), "belongs to the other probes; leave it out")
        if self.probe != "finetune" and self.embedder is None:
            raise ValueError(f"--probe {self.probe} needs an --embedder, such as uni")
        for probe, names in OF_PROBES.items():
            if probe != self.probe:
                words = f"belongs to --probe {probe}; leave it out with {self.probe}"
                refuse_given(self, names, words)
        if self.probe == "eva" and self.protocol != "val7k" and self.folds < 3:
            raise ValueError(f"--probe eva validates on a fold; folds is {self.folds}, at least 3")
        if self.input == "latents":
            words = "changes colours, which latents do not have; leave it out"
            refuse_given(self, ("jitter",), words)
        if self.test_data is not None and self.protocol != "val7k":
            raise ValueError("--test-data belongs to --protocol val7k; add it, or leave this out")
        if self.split is not None and self.test_data is None and self.protocol != "kfold":
            raise ValueError(f"--protocol {self.protocol} needs train and test; leave out --split")

    @property
    def model(self) -> str:
        """What the run's table calls the classifier."""
        return f"finetune:{self.arch}" if self.probe == "finetune" else self.probe
