"""Decoder fine-tuning: what is trained, what it is trained on, what is refused, what is left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from latentds_trainers.engine.ranks import join_ranks
from latentds_trainers.finetune_decoder.config import PAPER as FIXED
from latentds_trainers.finetune_decoder.config import FinetuneConfig
from latentds_trainers.finetune_decoder.decoder_losses import DecoderLosses, evaluating
from latentds_trainers.finetune_decoder.decoder_parts import open_codebook, read_validation
from latentds_trainers.finetune_decoder.pairs import Pair, PicturePairs
from latentds_trainers.finetune_decoder.task import DecoderTask, Judge, shown, without_places
from torch import nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.decoders import load_decoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, LatentdsError, UnknownNameError, WeightsError
from latentds.loading.loader import LatentLoader
from tests.conftest import save_pictures
from tests.small_embedders import save_phikon
from tests.trainer_ranks import run_words, succeed

QUICK = {
    "steps": 2, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "crop_px": 32, "lr": 1e-3,
    "validate_px": 64,
    "gan_weight": 0.0, "schedule": "constant",
}  # fmt: skip

PAPER = {
    "steps": 120_000, "batch_size": 12, "accumulation": 1, "lr": 5e-5, "warmup_steps": 10_000,
    "schedule": "constant", "clip": None, "spike": None, "precision": "fp32", "l1_weight": 1.0,
    "gan_weight": 0.5, "embedding_weight": 1.0, "gan_weight_mode": "adaptive",
    "disc_start": 50_001, "disc_lr": None, "reduction": "sum", "batch_norm": "eval",
    "crop_px": None, "half_scale": 0.0, "student": None, "teacher": False,
}  # fmt: skip
PAPER_LIKE = {"pictures": ("in",), "preset": "paper-finetune", "embedder": "uni"}
DATA = {"data": "set", "originals": "in"}
BF16 = {"pictures": ("in",), "precision": "bf16", "zero_stage": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of 64 px; read only."""
    folder = tmp_path_factory.mktemp("finetune") / "in"
    save_pictures(folder / "tumour", 12, edge=64)
    return folder


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "in")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two other pictures of 64 px; read only."""
    folder = tmp_path_factory.mktemp("finetune") / "held out"
    save_pictures(folder, 2, first_seed=50, edge=64)
    return folder


def settings(tmp_path, **options) -> FinetuneConfig:
    return FinetuneConfig(out=tmp_path / "run", **(QUICK | options))


def lines(tmp_path) -> list[dict]:
    text = (tmp_path / "run" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def dataset(folder):
    """The twelve pictures as a data set of tiny's latents; read only."""
    out = folder.with_name("set")
    convert(
        ConvertConfig(
            source=folder, out=out, autoencoder="tiny", device="cpu", fit_patches=4, workers=1
        )
    )
    return out


@pytest.fixture(scope="module")
def finished(folder, held_out):
    """The folder above `run`, the run of two steps on the pictures; read only."""
    above = folder.parent
    config = settings(above, pictures=(folder,), validate_on=(held_out,), licence="MIT")
    DecoderTask(config).run()
    return above


@pytest.fixture
def own_run(finished, tmp_path):
    """A copy of the finished run that a test may go on with."""
    return shutil.copytree(finished / "run", tmp_path / "run")


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
    weight = losses.gan_weight(loss, gan, losses.values(pair.images))
    (of_loss,) = torch.autograd.grad(loss, losses.last_layer, retain_graph=True)
    (of_gan,) = torch.autograd.grad(weight * gan, losses.last_layer)
    assert (of_gan.norm() / of_loss.norm()).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 3), (1.0, 0)])
def test_a_gan_weight_at_its_limit_is_remarked(tmp_path, caplog, strength, steps):
    layer = nn.Parameter(torch.ones(2))
    losses = DecoderLosses(settings(tmp_path, pictures=("in",), gan_weight=0.5), None, layer)
    for _ in range(3):
        losses.gan_weight((layer * 5).sum(), (layer * strength).sum(), 1)
    assert losses.told_limit() == steps
    assert ("at its limit of 5,000 at 3 steps" in caplog.text) == bool(steps)


