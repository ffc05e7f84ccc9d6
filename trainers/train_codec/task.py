"""What `train_codec` does in a step and with a checkpoint: a codec, or fast decoders of one."""
# B crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from latentds_trainers.engine.ranks import join_ranks, on_all_ranks
from latentds_trainers.engine.training import Engine
from latentds_trainers.train_codec.codec_product import (
    PRODUCT,
    STUDENTS,
    CodecNetwork,
    count_integers,
    encoded,
    held_out_figures,
    mse,
    rounded,
    save_product,
    save_students,
    wake,
)
from latentds_trainers.train_codec.tiles import Crops, read_tiles
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.codec_folder import (
    FACTOR,
    RECORD,
    is_codec_folder,
    load_codec,
    read_counts,
)
from latentds.autoencoders.decoders import find_decoder_folder, load_decoder, read_record
from latentds.autoencoders.students import build_student, fit_shortcut
from latentds.autoencoders.tiny import weights_folder
from latentds.errors import InputError, WeightsError

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

logger = logging.getLogger(__name__)
Network = TypeVar("Network", bound=nn.Module)
SHORTCUT_CROPS = 64
SHORTCUT_STEP = 2**32 - 1  # whose crops no training step draws
WAKING_CROPS = 256
WAKING_STEP = 2**32 - 2
COLD = "cold"
SAMPLES = 4
MAY_CHANGE = ("tiles", "pack", "name", "licence")
BETAS, DECAY = (0.9, 0.98), 1e-4
EARLY_SHARE = 8  # one part in so many of the steps has the early rate weight


