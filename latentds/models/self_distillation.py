"""DINO and DINOv2-like self-distillation: a student that learns to agree with its own average.

DINO: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". DINOv2-like:
Oquab et al. 2023, in its short setup: DINO's loss on class tokens, iBOT's (Zhou et al. 2022) on
masked patch tokens, KoLeo (Sablayrolles et al. 2019) on class tokens. Heads and KoLeo are
lightly's (MIT); so are the formulas of the losses, whose classes DINOLoss and IBOTPatchLoss move a
centre in every forward pass and wait for the device. Features and means are of the global batch,
gathered over the ranks; without `torch.distributed` everything is this process's own.
"""
# B batch of a rank, G global and L local views, C channels, H W pixels or latent cells, T patch
# tokens, D features, K prototypes (out_dim), S views of the student, globals first, N = G B images,
# n hidden tokens of all of them, R ranks

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latentds.errors import ShapeError, missing_extra
from latentds.models.vit_tokens import encode, require_vit

if TYPE_CHECKING:
    from latentds.views.view_batch import Views

CENTER_MOMENTUM = 0.9  # DINO main_dino.py, DINOLoss; DINOv2 loss/dino_clstoken_loss.py
IBOT_WEIGHT = 1.0  # DINOv2 ssl_default_config.yaml, ibot.loss_weight
KOLEO_WEIGHT = 0.1  # DINOv2 ssl_default_config.yaml, dino.koleo_loss_weight
STUDENT_TEMP = 0.1  # DINO main_dino.py, DINOLoss; DINOv2 loss/dino_clstoken_loss.py


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The tokens that the student does not see.

    masks    bool (N, T), True for hidden
    places   int64 (n,), where they are in N * T tokens
    weights  float32 (n,), each one's share of the loss: an image's sum to 1 / N
    """

    masks: Tensor
    places: Tensor
    weights: Tensor

    @staticmethod
    def of(masks: Tensor) -> Hidden:
        """Those of masks; counting them waits for the device, so once a forward pass."""
        images, tokens = masks.shape
        places = masks.flatten().nonzero()[:, 0]
        counts = masks.sum(1).index_select(0, places // tokens)
        return Hidden(masks, places, 1 / (counts * images))

    def among(self, tokens: Tensor) -> Tensor:
        """The hidden ones (n, D) of patch tokens (N, T, D)."""
        return tokens.flatten(0, 1).index_select(0, self.places)


def class_loss(teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Mean over patches, and over pairs of different views.

    teacher, student  logits (G, B, K) and (S, B, K)
    center            of the teacher's, (1, K)
    """
    targets = ((teacher - center) / teacher_temp).softmax(-1)
    logs = (student / STUDENT_TEMP).log_softmax(-1)
    pairs = -torch.einsum("gbk,sbk->gs", targets, logs)
    pairs.fill_diagonal_(0)  # a view with itself
    return pairs.sum() / ((pairs.numel() - len(teacher)) * teacher.shape[1])


def patch_loss(
    teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float, weights: Tensor
) -> Tensor:
    """Mean over the hidden tokens of an image, then over all images; 0 of one that hides none.

    teacher, student  logits (n, K)
    center            of the teacher's, (1, K)
    weights           (n,), of `Hidden`
    """
    targets = ((teacher - center) / teacher_temp).softmax(-1)
    losses = -(targets * (student / STUDENT_TEMP).log_softmax(-1)).sum(-1)
    return (losses * weights).sum()


class Branch(nn.Module):
    """A backbone with its head, logits (., K) of class and patch tokens (., D) alike.

    Student and teacher are one each. One head for both is DINOv2's default (ibot.separate_head).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def tokens(
        self, values: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (B, D) and patch tokens (B, T, D) of values (B, C, H, W)."""
        tokens = encode(self.backbone, values, masks=masks, mask_token=mask_token)
        prefix: Any = self.backbone.num_prefix_tokens
        return tokens[:, 0], tokens[:, prefix:]