def test_crops_depend_on_seed_step_and_place_alone(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), seed=5)
    pairs = [PicturePairs(config, load_autoencoder("tiny")) for _ in range(2)]
    whole = pairs[0].batch(7, range(4))
    halves = [pairs[1].batch(7, range(2)), pairs[1].batch(7, range(2, 4))]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    assert not torch.equal(whole.images, pairs[0].batch(8, range(4)).images)


def test_a_run_leaves_a_decoder_that_reads_the_same_latents(finished):
    decoder = load_decoder(finished / "run")
    tiny = load_autoencoder("tiny")
    assert decoder.card.latent_id == tiny.card.latent_id
    assert decoder.card.decoder_id != tiny.card.decoder_id
    report = json.loads((finished / "run" / "report.json").read_text())
    assert report["before"].keys() == report["after"].keys() and report["steps"] == 2
    assert report["gan_weight_at_limit"] == 0
    assert [line["step"] for line in lines(finished)] == [1, 2]
    record = json.loads((finished / "run" / "decoder" / "decoder.json").read_text())
    assert str(finished) not in json.dumps(record["trained"])


def test_a_data_set_and_its_originals_are_trained_on_and_the_set_decodes_so(
    dataset, folder, tmp_path
):
    DecoderTask(settings(tmp_path, data=dataset, originals=folder, lr=1e-6, steps=1)).run()
    # at such a rate the decoder is still the one the golden patches were decoded with
    assert lines(tmp_path)[0]["l1"] < 0.2  # of images in [-1, 1]
    loader = LatentLoader(dataset, decoder=tmp_path / "run", batch_size=4)
    assert next(iter(loader)).images.shape == (4, 3, 64, 64)


def test_an_interrupted_run_ends_as_one_that_was_not(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), steps=3, save_every=2, gan_weight=0.5,
                      disc_start=1)  # fmt: skip
    DecoderTask(config).run()
    whole = load_decoder(tmp_path / "run").card.decoder_id
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    shutil.rmtree(tmp_path / "run" / "decoder")
    DecoderTask(config).run()
    assert load_decoder(tmp_path / "run").card.decoder_id == whole
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_batches_read_ahead_are_taken_again_after_a_resume(dataset, folder, tmp_path):
    options = {"data": dataset, "originals": folder, "steps": 6, "save_every": 4, "batch_size": 5,
               "accumulation": 2, "crop_px": 16}  # fmt: skip
    config = settings(tmp_path, **options)
    DecoderTask(config).run()
    whole, figures = load_decoder(tmp_path / "run").card.decoder_id, lines(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert (state["loader"]["epoch"], state["loader"]["batch"]) == (2, 0)  # the second ended
    shutil.rmtree(tmp_path / "run" / "decoder")
    DecoderTask(config).run()
    assert load_decoder(tmp_path / "run").card.decoder_id == whole
    assert [line["l1"] for line in lines(tmp_path)] == [line["l1"] for line in figures]


def test_accumulation_takes_the_patches_of_a_larger_batch(dataset, folder, tmp_path):
    taken = []
    for number, options in enumerate([{"batch_size": 4}, {"batch_size": 2, "accumulation": 2}]):
        config = settings(tmp_path / str(number), data=dataset, originals=folder, **options)
        pairs = DecoderTask(config).pairs
        rows = range(config.batch_size)
        parts = [pairs.batch(0, rows) for _ in range(config.accumulation)]
        taken.append(torch.cat([part.images for part in parts]))
        pairs.close()
    assert torch.equal(*taken)


def test_a_run_on_a_set_goes_on_in_other_parts_of_the_same_batch(dataset, folder, tmp_path):
    options = {"data": dataset, "originals": folder, "crop_px": 16}
    DecoderTask(settings(tmp_path, batch_size=4, steps=1, **options)).run()
    DecoderTask(settings(tmp_path, batch_size=2, accumulation=2, **options)).run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_two_ranks_share_one_held_out_crop(folder, tmp_path, processes):
    words = ["--pictures", str(folder), "--held-out", "p000"]
    words += ["--validate-px", "64", "--crop-px", "64", "--steps", "2", "--batch-size", "2"]
    words += ["--sample-every", "1", "--disc-start", "1", "--log-every", "1"]
    out = tmp_path / "run"
    succeed(run_words(processes, out, 2, "latentds_trainers.finetune_decoder", *words))
    report = json.loads((out / "report.json").read_text())
    assert report["held_out_crops"] == 1 and report["before"]["psnr_db"] > 15


@pytest.mark.slow
def test_what_fails_on_all_ranks_is_told_once(tmp_path, processes):
    words = ["--pictures", str(tmp_path / "gone")]
    module = "latentds_trainers.finetune_decoder"
    ended = run_words(processes, tmp_path / "run", 2, module, *words)
    assert [rank.code for rank in ended] == [1, 1]
    text = "".join(rank.text for rank in ended)
    assert text.count("no such folder of pictures") == 1 and "rank 1:" not in text


def test_crops_that_no_record_is_made_for_are_refused(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), autoencoder="tiny-v2", crop_px=8)
    base = load_autoencoder("tiny-v2")
    pairs = PicturePairs(config, base)
    join_ranks()
    with pytest.raises(InputError, match="1 x 1 latent cells are too small"):
        open_codebook(config, base, pairs)


