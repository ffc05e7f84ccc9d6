"""A pretraining run: what it is made of, its step, and what it leaves behind.

It leaves OUT/backbone, a model of timm with a card, and OUT/result.json:

    timm.create_model("local-dir:OUT/backbone", pretrained=True)
    latentds features SET --embedder timm-dir:OUT/backbone --out FEATURES
    latentds publish-model OUT/backbone ORG/NAME --license ID
"""
# B patches of a forward pass, G global and L local crops, C channels, H W pixels or latent cells

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks
from latentds_trainers.engine.training import Engine
from latentds_trainers.engine.wrapping import gather_with
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.data_sources import open_source
from latentds_trainers.pretrain.feeds import TimeLedger, micro_batch
from latentds_trainers.pretrain.schedules import RECIPE, check_steps, settle, settle_batch
from latentds_trainers.pretrain.ssl_networks import (
    build_model,
    build_optimizer,
    build_views,
    edge_px,
    seeded,
    taken_alone,
    token_grid,
    trained_backbone,
)
from torch import Tensor, nn
from torch.nn import functional

from latentds.core.storage import write_atomically
from latentds.embedders.backbone_record import CODEBOOK
from latentds.embedders.timm_models import check_name
from latentds.errors import InputError
from latentds.loading.augmenting import replayed
from latentds.models.backbone_folder import write_backbone
from latentds.models.masked_autoencoder import MaskedAutoencoder
from latentds.models.token_masks import global_masks, random_masks
from latentds.quantizers.codebooks import save_codebook
from latentds.views.view_batch import Views

if TYPE_CHECKING:
    from latentds_trainers.pretrain.probe import Probe

logger = logging.getLogger(__name__)

NETWORK, FOLDER, FORMAT = "model", "backbone", "latentds-pretrain/1"
SAMPLES = 4  # patches in a sample picture
RECORDED = ("method", "source", "views", "steps", "images")  # of the result, in the backbone
# When a run goes on: where things lie, how they are read, what is only looked at. Which patches
# there are `data_id` tells.
MAY_CHANGE = (
    *("data", "originals", "codebook", "paired_with", "keep_mb", "num_workers", "max_bad"),
    *("slides", "root", "only", "splits", "max_px"),
    "decoder",  # where it lies; what it is, decoder_ids tell
    *("device", "probe", "probe_every", "probe_groups", "probe_patches"),
    *("probe_neighbours", "cuda_graph"),
)


