"""A decoder fine-tuning run: what it is made of, and what it leaves behind."""
# V validation crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks
from latentds_trainers.engine.training import Engine
from latentds_trainers.finetune_decoder.config import FinetuneConfig
from latentds_trainers.finetune_decoder.decoder_losses import DecoderLosses, cropped, evaluating
from latentds_trainers.finetune_decoder.decoder_parts import (
    check_sizes,
    open_autoencoder,
    open_codebook,
    open_decoder,
    open_embedder,
    read_validation,
    trained_networks,
)
from latentds_trainers.finetune_decoder.pairs import PicturePairs, ShardPairs
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import last_layer
from latentds.autoencoders.decoders import build, is_hub_name, save_decoder
from latentds.autoencoders.students import fit_shortcut
from latentds.core.storage import write_atomically
from latentds.embedders import Embedder, load_embedder

logger = logging.getLogger(__name__)

SHORTCUT_PATCHES = 128
JUDGED_AT_ONCE = 4
SAMPLES = 4  # held-out pictures in a sample picture
# When a run goes on: where things lie, how they are read, what is only judged.
MAY_CHANGE = (
    *("data", "originals", "slides", "root", "anonymize", "pictures", "codebook", "workers"),
    *("validate_on", "validate_split", "validate_crops", "validate_px", "judges"),
    *("half", "licence", "name"),
)
NAMES_OR_PATHS = ("autoencoder", "embedder", "judges", "data")
BEFORE_LAST = re.compile(r"^([^/]*[:@])?.*/")  # all of a path but its last part