@pytest.mark.parametrize(("px", "record_bytes"), [(64, 256), (96, 576)])
def test_pictures_are_coded_by_the_records_that_ship(folder, tmp_path, px, record_bytes):
    save_pictures(tmp_path / "in", 2, edge=96)
    config = settings(
        tmp_path, pictures=(tmp_path / "in",), autoencoder="tiny-v2", crop_px=px, batch_size=1,
        validate_on=(folder,), validate_px=64,
    )  # fmt: skip
    base = load_autoencoder("tiny-v2")
    pairs = PicturePairs(config, base)
    join_ranks()
    pairs.codebook = open_codebook(config, base, pairs)
    assert (pairs.codebook.encoding, pairs.codebook.record_bytes) == ("rans", record_bytes)
    pair = pairs.batch(0, range(1))
    units = pairs.codebook.steps[:, None] / pairs.codebook.gains
    integers = pair.latents[0].numpy() / units[:, :, None, None]
    assert np.abs(integers - integers.round()).max((1, 2, 3)).min() < 1e-3  # one step explains all
    assert (pair.latents != 0).sum() > 50
    held_out = read_validation(config, base, pairs)  # of another size than what is trained on
    assert held_out.latents.shape[1:] == (32, 8, 8)


def test_contradicting_options_are_a_line_of_usage():
    command = [sys.executable, "-m", "latentds_trainers.finetune_decoder", "--out", "x"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "give either --data" in ended.stderr


def test_windows_differ_from_patch_to_patch_and_fit_their_latents(dataset, folder, tmp_path):
    config = settings(tmp_path, data=dataset, originals=folder, batch_size=12, crop_px=32)
    pairs = DecoderTask(config).pairs
    pair = pairs.batch(0, range(12))
    pairs.close()
    tiny = load_autoencoder("tiny")
    near = (tiny.decode(pair.latents) - pair.images).abs().mean((1, 2, 3))
    other = (tiny.decode(pair.latents) - pair.images.roll(1, 0)).abs().mean((1, 2, 3))
    assert near.max() < other.min(), (near, other)


def test_a_split_of_the_set_is_validated_on(tmp_path):
    save_pictures(tmp_path / "in" / "train", 4, edge=64)
    save_pictures(tmp_path / "in" / "val", 3, edge=64)
    source, out = tmp_path / "in", tmp_path / "set"
    convert(
        ConvertConfig(
            source=source, out=out, autoencoder="tiny", device="cpu", fit_patches=4, workers=1
        )
    )
    DecoderTask(settings(tmp_path, data=out, originals=source, sample_every=1, steps=1)).run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["held_out_crops"] == 3 and report["before"]["psnr_db"] > 15
    assert (tmp_path / "run" / "samples" / "step-000001.png").exists()


def test_samples_of_a_set_without_a_second_split_are_refused(dataset, folder, tmp_path):
    config = settings(tmp_path, data=dataset, originals=folder, sample_every=2)
    with pytest.raises(InputError, match="give --validate-on, or --validate-split"):
        DecoderTask(config)


def test_windows_larger_than_the_patches_are_refused(dataset, folder, tmp_path):
    config = settings(tmp_path, data=dataset, originals=folder, crop_px=128)
    with pytest.raises(InputError, match="are 64x64 px; choose a smaller one"):
        DecoderTask(config)


def test_patches_that_fill_no_whole_cells_are_trained_on(tmp_path):
    save_pictures(tmp_path / "in", 3, edge=60)
    source, out = tmp_path / "in", tmp_path / "set"
    convert(
        ConvertConfig(
            source=source, out=out, autoencoder="tiny", device="cpu", fit_patches=4, workers=1
        )
    )
    config = settings(tmp_path, data=out, originals=source, crop_px=None, validate_on=(source,),
                      validate_px=56, teacher=True, steps=1)  # fmt: skip
    DecoderTask(config).run()
    assert lines(tmp_path)[0]["l1"] < 0.2


@pytest.mark.parametrize("student", [None, pytest.param("turbo-s", marks=pytest.mark.slow)])
def test_bf16_trains_and_saves_the_float32_weights(folder, held_out, tmp_path, student):
    options = BF16 | {"pictures": (folder,), "validate_on": (held_out,), "student": student}
    DecoderTask(settings(tmp_path, **options, lr=1e-5, steps=1, validate_px=32)).run()
    weights = load_decoder(tmp_path / "run").decoder.state_dict().values()
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["after"]["psnr_db"] > 5


@pytest.mark.slow
def test_autocast_trains_against_a_discriminator(folder, held_out, tmp_path):
    options = {"pictures": (folder,), "validate_on": (held_out,), "precision": "autocast"}
    options |= {"crop_px": 32, "batch_size": 1, "disc_start": 0, "gan_weight": 0.5}
    DecoderTask(settings(tmp_path, **options, steps=1, validate_px=32)).run()
    (line,) = lines(tmp_path)
    assert np.isfinite([line["gan"], line["discriminator/loss"], line["decoder/loss"]]).all()


def test_bf16_is_refused_for_a_decoder_with_batch_norm(tmp_path):
    from latentds_trainers.finetune_decoder import decoder_parts

    config = settings(tmp_path, **BF16)
    base = load_autoencoder("tiny")
    base.decoder.add_module("norm", nn.BatchNorm2d(3))
    with pytest.raises(InputError, match="take --precision autocast"):
        decoder_parts.open_decoder(config, base, torch.device("cpu"))


def test_batch_norm_over_ranks_is_refused_without_a_gpu(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(InputError, match="--batch-norm sync needs a GPU"):
        DecoderTask(settings(tmp_path, pictures=(folder,), batch_norm="sync"))


def test_batch_norm_is_in_eval_mode_where_nothing_is_learned():
    network = nn.BatchNorm2d(3).train()
    with evaluating(network):
        network(torch.rand(2, 3, 4, 4))
    assert network.training and int(network.num_batches_tracked) == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_fixed_weight_keeps_its_share_of_the_loss(tmp_path, reduction):
    losses, engine, pair = toy(tmp_path, gan_weight=0.25, gan_weight_mode="fixed", disc_start=0,
                               reduction=reduction)  # fmt: skip
    terms = losses.train_decoder(pair, is_adversarial=True)
    scale = 3 * 8 * 8 if reduction == "sum" else 1
    total = scale * (terms["l1"] + 0.25 * terms["gan"])
    assert engine.losses["decoder"].item() == pytest.approx(total.item(), rel=1e-5)


def test_a_rank_without_held_out_crops_judges_nothing():
    images, latents = torch.rand(1, 3, 16, 16), torch.rand(1, 4, 2, 2)
    judge = Judge(images, latents, {"toy": MeanEmbedder()}, rank=1, ranks=2)
    figures = judge(lambda latents: pytest.fail("nothing to decode"))
    assert figures == {"psnr_db": 0.0, "one_minus_cos/toy": 0.0}


def test_figures_before_the_run_are_taken_anew_where_there_is_no_checkpoint(
    folder, held_out, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "before.json").write_text('{"psnr_db": -1.0}')
    options = {"pictures": (folder,), "validate_on": (held_out,), "steps": 1}
    DecoderTask(settings(tmp_path, **options, validate_px=32)).run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["before"]["psnr_db"] > 0


def test_a_run_goes_on_where_its_inputs_were_moved(own_run, own_folder, tmp_path):
    moved = own_folder.rename(tmp_path / "moved")
    task = DecoderTask(settings(tmp_path, pictures=(moved,), workers=2, steps=3))
    assert task.engine.step == 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("/home/me/taef2", "taef2"),
        ("/home/me@corp/taef2/", "taef2"),
        ("uni@/home/me/x.bin", "uni@x.bin"),
        ("nic:/home/me/x.safetensors", "nic:x.safetensors"),
        ("hf://datasets/org/set@v1", "hf:set@v1"),
        ("org/decoder@v1", "org/decoder@v1"),
        ("dcae-f32", "dcae-f32"),
        (("/a/b", "uni"), ["b", "uni"]),
        (None, None),
    ],
)
def test_what_is_published_names_no_place(value, words):
    assert without_places(value) == words


