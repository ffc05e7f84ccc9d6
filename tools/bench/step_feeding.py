"""A training step as a user's would be, and what feeds it: cached views, images, the loader."""
# B batch, C channels of images or latents, H W their size

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from latentds_tools.bench.decode_networks import check_decoder, find_decoder
from latentds_tools.bench.harness import engaged
from latentds_tools.bench.step_config import random_patches
from latentds_tools.bench.synthetic import random_contract, write_synthetic
from latentds_tools.reports.commands import picked
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, latent_cells
from latentds.core.compiling import Graphed
from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import InputError
from latentds.loading.augmenting import Making
from latentds.loading.batch import Batch
from latentds.loading.decoding import Decode
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Order
from latentds.models.self_distillation import SelfDistillation
from latentds.store.manifest import read_manifest
from latentds.views.latent_crops import LatentCrops
from latentds.views.multicrop import MultiCrop
from latentds.views.view_batch import Views

if TYPE_CHECKING:
    from latentds_tools.bench.step_config import Config

CACHED = 2  # batches that lie on the device, used in turn
TOKEN_PX = 16  # of a patch16 arch: windows of latents start where its tokens do
TEMPERATURE, MOMENTUM = 0.04, 0.996  # of the teacher; DINO's, and no time depends on them


@dataclasses.dataclass(frozen=True)
class StepSource:
    """What is read.

    folder       of the set
    autoencoder  whose decoder is used; None for the recorded one, and where nothing is decoded
    decoder      its name
    weights      random or loaded; empty where nothing is decoded
    """

    folder: Path
    autoencoder: Autoencoder | None = None
    decoder: str = "none"
    weights: str = ""


def open_source(config: Config, work: Path) -> StepSource:
    """The set given, or one of random codes for the decoder, which claims to read its latents."""
    decodes = config.input == "pixels"
    if config.folder is not None:
        recorded = ("the recorded decoder", "loaded") if decodes else ("none", "")
        return StepSource(config.folder, None, *recorded)
    name, edge, folder = config.decoder or "turbo-s", config.patch_size, work / "set"
    check_decoder(name)
    autoencoder, weights = find_decoder(name)
    card = autoencoder.card
    shape = (card.channels, *latent_cells((edge, edge), card.factor))
    patches = random_patches(config, config.device.startswith("cuda"))
    write_synthetic(folder, patches, shape=shape, patch_px=edge)
    if not decodes:
        return StepSource(folder)
    autoencoder.card = dataclasses.replace(card, latent_id=random_contract().latent_id)
    return StepSource(folder, autoencoder, name, weights)