class SelfDistillation(nn.Module):
    """Student and teacher in one module; the teacher, without gradients, is the student's average.

    student_backbone   timm ViT with a class token, num_classes=0, dynamic_img_size=True for local
                       crops of another size; stochastic depth is its own affair
    teacher_backbone   the same network; its weights are overwritten with the student's
    method             dino, or dinov2: with iBOT and KoLeo
    out_dim            prototypes K: 65,536 in both papers
    hidden_dim         of the heads, 2048; bottleneck_dim 256: both papers
    seed               draws the heads, the same on every rank
    raises             InputError for a network that cannot be trained so, ValueError for a teacher
                       of another shape, MissingExtraError

    What the papers do around it: teacher temperature from 0.04 to 0.07 in 30 epochs, the heads'
    last layers (`is_last_layer`) left alone for the first epoch (both), teacher momentum from 0.996
    (DINO) or 0.992 (DINOv2) to 1 by half a cosine.

    Losses are means over the *global* batch: averaged over ranks of equal batches, loss and
    gradients are those of one rank that has all of them. Calls are collective: `forward` with
    dinov2, `update_teacher` always. Centres move in `update_teacher`, once a step, by the mean of
    what all ranks saw in all its forward passes: dino and ibot are what one pass of all patches
    gives. KoLeo is not: it takes the nearest neighbour within a pass, among the patches of all
    ranks.

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
        self.student, self.teacher = (
            Branch(backbone, new_head(sizes, not masked, seed))
            for backbone in (student_backbone, teacher_backbone)
        )
        self.out_dim = out_dim
        self.center = GatheredCenter(out_dim, CENTER_MOMENTUM)
        self.patch_center = GatheredCenter(out_dim, CENTER_MOMENTUM) if masked else None
        self.koleo_loss = new_koleo() if masked else None
        # zeros: DINOv2 models/vision_transformer.py
        self.mask_token = nn.Parameter(torch.zeros(features)) if masked else None
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
                      dino + ibot + KOLEO_WEIGHT * koleo
        raises        ValueError, ShapeError
        """
        self.check(views, masks)
        hidden = None if masks is None else Hidden.of(masks.flatten(0, 1))
        targets, patch_targets = self.teach(views.globals, hidden)
        features, patches, logits = self.study(views, hidden)
        with torch.autocast(views.globals.device.type, enabled=False):
            parts = {"dino": class_loss(targets, logits, self.center.value, teacher_temp)}
            self.center.add(targets.flatten(0, 1))
            if hidden is not None:
                assert patch_targets is not None and patches is not None and self.patch_center
                self.patch_center.add(patch_targets)
                center = self.patch_center.value
                parts["ibot"] = patch_loss(
                    patch_targets, patches, center, teacher_temp, hidden.weights
                )
                parts["koleo"] = torch.stack([self.koleo(view) for view in features]).sum()
            loss = parts["dino"] + IBOT_WEIGHT * parts.get("ibot", 0)
            loss = loss + KOLEO_WEIGHT * parts.get("koleo", 0)
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
    def teach(self, values: Tensor, hidden: Hidden | None) -> tuple[Tensor, Tensor | None]:
        """The teacher's float32 logits (G, B, K) of globals, and (n, K) of the hidden tokens."""
        classes, patches = self.teacher.tokens(values.flatten(0, 1))
        logits = self.teacher.head(classes).float().view(*values.shape[:2], -1)
        if hidden is None:
            return logits, None
        if hidden.masks.shape != patches.shape[:2]:
            given, shape = tuple(hidden.masks.shape), tuple(patches.shape[:2])
            raise ShapeError(f"masks are {given} for all global views; their tokens are {shape}")
        return logits, self.teacher.head(hidden.among(patches)).float()

    def study(self, views: Views, hidden: Hidden | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The student's features (G, B, D), logits (n, K) of the hidden tokens, (G + L, B, K)."""
        count, batch = views.globals.shape[:2]
        masks = None if hidden is None else hidden.masks
        classes, patches = self.student.tokens(views.globals.flatten(0, 1), masks, self.mask_token)
        features = classes.reshape(count, batch, -1)
        if len(views.locals):
            classes = torch.cat([classes, self.student.tokens(views.locals.flatten(0, 1))[0]])
        logits = self.student.head(classes).float().view(-1, batch, self.out_dim)
        if hidden is None:
            return features, None, logits
        return features, self.student.head(hidden.among(patches)).float(), logits

    def koleo(self, features: Tensor) -> Tensor:
        """KoLeo of the class tokens (B, D) of one view, among those of all ranks."""
        assert self.koleo_loss is not None
        loss: Tensor = self.koleo_loss(gather_rows(features.float()))
        return loss

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student, `momentum` of it stays, and the centres.

        Call after the optimizer's step, once, on every rank. Integer buffers are copied.
        raises  ValueError for weights that are not float32
        """
        mine, theirs = self.teacher.state_dict(), self.student.state_dict()
        means = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        low = [name for name in means if mine[name].dtype != torch.float32]
        if low:
            raise ValueError(f"teacher.{low[0]} is {mine[low[0]].dtype}; keep weights in float32")
        for center in (self.center, self.patch_center):
            if center is not None:
                center.move()
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


def new_koleo() -> Any:
    """lightly's KoLeo loss of features (B, D)."""
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()


def is_last_layer(name: str) -> bool:
    """Whether a parameter of `SelfDistillation` is of a head's last layer, its prototypes."""
    return re.match(r"student\.(patch_)?head\.last_layer\.", name) is not None


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    """Rows of all ranks in rank order; their gradient, times R, goes back to the own rows.

    For a loss that every rank computes alike, of all rows. Gradients of weights are *averaged* over
    ranks (DDP, DeepSpeed), while each rank's graph reaches the weights through its own rows alone:
    the sum over ranks would be the gradient, so the average needs the factor R. The own rows'
    gradient is whole without asking the others: nothing is sent in the backward pass.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        """Rows (R * B, D) of this rank's (B, D); B is the same on every rank."""
        context.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(ranks())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """The own rows' part of the gradient, times R."""
        start = dist.get_rank() * context.rows
        return gradients[0][start : start + context.rows] * ranks()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, float (R * B, D), differentiable in the own ones. Collective."""
    gathered: Tensor = Gather.apply(rows) if ranks() > 1 else rows
    return gathered


class GatheredCenter(nn.Module):
    """Moving average of the rows of all ranks, however many each of them has.

    momentum  share of the old centre that stays

    Rows are added pass by pass, and the centre moves once, by the mean of all of them: how many
    passes or ranks they came in makes no difference. lightly's `Center` moves with every pass, and
    averages the ranks' means: another number where ranks mask different counts of tokens, and NaN
    where one masks none.
    """

    value: Tensor

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, size))
        self.sums: Tensor | None = None  # float32 (D + 1,): of rows since the last move, and count

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take rows (n, D), n of 0 too, into the next move."""
        sums = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]).float()
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def move(self) -> None:
        """Move towards the mean of all ranks' rows; stay where there are none. Collective."""
        if self.sums is None:
            return
        sums, self.sums = self.sums, None
        if ranks() > 1:
            dist.all_reduce(sums)
        count = sums[-1]
        mean = torch.where(count > 0, sums[:-1] / count.clamp(min=1), self.value)
        self.value.lerp_(mean, 1 - self.momentum)