def test_a_student_learns_from_its_teacher_too(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), student="turbo-s", teacher=True, steps=1)
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


def test_whole_images_reach_the_embedding_loss(folder, tmp_path):
    embedder = f"phikon-v2@{save_phikon(tmp_path / 'phikon')}"
    first = {}
    for name in ("card", "native"):
        options = {"steps": 1, "batch_size": 1, "embedder_input": name}
        config = settings(tmp_path / name, pictures=(folder,), embedder=embedder, **options)
        DecoderTask(config).run()
        first[name] = [line["decoder/grad_norm"] for line in lines(tmp_path / name)]
    assert first["card"] != pytest.approx(first["native"], rel=1e-3)


def test_pictures_that_are_validated_on_are_not_trained_on(own_folder, tmp_path):
    folder = own_folder
    save_pictures(folder / "val", 2, first_seed=70, edge=64)
    base = load_autoencoder("tiny")
    pairs = PicturePairs(
        settings(tmp_path, pictures=(folder,), validate_on=(folder / "val",)), base
    )
    assert len(pairs.pictures[0]) == 12 and not any("val" in p.parts for p in pairs.pictures[0])
    with pytest.raises(InputError, match="all 14 pictures are in --validate-on"):
        PicturePairs(settings(tmp_path, pictures=(folder,), validate_on=(folder,)), base)