class Judge:
    """Judges a decoder on held-out crops, shared out among ranks; some may have none.

    images     (V, 3, H, W) in [0, 1]
    latents    (V, C, h, w) of them, as stored
    embedders  by name
    """

    def __init__(
        self,
        images: Tensor,
        latents: Tensor,
        embedders: Mapping[str, Embedder],
        rank: int,
        ranks: int,
    ) -> None:
        self.images, self.latents = images[rank::ranks], latents[rank::ranks]
        self.embedders, self.count = embedders, len(images)

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean PSNR in dB and 1 - cosine similarity by embedder, over all ranks.

        Pictures are rounded to 8 bits first, as a user gets them. Every rank has to call it.
        """
        names = ["psnr_db", *(f"one_minus_cos/{name}" for name in self.embedders)]
        totals = torch.zeros(len(names), dtype=torch.float64)
        for start in range(0, len(self.images), JUDGED_AT_ONCE):
            part = slice(start, start + JUDGED_AT_ONCE)
            images, latents = self.images[part], self.latents[part]
            decoded = cropped(decode(latents).float(), images)
            decoded = decoded.clamp(0, 1).mul(255).round().div(255)
            error = (decoded - images).square().mean((1, 2, 3)).clamp_min(1e-10)
            sums = [(-10 * error.log10()).sum()]
            for embedder in self.embedders.values():
                similar = torch.cosine_similarity(embedder.embed(decoded), embedder.embed(images))
                sums.append((1 - similar).sum())
            totals += torch.stack(sums).double().cpu()
        totals = totals.to(self.images.device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        return dict(zip(names, (totals / self.count).tolist(), strict=True))


class DecoderTask:
    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.device = join_ranks()
        self.pairs = on_all_ranks(self.open)
        if isinstance(self.pairs, PicturePairs) and config.quantize:
            self.pairs.codebook = open_codebook(config, self.base, self.pairs)
        if config.student is not None:
            sample = self.pairs.sample
            on_all_ranks(lambda: fit_shortcut(self.decoder, sample(SHORTCUT_PATCHES)))
        self.held_out = on_all_ranks(lambda: read_validation(config, self.base, self.pairs))
        self.engine = Engine(
            config,
            "finetune_decoder",
            trained_networks(config, self.decoder),
            loader=self.pairs if isinstance(self.pairs, ShardPairs) else None,
            may_change=MAY_CHANGE,
        )
        self.judge = None
        if self.held_out is not None:
            named = {e.card.name: e for e in (self.embedder, *self.judges) if e is not None}
            images, latents = self.held_out.images, self.held_out.latents
            self.judge = Judge(images, latents, named, self.engine.rank, self.engine.world_size)

    def open(self) -> PicturePairs | ShardPairs:
        """Embedders, autoencoder, the decoder to be trained, latents with their originals."""
        config = self.config
        self.embedder = open_embedder(config, self.device)
        self.judges = [load_embedder(name).to(self.device) for name in config.judges]
        self.base = open_autoencoder(config)
        check_sizes(config, self.base.card.factor)
        self.decoder, self.architecture = open_decoder(config, self.base, self.device)
        if not config.teacher:
            self.base.decoder = nn.Identity()  # not needed, and may be the network that is trained
        self.base.to(self.device)
        if config.data is None:
            return PicturePairs(config, self.base)
        return ShardPairs(config, self.base, self.device, dist.get_world_size())

    def run(self) -> None:
        teacher = self.base.decoder if self.config.teacher else None
        losses = DecoderLosses(
            self.config, self.engine, last_layer(self.decoder), self.embedder, teacher
        )
        before = self.before()
        try:
            self.engine.run(
                lambda step: losses.step(self.pairs.batch(step, self.engine.rows), step),
                samples=self.samples if self.judge is not None else None,
                validate=self.validate if self.judge is not None else None,
            )
        finally:
            self.pairs.close()
        self.finish(before, losses.told_limit())

    def before(self) -> dict[str, float] | None:
        """Figures of the decoder that the run started from, kept for a run that goes on."""
        path = self.config.out / "before.json"
        if self.judge is None:
            return None
        found: dict[str, float] | None = None
        if self.engine.step > 0:
            found = from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
        else:
            found = self.validate()
            from_first(lambda: write_atomically(path, json.dumps(found, indent=1).encode()))
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        network = self.engine["decoder"]
        with evaluating(network), self.engine.autocast():
            images: Tensor = network(latents.to(last_layer(network).dtype))
        return images.float()

    def validate(self) -> dict[str, float]:
        """Figures on held-out pictures; every rank has to call it."""
        assert self.judge is not None
        return self.judge(self.decode)

    def samples(self) -> Tensor:
        """Held-out pictures above what is decoded of them: (2n, 3, H, W) in [0, 1]; n of rank 0."""
        assert self.judge is not None
        images, latents = self.judge.images[:SAMPLES], self.judge.latents[:SAMPLES]
        if not len(images):
            return images
        return torch.cat([images, cropped(self.decode(latents), images).clamp(0, 1)]).cpu()

    def finish(self, before: dict[str, float] | None, at_limit: int) -> None:
        """Save the decoder and, where pictures were held out, the figures before and after."""
        after = self.validate() if self.judge is not None else None
        weights = self.engine.weights("decoder")
        count = 0 if self.held_out is None else len(self.held_out.images)
        figures = {"held_out_crops": count, "before": before, "after": after}

        def write() -> None:
            self.save(self.config.out / "decoder", weights, figures)
            report = {"steps": self.engine.step, **figures, "gan_weight_at_limit": at_limit}
            text = json.dumps(report, indent=1)
            write_atomically(self.config.out / "report.json", text.encode())

        from_first(write)
        logger.info("decoder in %s; %s", self.config.out / "decoder", json.dumps(figures))

    def save(self, folder: Path, weights: dict[str, Tensor], figures: dict[str, Any]) -> None:
        config, card = self.config, self.base.card
        trained = {
            "recipe": "finetune_decoder", "steps": self.engine.step,
            "ranks": self.engine.world_size, "config": shown(config), "held_out": figures,
        }  # fmt: skip
        network = build(self.architecture, card.channels, card.factor)
        network.load_state_dict(weights, assign=True)  # it was built without memory
        save_decoder(
            folder,
            network,
            dataclasses.replace(card, licence=config.licence),
            self.architecture,
            trained,
            name=config.name,
            dtype=torch.float16 if config.half else torch.float32,
        )


def shown(config: FinetuneConfig) -> dict[str, Any]:
    """The config without what names a place: paths by their last part."""
    return {
        name: without_places(value) if name in NAMES_OR_PATHS else last_parts(value)
        for name, value in dataclasses.asdict(config).items()
    }


def last_parts(value: Any) -> Any:
    """Paths by their last part, also in a tuple; other values as they are."""
    if isinstance(value, tuple):
        return [last_parts(part) for part in value]
    return value.name if isinstance(value, Path) else value


def without_places(value: Any) -> Any:
    """Names as they are, repositories of the Hub too; `uni@/home/me/file` as `uni@file`."""
    if isinstance(value, tuple):
        return [without_places(part) for part in value]
    text = None if value is None else str(value).rstrip("/")
    if text is None or is_hub_name(text):
        return text
    return BEFORE_LAST.sub(r"\1", text)
