"""CropWindows: of every patch, only the latents that its views show are decoded."""
# B patches, n of a group, C latent channels, h w latent cells, V views

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from latentds.loading.decoding import Decoder
from latentds.views.boxes import Boxes
from latentds.views.halo import measure_halo
from latentds.views.multicrop import MultiCrop
from latentds.views.view_batch import Views

# Sizes of windows, in parts of the patch: few shapes, for compiled and captured decoders.
STEPS = 16
GROUPS = 8  # of a batch, of equal numbers of patches


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Patches of a batch whose windows are of one size.

    rows, columns  of the windows, in cells
    patches        int64 (n,), places in the batch
    top, left      int64 (n,), the windows' first cells
    """

    rows: int
    columns: int
    patches: Tensor
    top: Tensor
    left: Tensor

    def to(self, device: torch.device) -> Group:
        """The group on a device, without waiting for it."""
        moved = [part.to(device, non_blocking=True) for part in (self.patches, self.top, self.left)]
        return Group(self.rows, self.columns, *moved)


@dataclasses.dataclass(frozen=True, eq=False)
class WindowPlan:
    """What of a batch is decoded: groups, and the boxes of its global and local views."""

    groups: list[Group]
    boxes: list[Boxes]

    @property
    def cells(self) -> int:
        """Latent cells that are decoded."""
        return sum(group.rows * group.columns * len(group.patches) for group in self.groups)


class CropWindows:
    """Views of codes without decoding what no view shows.

    A patch's window is the box around all its views, and the decoder's halo around that; where it
    ends at the patch's border, so does the decoder's own padding. Pixels equal those of the whole
    patch's decode up to the arithmetic's rounding.

    raises  ContractError for a decoder that sees the whole patch
    """

    def __init__(
        self, views: MultiCrop, decoder: Decoder, latents_shape: tuple[int, int, int]
    ) -> None:
        assert decoder.autoencoder is not None
        self.views, self.decoder, self.grid = views, decoder, latents_shape[1:]
        self.factor = decoder.autoencoder.card.factor
        self.halo = measure_halo(decoder.autoencoder, latents_shape[0], self.factor)

    def plan(self, seeds: Tensor) -> WindowPlan:
        """Windows of the patches of seeds int64 (B,), on the host: sizes are needed there."""
        boxes = self.views.boxes(self.views.draw(seeds), self.decoder.patch_px)
        spans = [
            span_of(boxes, start, length, self.factor, self.halo, cells)
            for start, length, cells in (
                ("top", "height", self.grid[0]),
                ("left", "width", self.grid[1]),
            )
        ]
        return WindowPlan(self.grouped(*spans), boxes)

    def grouped(self, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> list[Group]:
        """Groups of (first, last + 1) cells (B,) down and across, small windows first."""
        needed = [end - first for first, end in (rows, columns)]
        steps = [-(-STEPS * cells // size) for cells, size in zip(needed, self.grid, strict=True)]
        most = torch.maximum(*steps)
        order = most.argsort(stable=True)
        groups = []
        for patches in order.tensor_split(min(GROUPS, max(len(order), 1))):
            step = int(most[patches].max()) if len(patches) else STEPS
            height, width = (-(-size * step // STEPS) for size in self.grid)
            top = rows[0][patches].clamp(max=self.grid[0] - height)
            left = columns[0][patches].clamp(max=self.grid[1] - width)
            groups.append(Group(height, width, patches, top, left))
        return groups

    @torch.no_grad()
    def __call__(
        self, codes: Tensor, codebooks: Tensor | None, seeds: Tensor, plan: WindowPlan
    ) -> Views:
        """Views of codes uint8 (B, *codes_shape) on the decoder's device."""
        latents = self.decoder.lookup(codes, codebooks)
        boxes = [part.to(latents.device) for part in plan.boxes]
        made = [self.group_views(latents, seeds, boxes, group) for group in plan.groups]
        back = torch.cat([group.patches for group in plan.groups]).argsort()
        back = back.to(latents.device, non_blocking=True)
        return Views(
            torch.cat([views.globals for views in made], 1)[:, back],
            torch.cat([views.locals for views in made], 1)[:, back],
        )

    def group_views(
        self, latents: Tensor, seeds: Tensor, boxes: list[Boxes], group: Group
    ) -> Views:
        """Views of the patches of a group, from windows of the batch's latents."""
        group, device = group.to(latents.device), latents.device
        patches = group.patches
        rows = group.top[:, None] + torch.arange(group.rows, device=device)
        columns = group.left[:, None] + torch.arange(group.columns, device=device)
        window = latents[patches[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        images = self.decoder.decode_within_memory(window.permute(0, 3, 1, 2))
        corner = (group.top * self.factor, group.left * self.factor)
        within = [part.map(lambda own: own[:, patches]).moved(*corner) for part in boxes]
        return self.views.render(images, self.views.draw(seeds[patches]), within)


def span_of(
    boxes: list[Boxes], start: str, length: str, factor: int, halo: int, cells: int
) -> tuple[Tensor, Tensor]:
    """First and last + 1 cell (B,) along an axis that the views of every patch need."""
    starts = torch.cat([getattr(part, start) for part in boxes])
    ends = starts + torch.cat([getattr(part, length) for part in boxes])
    first = starts.amin(0) // factor - halo
    end = -(-ends.amax(0) // factor) + halo
    return first.clamp(min=0), end.clamp(max=cells)
