"""What a decoder fine-tuning run is made of: networks, pairs, judges; and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from latentds_trainers.decoder_losses import DecoderLosses
from latentds_trainers.engine import Engine
from latentds_trainers.finetune_decoder import ADAM_BETAS, FinetuneConfig
from latentds_trainers.judging import Judge, read_held_out
from latentds_trainers.pairs import Pairs, PicturePairs, ShardPairs
from latentds_trainers.ranks import from_first, join_ranks
from torch import Tensor, nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.architectures import architecture_of, build
from latentds.autoencoders.base import last_layer
from latentds.autoencoders.decoders import load_decoder, save_decoder
from latentds.autoencoders.students import build_student, fit_shortcut
from latentds.codebooks import StoredCodebook, load_codebook, save_codebook
from latentds.embedders import load_embedder
from latentds.errors import ContractError, InputError
from latentds.fit import fit_codebook
from latentds.loader import LatentLoader
from latentds.models.discriminator import PatchDiscriminator
from latentds.originals import Originals
from latentds.quantizer import dequantize, quantize
from latentds.storage import write_atomically

logger = logging.getLogger(__name__)

DEFAULT_CROP_PX = 256
CODEBOOK_CROPS, SHORTCUT_PATCHES = 256, 128
MAY_CHANGE = ("workers", "half", "licence", "name")  # when a run goes on
SAMPLES = 4  # held-out pictures in a sample picture


class DecoderTask:
    """A fine-tuning run: opens what the config names, trains, saves OUT/decoder and report.json."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.base = load_autoencoder(config.autoencoder)
        self.check_crop()
        self.device = join_ranks()
        self.decoder, self.architecture = self.open_decoder()
        if not config.teacher:
            self.base.decoder = nn.Identity()  # not needed, and may be the network that is trained
        self.base.to(self.device)
        self.loader = self.open_loader()
        self.pairs = self.open_pairs()
        if config.student is not None:
            fit_shortcut(self.decoder, self.pairs.sample(SHORTCUT_PATCHES))
        self.engine = Engine(
            config, "finetune_decoder", self.networks(), loader=self.loader, may_change=MAY_CHANGE
        )
        self.embedder = None
        if config.embedder is not None and config.embedding_weight > 0:
            self.embedder = load_embedder(config.embedder).to(self.device)
        self.held_out = read_held_out(config)
        self.judge = self.open_judge()

    def check_crop(self) -> None:
        """Refuse crops that cut through latent cells."""
        crop, factor = self.config.crop_px, self.base.card.factor
        if crop is not None and (crop < factor or crop % factor):
            raise InputError(f"--crop-px {crop}: no multiple of the autoencoder's factor {factor}")

    def open_decoder(self) -> tuple[nn.Module, dict[str, Any]]:
        """The network to be trained, and what it is built from."""
        config, card = self.config, self.base.card
        if config.student is not None:
            network = build_student(config.student, card.channels, card.factor, config.seed)
            return network.eval(), {"class": "student", "name": config.student}
        source = self.base
        if config.init is not None:
            source = load_decoder(config.init)
            if source.card.latent_id != card.latent_id:
                raise ContractError(
                    f"{config.init}: reads latents {source.card.latent_id}, {card.name} makes "
                    f"{card.latent_id}; give a decoder of these"
                )
        elif config.teacher:
            source = load_autoencoder(config.autoencoder)  # the teacher stays as it is
        # DeepSpeed sends weights as rows of bytes: no channels last.
        network = source.decoder.requires_grad_(True).to(memory_format=torch.contiguous_format)
        if config.batch_norm == "sync":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network).train()
        return network, architecture_of(source)

    def networks(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What the engine trains: the decoder and, where it has a weight, a discriminator."""
        config = self.config

        def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
            trained = [p for p in network.parameters() if p.requires_grad]
            return torch.optim.Adam(trained, lr=lr, betas=ADAM_BETAS, weight_decay=0.0)

        found = {"decoder": (self.decoder, adam(self.decoder, config.lr))}
        if config.gan_weight > 0:
            generator = torch.Generator().manual_seed(config.seed)
            network = PatchDiscriminator().initialize(generator).train()
            found["discriminator"] = (network, adam(network, config.disc_lr or config.lr))
        return found

    def open_loader(self) -> LatentLoader | None:
        """The data set's loader, where there is one."""
        config = self.config
        if config.data is None:
            return None
        loader = LatentLoader(
            config.data, config.split, batch_size=config.batch_size, shuffle=True, seed=config.seed,
            last="repeat", decode="latents", columns=("source",),
        )  # fmt: skip
        latent_id = loader.contract.latent_id
        if latent_id != self.base.card.latent_id:
            raise ContractError(
                f"{config.data}: stored latents have latent_id {latent_id}, autoencoder "
                f"{self.base.card.name!r} makes {self.base.card.latent_id}; give the one they were "
                "made with, --autoencoder"
            )
        return loader

    def open_pairs(self) -> Pairs:
        """Latents with their originals."""
        config = self.config
        if self.loader is not None and config.originals is not None:
            originals = Originals(
                self.loader.dataset.shards, config.originals, slides=config.slides,
                root=config.root, anonymize=config.anonymize, workers=config.workers,
            )  # fmt: skip
            return ShardPairs(
                self.loader, originals, self.device, crop_px=config.crop_px, seed=config.seed
            )
        pairs = PicturePairs(
            config.pictures, self.base, None, crop_px=config.crop_px or DEFAULT_CROP_PX,
            seed=config.seed, weights=config.picture_weights or None,
            half_scale=config.half_scale, held_out=config.held_out,
        )  # fmt: skip
        if config.quantize:
            pairs.codebook = self.open_codebook(pairs).codebook
        return pairs

    def open_codebook(self, pairs: PicturePairs) -> StoredCodebook:
        """The codebook that latents made on the fly are rounded with."""
        config, card = self.config, self.base.card
        if config.codebook is not None:
            stored = load_codebook(config.codebook)
        elif card.name == "tiny-v1":
            from latentds.autoencoders.tiny import tiny_codebook

            stored = tiny_codebook()
        else:
            stored = self.fitted_codebook(pairs)
        if stored.latent_id != card.latent_id:
            raise ContractError(
                f"codebook of latents {stored.latent_id}, {card.name} makes {card.latent_id}; give "
                "one that was fitted to these"
            )
        return stored

    def fitted_codebook(self, pairs: PicturePairs) -> StoredCodebook:
        """One fitted to crops of the training pictures by rank 0, kept in OUT/codebook."""
        path = self.config.out / "codebook.safetensors"

        def fit() -> None:
            if path.exists():
                return
            latents = torch.cat([part.cpu() for part, _ in pairs.sample(CODEBOOK_CROPS)])
            samples = latents.transpose(0, 1).flatten(1).numpy()
            codebook, report = fit_codebook(samples, seed=self.config.seed)
            made = {"origin": "fitted while fine-tuning", "crops": len(latents)} | report.to_json()
            latent_id = self.base.card.latent_id
            path.parent.mkdir(parents=True, exist_ok=True)
            save_codebook(StoredCodebook(codebook=codebook, latent_id=latent_id, made=made), path)

        from_first(fit)
        return load_codebook(path)

    def open_judge(self) -> Judge | None:
        """What held-out pictures are judged with; None where none are held out."""
        if self.held_out is None:
            return None
        device = self.device
        judges = [load_embedder(name).to(device) for name in self.config.judges]
        embedders = {e.card.name: e for e in [self.embedder, *judges] if e is not None}
        images = self.held_out.to(device)
        latents = torch.cat([self.base.encode(part) for part in images.split(SAMPLES)])
        codebook = getattr(self.pairs, "codebook", None) or self.stored_codebook()
        if codebook is not None:
            latents = dequantize(quantize(latents, codebook), codebook)
        return Judge(images, latents, embedders, self.engine.rank, self.engine.world_size)

    def stored_codebook(self) -> Any:
        """The data set's codebook, None without one."""
        return None if self.loader is None else self.loader.contract.codebook

    def run(self) -> None:
        """Train to the last step, save the decoder and the report."""
        teacher = self.base.decoder if self.config.teacher else None
        losses = DecoderLosses(
            self.config, self.engine, last_layer(self.decoder), self.embedder, teacher
        )
        before = self.before()
        self.engine.run(
            lambda step: losses.step(self.pairs.batch(step, self.engine.rows), step),
            samples=self.samples if self.held_out is not None else None,
            validate=self.validate if self.judge is not None else None,
        )
        self.finish(before)

    def before(self) -> dict[str, float] | None:
        """Figures of the decoder that the run starts from, kept for a run that is resumed."""
        path = self.config.out / "before.json"
        if self.judge is None:
            return None
        found: dict[str, float] | None = self.engine.from_first(
            lambda: json.loads(path.read_text()) if path.exists() else None
        )
        if found is None:
            found = self.validate()
            text = json.dumps(found, indent=1).encode()
            self.engine.from_first(lambda: write_atomically(path, text))
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of the network as it stands."""
        with self.engine.autocast():
            images: Tensor = self.engine["decoder"](latents)
        return images.float()

    def validate(self) -> dict[str, float]:
        """Figures on held-out pictures; every rank has to call it."""
        assert self.judge is not None
        return self.judge(self.decode)

    def samples(self) -> Tensor:
        """Held-out pictures above what is decoded of them: (2n, 3, H, W) in [0, 1]."""
        assert self.judge is not None
        images, latents = self.judge.images[:SAMPLES], self.judge.latents[:SAMPLES]
        return torch.cat([images, self.decode(latents).clamp(0, 1)]).cpu()

    def finish(self, before: dict[str, float] | None) -> None:
        """Save the decoder and, where pictures were held out, the figures before and after."""
        after = self.validate() if self.judge is not None else None
        weights = self.engine.weights("decoder")
        count = 0 if self.held_out is None else len(self.held_out)
        figures = {"held_out_crops": count, "before": before, "after": after}

        def write() -> None:
            self.save(self.config.out / "decoder", weights, figures)
            report = json.dumps({"steps": self.engine.step, **figures}, indent=1)
            write_atomically(self.config.out / "report.json", report.encode())

        self.engine.from_first(write)
        logger.info("decoder in %s; %s", self.config.out / "decoder", json.dumps(figures))

    def save(self, folder: Path, weights: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """The decoder folder."""
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
    """The config without what names a place: folders by their last part."""

    def last(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        return [last(part) for part in value] if isinstance(value, (tuple, list)) else value

    return {name: last(value) for name, value in dataclasses.asdict(config).items()}
