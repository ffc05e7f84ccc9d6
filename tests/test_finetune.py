"""Decoder fine-tuning: what is trained, what it is trained on, what is refused, what is left."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from latentds_trainers.decoder_losses import DecoderLosses
from latentds_trainers.decoder_task import DecoderTask
from latentds_trainers.finetune_decoder import PAPER, FinetuneConfig
from latentds_trainers.pairs import Pair, PicturePairs
from torch import nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.decoders import load_decoder, save_decoder
from latentds.conversion.config import ConvertConfig
from latentds.conversion.pipeline import convert
from latentds.errors import ContractError, InputError, UnknownNameError
from latentds.loader import LatentLoader
from tests.conftest import save_pictures

QUICK = {
    "steps": 2, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "crop_px": 32, "lr": 1e-3,
    "validate_px": 64,
    "gan_weight": 0.0, "schedule": "constant",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of 64 px."""
    save_pictures(tmp_path / "in" / "tumour", 12, edge=64)
    return tmp_path / "in"


def settings(tmp_path, **options) -> FinetuneConfig:
    return FinetuneConfig(out=tmp_path / "run", **(QUICK | options))


def lines(tmp_path) -> list[dict]:
    text = (tmp_path / "run" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


class ToyEngine:
    """The engine's face, without ranks: keeps losses instead of taking steps."""

    def __init__(self, **networks: nn.Module) -> None:
        self.networks, self.losses = networks, {}

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def frozen(self, name: str):
        from contextlib import contextmanager

        @contextmanager
        def freeze():
            self.networks[name].requires_grad_(False)
            yield self.networks[name]
            self.networks[name].requires_grad_(True)

        return freeze()

    def update(self, name: str, loss: torch.Tensor) -> None:
        self.losses[name] = loss
        loss.backward()


class MeanEmbedder:
    """The mean colour, through a weight that must not be trained."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def embed(self, images):
        return images.mean((2, 3)) * self.weight


def toy(tmp_path, **options):
    """Losses over a decoder of one convolution and a small discriminator."""
    config = settings(tmp_path, pictures=(tmp_path,), **options)
    decoder = nn.Conv2d(4, 3, 1)
    discriminator = nn.Conv2d(3, 1, 4, stride=4)
    engine = ToyEngine(decoder=decoder, discriminator=discriminator)
    embedder = MeanEmbedder() if config.embedder else None
    pair = Pair(torch.rand(2, 4, 8, 8), torch.rand(2, 3, 8, 8))
    return DecoderLosses(config, engine, decoder.weight, embedder), engine, pair


def test_losses_are_the_references_sums(tmp_path):
    losses, engine, pair = toy(tmp_path, embedder="toy", l1_weight=1.0, embedding_weight=2.0)
    terms = losses.step(pair, 0)
    images = engine["decoder"](pair.latents)
    l1 = ((2 * images - 1) - (2 * pair.images - 1)).abs().mean()  # the reference sees [-1, 1]
    embedding = (images.mean((2, 3)) - pair.images.mean((2, 3))).abs().mean()
    assert terms["l1"].item() == pytest.approx(l1.item())
    assert terms["embedding"].item() == pytest.approx(embedding.item())
    total = 3 * 8 * 8 * (l1 + 2 * embedding)  # |x - y| + w p, p broadcast, summed over an image
    assert engine.losses["decoder"].item() == pytest.approx(total.item(), rel=1e-5)


def test_before_disc_start_there_is_no_discriminator(tmp_path):
    losses, engine, pair = toy(tmp_path, gan_weight=0.5, disc_start=3)
    assert set(losses.step(pair, 2)) == {"l1"} and set(engine.losses) == {"decoder"}
    assert {"gan", "gan_weight", "disc"} <= set(losses.step(pair, 3))


def test_each_step_gives_gradients_to_its_own_network(tmp_path):
    losses, engine, pair = toy(tmp_path, gan_weight=0.5, disc_start=0, embedder="toy")
    losses.train_decoder(pair, is_adversarial=True)
    assert engine["discriminator"].weight.grad is None
    assert losses.embedder.weight.grad is None
    assert engine["decoder"].weight.grad is not None
    engine["decoder"].zero_grad()
    losses.train_discriminator(pair)
    assert engine["discriminator"].weight.grad is not None
    assert engine["decoder"].weight.grad is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_adversarial_share_does_not_depend_on_the_reduction(tmp_path, reduction):
    """Adam divides scale out; the ratio keeps both terms' gradients equal but for its epsilon."""
    torch.manual_seed(0)
    losses, engine, pair = toy(tmp_path, gan_weight=1.0, disc_start=0, reduction=reduction)
    loss, _ = losses.reconstruction(engine["decoder"](pair.latents), pair)
    gan = -engine["discriminator"](engine["decoder"](pair.latents) * 2 - 1).mean()
    weight = losses.gan_weight(loss, gan)
    (of_loss,) = torch.autograd.grad(loss, losses.last_layer, retain_graph=True)
    (of_gan,) = torch.autograd.grad(weight * gan, losses.last_layer)
    assert (of_gan.norm() / of_loss.norm()).item() == pytest.approx(1, abs=0.01)


def test_crops_depend_on_seed_step_and_place_alone(folder):
    autoencoder = load_autoencoder("tiny")
    pairs = [PicturePairs([folder], autoencoder, None, crop_px=32, seed=5) for _ in range(2)]
    whole = pairs[0].batch(7, range(4))
    halves = [pairs[1].batch(7, range(2)), pairs[1].batch(7, range(2, 4))]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    assert not torch.equal(whole.images, pairs[0].batch(8, range(4)).images)


def test_a_run_leaves_a_decoder_that_reads_the_same_latents(folder, tmp_path):
    DecoderTask(settings(tmp_path, pictures=(folder,), validate_on=(folder,), licence="MIT")).run()
    decoder = load_decoder(tmp_path / "run")
    tiny = load_autoencoder("tiny")
    assert decoder.card.latent_id == tiny.card.latent_id
    assert decoder.card.decoder_id != tiny.card.decoder_id
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["before"].keys() == report["after"].keys() and report["steps"] == 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    record = json.loads((tmp_path / "run" / "decoder" / "decoder.json").read_text())
    assert str(tmp_path) not in json.dumps(record["trained"])


def test_a_data_set_and_its_originals_are_trained_on_and_the_set_decodes_so(folder, tmp_path):
    options = {"device": "cpu", "fit_patches": 4, "workers": 1}
    convert(ConvertConfig(source=folder, out=tmp_path / "set", **options))
    config = settings(tmp_path, data=tmp_path / "set", originals=folder, lr=1e-6)
    DecoderTask(config).run()
    # at such a rate the decoder is still the one the golden patches were decoded with
    assert lines(tmp_path)[0]["l1"] < 0.1
    loader = LatentLoader(tmp_path / "set", decoder=tmp_path / "run", batch_size=4)
    assert next(iter(loader)).images.shape == (4, 3, 64, 64)


def test_an_interrupted_run_ends_as_one_that_was_not(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), steps=4, save_every=2, gan_weight=0.5,
                      disc_start=1, crop_px=64)  # fmt: skip
    DecoderTask(config).run()
    whole = load_decoder(tmp_path / "run").card.decoder_id
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "run" / "decoder")
    DecoderTask(config).run()
    assert load_decoder(tmp_path / "run").card.decoder_id == whole
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_student_learns_from_its_teacher_too(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), student="turbo-s", teacher=True)
    DecoderTask(config).run()
    record = json.loads((tmp_path / "run" / "decoder" / "decoder.json").read_text())
    assert record["architecture"] == {"class": "student", "name": "turbo-s"}
    assert lines(tmp_path)[0]["teacher"] > 0


