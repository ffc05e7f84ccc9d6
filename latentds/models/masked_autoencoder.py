"""Masked autoencoder: a ViT that sees a quarter of the tokens, and a decoder that paints the rest.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; the decoder's blocks are
lightly's (MIT) on timm's.
"""
# B batch, C channels, H W pixels or latent cells, h w tokens of the grid, T = h w, K kept tokens,
# M masked ones, D features, V values of a token (C times its cells)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.embedders.latent_stem import SplitCells
from latentds.errors import InputError, ShapeError, missing_extra
from latentds.models.token_masks import MAE_RATIO, masked_count
from latentds.models.vit_tokens import encode, require_vit

TARGET_EPSILON = 1e-6  # facebookresearch/mae models_mae.py, forward_loss


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder; the loss is the squared error of the hidden tokens' values.

    backbone    timm ViT, num_classes=0; with average pooling fc_norm=False, so that its last norm
                is trained. A class token, where it has one, goes through the decoder too
    width       of the decoder: 512; depth 8, heads 16: the paper's best in table 1, and its code's
    ratio       share of tokens hidden, 0.75 in the paper; fixes how many, so that nothing waits for
                the device
    seed        draws the decoder, the same on every rank
    raises      InputError for a network that cannot be trained so, ValueError for the ratio,
                MissingExtraError

    The loss is a mean over the batch: averaged over ranks of equal batches, loss and gradients are
    those of one rank that has all of them. Targets are the input's own values, normalized as the
    network takes them: crops of images, or latents. They and the loss are float32 under autocast
    too. Nothing is drawn here.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        ratio: float = MAE_RATIO,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_vit(backbone, class_token=False)
        network: Any = backbone
        self.backbone = network
        self.grid: tuple[int, int] = tuple(network.patch_embed.grid_size)
        # in the input's own cells: pixels, or latent cells under a latent stem
        self.token_size = network.patch_embed.patch_size[0]
        self.channels = network.patch_embed.proj.in_channels
        self.check_network(network.patch_embed)
        self.masked = masked_count(self.grid[0] * self.grid[1], ratio)
        if not 0 < self.masked < self.grid[0] * self.grid[1]:
            raise ValueError(f"ratio is {ratio}, {self.masked} tokens of a grid {self.grid}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(network.num_features, width)
            self.decoder = new_decoder(self.grid, network.num_prefix_tokens, width, depth, heads)
            self.predict = nn.Linear(width, self.channels * self.token_size**2)
            for layer in (self.embed, self.predict):  # models_mae.py, _init_weights
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, values: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """`loss`, a scalar.

        values  float (B, C, H, W), of the size the backbone was built for
        masks   bool (B, T), True for hidden, as many in every row as `token_masks.random_masks`
                hides at this ratio
        raises  ShapeError; ValueError for other counts (on CUDA a device assertion)
        """
        self.check(values, masks)
        order = masks.int().argsort(dim=1, stable=True)  # kept tokens first
        kept, hidden = order[:, : -self.masked], order[:, -self.masked :]
        predicted = self.decode(encode(self.backbone, values, kept=kept), kept, hidden)
        with torch.autocast(values.device.type, enabled=False):
            targets = self.targets(values.float())
            targets = targets.gather(1, hidden[..., None].expand(-1, -1, targets.shape[2]))
            return {"loss": functional.mse_loss(predicted.float(), targets)}

    def check_network(self, patch_embed: nn.Module) -> None:
        if self.grid[0] != self.grid[1]:  # lightly's position embedding
            raise InputError(f"backbone of {self.grid} tokens; the decoder takes square grids")
        if isinstance(patch_embed, SplitCells):
            raise InputError(
                "latent cells are larger than a token, so no token has values of its own to "
                "predict; take method dino or dinov2, or an arch of larger patches"
            )

    def check(self, values: Tensor, masks: Tensor) -> None:
        """Raise for values or masks of another shape or count."""
        height, width = (edge * self.token_size for edge in self.grid)
        if values.shape[1:] != (self.channels, height, width):
            wanted = f"(B, {self.channels}, {height}, {width})"
            raise ShapeError(f"values are {tuple(values.shape)}; the model takes {wanted}")
        if masks.shape != (len(values), self.grid[0] * self.grid[1]):
            shape = (len(values), self.grid[0] * self.grid[1])
            raise ShapeError(f"masks are {tuple(masks.shape)}; the model takes {shape}")
        right = (masks.sum(1) == self.masked).all()
        if masks.is_cuda:  # reading it would wait for the device
            torch._assert_async(right)
        elif not right:
            counts = sorted({int(count) for count in masks.sum(1)})
            raise ValueError(f"masks hide {counts} tokens; {self.masked} in every row is wanted")

    def targets(self, values: Tensor) -> Tensor:
        """What is to be predicted, (B, T, V): values normalized within each token, table 1d."""
        tokens = functional.pixel_unshuffle(values, self.token_size).flatten(2).transpose(1, 2)
        variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
        return (tokens - mean) / (variance + TARGET_EPSILON).sqrt()

    def decode(self, tokens: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
        """Predicted values (B, M, V) of the hidden tokens.

        tokens        the encoder's: prefix tokens, then the kept ones
        kept, hidden  int64 (B, K) and (B, M), places in the grid
        """
        tokens = self.embed(tokens)
        prefix = tokens.shape[1] - kept.shape[1]
        fillers = self.decoder.mask_token.to(tokens.dtype).expand(*hidden.shape, -1)
        patches = torch.cat([tokens[:, prefix:], fillers], dim=1)
        places = torch.cat([kept, hidden], dim=1).argsort(dim=1)  # where each place's token lies
        patches = patches.gather(1, places[..., None].expand_as(patches))
        decoded = self.decoder(torch.cat([tokens[:, :prefix], patches], dim=1))[:, prefix:]
        decoded = decoded.gather(1, hidden[..., None].expand(-1, -1, decoded.shape[2]))
        predicted: Tensor = self.predict(decoded)
        return predicted


def new_decoder(grid: tuple[int, int], prefix: int, width: int, depth: int, heads: int) -> Any:
    """lightly's decoder: mask token, fixed sine-cosine positions, timm blocks, a norm."""
    try:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
    except ImportError as error:
        raise missing_extra("lightly>=1.6", "train") from error
    return MaskedVisionTransformerDecoderTIMM(
        grid[0] * grid[1], width, depth, heads, num_prefix_tokens=prefix
    )