def test_held_out_pictures_are_never_drawn(folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), held_out=r"p00[0-5]\.png")
    pairs = PicturePairs(config, load_autoencoder("tiny"))
    assert {path.name for path in pairs.pictures[0]} == {f"p{n:03d}.png" for n in range(6, 12)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --data with --originals, or --pictures"),
        ({"data": "set"}, "--data needs --originals"),
        (
            {"pictures": ("in",), "picture_weights": (1.0, 2.0)},
            "one for each of the 1",
        ),
        ({"pictures": ("in",), "preset": "paper-finetune"}, "needs an --embedder"),
        (PAPER_LIKE, "has .*batch_size=12.*leave out these or the preset"),
        ({"pictures": ("in",), "embedding_weight": 1.0}, "1.0 needs an --embedder"),
        ({"pictures": ("in",), "l1_weight": float("nan")}, "l1_weight is nan"),
        ({"pictures": ("in",), "gan_weight": -1.0}, "gan_weight is -1"),
        ({"pictures": ("in",), "workers": 0}, "workers is 0; at least 1"),
        ({"pictures": ("in",), "validate_crops": 0}, "validate_crops is 0"),
        ({"pictures": ("in",), "disc_start": -1}, "disc_start is -1"),
        ({"pictures": ("in",), "picture_weights": (-1.0,)}, "none below 0"),
        ({"pictures": ("in",), "half_scale": 2.0}, "a share from 0 to 1"),
        ({"pictures": ("in",), "held_out": "("}, "no regular expression"),
        ({"pictures": ("in",), "sample_every": 1}, "give --held-out or --validate-on"),
        ({"pictures": ("in",), "judges": ("uni",)}, "give --held-out or --validate-on"),
        ({"pictures": ("in",), "validate_split": "val"}, "--validate-split belongs to --data"),
        (DATA | {"held_out": "x"}, "--held-out is for --pictures"),
        (DATA | {"validate_split": "train"}, "is the training split"),
        (DATA | {"validate_split": "val", "validate_on": ("in",)}, "not both"),
        (BF16 | {"gan_weight": 0.5}, "take autocast, or --gan-weight 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_the_papers_preset_is_the_papers():
    config = FinetuneConfig(out="x", pictures=("in",), embedder="uni", preset="paper-finetune")
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert {*FIXED, "embedding_weight"} == set(PAPER)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_papers_preset_takes_both_readings_and_records_which(reduction):
    config = FinetuneConfig(out="x", **PAPER_LIKE, embedding_reduction=reduction)
    assert shown(config)["embedding_reduction"] == reduction


@pytest.mark.parametrize("change", [{"precision": "autocast"}, {"embedding_weight": 2.0}])
def test_the_papers_preset_refuses_other_values(change):
    options = {"out": "x", "pictures": ("in",), "embedder": "uni", "preset": "paper-finetune"}
    (name,) = change
    with pytest.raises(ValueError, match=f"--preset paper-finetune has {name}="):
        FinetuneConfig(**options | change)


def test_crops_that_cut_latent_cells_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--crop-px 36: no multiple of the autoencoder's factor 8"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=36))


def test_crops_larger_than_every_picture_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="12 pictures, none of 128 px or larger"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=128))


