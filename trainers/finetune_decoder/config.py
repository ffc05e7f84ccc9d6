"""Settings of finetune_decoder. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import TrainConfig, check_ranges, refuse_given

# What the paper states (section 3.2), and what the code it builds on has where it does not: the
# defaults of these options. How equation 1 is read is left open.
PAPER = (
    *("steps", "batch_size", "accumulation", "lr", "warmup_steps", "schedule", "clip", "spike"),
    *("precision", "l1_weight", "gan_weight", "gan_weight_mode", "disc_start", "disc_lr"),
    *("reduction", "batch_norm", "crop_px", "half_scale", "student", "teacher"),
)
ADAM_BETAS = (0.5, 0.9)  # latent-diffusion, ldm/models/autoencoder.py

StudentName = Literal["turbo-xs", "turbo-s", "turbo-s32", "turbo-m", "turbo-f32", "taesd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a decoder for latents that do not change.

    Defaults are the paper's, or those of the code it builds on if the paper states none.
    """

    data: str | None = None
    """Data set of latents (folder, hf://, s3://), with --originals; the decoder then also learns to
    undo the set's quantizer."""
    split: str = "train"
    """Split of --data to train on."""
    originals: Path | None = None
    """Source of --data: pictures, slides, coordinates, archives. The set's golden patches are
    compared with it."""
    slides: Path | None = None
    """Slides that coordinates belong to, as for convert."""
    root: Path | None = None
    """Folder to which a table's paths are relative, as for convert."""
    anonymize: Path | None = None
    """Key file of a set whose names are hashes."""
    pictures: tuple[Path, ...] = ()
    """Folders of pictures instead of --data, cropped at random and encoded on the fly; every folder
    is drawn from equally often."""
    picture_weights: tuple[float, ...] = ()
    """Relative frequency of each folder of --pictures."""
    held_out: str | None = None
    """Regular expression: pictures of --pictures whose relative path matches are used for
    validation, never for training."""
    validate_on: tuple[Path, ...] = ()
    """More folders of held-out pictures for validation."""
    validate_split: str | None = None
    """Split of --data for validation, as whole patches with their originals; by default val or
    test, if the set has one and --validate-on is not given."""
    validate_crops: int = 24
    """Pictures (or patches) for validation, spread over all available ones, with one centre crop of
    each picture."""
    validate_px: int = 256
    """Edge of a picture's crop, a multiple of the autoencoder's factor."""
    quantize: bool = True
    """Quantize latents that are encoded on the fly, by --codebook, by the autoencoder's own
    codebook (tiny-v1's levels, tiny-v2's records), or by levels fitted to crops of the pictures."""
    codebook: Path | None = None
    """Codebook file of the latents, for --pictures."""
    crop_px: int | None = None
    """Edge of the training crops or windows, a multiple of the autoencoder's factor; by default
    whole patches of --data and 256 px of --pictures."""
    half_scale: float = 0.0
    """Share of the crops of --pictures at half resolution."""
    autoencoder: str | None = None
    """Autoencoder of the latents, whose decoder is trained: name, local folder, or the folder of a
    decoder to train on; by default the one that --data records, and tiny-v1 for --pictures."""
    student: StudentName | None = None
    """Train this small decoder instead. turbo-xs (for CPUs), turbo-s, turbo-s32 (for many
    channels), turbo-m and turbo-f32 start from the linear least-squares decoder and random weights
    elsewhere; taesd starts from random weights."""
    teacher: bool = False
    """Also learn from the output of the autoencoder's own decoder."""
    teacher_weight: float = 1.0
    """Weight of the L1 distance to the teacher's output."""
    zero_stage: Literal[0, 1, 2] = 0
    """What DeepSpeed divides among the ranks: 0 nothing, 1 optimizer state, 2 also gradients. 3
    would divide the last layer, which the adaptive weight needs whole."""
    embedder: str | None = None
    """Frozen encoder of the embedding loss: uni, phikon-v2, efficientnet-lite0, timm:NAME, ..."""
    embedder_input: Literal["card", "native"] = "card"
    """card: images resized and cropped as the embedder's card says; native: whole images as they
    are (uni, uni2-h, gigapath, phikon-v2)."""
    judges: tuple[str, ...] = ()
    """Embedders that judge held-out pictures and take no part in training."""
    l1_weight: float = 1.0
    gan_weight: float = 0.5
    """Factor of the adaptive ratio; 0 trains without a discriminator."""
    embedding_weight: float | None = None
    """Weight of the embedding loss; 1 by default with an --embedder."""
    gan_weight_mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: the ratio of gradient norms at the decoder's last layer, as in the reference;
    fixed: the weight itself, in proportion to --l1-weight under either --reduction."""
    disc_start: int = 50_001
    """First step of the discriminator (from the reference; the paper does not state it)."""
    disc_lr: float | None = None
    """Learning rate of the discriminator; by default that of the decoder."""
    reduction: Literal["sum", "mean"] = "sum"
    """sum: the reconstruction loss is summed over an image's values, as in the reference, to which
    the adaptive ratio's limit of 10,000 and its 1e-4 refer."""
    embedding_reduction: Literal["mean", "sum"] = "mean"
    """L1 over an embedding's dimensions. Equation 1 of the paper is a sum; as a sum it weighs some
    1,000 times the pixels' L1, which is a mean. The run records the choice."""
    batch_norm: Literal["eval", "sync"] = "eval"
    """BatchNorm of decoders that have it (DC-AE): eval for frozen statistics, sync to train them
    over all ranks (GPU only)."""
    workers: int = 4
    """Threads that read originals and pictures."""
    half: bool = False
    """Save the decoder in fp16."""
    name: str | None = None
    """Name on the decoder's card; by default that of the output folder."""
    licence: str = "unknown"
    """Licence of the trained decoder, on its card."""
    preset: Literal["paper-finetune"] | None = None
    """paper-finetune: the paper's settings; other values of the same options are refused."""

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
        is_right = len(weights) == len(self.pictures) and 0 < sum(weights) < math.inf
        if weights and not (is_right and all(weight >= 0 for weight in weights)):
            raise ValueError(
                f"--picture-weights are {weights}; give one for each of the {len(self.pictures)} "
                "--pictures, none below 0 and one above"
            )

    def check_validation(self) -> None:
        """Refuse options of a validation that does not take place."""
        if self.held_out is not None:
            try:
                re.compile(self.held_out)
            except re.error as error:
                raise ValueError(
                    f"--held-out {self.held_out!r} is no regular expression: {error}"
                ) from error
        if self.data is None:
            words = "belongs to --data; --pictures takes --held-out or --validate-on"
            refuse_given(self, ("validate_split",), words)
        else:
            words = "is for --pictures; with --data give --validate-split or --validate-on"
            refuse_given(self, ("held_out",), words)
            if self.validate_split is not None and self.validate_on:
                raise ValueError("give --validate-split or --validate-on, not both")
            if self.validate_split == self.split:
                raise ValueError(f"--validate-split {self.split} is the training split too")
        if self.data is None and self.held_out is None and not self.validate_on:
            self.refuse_unvalidated("give --held-out or --validate-on")

    def refuse_unvalidated(self, remedy: str) -> None:
        """ValueError for what needs held-out pictures where there are none."""
        words = f"needs held-out pictures, and there are none; {remedy}"
        refuse_given(self, ("sample_every", "judges"), words)

    def check_networks(self) -> None:
        if self.embedder is None and self.embedding_weight is not None:
            raise ValueError(f"--embedding-weight {self.embedding_weight} needs an --embedder")
        if self.precision == "bf16" and self.gan_weight > 0:
            raise ValueError(
                "--precision bf16: the discriminator has BatchNorm, whose statistics stay in "
                "float32; take autocast, or --gan-weight 0"
            )

    def check_paper(self) -> None:
        if self.embedder is None:
            raise ValueError("--preset paper-finetune needs an --embedder (the paper's is uni)")
        changed = [name for name in PAPER if getattr(self, name) != getattr(FinetuneConfig, name)]
        wanted = [f"{name}={getattr(FinetuneConfig, name)}" for name in changed]
        if self.embedding_weight != 1:
            wanted.append("embedding_weight=1")
        if wanted:
            raise ValueError(
                f"--preset paper-finetune has {', '.join(wanted)}; leave out these or the preset"
            )
