"""A training step as a user's would be: timm's ViT, a method's losses, AdamW, bfloat16 on a GPU."""
# B batch, G global and L local crops, T tokens of a global crop, h w their grid

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.models.token_masks import global_masks, random_masks

if TYPE_CHECKING:
    from latentds_tools.bench.step_config import Config

    from latentds.views.view_batch import Views

TEMPERATURE, MOMENTUM = 0.04, 0.996  # of the teacher; DINO's, and no time depends on them
DISTILLING = ("dino", "dinov2")
CLASSES = 9


class Training:
    """A model of random weights and its optimizer; `step` takes views.

    stem  what latents are like where they are the input, None for pixels
    """

    def __init__(self, config: Config, stem: LatentStemConfig | None, device: torch.device) -> None:
        self.method, self.device = config.method, device
        self.model = build_model(config, stem).to(device)
        wanted = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(wanted, lr=1e-5, fused=device.type == "cuda")
        edge = config.global_px // (stem.factor if stem else 1)
        embedding: Any = getattr(self.model, "backbone", self.model).patch_embed
        self.grid: tuple[int, int] = embedding.dynamic_feat_size((edge, edge))

    def step(self, views: Views, seeds: Tensor) -> None:
        """Masks where the method has them, forward, backward, update, and the teacher's."""
        self.optimizer.zero_grad(set_to_none=True)
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = self.loss(views, seeds)
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.method in DISTILLING:
            distilling: Any = self.model
            distilling.update_teacher(MOMENTUM)

    def loss(self, views: Views, seeds: Tensor) -> Tensor:
        """The method's loss; labels are made up."""
        if self.method == "supervised":
            logits = self.model(views.globals[0]).float()
            labels = torch.arange(len(logits), device=self.device) % CLASSES
            return nn.functional.cross_entropy(logits, labels)
        if self.method == "mae":
            hidden = random_masks(seeds, self.grid[0] * self.grid[1])
            found: dict[str, Tensor] = self.model(views.globals[0], hidden)
        else:
            hidden = None
            if self.method == "dinov2":  # bool (G, B, T)
                hidden = global_masks(seeds, len(views.globals), self.grid)
            found = self.model(views, teacher_temp=TEMPERATURE, masks=hidden)
        return found["loss"]


def build_model(config: Config, stem: LatentStemConfig | None) -> nn.Module:
    assert config.arch is not None and config.out_dim is not None
    options: dict[str, Any] = {"stem": stem, "img_px": config.global_px}
    if config.method == "supervised":
        return build_vit(config.arch, **options, num_classes=CLASSES)
    if config.method == "mae":
        from latentds.models.masked_autoencoder import MaskedAutoencoder

        return MaskedAutoencoder(build_vit(config.arch, **options))
    from latentds.models.self_distillation import SelfDistillation

    student, teacher = (build_vit(config.arch, **options) for _ in range(2))
    return SelfDistillation(student, teacher, method=config.method, out_dim=config.out_dim)