def test_a_pattern_that_holds_out_nothing_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="matches no picture"):
        DecoderTask(settings(tmp_path, pictures=(folder,), held_out="slide9"))


def test_crops_of_held_out_pictures_that_cut_cells_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--validate-px 60: no multiple"):
        DecoderTask(settings(tmp_path, pictures=(folder,), held_out="p000", validate_px=60))


def test_places_that_are_not_there_are_named(folder, tmp_path):
    for options in (
        {"pictures": (tmp_path / "gone",)},
        {"autoencoder": "./gone"},
        {"codebook": Path("gone")},
    ):
        with pytest.raises(LatentdsError, match="gone"):
            DecoderTask(settings(tmp_path, **({"pictures": (folder,)} | options)))


def test_a_picture_that_cannot_be_read_is_named(own_folder, tmp_path):
    (own_folder / "tumour" / "p003.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"p003\.png: cannot be read .*repair it"):
        DecoderTask(settings(tmp_path, pictures=(own_folder,)))


def test_a_picture_cut_short_is_named_when_it_is_drawn(own_folder, tmp_path):
    for path in (own_folder / "tumour").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-200])
    config = settings(tmp_path, pictures=(own_folder,), workers=2)
    pairs = PicturePairs(config, load_autoencoder("tiny"))
    with pytest.raises(InputError, match=r"p0\d\d\.png: cannot be decoded"):
        pairs.batch(0, range(4))


def test_an_embedder_nobody_knows_is_refused(folder, tmp_path):
    with pytest.raises(UnknownNameError, match="efficientnet-lite0"):
        DecoderTask(settings(tmp_path, pictures=(folder,), embedder="efficientnet-lite9"))


def test_latents_of_another_autoencoder_are_refused(shared_dataset, folder, tmp_path):
    with pytest.raises(ContractError, match="give the one they were made with"):
        DecoderTask(settings(tmp_path, data=shared_dataset, originals=folder, autoencoder="tiny"))
    with pytest.raises(WeightsError, match=r"made with a local autoencoder .* --autoencoder"):
        DecoderTask(settings(tmp_path, data=shared_dataset, originals=folder))


def test_the_decoder_of_a_set_of_the_default_is_trained_by_its_name(folder, tmp_path):
    out = tmp_path / "set"
    convert(ConvertConfig(source=folder, out=out, device="cpu", workers=1, fit_patches=8))
    DecoderTask(settings(tmp_path, data=out, originals=folder, steps=1, crop_px=32)).run()
    card = load_decoder(tmp_path / "run").card
    assert card.latent_id == load_autoencoder("tiny-v2").card.latent_id
    assert np.isfinite(lines(tmp_path)[0]["l1"])


def test_a_decoder_is_trained_on_from_its_folder(finished, folder, tmp_path):
    config = settings(tmp_path, pictures=(folder,), autoencoder=str(finished / "run"), steps=1)
    DecoderTask(config).run()
    before, after = (load_decoder(path / "run").card for path in (finished, tmp_path))
    assert before.decoder_id != after.decoder_id
    assert (after.encoder, after.latent_id) == (before.encoder, before.latent_id)


def test_other_settings_do_not_go_on_from_a_checkpoint(own_run, folder, tmp_path):
    with pytest.raises((ContractError, InputError), match="crop_px"):
        DecoderTask(settings(tmp_path, pictures=(folder,), crop_px=64))


def test_mean_of_four_rounds_half_up():
    from latentds_trainers.finetune_decoder.pairs import mean_of_four

    picture = np.array([[[0], [1]], [[1], [0]]], np.uint8).repeat(3, 2)
    assert mean_of_four(picture).tolist() == [[[1, 1, 1]]]
