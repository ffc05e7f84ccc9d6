"""DINO and DINOv2-like self-distillation: a student that learns to agree with its own average.

DINO: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". DINOv2-like:
Oquab et al. 2023, in its short setup: DINO's loss on class tokens, iBOT's (Zhou et al. 2022) on
masked patch tokens, KoLeo (Sablayrolles et al. 2019) on class tokens. Heads and losses are
lightly's (MIT).
"""
# B batch of a rank, G global and L local views, C channels, H W pixels or latent cells, T patch
# tokens, D features, K prototypes (out_dim), n masked tokens

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from latentds.errors import ShapeError, missing_extra
from latentds.models.gathering import GatheredCenter, gather_rows
from latentds.models.vit_tokens import encode, require_vit

if TYPE_CHECKING:
    from latentds.views.crops import Views

STUDENT_TEMP = 0.1  # DINO main_dino.py, DINOLoss; DINOv2 loss/dino_clstoken_loss.py
CENTER_MOMENTUM = 0.9  # the same two
IBOT_WEIGHT = 1.0  # DINOv2 ssl_default_config.yaml, ibot.loss_weight


class Branch(nn.Module):
    """A backbone with its heads; student and teacher are one each.

    head        logits (., K) of class tokens (., D)
    patch_head  of patch tokens; None where one head serves both
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, patch_head: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    def tokens(
        self, values: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (B, D) and patch tokens (B, T, D) of values (B, C, H, W)."""
        tokens = encode(self.backbone, values, masks=masks, mask_token=mask_token)
        prefix: Any = self.backbone.num_prefix_tokens
        return tokens[:, 0], tokens[:, prefix:]

    def patch_logits(self, tokens: Tensor) -> Tensor:
        """Logits (n, K) of patch tokens (n, D)."""
        head = self.head if self.patch_head is None else self.patch_head
        logits: Tensor = head(tokens)
        return logits


