"""Conversion: right codes, splits, labels and columns.

Same bytes for any workers; what the options do.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.autoencoders.autoencoder import pad_to_factor
from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import InputError
from latentds.quantizers.scalar import quantize
from latentds.sources.picture import ORIENTATION
from latentds.sources.picture_files import read_header
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder


def sources_and_codes(folder):
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    return shards.read_columns(rows, ["source"])["source"], shards.read_codes(rows)


def data_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_stored_codes_are_the_quantized_latents_of_their_source(pictures, tmp_path):
    manifest = convert_with_mean(pictures, tmp_path / "out")
    autoencoder = MeanAutoencoder()
    for source, codes in zip(*sources_and_codes(tmp_path / "out"), strict=True):
        image = torch.from_numpy(np.asarray(Image.open(pictures / source)).copy())
        latents = autoencoder.encode(image.permute(2, 0, 1)[None].float() / 255)
        assert torch.equal(
            quantize(latents, manifest.contract.codebook)[0], torch.from_numpy(codes)
        )


def test_the_encoder_sees_one_patch_before_the_work_and_then_full_batches(pictures, tmp_path):
    """A shape is learned once, of one patch: of a large network on a CPU a batch takes minutes."""
    sizes = []

    class Counting(MeanAutoencoder):
        def encode(self, images):
            sizes.append(len(images))
            return super().encode(images)

    options = {"fit_patches": 16, "encode_batch": 4, "device": "cpu"}
    convert(ConvertConfig(source=pictures, out=tmp_path / "out", **options), Counting())
    assert sizes == [1] + [4] * (4 + 9)  # a sample of 16 for the codebook, and 33 patches


def test_class_folders_become_labels(pictures, tmp_path):
    manifest = convert_with_mean(pictures, tmp_path / "out")
    assert manifest.labels() == {"stroma": 13, "tumour": 20}
    shards = ShardSet(tmp_path / "out")
    sources, _ = sources_and_codes(tmp_path / "out")
    assert [manifest.classes[i] for i in shards.patches["label"]] == [
        s.split("/")[0] for s in sources
    ]


def test_split_class_and_slide_folders(shared_dataset):
    manifest = ShardSet(shared_dataset).manifest
    assert manifest.splits == {"train": 500, "val": 100}
    assert manifest.slides == ("slide.A", "slide.B")
    assert manifest.labels("val") == {"stroma": 50, "tumour": 50}


@pytest.mark.parametrize("pack_size", [1, 7, 256])
def test_same_bytes_for_any_number_of_workers(pictures, tmp_path, pack_size):
    for workers in (1, 4):
        convert_with_mean(pictures, tmp_path / str(workers), workers=workers, pack_size=pack_size)
    assert data_bytes(tmp_path / "1") == data_bytes(tmp_path / "4")


def test_pack_size_does_not_change_codes(pictures, tmp_path):
    for pack_size in (1, 8, 256):
        convert_with_mean(pictures, tmp_path / str(pack_size), pack_size=pack_size)
    first = sources_and_codes(tmp_path / "1")
    for pack_size in (8, 256):
        other = sources_and_codes(tmp_path / str(pack_size))
        assert first[0] == other[0] and np.array_equal(first[1], other[1])
    assert [ShardSet(tmp_path / p).manifest.packs for p in ("1", "8", "256")] == [33, 5, 1]


def test_one_pack_a_slide(tmp_path):
    for number, count in enumerate((3, 9, 5)):
        save_pictures(tmp_path / "in" / "c" / f"TCGA-{number}.x", count, first_seed=number * 50)
    convert_with_mean(tmp_path / "in", tmp_path / "out", pack_by_slide=True)
    assert ShardSet(tmp_path / "out").packs["count"].tolist() == [3, 9, 5]


def test_small_shards_split_the_set(shared_dataset, tmp_path):
    save_pictures(tmp_path / "in", 600)
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", shard_mb=1)
    assert len(manifest.shards) == 1  # 600 patches of 48 bytes stay far below a megabyte
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "o", shard_mb=1)
    from latentds.conversion.conversion_plan import make_plan, plan_shards

    shards = plan_shards(make_plan(config), config, bytes_per_patch=3000)
    assert [sum(b - a for a, b in shard.blocks) for shard in shards] == [256, 256, 88]


def test_tiles_with_overlap_carry_their_place(tmp_path):
    save_pictures(tmp_path / "in", 1, edge=64)
    convert_with_mean(tmp_path / "in", tmp_path / "out", tile=True, patch_size=32, stride=16)
    shards = ShardSet(tmp_path / "out")
    places = sorted(zip(shards.patches["x"].tolist(), shards.patches["y"].tolist(), strict=True))
    assert places == [(x, y) for x in (0, 16, 32) for y in (0, 16, 32)]
    keys = shards.read_columns(np.arange(9), ["key"])["key"]
    assert len(set(keys)) == 9 and "p000_x16_y32" in keys


def test_resize_brings_sizes_together(tmp_path):
    save_pictures(tmp_path / "in" / "a", 2, edge=48)
    save_pictures(tmp_path / "in" / "b", 2, edge=80)
    manifest = convert_with_mean(
        tmp_path / "in", tmp_path / "out", resize=True, patch_size=64, mpp=0.5
    )
    assert manifest.contract.patch_px == (64, 64)
    patches = ShardSet(tmp_path / "out").patches
    assert sorted(set(patches["size_px"].tolist())) == [48, 80]
    assert np.allclose(patches["mpp"], 0.5 * patches["size_px"] / 64)


def test_pad_reflects_up_to_the_patch_size(tmp_path):
    save_pictures(tmp_path / "in", 3, edge=40)
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", pad=True, patch_size=48)
    assert manifest.contract.codes_shape == (3, 6, 6)


def test_sizes_the_factor_does_not_divide_are_padded_and_cropped_back(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(smooth_picture(number, 48)[:37, :43]).save(
            tmp_path / "in" / f"{number}.png"
        )
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.contract.patch_px == (37, 43) and manifest.contract.codes_shape == (3, 5, 6)
    padded = pad_to_factor(torch.arange(37.0).view(1, 1, 37, 1).expand(1, 3, 37, 43), 8)
    assert padded[0, 0, -3:, 0].tolist() == [35, 34, 33]


def test_name_pattern_fills_columns(tmp_path):
    save_pictures(tmp_path / "in", 3)
    for path in sorted((tmp_path / "in").iterdir()):
        path.rename(path.with_name(f"s{path.stem[-1]}_benign_x8_y16.png"))
    pattern = r"(?P<slide>s\d)_(?P<label>[a-z]+)_x(?P<x>\d+)_y(?P<y>\d+)"
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", name_pattern=pattern)
    assert manifest.slides == ("s0", "s1", "s2") and manifest.classes == ("benign",)
    assert ShardSet(tmp_path / "out").patches["y"].tolist() == [16, 16, 16]


def test_masks_come_back_to_the_pixel(tmp_path):
    save_pictures(tmp_path / "in", 3)
    (tmp_path / "masks").mkdir()
    for number in range(3):
        mask = np.random.default_rng(number).integers(0, 6, (32, 32), np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"p{number:03d}.png")
    convert_with_mean(tmp_path / "in", tmp_path / "out", masks=tmp_path / "masks")
    shards = ShardSet(tmp_path / "out")
    sources, _ = sources_and_codes(tmp_path / "out")
    for source, mask in zip(sources, shards.read_masks(np.arange(3)), strict=True):
        assert np.array_equal(mask, np.asarray(Image.open(tmp_path / "masks" / source)))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA"])
def test_other_8_bit_modes_are_converted_and_counted(tmp_path, mode):
    save_pictures(tmp_path / "in", 2)
    path = tmp_path / "in" / ("q.tif" if mode in ("CMYK", "LA") else "q.png")
    Image.fromarray(smooth_picture(9)).convert("L" if mode == "LA" else "RGB").convert(mode).save(
        path
    )
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.patches == 3 and manifest.made["converted_to_rgb"] == {mode: 1}


@pytest.mark.parametrize(("suffix", "is_told"), [("jpg", True), ("png", True), ("tif", False)])
def test_an_orientation_that_is_not_applied_is_told(tmp_path, caplog, suffix, is_told):
    save_pictures(tmp_path / "in", 2)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn; a TIFF's is applied when it is read
    Image.fromarray(smooth_picture(9)).save(tmp_path / f"in/q.{suffix}", exif=exif)
    caplog.set_level("INFO", "latentds")
    plan = make_plan(ConvertConfig(source=tmp_path / "in", out=tmp_path / "out"))
    note = f"EXIF orientation, which is not applied, is in 1 of 3 headers: 'q.{suffix}'"
    assert plan.notes == ((note,) if is_told else ()) and (note in caplog.text) == is_told


def test_exif_that_cannot_be_read_loses_no_picture(tmp_path):
    Image.fromarray(smooth_picture(9)).save(tmp_path / "q.png", exif=b"Exif\0\0none")
    assert read_header(tmp_path / "q.png", 10**6).orientation == 1


def test_source_encoding_is_recorded_with_jpeg_quality(tmp_path):
    (tmp_path / "in").mkdir()
    for quality, sampling in ((70, "4:2:0"), (90, "4:4:4")):
        Image.fromarray(smooth_picture(quality)).save(
            tmp_path / "in" / f"{quality}.jpg", quality=quality, subsampling=sampling
        )
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.made["source_encodings"] == {"jpeg:q=70:4:2:0": 1, "jpeg:q=90:4:4:4": 1}


def test_codebook_is_fitted_to_the_training_split_and_reported(shared_dataset):
    made = ShardSet(shared_dataset).manifest.made["codebook"]
    assert made["split"] == "train" and made["patches"] == 16 and made["seed"] == 0
    assert made["snr_db"] > 20 and "dead_levels" in made


QUANTIZERS = ["kmeans-channel", "int8-minmax", "int8-percentile", "int8-channel"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_converts(pictures, tmp_path, quantizer):
    manifest = convert_with_mean(pictures, tmp_path / "out", quantizer=quantizer, levels=64)
    assert manifest.contract.codebook.kind == quantizer
    assert ShardSet(tmp_path / "out").read_codes(np.arange(33)).max() < 64


def test_files_that_are_no_pictures_are_counted(pictures, tmp_path):
    (pictures / "labels.csv").write_text("a,b")
    (pictures / ".DS_Store").write_text("x")
    assert convert_with_mean(pictures, tmp_path / "out").made["ignored_files"] == 1


def test_golden_patches_are_kept(shared_dataset):
    from latentds.store.golden import read_golden

    shards = ShardSet(shared_dataset)
    golden = read_golden(shared_dataset, shards.manifest.contract, len(shards))
    assert len(golden.rows) == 8
    assert np.array_equal(shards.read_codes(golden.rows), golden.codes)


def test_the_embedded_autoencoder_converts_with_its_own_codebook(pictures, tmp_path):
    manifest = convert(
        ConvertConfig(source=pictures, out=tmp_path / "out", autoencoder="tiny", device="cpu")
    )
    assert manifest.contract.autoencoder["name"] == "tiny-v1"
    assert manifest.made["codebook"]["origin"] == "ships with tiny-v1"


def test_gnu_tar_lists_a_shard(shared_dataset):
    shard = shared_dataset / "data" / "train-000000.tar"
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines()[0] == "train-000000-000000.codes.npy"


def test_manifest_is_json_with_sorted_keys(shared_dataset):
    text = (shared_dataset / ".latentds" / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    "options",
    [
        {"tile": True, "resize": True, "patch_size": 32},
        {"tile": True},
        {"stride": 4},
        {"levels": 300},
        {"pack_size": 0},
        {"mpp": -1.0},
        {"max_bad": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options):
    with pytest.raises(InputError):
        ConvertConfig(source=tmp_path, out=tmp_path / "o", **options)


def test_two_links_to_one_folder_are_two_classes(tmp_path):
    save_pictures(tmp_path / "store", 3)
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "s1").symlink_to(tmp_path / "store")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in" / "a")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.labels() == {"a": 3, "b": 3}


def test_a_tiled_picture_is_decoded_once(tmp_path, monkeypatch):
    from latentds.sources import picture_files

    opened = []
    original = picture_files.read_picture
    monkeypatch.setattr(
        picture_files, "read_picture", lambda p, m: opened.append(p) or original(p, m)
    )
    save_pictures(tmp_path / "in", 2, edge=256)
    manifest = convert_with_mean(
        tmp_path / "in", tmp_path / "out", tile=True, patch_size=32, fit_patches=1, order="path"
    )
    assert manifest.patches == 128
    assert len(opened) <= 2 + 1 + 8  # conversion, codebook sample, golden patches


def test_a_codebook_file_is_named_in_the_manifest(pictures, tmp_path):
    from latentds.quantizers.codebooks import StoredCodebook, save_codebook

    first = convert_with_mean(pictures, tmp_path / "a")
    stored = StoredCodebook(
        codebook=first.contract.codebook, latent_id=first.contract.latent_id, made={"seed": 3}
    )
    save_codebook(stored, tmp_path / "book.safetensors")
    manifest = convert_with_mean(pictures, tmp_path / "b", codebook=tmp_path / "book.safetensors")
    assert manifest.made["codebook"] == {
        "origin": "from a codebook file",
        "file": "book.safetensors",
        "fit": {"seed": 3},
    }


def test_options_of_the_command_line_alone_are_not_recorded(tmp_path):
    from latentds_tools.convert import Config

    places = {"source": tmp_path, "out": tmp_path / "o"}
    assert Config(**places, json=True).recorded() == ConvertConfig(**places).recorded()


def test_threads_are_left_as_they_were(pictures, tmp_path):
    before = torch.get_num_threads()
    convert_with_mean(pictures, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_bytes_alone_choose_additive_codes_of_as_many(pictures, tmp_path):
    manifest = convert_with_mean(pictures, tmp_path / "out", bytes=32)
    contract = manifest.contract
    assert (contract.encoding, contract.codes_shape) == ("u8-sum", (2, 4, 4))
    assert contract.bytes_per_patch == 32 and contract.latents_shape == (3, 4, 4)
    assert manifest.made["options"]["bytes"] == 32
    assert manifest.made["codebook"]["snr_db"] > 20
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bytes": 40}, r"additive codes of latents of 3 channels x 16 cells take 16, 32 or 48,"),
        ({"codebook": Path("additive")}, "--codebook additive needs --bytes"),
        ({"codebook": Path("scalar"), "bytes": 32}, "scalar codes take a byte a latent value"),
        ({"bytes": 32, "levels": 16, "codebook": Path("additive")}, "leave --quantizer and"),
    ],
)
def test_bytes_that_codes_cannot_have_are_refused_with_those_they_can(
    pictures, tmp_path, options, words
):
    with pytest.raises(InputError, match=words):
        convert_with_mean(pictures, tmp_path / "out", **options)


class Inverting(MeanAutoencoder):
    """Decodes to what is wrong, as damaged weights do."""

    def decode(self, latents):
        return 1 - super().decode(latents)


@pytest.mark.parametrize("network", [MeanAutoencoder, Inverting])
def test_stored_patches_that_decode_to_other_pictures_are_told(tmp_path, caplog, network):
    options = {"fit_patches": 16, "encode_batch": 4, "device": "cpu"}
    dark = tmp_path / "dark"
    dark.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (20, number, 30)).save(dark / f"{number}.png")
    with caplog.at_level("WARNING"):
        convert(ConvertConfig(source=dark, out=tmp_path / "out", **options), network())
    told = "what stored patches decode to is unlike the pictures" in caplog.text
    assert told == (network is Inverting)
