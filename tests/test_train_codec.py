"""Training a codec: the network, its rate, and a run from tiles to a folder that loads."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("deepspeed")

from latentds_trainers.train_codec import codec_product
from latentds_trainers.train_codec import task as task_module
from latentds_trainers.train_codec.codec_product import (
    GAIN,
    STEPS,
    CodecNetwork,
    Rate,
    patch_bytes,
    rounded,
    step_for,
    symbol_counts,
    table_bits,
    wake,
)
from latentds_trainers.train_codec.config import PRESETS, TrainCodecConfig
from latentds_trainers.train_codec.task import CodecTask, StudentTask, codec_folder_of, draws, train

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.codec_folder import is_codec_folder, read_counts
from latentds.autoencoders.decoders import load_decoder
from latentds.errors import InputError, WeightsError
from tests.conftest import smooth_picture


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    """Engines of this process run on the CPU, whatever the machine has."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(20):
        Image.fromarray(smooth_picture(number, 256)).save(folder / f"{number:02d}.png")
    return folder


def settings(tiles, out, **options):
    small = {"steps": 2, "batch_size": 2, "crop_px": 32, "save_every": 1, "log_every": 1}
    small |= {"encoder_widths": (16, 24), "init": "cold", "channels": 8, "sample_every": None}
    return TrainCodecConfig(tiles=tiles, out=out, **(small | options)).settings


@pytest.mark.parametrize("step", [0.7, 1.0, 2.8])
def test_the_rates_chances_of_all_integers_sum_to_one(step):
    integers = torch.arange(-60, 61).float() * step
    bits = Rate(2)(integers.view(1, 1, 1, -1).expand(1, 2, 1, -1), torch.tensor([step]))
    assert torch.allclose((2.0**-bits).sum(-1), torch.ones(1, 2, 1), atol=2e-4)  # the least chance


def test_the_rate_costs_a_rare_integer_no_more_than_an_escape():
    bits = Rate(1)(torch.full((1, 1, 1, 1), 500.0), torch.ones(1))
    assert bits.item() == pytest.approx(19.93, abs=0.01)


def test_rounding_gives_the_decoder_integers_and_the_encoder_its_gradient():
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    steps = torch.tensor([1.0, 2.5])
    coded = rounded(latents, steps)
    integers = coded * GAIN / steps.view(-1, 1, 1, 1)
    coded.sum().backward()
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert (coded - latents).abs().amax((1, 2, 3)).lt(steps / GAIN / 2 + 1e-6).all()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def missed_by(network, images):
    """What a decoded picture lacks, a row a latent cell; integers of latents, likewise."""
    with torch.no_grad():
        coded = rounded(network.encoder(images), torch.ones(len(images)))
        lack = torch.nn.functional.pixel_unshuffle(images - network.decoder(coded), 8)
    return (values.flatten(2).transpose(1, 2).flatten(0, 1) for values in (lack, coded * GAIN))


def told(lack, integers):
    """The share of `lack` that a linear decoder of the integers would restore."""
    known = torch.cat([integers, torch.ones(len(integers), 1)], 1)
    left = lack - known @ torch.linalg.lstsq(known, lack).solution
    return 1 - float(left.square().sum() / (lack - lack.mean(0)).square().sum())


def test_silent_channels_begin_with_what_the_decoder_misses(tiles):
    torch.manual_seed(0)
    network, silent = CodecNetwork(8, (16, 24)), [2, 5]
    last = network.encoder.layers[-1]
    with torch.no_grad():
        last.weight[silent], last.bias[silent] = 0, 0
    before = last.weight.clone()
    pictures = [np.array(Image.open(path)) for path in sorted(tiles.iterdir())[:8]]
    crops = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, :, :128, :128] / 255
    lack, integers = missed_by(network, crops)
    wake(network, crops.split(4))
    _, woken = missed_by(network, crops)
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(last.weight[others], before[others])
    assert (woken[:, silent].abs().amax(0) > 1).all()
    assert told(lack, woken) > 0.9 > told(lack, integers)


@pytest.mark.slow
def test_a_run_goes_on_from_a_codec_of_its_own_sizes_alone(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "WAKING_CROPS", 8)
    monkeypatch.setattr(task_module, "SHORTCUT_CROPS", 8)
    sizes = {"channels": 32, "encoder_widths": (96, 160)}
    task = CodecTask(settings(tiles, tmp_path / "on", init="tiny-v2", **sizes))
    known = load_autoencoder("tiny-v2").encoder.state_dict()
    mine = task.network().encoder.state_dict()
    assert all(torch.equal(mine[name], known[name]) for name in known if "layers.7" not in name)
    with pytest.raises(InputError, match="its encoder has other sizes; give --channels"):
        CodecTask(settings(tiles, tmp_path / "other", init="tiny-v2"))


def test_places_draw_the_same_steps_and_noise_on_any_number_of_ranks(tiles, tmp_path):
    config, latents = settings(tiles, tmp_path), torch.zeros(4, 8, 2, 2)
    steps, noise = draws(config, 5, range(4), latents)
    later_steps, later_noise = draws(config, 5, range(2, 4), latents[:2])
    low, high = config.step_range
    assert torch.equal(steps[2:], later_steps) and torch.equal(noise[2:], later_noise)
    assert steps.unique().numel() == 4 and low <= steps.min() and steps.max() <= high