def test_the_teacher_stays_as_it_is(folder, tmp_path):
    task = DecoderTask(settings(tmp_path, pictures=(folder,), teacher=True))
    before = [p.clone() for p in task.base.decoder.parameters()]
    task.run()
    after = list(task.base.decoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_held_out_pictures_are_never_drawn(folder):
    pairs = PicturePairs(
        [folder], load_autoencoder("tiny"), None, crop_px=32, held_out=r"p00[0-5]\.png"
    )
    assert {path.name for path in pairs.pictures[0]} == {f"p{n:03d}.png" for n in range(6, 12)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --data with --originals, or --pictures"),
        ({"data": "set"}, "--data needs --originals"),
        ({"pictures": ("in",), "picture_weights": (1.0, 2.0)}, "2 --picture-weights for 1"),
        ({"pictures": ("in",), "zero_stage": 3}, "choose 0, 1 or 2"),
        ({"pictures": ("in",), "student": "turbo-s", "init": "run"}, "leave --init"),
        ({"pictures": ("in",), "preset": "paper-finetune"}, "leave these or the preset"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_the_papers_preset_is_the_papers():
    config = FinetuneConfig(out="x", pictures=("in",), preset="paper-finetune")
    values = {name: getattr(config, name) for name in PAPER}
    assert values == PAPER
    weights = (config.l1_weight, config.gan_weight, config.embedding_weight)
    assert weights == (1, 0.5, 1) and (config.lr, config.steps) == (5e-5, 120_000)


def test_crops_that_cut_latent_cells_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--crop-px 36: no multiple of the autoencoder's factor 8"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=36))


def test_crops_larger_than_every_picture_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="12 pictures, none of 128 px or larger"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=128))


def test_a_pattern_that_holds_out_nothing_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="matches no picture"):
        DecoderTask(settings(tmp_path, pictures=(folder,), held_out="slide9"))


def test_an_embedder_nobody_knows_is_refused(folder, tmp_path):
    with pytest.raises(UnknownNameError, match="efficientnet-lite0"):
        DecoderTask(settings(tmp_path, pictures=(folder,), embedder="efficientnet-lite9"))


def test_latents_of_another_autoencoder_are_refused(shared_dataset, folder, tmp_path):
    with pytest.raises(ContractError, match="give the one they were made with"):
        DecoderTask(settings(tmp_path, data=shared_dataset, originals=folder))


def test_a_decoder_of_other_latents_is_no_start(folder, tmp_path):
    DecoderTask(settings(tmp_path, pictures=(folder,))).run()
    decoder = load_decoder(tmp_path / "run")
    card = dataclasses.replace(decoder.card, latent_id="sha256:" + "0" * 64)
    save_decoder(tmp_path / "other", decoder.decoder, card, {"class": "tiny"}, {})
    config = settings(tmp_path, pictures=(folder,), init=str(tmp_path / "other"))
    config = dataclasses.replace(config, out=tmp_path / "next")
    with pytest.raises(ContractError, match="give a decoder of these"):
        DecoderTask(config)


def test_other_settings_do_not_go_on_from_a_checkpoint(folder, tmp_path):
    DecoderTask(settings(tmp_path, pictures=(folder,))).run()
    with pytest.raises((ContractError, InputError), match="crop_px"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=64))


def test_mean_of_four_rounds_half_up():
    from latentds_trainers.pairs import mean_of_four

    picture = np.array([[[0], [1]], [[1], [0]]], np.uint8).repeat(3, 2)
    assert mean_of_four(picture).tolist() == [[[1, 1, 1]]]
