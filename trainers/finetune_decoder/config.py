"""Settings of finetune_decoder. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

from latentds_trainers.engine.settings import TrainConfig, check_ranges, refuse_given

# What the paper states (section 3.2), and what the code it builds on has where it does not. Not
# among them: how equation 1 is read (see `readings`); both readings are the paper's preset.
PAPER: dict[str, Any] = {
    "steps": 120_000,
    "batch_size": 12,
    "accumulation": 1,
    "lr": 5e-5,
    "warmup_steps": 10_000,
    "schedule": "constant",
    "clip": None,
    "spike": None,
    "precision": "fp32",
    "l1_weight": 1.0,
    "gan_weight": 0.5,
    "embedding_weight": 1.0,
    "gan_weight_mode": "adaptive",
    "disc_start": 50_001,
    "disc_lr": None,
    "reduction": "sum",
    "batch_norm": "eval",
    "crop_px": None,
    "half_scale": 0.0,
    "init": None,
    "student": None,
    "teacher": False,
}
ADAM_BETAS = (0.5, 0.9)  # latent-diffusion, ldm/models/autoencoder.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a decoder for latents that stay as they are.

    Defaults are the paper's where it tells, else those of the code it builds on.
    """

    data: str | None = None
    """Data set of latents (folder, hf://, s3://), with --originals; the decoder then learns to undo
    its quantizer too."""
    split: str = "train"
    """Split of --data to train on."""
    originals: Path | None = None
    """What --data was converted from: pictures, slides, coordinates, archives. Checked by the set's
    golden patches."""
    slides: Path | None = None
    """As for convert: slides that coordinates belong to."""
    root: Path | None = None
    """As for convert: folder that a table's paths start from."""
    anonymize: Path | None = None
    """Key file of a set whose names are hashes."""
    pictures: tuple[Path, ...] = ()
    """Instead of --data: folders of pictures, cropped at random and encoded on the fly; every
    folder is drawn from equally often."""
    picture_weights: tuple[float, ...] = ()
    """How often each folder of --pictures is drawn from, relative to the others."""
    held_out: str | None = None
    """Regular expression: pictures of --pictures whose relative path matches are never trained on,
    and are validated on."""
    validate_on: tuple[Path, ...] = ()
    """Further folders of held-out pictures to validate on."""
    validate_split: str | None = None
    """Split of --data to validate on, whole patches from its codes and originals; val or test where
    the set has one and --validate-on is not given."""
    validate_crops: int = 24
    """Pictures to validate on, one centre crop of each (or patches), spread over all that there
    are."""
    validate_px: int = 256
    """Edge of the crops of pictures, a multiple of the autoencoder's factor."""
    quantize: bool = True
    """Quantize what is encoded on the fly, by --codebook, by what ships with the autoencoder
    (tiny-v1's levels, tiny-v2's records), or by levels fitted to crops of the pictures."""
    codebook: Path | None = None
    """Codebook file of the latents, for --pictures."""
    crop_px: int | None = None
    """Edge of the crops or windows trained on, a multiple of the autoencoder's factor; whole
    patches of --data and 256 px of --pictures where not given."""
    half_scale: float = 0.0
    """Share of the crops of --pictures taken at half resolution."""
    autoencoder: str | None = None
    """Whose latents they are: name, or local folder; by default what --data records, and tiny-v1
    for --pictures."""
    init: str | None = None
    """Decoder to start from instead of the autoencoder's own: a decoder folder."""
    student: Literal["turbo-xs", "turbo-s", "turbo-m", "turbo-f32", "taesd"] | None = None
    """Train this small decoder instead. turbo-xs (for CPUs), turbo-s, turbo-m and turbo-f32 start
    from the linear decoder of least squares, what else they have from random weights, as all of
    taesd."""
    teacher: bool = False
    """Also approach what the autoencoder's own decoder makes of the latents."""
    teacher_weight: float = 1.0
    """Weight of the L1 distance to the teacher's output."""
    zero_stage: Literal[0, 1, 2] = 0
    """What DeepSpeed spreads over the ranks: 0 nothing, 1 optimizer state, 2 gradients too. 3 would
    part the last layer, which the adaptive weight needs whole."""
    embedder: str | None = None
    """Frozen encoder of the embedding loss: uni, phikon-v2, efficientnet-lite0, timm:NAME, ..."""
    embedder_input: Literal["card", "native"] = "card"
    """card: images resized and cropped as the embedder's card says; native: whole images as they
    are (uni, uni2-h, gigapath, phikon-v2)."""
    checkpoint_embedder: bool = False
    """Recompute the embedder's activations in the backward pass: less memory, more time."""
    judges: tuple[str, ...] = ()
    """Embedders that only judge held-out pictures."""
    l1_weight: float = 1.0
    gan_weight: float = 0.5
    """Multiplies the adaptive ratio; 0 trains without a discriminator."""
    embedding_weight: float | None = None
    """Weight of the embedding loss; 1 where an --embedder is given."""
    gan_weight_mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: the ratio of gradient norms at the decoder's last layer, as in the reference;
    fixed: the weight itself, in proportion to --l1-weight under either --reduction."""
    disc_start: int = 50_001
    """Step from which the discriminator counts and learns (reference; the paper does not tell)."""
    disc_lr: float | None = None
    """Learning rate of the discriminator; the decoder's where not given."""
    reduction: Literal["sum", "mean"] = "sum"
    """sum: the reconstruction loss is summed over an image's values, as in the reference, against
    which the adaptive ratio's limit of 10,000 and its 1e-4 are meant."""
    embedding_reduction: Literal["mean", "sum"] = "mean"
    """L1 over an embedding's dimensions. Equation 1 of the paper is a sum; taken so it weighs some
    1,000 times the pixels' L1, which is a mean. The run records which reading it took."""
    batch_norm: Literal["eval", "sync"] = "eval"
    """BatchNorm of decoders that have it (DC-AE): frozen statistics, or trained over all ranks
    (GPU only)."""
    workers: int = 4
    """Threads that read originals and pictures."""
    half: bool = False
    """Save the decoder in fp16."""
    name: str | None = None
    """Name on the decoder's card; the output folder's where not given."""
    licence: str = "unknown"
    """Licence of the trained decoder, on its card."""
    preset: Literal["paper-finetune"] | None = None
    """paper-finetune: the paper's settings; refuses others for what they fix."""

    steps: int = 120_000
    batch_size: int = 12
    lr: float = 5e-5
    warmup_steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedder is not None and self.embedding_weight is None:
            object.__setattr__(self, "embedding_weight", 1.0)
        check_ranges(
            self,
            {"workers": 1, "validate_crops": 1, "validate_px": 1, "disc_start": 0},
            positive=("disc_lr",),
            not_negative=("l1_weight", "gan_weight", "embedding_weight", "teacher_weight"),
            shares=("half_scale",),
        )
        self.check_inputs()
        self.check_validation()
        self.check_networks()
        if self.preset == "paper-finetune":
            self.check_paper()

    def check_inputs(self) -> None:
        if (self.data is None) == (not self.pictures):
            raise ValueError("give either --data with --originals, or --pictures")
        if self.data is not None and self.originals is None:
            raise ValueError("--data needs --originals, the pictures it was converted from")
        weights = self.picture_weights
        if weights and len(weights) != len(self.pictures):
            raise ValueError(
                f"{len(weights)} --picture-weights for {len(self.pictures)} --pictures"
            )
        if weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise ValueError(f"--picture-weights are {weights}; none below 0, not all 0")

    def check_validation(self) -> None:
        """Refuse options of a validation that does not take place."""
        if self.held_out is not None:
            try:
                re.compile(self.held_out)
            except re.error as error:
                raise ValueError(
                    f"--held-out {self.held_out!r} is no regular expression: {error}"
                ) from error
        if self.data is not None:
            if self.held_out is not None:
                raise ValueError(
                    "--held-out is for --pictures; with --data give --validate-split or "
                    "--validate-on"
                )
            if self.validate_split is not None and self.validate_on:
                raise ValueError("give --validate-split or --validate-on, not both")
            if self.validate_split == self.split:
                raise ValueError(f"--validate-split {self.split} is the split trained on")
            return
        if self.validate_split is not None:
            raise ValueError(
                "--validate-split is of --data; with --pictures give --held-out or --validate-on"
            )
        if self.held_out is None and not self.validate_on:
            self.refuse_unvalidated("give --held-out or --validate-on")

    def refuse_unvalidated(self, remedy: str) -> None:
        """ValueError for what needs held-out pictures where there are none."""
        words = f"shows held-out pictures and there are none; {remedy}"
        refuse_given(self, ("sample_every", "judges"), words)

    def check_networks(self) -> None:
        if self.embedder is None and self.embedding_weight is not None:
            raise ValueError(f"--embedding-weight {self.embedding_weight} without an --embedder")
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(
                "--zero-stage 3 parts the last layer, which the adaptive weight needs whole; "
                "choose 0, 1 or 2"
            )
        if self.precision == "bf16" and self.gan_weight > 0:
            raise ValueError(
                "--precision bf16: the discriminator has BatchNorm, whose statistics stay in "
                "float32; take autocast, or --gan-weight 0"
            )
        if self.student and self.init:
            raise ValueError("--student brings its own first weights; leave --init")

    def check_paper(self) -> None:
        if self.embedder is None:
            raise ValueError("--preset paper-finetune needs an --embedder (the paper's is uni)")
        changed = [name for name, value in PAPER.items() if getattr(self, name) != value]
        if changed:
            wanted = ", ".join(f"{name}={PAPER[name]}" for name in changed)
            raise ValueError(f"--preset paper-finetune has {wanted}; leave these or the preset")


def readings(config: FinetuneConfig) -> dict[str, str]:
    """How the run reads what the paper leaves open, and where it trains on other latents than it.

    source  Yellapragada et al. 2025, section 3.2
    """
    eq_1 = {
        "sum": "a sum over the embedding's dimensions, as written",
        "mean": "a mean over the embedding's dimensions; written is a sum",
    }
    is_quantized = config.data is not None or config.quantize
    latents = "dequantized codes; the paper trains on latents that are not quantized"
    return {
        "equation 1": eq_1[config.embedding_reduction],
        "latents": latents if is_quantized else "not quantized, as in the paper",
    }