def test_a_table_of_the_symbols_own_counts_costs_about_their_entropy():
    latents = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0)) / GAIN
    counts = symbol_counts(latents, 1.0)
    shares = counts[counts > 0].double() / 1024
    cost = (counts * table_bits(counts)).nan_to_num().sum() / counts.sum()
    entropy = -(shares * shares.log2()).sum() / 2
    assert counts.sum() == latents.numel() and 0 <= cost - entropy < 0.02


def test_the_step_for_a_size_makes_patches_of_it():
    latents = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    counts = torch.stack([symbol_counts(latents, step) for step in STEPS])
    step = step_for(latents, counts, 200)
    assert patch_bytes(latents, counts, step) == pytest.approx(200, abs=3)  # a change of table


def test_fewer_bytes_weigh_the_rate_more(tiles, tmp_path):
    weights = [settings(tiles, tmp_path, bytes=size).rate_weight for size in (4096, 2048)]
    assert weights == pytest.approx([1.1e-3, 4.4e-3])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_what_is_not_given(preset, tiles, tmp_path):
    config = TrainCodecConfig(tiles=tiles, out=tmp_path, preset=preset, crop_px=40)
    wanted = dataclasses.asdict(PRESETS[preset]) | {"crop_px": 40}
    assert dataclasses.asdict(config.settings) == dataclasses.asdict(config.settings) | wanted


@pytest.mark.slow
def test_channels_that_are_always_zero_are_told(tiles, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(codec_product, "COUNTED_CROPS", 8)
    monkeypatch.setattr(codec_product, "COUNTED_PX", 64)
    task = CodecTask(settings(tiles, tmp_path / "mine"))
    assert task.validate()["silent_channels"] == 0 and "are zero" not in caplog.text
    network = task.network()
    last = network.encoder.layers[-1]
    last.weight[[2, 5]], last.bias[[2, 5]] = 0, 0
    monkeypatch.setattr(task, "network", lambda: network)
    assert task.validate()["silent_channels"] == 2
    assert (
        f"2 of 8 channels are zero in all held-out pictures, and learn nothing more; --init \
{tmp_path / 'mine' / 'codec'} would begin them anew"
        in caplog.text
    )


@pytest.mark.slow
def test_a_run_resumes_and_leaves_a_folder_that_loads(tiles, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(codec_product, "COUNTED_CROPS", 8)
    monkeypatch.setattr(codec_product, "FINAL_CROPS", 8)
    monkeypatch.setattr(codec_product, "COUNTED_PX", 64)
    for steps in (1, 2):
        product = train(CodecTask(settings(tiles, tmp_path / "mine", steps=steps)))
    lines = [json.loads(x) for x in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"validation/psnr_db_at_4096", "validation/fast_psnr_db_at_2048"} < set(lines[-1])
    codec, fast = load_autoencoder(product), load_decoder(product / "fast")
    assert codec.card.name == "mine" and fast.card.latent_id == codec.card.latent_id
    assert fast.decode(codec.encode(torch.rand(1, 3, 64, 64))).shape == (1, 3, 64, 64)
    assert read_counts(product).counts_SCT.sum((1, 2)).unique().tolist() == [8 * 8 * 64]

    config = settings(tiles, tmp_path / "students", students_of=str(product), steps=1, lr=1e-9)
    students = train(StudentTask(config))
    assert sorted(path.name for path in students.iterdir()) == ["cpu", "fast"]
    decoder = load_decoder(students / "fast")  # went on from the codec's
    assert (decoder.card.name, decoder.card.latent_id) == ("mine-fast", codec.card.latent_id)
    ends = [network.decoder.state_dict() for network in (decoder, fast)]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-3) for name in ends[1])

    monkeypatch.setitem(codec_product.STUDENTS, "fast", "turbo-s")  # as codecs had it before
    config = settings(tiles, tmp_path / "others", students_of=str(product), steps=1)
    assert load_decoder(train(StudentTask(config)) / "fast").decoder.spec.rank is None
    assert f"{product / 'fast'} is a turbo-s32; a new turbo-s starts" in caplog.text


def test_students_are_of_a_codec_of_this_recipe():
    with pytest.raises(WeightsError, match=r"sd15: no codec's folder .*finetune_decoder --student"):
        codec_folder_of("sd15")
    assert is_codec_folder(codec_folder_of("tiny-v2"))


@pytest.mark.slow
def test_an_interrupted_run_takes_the_steps_of_one_that_was_not(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(CodecTask, "validate", lambda *_, **__: {})
    for steps in (1, 2):
        resumed = CodecTask(settings(tiles, tmp_path / "a", steps=steps, schedule="constant"))
        train(resumed)
    whole = CodecTask(settings(tiles, tmp_path / "b", schedule="constant"))
    train(whole)
    ends = [task.engine.weights("codec")["decoder.layers.0.weight"] for task in (resumed, whole)]
    assert torch.equal(*ends)