class Feeding:
    """One training that is fed in several ways; every method but `facts` does one step's part.

    has_decoder  whether anything is decoded
    views        as they are
    replayed     the loader's, from a graph; None without --cuda-graph
    raises       InputError where the split does not fill a batch
    """

    def __init__(self, source: StepSource, config: Config, device: torch.device) -> None:
        patches, batch = read_manifest(source.folder).splits.get("train"), config.batch_size
        if patches is not None and patches < (batch or 0):  # without that split the loader refuses
            raise InputError(
                f"{source.folder}: {patches} patches, a batch is {batch}; a smaller --batch-size"
            )
        self.has_decoder = config.input == "pixels"
        codes_loader = open_loader(source, config, device, decode="stored")
        stem = None
        self.views: Making
        if self.has_decoder:
            self.views = pixel_views(config)
            self.loader = open_loader(source, config, device, views=self.views)
        else:
            stem = LatentStemConfig.of(codes_loader.contract, codes_loader.statistics)
            self.views = latent_views(config, stem)
            options = {"decode": "latents", "normalize": True, "views": self.views}
            self.loader = open_loader(source, config, device, **options)
        assert self.loader.decoder is not None
        self.decoder, views = self.loader.decoder, self.loader.views
        self.wants_graphs = config.cuda_graph
        self.replayed = views if isinstance(views, Graphed) else None
        self.batches, self.codes = endless(self.loader), endless(codes_loader)
        held = [self.hold(next(self.codes)) for _ in range(CACHED)]
        self.held_codes = itertools.cycle([codes for codes, _, _ in held])
        self.images = itertools.cycle([(values, seeds) for _, values, seeds in held])
        self.made = itertools.cycle([self.views(values, seeds) for _, values, seeds in held])
        self.training = Training(config, stem, device)

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
        codes, seeds = batch.codes.clone(), batch.seeds.clone()
        return codes, self.decoder(codes, batch.codebooks).clone(), seeds

    def step_on_cached_views(self) -> None:
        """A step of which nothing but the network is timed."""
        self.training.step(next(self.made))

    def step_on_cached_images(self, views: Making) -> None:
        """A step that makes its views of images, or latents, that lie there."""
        values, seeds = next(self.images)
        self.training.step(views(values, seeds))

    def step_on_loader(self) -> None:
        batch = next(self.batches)
        assert batch.views is not None
        self.training.step(batch.views)

    def read(self) -> None:
        """A batch of codes read and brought to the device."""
        next(self.codes)

    def make_views(self, views: Making) -> None:
        """Views of a batch that lies there."""
        views(*next(self.images))

    def decode(self) -> None:
        """A batch of codes that lies there, decoded."""
        self.decoder(next(self.held_codes))

    def counters(self) -> dict[str, Any]:
        """What decoded, where; InputError where an option for it never engaged."""
        found = engaged(self.decoder) if self.has_decoder else self.decoder.counters()
        replays = self.replayed.replays if self.replayed else 0
        if self.wants_graphs and not replays:
            raise InputError(f"never engaged: no views were replayed from a CUDA graph ({found})")
        return found | {"view_replays": replays}

    def facts(self) -> dict[str, Any]:
        contract = self.loader.contract
        return {"bytes_per_patch": contract.bytes_per_patch, "patch_px": contract.patch_px[0]}


def open_loader(
    source: StepSource, config: Config, device: torch.device, **options: Any
) -> LatentLoader:
    """The loader, shuffling as a training does.

    options  decode and views
    """
    return LatentLoader(
        source.folder,
        batch_size=config.batch_size,
        shuffle=True,
        order=Order(last="drop"),
        device=device,
        num_workers=config.num_workers or 0,
        autoencoder=source.autoencoder,
        dtype=getattr(torch, str(config.dtype)),
        decoding=Decode(**picked(config, "channels_last", "compile", "cuda_graph")),
        **options,
    )


def endless(loader: LatentLoader) -> Generator[Batch, None, None]:
    while True:
        yield from loader


def pixel_views(config: Config) -> MultiCrop:
    return MultiCrop.preset(
        "dino",
        compile=config.compile_views,
        **picked(config, "globals", "locals", "global_px", "local_px"),
    )


def latent_views(config: Config, stem: LatentStemConfig) -> LatentCrops:
    """Crops of latents, as many cells as the pixels are."""
    return LatentCrops(
        globals=config.globals,
        locals=config.locals,
        global_cells=config.global_px // stem.factor,
        local_cells=config.local_px // stem.factor,
        align=max(1, TOKEN_PX // stem.factor),
    )


class Training:
    """DINO's networks of random weights and their optimizer; `step` takes views.

    stem  what latents are like where they are the input, None for pixels
    """

    def __init__(self, config: Config, stem: LatentStemConfig | None, device: torch.device) -> None:
        assert config.arch is not None and config.out_dim is not None
        student, teacher = (
            build_vit(config.arch, stem=stem, img_px=config.global_px) for _ in range(2)
        )
        self.device = device
        self.model = SelfDistillation(student, teacher, method="dino", out_dim=config.out_dim)
        self.model.to(device)
        wanted = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(wanted, lr=1e-5, fused=device.type == "cuda")

    def step(self, views: Views) -> None:
        """Forward, backward, update, and the teacher's."""
        self.optimizer.zero_grad(set_to_none=True)
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            found = self.model(views, teacher_temp=TEMPERATURE)
        torch.autograd.backward(found["loss"])
        self.optimizer.step()
        self.model.update_teacher(MOMENTUM)
