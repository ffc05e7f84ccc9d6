"""What feeds a training step: cached views, cached images, the loader; and its parts alone."""
# B batch, C channels of images or latents, H W their size

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from latentds_tools.bench.harness import engaged
from latentds_tools.bench.step_sets import StepSource, endless, open_loader
from latentds_tools.bench.step_training import Training
from torch import Tensor

from latentds.embedders.latent_stem import LatentStemConfig

if TYPE_CHECKING:
    from latentds_tools.bench.step_config import Config

    from latentds.loading.batch import Batch
    from latentds.views.view_batch import Views

    MakesViews = Callable[[Tensor, Tensor], Views]

CACHED = 2  # batches that lie on the device, used in turn
TOKEN_PX = 16  # of a patch16 arch: windows of latents start where its tokens do


class Feeding:
    """One training that is fed in several ways; every method but `facts` does one step's part.

    has_decoder  whether anything is decoded
    """

    def __init__(self, source: StepSource, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.has_decoder = config.input == "pixels"
        dtype = getattr(torch, str(config.dtype))
        self.codes_loader = open_loader(source, config, device, dtype, decode="stored")
        self.stem: LatentStemConfig | None = None
        self.views: MakesViews
        if self.has_decoder:
            self.views = pixel_views(config)
            self.loader = open_loader(source, config, device, dtype, views=self.views)
        else:
            codes = self.codes_loader
            self.stem = LatentStemConfig.of(codes.contract, codes.statistics)
            self.views = latent_views(config, self.stem)
            self.loader = open_loader(
                source, config, device, dtype, decode="latents", normalize=True, views=self.views
            )
        self.batches, self.codes = endless(self.loader), endless(self.codes_loader)
        held = [self.hold(next(self.codes)) for _ in range(CACHED)]
        self.held_codes = itertools.cycle([codes for codes, _, _ in held])
        self.images = itertools.cycle([(values, seeds) for _, values, seeds in held])
        made = [(self.views(values, seeds), seeds) for _, values, seeds in held]
        self.made = itertools.cycle(made)
        self.training = Training(config, self.stem, device)

    def __enter__(self) -> Feeding:
        return self

    def __exit__(self, *_: object) -> None:
        """End the loaders' workers before their set is deleted."""
        self.batches.close()
        self.codes.close()

    def hold(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, what they decode to, seeds; copied, as the loader uses its memory again.

        Images, or normalized latents.
        """
        assert self.loader.decoder is not None
        codes, seeds = batch.codes.clone(), batch.seeds.clone()
        return codes, self.loader.decoder(codes, batch.codebooks).clone(), seeds

    def step_on_cached_views(self) -> None:
        """A step of which nothing but the network is timed."""
        self.training.step(*next(self.made))

    def step_on_cached_images(self) -> None:
        """A step that makes its views of images, or latents, that lie there."""
        values, seeds = next(self.images)
        self.training.step(self.views(values, seeds), seeds)

    def step_on_loader(self) -> None:
        """A step on what the loader brings."""
        batch = next(self.batches)
        assert batch.views is not None
        self.training.step(batch.views, batch.seeds)

    def read(self) -> None:
        """A batch of codes read and brought to the device."""
        next(self.codes)

    def make_views(self) -> None:
        """Views of a batch that lies there."""
        self.views(*next(self.images))

    def decode(self) -> None:
        """A batch of codes that lies there, decoded."""
        assert self.loader.decoder is not None
        self.loader.decoder(next(self.held_codes))

    def counters(self) -> dict[str, Any]:
        """What decoded, where; InputError where an option for it never engaged."""
        decoder = self.loader.decoder
        assert decoder is not None
        return engaged(decoder) if self.has_decoder else decoder.counters()

    def facts(self) -> dict[str, Any]:
        """Of the set, for the report."""
        contract = self.loader.contract
        return {"bytes_per_patch": contract.bytes_per_patch, "patch_px": contract.patch_px[0]}


def pixel_views(config: Config) -> Any:
    """The method's augmentation at the config's crops."""
    from latentds.views.multicrop import MultiCrop

    preset = "mae" if config.method in ("mae", "supervised") else config.method
    return MultiCrop.preset(
        preset,
        globals=config.globals,
        locals=config.locals,
        global_px=config.global_px,
        local_px=config.local_px,
        compile=config.compile_views,
    )


def latent_views(config: Config, stem: LatentStemConfig) -> Any:
    """Crops of latents, as many cells as the pixels are."""
    from latentds.views.latent_crops import LatentCrops

    return LatentCrops(
        globals=config.globals,
        locals=config.locals,
        global_cells=config.global_px // stem.factor,
        local_cells=config.local_px // stem.factor,
        align=max(1, TOKEN_PX // stem.factor),
    )