class TileTask:
    """What trains on tiles: their crops, fast decoders.

    engine  set by the task, with its fast decoders by their folder in the product
    """

    engine: Engine

    def __init__(self, config: CodecSettings) -> None:
        self.config = config
        self.device = join_ranks()
        self.tiles = on_all_ranks(lambda: read_tiles(config.tiles))
        self.held_out = self.tiles.held_out.to(self.device)
        self.crops = Crops(self.tiles.pictures, self.tiles.shares, config, self.device)

    @torch.no_grad()
    def new_students(self, encoder: nn.Module, channels: int) -> dict[str, nn.Module]:
        """Fast decoders, each from the linear decoder of the encoder's latents."""
        students = {}
        for place, name in STUDENTS.items():
            students[place] = build_student(name, channels, FACTOR, self.config.seed)
            batches = (self.crops.batch(SHORTCUT_STEP, [row]) for row in range(SHORTCUT_CROPS))
            fit_shortcut(students[place], ((encoder(images), images) for images in batches))
        return students

    def with_optimizers(
        self, students: Mapping[str, nn.Module]
    ) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What the engine takes of fast decoders."""
        options: dict[str, Any] = {"lr": self.config.lr, "betas": BETAS, "weight_decay": DECAY}
        return {
            name: (student, torch.optim.AdamW(student.parameters(), **options))
            for name, student in students.items()
        }

    def batch(self, step: int) -> Tensor:
        """Crops (B, 3, s, s) of a step."""
        crops = self.crops.batch(step, self.engine.rows)
        return crops.contiguous(memory_format=torch.channels_last)

    def update_students(self, coded: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """A step of every fast decoder from latents to what they are to become; their errors."""
        errors = {}
        for name in STUDENTS:
            with self.engine.autocast():
                error = mse(self.engine[name](coded), wanted)
            self.engine.update(name, error)
            errors[f"{name}_mse"] = error
        return errors

    def copied(self, network: Network, name: str) -> Network:
        """The network with the engine's weights, in float32 on the device, in eval mode."""
        network.load_state_dict({k: v.float() for k, v in self.engine.weights(name).items()})
        return network.to(self.device).eval().requires_grad_(False)

    def copied_students(self, channels: int) -> dict[str, nn.Module]:
        fresh = {place: build_student(name, channels, FACTOR) for place, name in STUDENTS.items()}
        return {place: self.copied(network, place) for place, network in fresh.items()}

    def shown(self) -> Tensor:
        return self.held_out[:: max(1, len(self.held_out) // SAMPLES)][:SAMPLES]


def draws(
    config: CodecSettings, step: int, places: Iterable[int], latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantization steps (B,) and noise like the latents, each crop's from its seed alone."""
    low, high = (math.log(bound) for bound in config.step_range)
    steps, noise = [], []
    for place in places:
        generator = torch.Generator().manual_seed((config.seed << 48) + (step << 16) + place)
        share = float(torch.rand((), generator=generator))
        steps.append(math.exp(low + share * (high - low)))
        noise.append(torch.rand(latents.shape[1:], generator=generator) - 0.5)
    return torch.tensor(steps).to(latents), torch.stack(noise).to(latents)


def train(task: CodecTask | StudentTask) -> Path | None:
    """Train to the last step; rank 0 returns the product's folder."""
    task.engine.run(task.step, samples=task.samples, validate=task.validate)
    task.validate()
    return task.config.out / PRODUCT if task.engine.is_first else None


def go_on(network: CodecNetwork, folder: Path) -> None:
    """Take encoder and decoder of a codec; InputError where its networks have other sizes."""
    codec = load_codec(folder)
    for part in ("encoder", "decoder"):
        try:
            getattr(network, part).load_state_dict(getattr(codec, part).state_dict())
        except RuntimeError as error:
            raise InputError(
                f"--init {folder}: its {part} has other sizes; give --channels and "
                f"--encoder-widths as its {RECORD} has them, or --init {COLD}"
            ) from error


def rounded_values(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


class CodecTask(TileTask):
    def __init__(self, config: CodecSettings) -> None:
        folder = None if config.init == COLD else codec_folder_of(config.init)
        torch.manual_seed(config.seed)
        network = CodecNetwork(config.channels, config.encoder_widths)
        if folder:
            go_on(network, folder)
        super().__init__(config)
        network.to(self.device)
        if folder:
            wake(network, (self.crops.batch(WAKING_STEP, [row]) for row in range(WAKING_CROPS)))
        students = self.new_students(network.encoder, config.channels)
        if folder:
            take_students(students, folder)
        networks = {"codec": (network, optimizer_of(network, config))}
        self.engine = Engine(
            config, "train_codec", networks | self.with_optimizers(students), may_change=MAY_CHANGE
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """Distortion and rate of the network, distortion of the students."""
        engine, config = self.engine, self.config
        images = self.batch(step)
        network = engine["codec"]
        assert isinstance(network, CodecNetwork)
        with engine.autocast():
            latents = network.encoder(images)
        latents = latents.float()
        steps, noise = draws(config, step, engine.rows, latents)
        coded = rounded(latents, steps)
        with engine.autocast():
            distortion = mse(network.decoder(coded), images)
        bits = network.bits(latents, steps, noise).sum((1, 2, 3)) / images[0, 0].numel()
        # What a bit is worth in squared error grows as the square of the step.
        engine.update("codec", distortion + self.rate_weight(step) * (bits * steps**2).mean())
        students = self.update_students(coded.detach(), images)
        return {"mse": distortion, "bits_per_pixel": bits.mean()} | students

    def rate_weight(self, step: int) -> float:
        """Of bits a pixel at this step."""
        config = self.config
        is_early = step * EARLY_SHARE < config.steps
        return config.early_rate_weight if is_early else config.rate_weight

    def network(self) -> CodecNetwork:
        fresh = CodecNetwork(self.config.channels, self.config.encoder_widths)
        return self.copied(fresh, "codec")

    def samples(self) -> Tensor:
        """Held-out pictures above their reconstructions at step 1."""
        network, images = self.network(), self.shown()
        with torch.no_grad():
            coded = rounded(network.encoder(images), torch.ones(len(images)).to(images))
            return torch.cat([images, network.decoder(coded).clamp(0, 1)])

    def validate(self) -> dict[str, float]:
        """Rate and distortion on the held-out patients; writes the product."""
        network, students = self.network(), self.copied_students(self.config.channels)
        if not self.engine.is_first:
            return {}
        counts = count_integers(network.encoder, self.crops, self.config, self.engine.is_done)
        latents = encoded(network.encoder, self.held_out)
        figures = held_out_figures(latents, network.decoder, students, counts, self.held_out)
        if figures["silent_channels"]:
            logger.warning(
                "%.0f of %d channels are zero in all held-out pictures, and learn nothing more; "
                "--init %s would begin them anew",
                figures["silent_channels"], network.channels, self.config.out / PRODUCT,
            )  # fmt: skip
        made = {"steps": self.engine.step, "seconds": round(self.engine.state().seconds)}
        trained = {"shares": self.tiles.shares, "figures": rounded_values(figures)} | made
        save_product(self.config, network, students, counts, trained)
        return figures


def optimizer_of(network: CodecNetwork, config: CodecSettings) -> torch.optim.AdamW:
    """AdamW with the mixtures in a group of their own."""
    rate = list(network.rate.parameters())
    others = [*network.encoder.parameters(), *network.decoder.parameters()]
    groups = [
        {"params": others, "lr": config.lr, "weight_decay": DECAY},
        {"params": rate, "lr": config.rate_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=BETAS)


class StudentTask(TileTask):
    """Fast decoders for the latents of a codec whose networks stay as they are.

    They learn what the codec's decoder makes of rounded latents: that is what pictures look like on
    average at these latents, so its difference to one picture does not disturb them.
    """

    def __init__(self, config: CodecSettings) -> None:
        assert config.students_of is not None
        self.folder = codec_folder_of(config.students_of)
        codec = load_codec(self.folder)
        super().__init__(config)
        self.codec: NetworkAutoencoder = codec.to(self.device)
        students = self.new_students(self.codec.encoder, self.codec.card.channels)
        take_students(students, self.folder)
        networks = self.with_optimizers(students)
        self.engine = Engine(config, "train_codec", networks, may_change=MAY_CHANGE)

    def step(self, step: int) -> dict[str, Tensor]:
        """Distortion of the students, to the codec's decoder."""
        with torch.no_grad(), self.engine.autocast():
            latents = self.codec.encoder(self.batch(step)).float()
            coded = rounded(latents, draws(self.config, step, self.engine.rows, latents)[0])
            wanted = self.codec.decoder(coded).float()
        return self.update_students(coded, wanted)

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Held-out pictures above what the decoders make of them at step 1."""
        images = self.shown()
        coded = rounded(self.codec.encoder(images), torch.ones(len(images)).to(images))
        decoders = [self.codec.decoder, *self.copied_students(self.codec.card.channels).values()]
        return torch.cat([images, *(decoder(coded).clamp(0, 1) for decoder in decoders)])

    def validate(self) -> dict[str, float]:
        """Distortion on the held-out patients; writes the fast decoders."""
        students = self.copied_students(self.codec.card.channels)
        if not self.engine.is_first:
            return {}
        latents = encoded(self.codec.encoder, self.held_out)
        counts = read_counts(self.folder).counts_SCT
        figures = held_out_figures(latents, self.codec.decoder, students, counts, self.held_out)
        told = rounded_values(figures)
        save_students(self.config.out / PRODUCT, students, self.codec.card, told)
        return figures


def take_students(students: Mapping[str, nn.Module], folder: Path) -> None:
    """Go on from the fast decoders that a codec's folder has."""
    for place, name in STUDENTS.items():
        if not find_decoder_folder(folder / place):
            continue
        shape = read_record(folder / place).architecture.get("name")
        if shape == name:
            students[place].load_state_dict(load_decoder(folder / place).decoder.state_dict())
        else:
            logger.warning("%s is a %s; a new %s starts", folder / place, shape, name)


def codec_folder_of(name: str) -> Path:
    """The folder of a codec: `tiny-v2`'s own, or a path; WeightsError for what is none."""
    folder: Path = weights_folder() / name if name == "tiny-v2" else Path(name)
    if not is_codec_folder(folder):
        raise WeightsError(
            f"{name}: no codec's folder ({RECORD}), which tiny-v2 and a run's OUT/codec are; for "
            "decoders of other autoencoders: "
            "python -m latentds_trainers.finetune_decoder --student turbo-s"
        )
    return folder
