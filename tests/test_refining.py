"""Refined latents: never worse, the same in any batch, recorded, refused where they cannot be."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from latentds_tools import info
from torch import nn

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.codecs import parse_codec, with_quantizer
from latentds.codecs.refining import MAX_STEPS, errors, refine
from latentds.conversion import shard_writing as conversion_shards
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.entropy.native_model import native_model
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.entropy.record_encoding import round_at_steps
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook
from latentds.quantizers.scalar_fit import fit_codebook
from latentds.store.golden import psnr_db
from latentds.store.manifest import read_manifest
from tests.conftest import save_pictures, smooth_picture
from tests.fakes import CARD, MeanAutoencoder
from tests.test_convert import data_bytes

CHANNELS, EDGE = 6, 40


@pytest.fixture(scope="module")
def autoencoder() -> NetworkAutoencoder:
    """A random decoder of 3x3 and transposed layers, and an encoder that half fits it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Conv2d(3, CHANNELS, 8, stride=8)
        decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 8, stride=8)
        )
    with torch.no_grad():
        encoder.weight.mul_(3)
        encoder.bias.copy_(-0.5 * encoder.weight.sum((1, 2, 3)))  # latents about 0
        decoder[-1].bias.fill_(0.5)
    card = dataclasses.replace(CARD, channels=CHANNELS, name="random8")
    return NetworkAutoencoder(card, encoder, decoder)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pictures = np.stack([smooth_picture(seed, EDGE) for seed in range(3)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def records_of(latents: torch.Tensor, **options: int) -> EntropyCodebook:
    """Tables for values that are mostly near 0, as those of a network trained for them are."""
    drawn = np.random.default_rng(0).laplace(size=(64, *latents.shape[1:])).astype(np.float32)
    spread = float(latents.std())
    return fit_entropy_codebook(torch.from_numpy(drawn) * spread, 90, lanes=4, **options)[0]


@pytest.fixture(scope="module")
def codebooks(autoencoder, images) -> dict:
    latents = autoencoder.encode(images)
    samples = latents.transpose(0, 1).flatten(1).numpy()
    return {
        "scalar": fit_codebook(samples, "kmeans", 8)[0],
        "additive": fit_additive(samples.T, 3, "residual", 16, 0)[0],
        "rans": records_of(latents),
    }


KINDS = ("scalar", "additive", "rans")


@pytest.mark.parametrize("kind", KINDS)
def test_no_patch_gets_worse_and_some_get_better(kind, autoencoder, images, codebooks):
    codebook, latents = codebooks[kind], autoencoder.encode(images)
    found = refine(latents, images, autoencoder, codebook, 4)
    before, after = (
        errors(codebook.dequantize(codebook.quantize(each)), images, autoencoder)
        for each in (latents, found)
    )
    assert bool((after <= before).all())
    assert float(after.mean() / before.mean()) < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_refined_alike_in_any_batch(kind, autoencoder, images, codebooks):
    codebook, latents = codebooks[kind], autoencoder.encode(images)
    together = refine(latents, images, autoencoder, codebook, 2)
    assert not torch.equal(together, latents)
    others = refine(latents[1:].flip(0), images[1:].flip(0), autoencoder, codebook, 2)
    assert torch.equal(together[1:], others.flip(0))


def test_no_steps_change_nothing(autoencoder, images, codebooks):
    latents = autoencoder.encode(images)
    assert torch.equal(refine(latents, images, autoencoder, codebooks["scalar"], 0), latents)


def test_the_caller_keeps_weights_without_gradients(autoencoder, images, codebooks):
    refine(autoencoder.encode(images), images, autoencoder, codebooks["scalar"], 1)
    assert all(weight.grad is None for weight in autoencoder.decoder.parameters())


def test_a_patch_without_any_error_stays_as_it_is(codebooks):
    plain = torch.full((1, 3, 16, 16), 0.5)  # coded and decoded exactly: no direction to go
    mean = MeanAutoencoder()
    levels, _ = fit_codebook(np.array([[-3, -2, 0, 2, 3]], np.float32).repeat(3, 0), "kmeans", 5)
    latents = mean.encode(plain)
    assert torch.equal(refine(latents, plain, mean, levels, 3), latents)


def test_a_decoder_without_gradients_is_named(images, codebooks, autoencoder):
    class Cut(NetworkAutoencoder):
        @torch.no_grad()
        def decode(self, latents):
            return super().decode(latents)

    cut = Cut(autoencoder.card, autoencoder.encoder, autoencoder.decoder)
    with pytest.raises(ContractError, match="random8: its decode gives no gradient"):
        refine(cut.encode(images), images, cut, codebooks["scalar"], 1)


@pytest.mark.parametrize("steps", [-1, MAX_STEPS + 1])
def test_absurd_numbers_of_steps_are_refused(steps, images, autoencoder, codebooks, tmp_path):
    with pytest.raises(ValueError, match=f"{steps} steps are not between 0 and 256"):
        refine(images, images, autoencoder, codebooks["scalar"], steps)
    with pytest.raises(InputError, match=f"--refine {steps} is not between 0 and 256"):
        ConvertConfig(source=tmp_path, out=tmp_path / "out", refine=steps)


def test_rounding_at_a_records_step_is_what_the_record_holds(autoencoder, images, codebooks):
    codebook, latents = codebooks["rans"], autoencoder.encode(images)
    records = codebook.quantize(latents, rate_weight=codebook.rate_weight)
    points, _ = round_at_steps(latents, records[:, 0].long(), codebook)
    assert torch.allclose(points, codebook.dequantize(records), rtol=0, atol=1e-6)


def test_bits_pull_by_what_the_tables_cost_on_both_sides_of_a_value(autoencoder, images):
    latents = autoencoder.encode(images)
    codebook = records_of(latents, classes=1)
    index = torch.full((len(latents),), len(codebook.steps) // 2)
    step = float(codebook.steps[index[0]])
    exact = torch.full_like(latents, 0.25 * step)  # between 0 and 1, rounded to 0
    points, pull = round_at_steps(exact, index, codebook)
    costs = torch.from_numpy(native_model(codebook).costs[0]).float() / 256
    zero = codebook.magnitude
    wanted = (costs[:, zero + 1] - costs[:, zero]) * step
    assert not bool(points.any())
    assert torch.allclose(pull[0, :, 0, 0], wanted) and bool((wanted > 0).any())


def convert_refined(source, out, **options):
    settings = {"device": "cpu", "encode_batch": 4, "pack_size": 4, "levels": 8, "fit_patches": 9}
    config = ConvertConfig(source=source, out=out, **settings | options)
    return convert(config, MeanAutoencoder())


@pytest.fixture
def pictures(tmp_path):
    save_pictures(tmp_path / "in" / "tumour", 9)
    return tmp_path / "in"


def test_a_conversion_records_steps_and_gives_the_same_bytes_for_any_workers(pictures, tmp_path):
    for workers in (1, 3):
        convert_refined(pictures, tmp_path / str(workers), refine=2, workers=workers)
    assert data_bytes(tmp_path / "1") == data_bytes(tmp_path / "3")
    convert_refined(pictures, tmp_path / "plain")
    refined, plain = (read_manifest(tmp_path / n).made["options"] for n in ("1", "plain"))
    assert refined["refine"] == 2 and plain["refine"] is None
    assert "refined        2 gradient steps" in info.as_text(
        info.summarize(info.Config(folder=tmp_path / "1"))
    )


def test_a_stopped_conversion_goes_on_to_the_same_bytes(pictures, tmp_path, monkeypatch):
    convert_refined(pictures, tmp_path / "whole", refine=2, shard_mb=1)
    whole, calls = conversion_shards.encode_chunk, []

    def stop_late(conversion, chunk):
        calls.append(chunk)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return whole(conversion, chunk)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion_shards, "encode_chunk", stop_late)
        convert_refined(pictures, tmp_path / "again", refine=2, shard_mb=1)
    with pytest.raises(InputError, match="refine"):
        convert_refined(pictures, tmp_path / "again", shard_mb=1)
    convert_refined(pictures, tmp_path / "again", refine=2, shard_mb=1)
    assert data_bytes(tmp_path / "again") == data_bytes(tmp_path / "whole")


def test_a_refined_codec_has_a_name_and_keeps_more_in_as_many_bytes(autoencoder, images):
    samples = autoencoder.encode(images).transpose(0, 1).flatten(1).numpy()
    pictures = [(255 * i).byte().permute(1, 2, 0).numpy().copy() for i in images]
    plain, better = (
        with_quantizer(
            autoencoder, f"kmeans:4{suffix}", patch_px=(EDGE, EDGE), samples=samples
        )
        for suffix in ("", "+refine4")
    )  # fmt: skip
    assert better.name == "random8+kmeans:4+refine4"
    kept = []
    for codec in (plain, better):
        files = codec.encode_batch(pictures)
        assert {len(file) for file in files} == {math.ceil(CHANNELS * 25 * 2 / 8)}
        decoded = codec.decode_batch(files)
        kept.append(np.mean([psnr_db(d, p) for d, p in zip(decoded, pictures, strict=True)]))
    assert kept[1] > kept[0] + 0.05


def test_refinement_is_written_after_the_codes():
    codec = parse_codec("tiny-v2+rans:4096+refine16")
    assert (codec.name, codec.quantizer.record_bytes) == ("tiny-v2", 4096)
    assert codec.quantizer.refine == 16 and codec.text == "tiny-v2+rans:4096+refine16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny+refine4", "refine4 follows codes"),
        ("tiny+fp16+refine4", "refine4 follows codes"),
        ("avif+refine4", "latents are refined"),
        ("png+refine4", "latents are refined"),
        ("tiny+kmeans+refine0", "steps of refine are 1 to 256"),
        ("tiny+kmeans+refine257", "steps of refine are 1 to 256"),
        ("tiny+kmeans+refine4+refine4", "refine4 follows codes"),
    ],
)
def test_refinement_of_what_has_no_codes_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_codec(text)