class SelfDistillation(nn.Module):
    """Student and teacher in one module; the teacher, without gradients, is the student's average.

    student_backbone   timm ViT with a class token, num_classes=0, dynamic_img_size=True for local
                       crops of another size; stochastic depth is its own affair
    teacher_backbone   the same network; its weights are overwritten with the student's
    method             dino, or dinov2: with iBOT and KoLeo
    out_dim            prototypes K: 65,536 in both papers
    hidden_dim         of the heads, 2048; bottleneck_dim 256: both papers
    separate_heads     a head of its own for patch tokens, as DINOv2's long runs have; its default
                       configuration shares one (ibot.separate_head)
    koleo_weight       0.1: DINOv2 ssl_default_config.yaml, dino.koleo_loss_weight
    seed               draws the heads, the same on every rank
    last_layer_frozen  set True for the first epoch (both papers): the heads' last layers then get
                       zero gradients; weight decay, which the papers leave out too, still acts
    raises             InputError for a network that cannot be trained so, ValueError for a teacher
                       of another shape, MissingExtraError

    What the papers do around it: teacher temperature from 0.04 to 0.07 in 30 epochs (both), teacher
    momentum from 0.996 (DINO) or 0.992 (DINOv2) to 1 by half a cosine.

    Losses are means over the *global* batch: averaged over ranks of equal batches, loss and
    gradients are those of one rank that has all of them. So `forward` is collective. Centres move
    once a forward pass: with accumulation several times a step, each time by the mean of what all
    ranks saw in that pass; KoLeo spreads the patches of a pass.

    Nothing is drawn but the student's stochastic depth and dropout, where it has them, by torch's
    own generator: seed that by run, step and rank where resumed runs must repeat. Losses are
    float32 under autocast too. Weights have to be float32: in bfloat16 a mean of momentum 0.996
    does not move.
    """

    mask_token: Tensor | None

    def __init__(
        self,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        *,
        method: Literal["dino", "dinov2"],
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        separate_heads: bool = False,
        koleo_weight: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method not in ("dino", "dinov2"):
            raise ValueError(f"method is {method!r}; dino or dinov2")
        for backbone in (student_backbone, teacher_backbone):
            require_vit(backbone, class_token=True)
        masked = method == "dinov2"
        features: Any = student_backbone.num_features
        sizes = (features, hidden_dim, bottleneck_dim, out_dim)
        branches = []
        for backbone in (student_backbone, teacher_backbone):
            patch_head = new_head(sizes, False, seed + 1) if masked and separate_heads else None
            branches.append(Branch(backbone, new_head(sizes, not masked, seed), patch_head))
        self.student, self.teacher = branches
        self.out_dim, self.koleo_weight = out_dim, koleo_weight
        self.last_layer_frozen = False
        self.dino_loss, self.patch_loss, self.koleo_loss = new_losses(out_dim, masked)
        # zeros: DINOv2 models/vision_transformer.py
        self.mask_token = nn.Parameter(torch.zeros(features)) if masked else None
        self.start_teacher()
        trained: dict[str, Any] = dict(self.student.named_parameters())
        for name, parameter in trained.items():
            if ".last_layer." in name and parameter.requires_grad:
                parameter.register_hook(self.unless_frozen)

    def unless_frozen(self, gradient: Tensor) -> Tensor:
        """A last layer's gradient; a hook, as ZeRO takes gradients away while they arrive."""
        return torch.zeros_like(gradient) if self.last_layer_frozen else gradient

    def start_teacher(self) -> None:
        """Make the teacher the student's copy, without gradients."""
        try:
            self.teacher.load_state_dict(self.student.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the teacher is not the student's network: {error}") from error
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SelfDistillation:
        """Self; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def backbone(self) -> nn.Module:
        """The teacher's: what is probed and exported."""
        return self.teacher.backbone

    def forward(
        self, views: Views, *, teacher_temp: float, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, scalars: `loss`, and its parts without gradient.

        views         globals (G, B, C, H, W), G of 2 or more, and locals (L, B, C, h, w); the
                      teacher sees the globals
        teacher_temp  of this step
        masks         dinov2 only: bool (G, B, T), tokens hidden from the student
        returns       dino; for dinov2 also ibot, and koleo, the sum over global views; loss is
                      dino + ibot + koleo_weight * koleo
        raises        ValueError, ShapeError
        """
        self.check(views, masks)
        hidden = None if masks is None else masks.flatten(0, 1)
        targets, patch_targets = self.teach(views.globals, hidden)
        features, patches, logits = self.study(views, hidden)
        with torch.autocast(views.globals.device.type, enabled=False):
            parts = {"dino": self.dino_loss(list(targets), list(logits), teacher_temp)}
            if hidden is not None:
                parts["ibot"] = self.patch_loss(
                    patch_targets, patches, hidden[:, None], teacher_temp
                )
                parts["koleo"] = torch.stack([self.koleo(view) for view in features]).sum()
            loss = parts["dino"] + IBOT_WEIGHT * parts.get("ibot", 0)
            loss = loss + self.koleo_weight * parts.get("koleo", 0)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def check(self, views: Views, masks: Tensor | None) -> None:
        """Raise ValueError or ShapeError for views or masks that do not belong here."""
        if (masks is None) != (self.mask_token is None):
            given = "no masks" if masks is None else "masks"
            raise ValueError(f"{given} given; dinov2 takes token_masks.global_masks, dino none")
        if len(views.globals) < 2:
            raise ShapeError(f"globals are {tuple(views.globals.shape)}; at least 2 global views")
        if masks is not None and masks.shape[:2] != views.globals.shape[:2]:
            shapes = f"{tuple(masks.shape)}; globals {tuple(views.globals.shape)}"
            raise ShapeError(f"masks are (G, B, T) for globals (G, B, ...), not {shapes}")

    @torch.no_grad()
    def teach(self, values: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The teacher's float32 logits (G, B, K) of globals, and (n, K) of the hidden tokens."""
        classes, patches = self.teacher.tokens(values.flatten(0, 1))
        logits = self.teacher.head(classes).float().view(*values.shape[:2], -1)
        if hidden is None:
            return logits, None
        if hidden.shape != patches.shape[:2]:
            given, shape = tuple(hidden.shape), tuple(patches.shape[:2])
            raise ShapeError(f"masks are {given} for all global views; their tokens are {shape}")
        return logits, self.teacher.patch_logits(patches[hidden]).float()

    def study(self, views: Views, hidden: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The student's features (G, B, D), logits (n, K) of the hidden tokens, (G + L, B, K)."""
        count, batch = views.globals.shape[:2]
        classes, patches = self.student.tokens(views.globals.flatten(0, 1), hidden, self.mask_token)
        features = classes.reshape(count, batch, -1)
        if len(views.locals):
            classes = torch.cat([classes, self.student.tokens(views.locals.flatten(0, 1))[0]])
        logits = self.student.head(classes).float().view(-1, batch, self.out_dim)
        if hidden is None:
            return features, None, logits
        return features, self.student.patch_logits(patches[hidden]).float(), logits

    def koleo(self, features: Tensor) -> Tensor:
        """KoLeo of the class tokens (B, D) of one view, among those of all ranks."""
        loss: Tensor = self.koleo_loss(gather_rows(features.float()))
        return loss

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: `momentum` of it stays.

        Call after the optimizer's step, on every rank. Integer buffers are copied.
        raises  ValueError for weights that are not float32
        """
        mine, theirs = self.teacher.state_dict(), self.student.state_dict()
        means = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        low = [name for name in means if mine[name].dtype != torch.float32]
        if low:
            raise ValueError(f"teacher.{low[0]} is {mine[low[0]].dtype}; keep weights in float32")
        torch._foreach_lerp_(
            [mine[name] for name in means], [theirs[name] for name in means], 1 - momentum
        )
        for name in mine.keys() - set(means):
            mine[name].copy_(theirs[name])


def new_head(sizes: tuple[int, int, int, int], norm_last_layer: bool, seed: int) -> Any:
    """lightly's projection head for (D, hidden, bottleneck, K), drawn from the seed.

    norm_last_layer  keep its prototypes at length 1: DINO does (main_dino.py), DINOv2 does not
    """
    try:
        from lightly.models.modules import DINOProjectionHead
    except ImportError as error:
        raise missing_extra("lightly", "train") from error
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # lightly takes torch's older weight_norm
        torch.manual_seed(seed)
        return DINOProjectionHead(*sizes, norm_last_layer=norm_last_layer)


def new_losses(out_dim: int, masked: bool) -> tuple[Any, Any, Any]:
    """lightly's losses of class tokens, patch tokens and features; the first alone for DINO."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

    dino = DINOLoss(out_dim, student_temp=STUDENT_TEMP, center_momentum=CENTER_MOMENTUM)
    if not masked:
        return dino, None, None
    patch = IBOTPatchLoss(out_dim, student_temp=STUDENT_TEMP, center_momentum=CENTER_MOMENTUM)
    patch.center = GatheredCenter(out_dim, CENTER_MOMENTUM)
    return dino, patch, KoLeoLoss()
