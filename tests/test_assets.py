"""The main job on real material: real tissue, real weights, awkward tiles, the trainer."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.autoencoders import load_autoencoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.loading.loader import LatentLoader
from latentds.quantizers.codebooks import tiny_codebook
from latentds.quantizers.scalar import Codebook, dequantize, quantize
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.trainer_ranks import run_words, succeed

pytestmark = pytest.mark.assets


def monuseg_crops(assets: Path) -> torch.Tensor:
    """Two 256 px crops of each of the 14 pictures, float (28, 3, 256, 256)."""
    crops = []
    for path in sorted((assets / "segmentation" / "monuseg" / "images").glob("*.png")):
        picture = np.asarray(Image.open(path).convert("RGB"))
        crops += [picture[100:356, 100:356], picture[600:856, 500:756]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def mean_psnr_db(images: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((-10 * (images - decoded).square().mean((1, 2, 3)).log10()).mean())


@torch.no_grad()
def round_trip(name: str, images: torch.Tensor, codebook: Codebook | None = None) -> torch.Tensor:
    autoencoder = load_autoencoder(name)
    parts = []
    for part in images.split(7):
        latents = autoencoder.encode(part)
        if codebook is not None:
            latents = dequantize(quantize(latents, codebook), codebook)
        parts.append(autoencoder.decode(latents))
    return torch.cat(parts)


def test_taef2_with_its_real_weights_reconstructs_monuseg(assets):
    images = monuseg_crops(assets)[::2]  # a crop a picture
    assert mean_psnr_db(images, round_trip(str(assets / "autoencoders" / "taef2"), images)) >= 29


def test_tiny_reconstructs_monuseg_after_quantization(assets):
    images = monuseg_crops(assets)
    assert mean_psnr_db(images, round_trip("tiny", images, tiny_codebook().codebook)) >= 28


def test_real_patches_convert_verify_and_load(assets, tmp_path):
    config = ConvertConfig(
        source=assets / "classification" / "ucsb_breast",
        out=tmp_path / "ucsb",
        autoencoder="tiny",  # the default's records: test_real_jpegs_and_masks_convert
        device="cpu",
        name_pattern=r"(?P<slide>ytma[^/]*)__y(?P<y>\d+)_x(?P<x>\d+)",
    )
    manifest = convert(config)
    assert manifest.labels() == {"benign": 207, "malignant": 153} and len(manifest.slides) == 40
    assert verify(tmp_path / "ucsb").is_good
    options = {"batch_size": 40, "shuffle": True, "num_workers": 2}
    loader = LatentLoader(tmp_path / "ucsb", decode="codes", **options)
    rows = [row for batch in loader for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(360)) and loader.classes == ["benign", "malignant"]


def test_real_jpegs_and_masks_convert(assets, tmp_path):
    images = assets / "segmentation" / "dsb2018_he"
    manifest = convert(
        ConvertConfig(
            source=images / "images", masks=images / "masks", out=tmp_path / "dsb", device="cpu"
        )
    )
    assert manifest.contract.patch_px == (256, 320)
    shards = ShardSet(tmp_path / "dsb")
    rows = np.array([0, 40])
    for source, mask in zip(
        shards.read_columns(rows, ["source"])["source"], shards.read_masks(rows), strict=True
    ):
        assert np.array_equal(mask, np.asarray(Image.open(images / "masks" / source)))
    jpegs = convert(
        ConvertConfig(
            source=assets / "classification" / "oral_cc0_jpeg", out=tmp_path / "oral", device="cpu"
        )
    )
    assert all(name.startswith("jpeg:q=") for name in jpegs.made["source_encodings"])


def test_awkward_tiles_survive_tiling(assets, tmp_path):
    options = {"tile": True, "patch_size": 256, "device": "cpu", "autoencoder": "tiny"}
    config = ConvertConfig(source=assets / "edge_tiles", out=tmp_path / "edge", **options)
    manifest = convert(config)
    assert manifest.patches == 36 and manifest.contract.codes_shape == (4, 32, 32)
    assert verify(tmp_path / "edge").is_good
    (batch,) = LatentLoader(tmp_path / "edge", batch_size=36, num_workers=1)
    assert batch.images.shape == (36, 3, 256, 256)


def test_a_local_autoencoder_leaves_no_path_of_its_machine(assets, tmp_path):
    (tile,) = (assets / "edge_tiles").glob("very-low-nuclei-*")
    (tmp_path / "in").mkdir()
    shutil.copy(tile, tmp_path / "in")
    taef2 = str(assets / "autoencoders" / "taef2")
    options = {"tile": True, "patch_size": 256, "device": "cpu", "autoencoder": taef2}
    config = ConvertConfig(
        source=tmp_path / "in", out=tmp_path / "edge", fit_patches=2, encode_batch=4, **options
    )
    assert convert(config).contract.codes_shape == (32, 32, 32)
    assert str(assets) not in (tmp_path / "edge" / ".latentds" / "manifest.json").read_text()
    loader = LatentLoader(tmp_path / "edge", batch_size=4, num_workers=0, autoencoder=taef2)
    assert next(iter(loader)).images.shape == (4, 3, 256, 256)


def test_no_codec_is_trained_on_a_test_set(assets, monkeypatch):
    from latentds_trainers.train_codec.tiles import read_tiles

    opened = []
    original = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **o: opened.append(str(path)) or original(path, **o)
    )
    tiles = read_tiles(assets)
    assert len(opened) > 1000 and len(tiles.held_out) == 6
    assert not [path for path in opened if "monuseg" in path or "ucsb" in path]


def test_trainer_runs_resumes_and_writes_a_codec(assets, tmp_path, processes):
    out = tmp_path / "run"
    options = [
        *("--tiles", str(assets / "segmentation" / "dsb2018_he" / "images")),
        *("--save-every", "2", "--batch-size", "2", "--crop-px", "32"),
        *("--encoder-widths", "16", "24", "--init", "cold"),
    ]
    for steps in ("2", "4"):
        module = "latentds_trainers.train_codec"
        (ended,) = run_words(processes, out, 1, module, *options, "--steps", steps)
        succeed([ended])
    assert "going on after step 2" in ended.text and "\nstep 4 codec/loss" in ended.text
    assert "\nstep 2 codec/loss" not in ended.text
    assert ended.text.strip().endswith("codec")
    assert load_autoencoder(out / "codec").card.channels == 32