class PretrainTask:
    probe: Probe | None = None

    def __init__(self, config: PretrainConfig) -> None:
        self.device = join_ranks()
        if config.cuda_graph and self.device.type != "cuda":
            raise InputError(f"--cuda-graph needs a CUDA device, not {self.device}")
        model = on_all_ranks(lambda: self.make(config))
        self.ledger = TimeLedger(self.source.feed, self.device)
        optimizer = build_optimizer(model, self.config)
        self.decays = [bool(group["decays"]) for group in optimizer.param_groups]
        self.are_last = [bool(group["is_last"]) for group in optimizer.param_groups]
        self.engine = Engine(
            self.config, RECIPE, {NETWORK: (model, optimizer)}, self.ledger, may_change=MAY_CHANGE
        )
        self.model: Any = self.engine[NETWORK]
        if self.config.zero_stage == 3:
            assert isinstance(model, MaskedAutoencoder)  # no other method takes stage 3
            gather_with(self.model, taken_alone(model))
        self.shown: tuple[Tensor, Views] | None = None
        self.probed: dict[str, float] = {}

    def make(self, config: PretrainConfig) -> nn.Module:
        """What this rank makes without meeting the others; the network to be trained."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        check_name(config.arch)
        sized = settle_batch(config, ranks)
        self.source = open_source(sized, self.device, rank, ranks)
        self.stem = self.source.stem
        self.views = build_views(sized, self.stem)
        self.make_views = (config.cuda_graph and replayed(self.views)) or self.views
        self.config = settle(
            sized,
            epoch_steps=len(self.source.feed),
            edge_px=edge_px(self.views, self.stem),
            data_id=self.source.data_id,
            decoder_ids=self.source.decoder_ids,
            views=self.views.record(),
        )
        check_steps(self.config)
        if config.probe is not None:
            from latentds_trainers.pretrain.probe import Probe

            self.probe = Probe(self.config, self.device, self.stem)
        return build_model(self.config, self.stem)

    def run(self) -> None:
        self.model.train()
        self.patches = iter(self.ledger)
        self.engine.run(
            self.step,
            samples=self.samples if self.config.sample_every else None,
            validate=self.validate if self.probe is not None else None,
        )
        self.finish()

    def step(self, number: int) -> dict[str, Tensor | float]:
        engine, config = self.engine, self.config
        if engine.micro == 0:
            self.groups = next(self.patches)
            self.set_schedules(number)
        parts = micro_batch(self.groups, engine.micro, config.accumulation)
        made = [self.make_views(part.values, part.seeds) for part in parts]
        views = join(made).map(self.as_input)
        if config.sample_every and not engine.micro and not (number + 1) % config.sample_every:
            images = parts[0].values[:SAMPLES].clone()  # a slice would keep the whole step's memory
            self.shown = (images, views[: len(images)].map(Tensor.clone))
        seeds = torch.cat([part.seeds for part in parts])
        words = ("drop path", config.seed, number, engine.rank, engine.micro)
        with seeded(self.device, *words), engine.autocast():
            losses = self.losses(views, seeds, number)
        engine.update(NETWORK, losses.pop("loss"))
        decay = config.weight_decay_at(number)
        figures: dict[str, Tensor | float] = {**losses, "weight_decay": decay}
        if config.method == "mae":
            return figures
        momentum = config.momentum_at(number)
        if engine.micro == config.accumulation - 1:  # the student has taken its step
            self.model.update_teacher(momentum)
        return figures | {"momentum": momentum, "teacher_temp": config.teacher_temp_at(number)}

    def as_input(self, crops: Tensor) -> Tensor:
        """Crops in the type of the weights."""
        return crops.to(torch.bfloat16 if self.config.precision == "bf16" else torch.float32)

    def set_schedules(self, number: int) -> None:
        decay = self.config.weight_decay_at(number)
        is_frozen = number < self.config.freeze_last_steps
        groups = self.engine.groups(NETWORK)
        for group, decays, is_last in zip(groups, self.decays, self.are_last, strict=True):
            group["weight_decay"] = decay if decays else 0.0
            group["is_frozen"] = is_last and is_frozen

    def losses(self, views: Views, seeds: Tensor, number: int) -> dict[str, Tensor]:
        """`loss` and its parts.

        seeds  int64 (B,), from which masks are drawn
        """
        config = self.config
        values = views.globals
        if config.method == "mae":
            rows, columns = token_grid(self.model.backbone, values)
            masks = random_masks(seeds, rows * columns, config.mask_ratio)
            found: dict[str, Tensor] = dict(self.model(values[0], masks))
            return found
        token_masks = None
        if config.method == "dinov2":
            token_masks = global_masks(seeds, len(values), token_grid(self.model.backbone, values))
        temp = config.teacher_temp_at(number)
        return dict(self.model(views, teacher_temp=temp, masks=token_masks))

    def samples(self) -> Tensor:
        """The last patches with their crops in a row, (n, 3, H, W) in [0, 1]."""
        assert self.shown is not None
        (images, views), self.shown = self.shown, None
        mean, std = (images.new_tensor(values).float() for values in self.normalization())
        edge = views.globals.shape[-1]
        crops = [crop.float() * std.view(3, 1, 1) + mean.view(3, 1, 1) for crop in views.crops()]
        tiles = [functional.interpolate(image, (edge, edge)) for image in [images.float(), *crops]]
        return torch.cat(tiles, dim=-1).clamp(0, 1)

    def backbone(self) -> nn.Module:
        """A copy of what is to be used: the teacher's ViT, or the masked autoencoder's."""
        network = trained_backbone(self.config, self.stem, self.backbone_weights())
        return network.to(self.device).eval()

    def backbone_weights(self) -> dict[str, Tensor]:
        """Its weights in float32; with bf16 the optimizer's, which every rank has to ask for."""
        if self.config.precision != "bf16" and self.config.zero_stage < 3:
            return {name: w.float() for name, w in self.model.backbone.state_dict().items()}
        weights = self.engine.weights(NETWORK).items()  # of mae: the others have neither
        prefix = "backbone."
        return {n.removeprefix(prefix): w.float() for n, w in weights if n.startswith(prefix)}

    def validate(self) -> dict[str, float]:
        """Figures of the probe, where one is due; every rank has to call it."""
        config, every = self.config, self.config.probe_every
        step = self.engine.step
        if self.probe is None or (every and step % every and step < config.steps):
            return {}
        with self.ledger.aside():
            self.probed = self.probe(self.backbone(), self.prepare)
        return self.probed

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the network takes them: resized and normalized."""
        edge = self.config.global_px
        if images.shape[-2:] != (edge, edge):
            images = functional.interpolate(
                images, (edge, edge), mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in self.normalization())
        return (images - mean) / std

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the channels of pictures that views take off and divide by."""
        mean, std = getattr(self.views, "mean", None), getattr(self.views, "std", None)
        return mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)

    def result(self) -> dict[str, Any]:
        """What result.json says of the finished run. Collective."""
        config, engine, totals = self.config, self.engine, self.ledger.totals()
        facts = self.source.feed.facts
        images = engine.step * config.global_batch_size
        stored, log = facts["bytes_per_patch"], config.out / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []  # a full disk may leave none
        return {
            "format": FORMAT,
            "method": config.method,
            "arch": config.arch,
            "input": config.input,
            "source": facts,
            "views": config.views_record,
            "seed": config.seed,
            "steps": engine.step,
            "global_batch_size": config.global_batch_size,
            "images": images,
            "epochs": images / self.source.patches,
            "bytes_of_patches": None if stored is None else round(images * stored),
            "wall_s": engine.seconds - totals["aside_s"],
            "probe_s": totals["aside_s"],
            "waited_s": totals["waited_s"],
            "ranks": engine.world_size,
            "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
            "last": json.loads(lines[-1]) if lines else {},
            "probe": self.probed,
            "probed": self.probe.facts if self.probe is not None else None,
            "backbone": FOLDER,
            "versions": package_versions(),
        }

    def finish(self) -> None:
        backbone = self.backbone()
        if self.probe is not None and not self.probed:  # a run that had its last step before
            self.probed = self.probe(backbone, self.prepare)
        result = self.result()

        def write() -> None:
            mean, std = self.normalization()
            recorded = {name: result[name] for name in RECORDED}
            folder = write_backbone(
                self.config.out / FOLDER,
                backbone,
                trained={"recipe": RECIPE, **recorded, "versions": result["versions"]},
                arch=self.config.arch,
                stem=self.stem,
                mean=mean,
                std=std,
                input_px=self.config.global_px,
            )
            if self.source.codebook is not None:  # pictures are rounded to it before they go in
                save_codebook(self.source.codebook, folder / CODEBOOK)
            text = json.dumps(result, indent=1).encode()
            write_atomically(self.config.out / "result.json", text)

        from_first(write)
        logger.info("backbone in %s; %s", self.config.out / FOLDER, json.dumps(self.probed))


def join(parts: Sequence[Views]) -> Views:
    """The views of several groups of patches as those of one."""
    if len(parts) == 1:
        return parts[0]
    return Views(
        torch.cat([part.globals for part in parts], dim=1),
        torch.cat([part.locals for part in parts], dim=1),
    )
