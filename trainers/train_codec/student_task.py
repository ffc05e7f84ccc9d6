"""Train fast decoders alone, for a codec that stands."""
# B crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from latentds_trainers.engine.training import Engine
from latentds_trainers.train_codec.codec_network import rounded
from latentds_trainers.train_codec.codec_product import (
    PRODUCT,
    STUDENTS,
    encoded,
    held_out_figures,
    save_students,
)
from latentds_trainers.train_codec.tile_task import MAY_CHANGE, TileTask, draws
from torch import Tensor

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.codec_folder import is_codec_folder, load_codec, read_counts
from latentds.autoencoders.decoders import find_decoder_folder, load_decoder
from latentds.autoencoders.tiny import weights_folder
from latentds.errors import WeightsError

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings


class StudentTask(TileTask):
    """Fast decoders for the latents of a codec whose networks stay as they are.

    They learn what the codec's decoder makes of rounded latents: that is what pictures look like on
    average at these latents, so its difference to one picture does not disturb them.
    """

    def __init__(self, config: CodecSettings) -> None:
        super().__init__(config)
        assert config.students_of is not None
        self.folder = codec_folder_of(config.students_of)
        self.codec: NetworkAutoencoder = load_codec(self.folder).to(self.device)
        students = self.new_students(self.codec.encoder, self.codec.card.channels)
        for place in STUDENTS:
            if find_decoder_folder(self.folder / place):  # goes on from what the codec has
                known = load_decoder(self.folder / place).decoder.state_dict()
                students[place].load_state_dict(known)
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
        decoders = {"": self.codec.decoder} | {f"{name}_": s for name, s in students.items()}
        figures = held_out_figures(latents, decoders, counts, self.held_out)
        rounded_figures = {name: round(value, 3) for name, value in figures.items()}
        save_students(self.config.out / PRODUCT, students, self.codec.card, rounded_figures)
        return figures


def codec_folder_of(name: str) -> Path:
    """The folder of a codec: `tiny-v2`'s own, or a path; WeightsError for what is none."""
    folder: Path = weights_folder() / name if name == "tiny-v2" else Path(name)
    if not is_codec_folder(folder):
        raise WeightsError(
            f"{name}: no codec's folder (codec.json); for decoders of other autoencoders: "
            "python -m latentds_trainers.finetune_decoder --student turbo-s"
        )
    return folder
