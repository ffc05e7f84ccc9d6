"""Patches of originals, of codecs on the fly and of shards: the same patches in the same order."""

import dataclasses
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.decoders import architecture_of, save_decoder
from latentds.autoencoders.students import build_student
from latentds.codecs import PictureCodec
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import (
    ContractError,
    FormatError,
    InputError,
    LatentdsError,
    UnknownNameError,
    WeightsError,
)
from latentds.evaluation.patchsets.developing import in_chunks
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.scalar import Codebook
from latentds.store.reader import ShardSet
from tests.bad_shards import flip_bit
from tests.conftest import convert_with_mean, save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder

TABLES = ("labels", "x", "y", "mpp", "size_px")


def opened(data: Path, autoencoder: object = None, **options: object) -> PatchSet:
    settings = {"device": "cpu", "workers": 2} | options
    return open_patches(PatchInput(data=data, **settings), autoencoder)


def everything(patches: PatchSet) -> np.ndarray:
    return np.arange(len(patches))


def assert_same_patches(one: PatchSet, other: PatchSet) -> None:
    """All that is told of the patches is the same, row by row."""
    assert (one.patch_px, one.classes) == (other.patch_px, other.classes)
    assert one.slides() == other.slides()
    for name in ("sources", "slides", "splits", "names"):
        assert getattr(one.table, name) == getattr(other.table, name), name
    for name in TABLES:
        own, their = getattr(one.table, name), getattr(other.table, name)
        assert own.dtype == their.dtype
        assert np.array_equal(own, their, equal_nan=True), name


def test_a_patch_without_a_mask_is_not_background(pictures, tmp_path):
    paths = sorted(pictures.rglob("*.png"))
    write_masks(pictures, tmp_path / "masks")
    cells = [tmp_path / "masks" / path.relative_to(pictures) for path in paths]
    lines = [f"{path},{'' if row == 1 else mask}"
             for row, (path, mask) in enumerate(zip(paths, cells, strict=True))]  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,mask", *lines]) + "\n")
    convert(
        ConvertConfig(
            source=table, out=tmp_path / "set", autoencoder="tiny", device="cpu", workers=1
        )
    )
    for location in (table, tmp_path / "set"):
        patches = opened(location)
        rows = np.arange(len(patches))
        assert patches.has_masks and patches.masks(rows[:1]).any()
        with pytest.raises(InputError, match="has no mask"):
            patches.masks(rows)


def write_masks(root: Path, masks: Path) -> None:
    """A mask of every picture below `root`, different for each."""
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        size = Image.open(path).size[::-1]
        target = masks / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 5, size, np.uint8)).save(target)


@pytest.fixture
def split_pictures(tmp_path) -> Path:
    """train and val folders, two classes, two slides each, of 48 px; names are not in order."""
    root = tmp_path / "in"
    for split, first in (("train", 0), ("val", 500)):
        for label, seed in (("tumour", 0), ("stroma", 100)):
            for slide in ("s2", "s1"):
                save_pictures(root / split / label / f"{label}-{slide}", 3, first + seed, edge=48)
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": True, "patch_size": 16},
        pytest.param({"tile": True, "patch_size": 16, "stride": 8}, marks=pytest.mark.slow),
        {"resize": True, "patch_size": 24, "mpp": 0.5},
        {"pad": True, "patch_size": 56},
    ],
)
def test_shards_have_the_patches_of_their_originals(split_pictures, tmp_path, options):
    write_masks(split_pictures, tmp_path / "masks")
    options = options | {"masks": tmp_path / "masks"}
    convert_with_mean(split_pictures, tmp_path / "out", pack_size=4, **options)
    originals = opened(split_pictures, **options)
    shards = opened(tmp_path / "out", MeanAutoencoder())
    assert_same_patches(originals, shards)
    rows = everything(originals)
    assert originals.has_masks and shards.has_masks
    assert np.array_equal(originals.masks(rows), shards.masks(rows))
    far = (originals.images(rows).float() - shards.images(rows).float()).mean((2, 3)).abs()
    assert far.max() < 8  # mean colours, their levels fitted to a sample


def test_canonical_order_is_by_source_y_and_x(split_pictures):
    table = opened(split_pictures, tile=True, patch_size=16).table
    places = list(zip(table.sources, table.y.tolist(), table.x.tolist(), strict=True))
    assert places == sorted(places) and len(places) == 24 * 9
    assert table.names[1].endswith("p000.png@16,0")


def test_originals_are_the_files_pixels(pictures):
    patches = opened(pictures)
    images = patches.images(np.array([5, 0, 5]))
    files = [patches.table.sources[row] for row in (5, 0, 5)]
    expected = np.stack([np.asarray(Image.open(pictures / file)) for file in files])
    assert images.dtype == torch.uint8
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_one_split_keeps_the_classes_of_all(split_pictures, tmp_path):
    for path in (split_pictures / "val" / "stroma").rglob("*.png"):
        path.unlink()
    convert_with_mean(split_pictures, tmp_path / "out")
    originals = opened(split_pictures, split="val")
    shards = opened(tmp_path / "out", MeanAutoencoder(), split="val")
    assert_same_patches(originals, shards)
    assert originals.classes == ["stroma", "tumour"] and set(originals.table.splits) == {"val"}
    assert len(originals) == 6 and originals.table.labels.tolist() == [1] * 6


def test_labels_can_be_left_alone(pictures):
    patches = opened(pictures, use_labels=False)
    assert patches.classes == [] and set(patches.table.labels.tolist()) == {-1}


def test_bags_come_out_of_file_names(tmp_path):
    for number, label in enumerate(("benign", "malignant")):
        for y in (0, 32):
            for x in (0, 32):
                path = tmp_path / "in" / label / f"core{number}__y{y}_x{x}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(smooth_picture(number + x + y)).save(path)
    pattern = r"(?P<slide>core\d+)__y(?P<y>\d+)_x(?P<x>\d+)"
    convert_with_mean(tmp_path / "in", tmp_path / "out", name_pattern=pattern)
    originals = opened(tmp_path / "in", name_pattern=pattern)
    assert_same_patches(originals, opened(tmp_path / "out", MeanAutoencoder()))
    bag = originals.of_slide("core1")
    assert (bag.table.x.tolist(), bag.table.y.tolist()) == ([0, 32, 0, 32], [0, 0, 32, 32])
    assert bag.classes == ["benign", "malignant"] and bag.table.labels.tolist() == [1] * 4


def test_a_slide_of_a_set_has_its_rows_and_pixels(split_pictures, tmp_path):
    convert_with_mean(split_pictures, tmp_path / "out", mix=8)
    for patches in (opened(split_pictures), opened(tmp_path / "out", MeanAutoencoder())):
        rows = np.flatnonzero([slide == "stroma-s1" for slide in patches.table.slides])
        bag = patches.of_slide("stroma-s1")
        assert len(rows) == len(bag) == 6 and bag.slides() == ["stroma-s1"]
        assert bag.table.names == [patches.table.names[row] for row in rows]
        assert torch.equal(bag.images(everything(bag)), patches.images(rows))


def test_an_unknown_slide_is_named(split_pictures):
    with pytest.raises(UnknownNameError, match="unknown slide 'stroma-s9'.*stroma-s1"):
        opened(split_pictures).of_slide("stroma-s9")


# Codecs on the fly


@pytest.mark.parametrize("size", [pytest.param((48, 48), marks=pytest.mark.slow), (50, 46)])
def test_a_codec_on_the_fly_gives_the_pixels_of_shards(tmp_path, size):
    """Sizes that are no multiple of the factor are padded and cut back alike."""
    (tmp_path / "in").mkdir()
    for number in range(20):
        picture = Image.fromarray(smooth_picture(number, 64)).resize(size[::-1])
        picture.save(tmp_path / "in" / f"{number:02d}.png")
    convert(
        ConvertConfig(
            source=tmp_path / "in", out=tmp_path / "out", autoencoder="tiny", device="cpu"
        )
    )
    shards, codec = opened(tmp_path / "out"), opened(tmp_path / "in", codec="tiny+kmeans")
    assert shards.patch_px == codec.patch_px == size
    assert torch.equal(shards.images(everything(shards)), codec.images(everything(codec)))
    facts = codec.facts()
    assert facts.name == shards.facts().name == codec.name == "tiny-v1+kmeans"
    assert (
        facts.bytes_per_patch == shards.facts().bytes_per_patch == 4 * 6 * 6 + (size[0] > 48) * 24
    )
    assert facts.quantized and not facts.fine_tuned
    assert facts.codebook["origin"] == "shipped with tiny"


@pytest.mark.parametrize("codec", ["original", "jpeg:30", "tiny+kmeans", "tiny"])
def test_pixels_do_not_depend_on_what_is_asked_for_together(pictures, codec):
    options = {"codec": codec, "keep_mb": 0}
    whole = opened(pictures, **options).images(np.arange(33))
    parts = opened(pictures, **options)
    rows = np.random.default_rng(0).permutation(33)
    mixed = torch.cat([parts.images(part) for part in np.array_split(rows, 5)])
    assert torch.equal(mixed, whole[rows])


def test_the_number_of_workers_changes_nothing(split_pictures):
    options = {"tile": True, "patch_size": 16, "codec": "jpeg:30"}
    one, many = (opened(split_pictures, **options | {"workers": n}) for n in (1, 5))
    rows = np.random.default_rng(1).permutation(len(one))[:40]
    assert torch.equal(one.images(rows), many.images(rows))


def test_what_is_kept_in_memory_is_what_was_decoded(pictures):
    patches = opened(pictures, codec="tiny+kmeans")
    first = patches.images(np.arange(10))
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"gone")
    assert torch.equal(patches.images(np.array([9, 3, 3])), first[[9, 3, 3]])
    with pytest.raises(InputError, match=r"stroma/p010.png: cannot be decoded"):
        patches.images(np.array([3, 10]))


def test_kept_and_new_pixels_come_in_the_order_asked_for(pictures):
    patches, fresh = opened(pictures), opened(pictures, keep_mb=0)
    patches.images(np.array([4, 8, 2]))
    rows = np.array([9, 4, 0, 2, 30, 8, 4])
    assert torch.equal(patches.images(rows), fresh.images(rows))


def test_memory_is_bounded(pictures):
    patches = opened(pictures, keep_mb=0)
    patches.images(np.arange(5))
    assert patches.memory.held == 0


@pytest.mark.parametrize("codec", ["original", "tiny+kmeans"])
def test_a_stream_is_one_request_after_the_other(pictures, codec):
    patches = opened(pictures, codec=codec)
    requests = [np.array([1, 2]), np.array([30]), np.array([2, 1, 0]), np.array([5]), np.array([6])]
    streamed = list(patches.stream(iter(requests)))
    assert all(
        torch.equal(images, patches.images(rows))
        for images, rows in zip(streamed, requests, strict=True)
    )
    assert len(streamed) == 5


def test_small_requests_of_a_stream_go_through_the_network_together(pictures, monkeypatch):
    patches, sizes = opened(pictures, codec="tiny+kmeans"), []
    develop = patches.developer.develop
    monkeypatch.setattr(
        patches.developer, "develop", lambda raw: (sizes.append(len(raw)), develop(raw))[1]
    )
    streamed = list(patches.stream(np.array([row]) for row in range(10)))
    assert sizes == [4, 4, 2] and [len(images) for images in streamed] == [1] * 10


def test_a_stream_may_be_left_early(pictures):
    stream = opened(pictures).stream(np.array([row]) for row in range(33))
    next(stream)
    stream.close()


def test_a_stream_tells_which_file_is_damaged(pictures):
    patches = opened(pictures)
    (pictures / "tumour" / "p003.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"tumour/p003.png: cannot be decoded"):
        list(patches.stream([np.arange(10), np.arange(10, 33)]))


@pytest.mark.parametrize("codec", ["jpeg:10", "webp:50", "jpeg@700", "png"])
def test_picture_formats_are_those_of_the_codec(pictures, codec):
    patches = opened(pictures, codec=codec)
    name, _, value = codec.replace("@", ":").partition(":")
    quality = float(value) if ":" in codec else None
    made = PictureCodec(name, quality, int(value) if "@" in codec else None)
    file = made.encode(np.asarray(Image.open(pictures / patches.table.sources[7])))
    assert np.array_equal(
        patches.images(np.array([7]))[0].permute(1, 2, 0).numpy(), made.decode(file)
    )
    assert patches.name == codec and patches.facts().kind == "codec"


def test_bytes_of_a_format_are_measured(pictures):
    patches, codec = opened(pictures, codec="jpeg:10"), PictureCodec("jpeg", 10)
    images = patches.contents.read(np.arange(33))
    expected = np.mean([len(codec.encode(image)) for image in images])
    assert patches.facts().bytes_per_patch == pytest.approx(expected)


def test_bytes_of_originals_are_those_of_their_files(pictures):
    held = sum(path.stat().st_size for path in pictures.rglob("*.png"))
    assert opened(pictures).facts().bytes_per_patch == held / 33
    tiled = opened(pictures, tile=True, patch_size=16)
    assert tiled.facts().bytes_per_patch == held / 33 / 4


def test_a_fingerprint_is_of_the_content_wherever_it_lies(split_pictures, tmp_path):
    write_masks(split_pictures, tmp_path / "masks")
    with_masks = {"masks": tmp_path / "masks"}
    plain, masked = opened(split_pictures), opened(split_pictures, **with_masks)
    before = masked.fingerprint()
    moved = Path(shutil.copytree(split_pictures, tmp_path / "moved"))
    assert opened(moved).fingerprint() == plain.fingerprint() != before
    assert opened(moved, codec="jpeg:10").fingerprint() == plain.fingerprint()  # stored is the same
    for path in (min((tmp_path / "masks").rglob("*.png")), min(moved.rglob("*.png"))):
        path.write_bytes(path.read_bytes()[:-1] + b"!")  # of the same size
    assert opened(split_pictures, **with_masks).fingerprint() != before
    assert opened(moved).fingerprint() != plain.fingerprint()


def test_a_fingerprint_of_shards_is_of_their_hashes_and_patches(split_pictures, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        convert(
            ConvertConfig(
                source=split_pictures,
                out=tmp_path / name,
                autoencoder="tiny",
                device="cpu",
                workers=2,
                seed=seed,
            )
        )
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    moved = opened(Path(shutil.copytree(tmp_path / "one", tmp_path / "moved")))
    assert moved.fingerprint() == one.fingerprint() != two.fingerprint()
    parts = {opened(tmp_path / "one", split=name).fingerprint() for name in ("train", "val")}
    assert len(parts | {one.fingerprint()}) == 3


def test_facts_are_json(pictures):
    facts = opened(pictures, codec="tiny+kmeans:16").facts()
    record = facts.to_json()
    assert record["patch_px"] == [32, 32] and record["bytes_per_patch"] == 32
    assert record["codebook"]["origin"] == "fitted to a sample of the patches"
    assert record["data"] == str(pictures)


def test_a_fitted_codebook_is_the_same_each_time(split_pictures):
    one, two = (opened(split_pictures, codec="tiny+kmeans:8").facts() for _ in range(2))
    assert one == two and one.codebook["patches"] == 12
    assert one.codebook["origin"] == "fitted to a sample of the patches of train"


def test_a_codebook_file_is_used(pictures, tmp_path):
    levels = np.linspace(-3, 3, 16, dtype=np.float32)[None]
    latent_id = load_autoencoder("tiny").card.latent_id
    stored = StoredCodebook(codebook=Codebook(levels, "kmeans"), latent_id=latent_id, made={})
    save_codebook(stored, tmp_path / "book.safetensors")
    codebook = opened(
        pictures, codec="tiny+kmeans:16", codebook=tmp_path / "book.safetensors"
    ).facts().codebook  # fmt: skip
    assert codebook["codebook_id"] == stored.codebook.codebook_id
    with pytest.raises(ContractError, match="kmeans:16, 1x16 levels"):
        opened(pictures, codec="tiny+kmeans", codebook=tmp_path / "book.safetensors")


def test_bfloat16_decodes_and_encodes_in_float32(pictures):
    exact = opened(pictures, codec="tiny+kmeans").images(np.arange(8)).float()
    fast = opened(pictures, codec="tiny+kmeans", decode_dtype="bfloat16").images(np.arange(8))
    assert 0 < (fast.float() - exact).abs().mean() < 2


def test_chunks_are_full_and_results_cut(pictures):
    seen = []

    def double(part):
        seen.append(part.shape)
        return part * 2

    values = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(in_chunks(double, values, 4), values * 2)
    assert seen == [(4, 2), (4, 2)]


# Decoders


def student_of_tiny(folder: Path, seed: int = 0, latent_id: str | None = None) -> Path:
    """The folder of a random decoder for tiny's latents."""
    torch.manual_seed(seed)
    card = load_autoencoder("tiny").card
    card = dataclasses.replace(card, latent_id=latent_id or card.latent_id)
    network = NetworkAutoencoder(card, torch.nn.Identity(), build_student("turbo-s", 4, 8))
    save_decoder(
        folder, network.decoder, card, architecture_of(network), {"steps": 1}, name=folder.name
    )
    return folder


@pytest.mark.parametrize("kind", ["shards", "codec"])
def test_another_decoder_gives_other_pixels_and_a_name(pictures, tmp_path, kind):
    decoder = str(student_of_tiny(tmp_path / "mine"))
    convert(ConvertConfig(source=pictures, out=tmp_path / "out", autoencoder="tiny", device="cpu"))
    data, codec = (
        (tmp_path / "out", {}) if kind == "shards" else (pictures, {"codec": "tiny+kmeans"})
    )
    own, other = opened(data, **codec), opened(data, decoder=decoder, **codec)
    assert other.name == "tiny-v1+kmeans/mine" and own.name == "tiny-v1+kmeans"
    facts = other.facts()
    assert (facts.autoencoder, facts.decoder, facts.fine_tuned) == ("tiny-v1", "mine", True)
    assert facts.bytes_per_patch == own.facts().bytes_per_patch == 64
    rows = np.arange(33)
    assert not torch.equal(own.images(rows), other.images(rows))


def test_shards_and_codec_agree_on_another_decoder(pictures, tmp_path):
    decoder = str(student_of_tiny(tmp_path / "mine"))
    convert(ConvertConfig(source=pictures, out=tmp_path / "out", autoencoder="tiny", device="cpu"))
    shards = opened(tmp_path / "out", decoder=decoder)
    codec = opened(pictures, codec=f"{decoder}+kmeans")
    assert shards.name == codec.name
    assert torch.equal(shards.images(np.arange(33)), codec.images(np.arange(33)))


def test_a_decoder_of_other_latents_is_refused(pictures, tmp_path):
    decoder = str(student_of_tiny(tmp_path / "foreign", latent_id="sha256:" + "c" * 64))
    convert(ConvertConfig(source=pictures, out=tmp_path / "out", autoencoder="tiny", device="cpu"))
    for data, codec in ((tmp_path / "out", "original"), (pictures, "tiny+kmeans")):
        with pytest.raises(ContractError, match="latent_id"):
            opened(data, codec=codec, decoder=decoder)


# Bad input


def test_an_empty_folder_is_neither(tmp_path):
    with pytest.raises(InputError, match="no pictures in it.*; name a folder of pictures"):
        opened(tmp_path)


def test_a_file_that_holds_no_patches_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match="notes.txt: no picture or slide, no table"):
        opened(tmp_path / "notes.txt")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):  # before what only latents may have
        open_patches(PatchInput(data=tmp_path / "nowhere", decoder="mine", device="cpu"))


def test_an_unfinished_data_set_is_told(tmp_path):
    (tmp_path / ".latentds").mkdir()
    with pytest.raises(FormatError, match="its conversion has not ended"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "jpeg:10"}, "--codec jpeg:10: not for a data set"),
        ({"codebook": Path("b")}, "--codebook b: not for a data set"),
        ({"tile": True}, "--tile True: not for a data set"),
        ({"masks": Path("m")}, "--masks m: not for a data set"),
        ({"split": "test"}, "unknown split .*'test'.* known: train"),
    ],
)
def test_settings_of_originals_are_refused_for_latents(pictures, tmp_path, options, message):
    convert_with_mean(pictures, tmp_path / "out")
    with pytest.raises(LatentdsError, match=message):
        opened(tmp_path / "out", MeanAutoencoder(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "x"}, "--decoder x: not for originals as they are"),
        ({"codec": "jpeg:10", "decoder": "x"}, "--decoder x: not for jpeg:10"),
        ({"codec": "tiny", "codebook": Path("b")}, "--codebook b: not for tiny, which has none"),
        ({"codec": "jepg:10"}, "unknown codec 'jepg'; did you mean 'jpeg'"),
        ({"codec": "jpeg:500"}, "--codec jpeg:500: .*1 to 95|--codec.*500"),
        ({"codec": "jpeg"}, "--codec jpeg: say at which quality .* jpeg:50 or jpeg@4096"),
        ({"codec": "tiny+kmaens"}, "unknown codec|unknown quantizer"),
        ({"split": "test"}, "unknown split .*'test'.* known: train"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
        ({"masks": Path("nowhere")}, "--masks nowhere: no such folder"),
        ({"tile": True}, "need --patch-size"),
    ],
)
def test_settings_that_do_not_belong_to_originals_are_told(pictures, options, message):
    with pytest.raises(LatentdsError, match=message):
        opened(pictures, **options)


def test_a_codebook_of_other_latents_is_refused(pictures, tmp_path):
    levels = np.linspace(-3, 3, 256, dtype=np.float32)[None]
    stored = StoredCodebook(codebook=Codebook(levels, "kmeans"), latent_id="sha256:x", made={})
    save_codebook(stored, tmp_path / "b")
    with pytest.raises(ContractError, match="fitted to other latents than 'tiny-v1'"):
        opened(pictures, codec="tiny+kmeans", codebook=tmp_path / "b")


def test_latents_that_are_not_finite_are_told(pictures):
    network = load_autoencoder("tiny")
    for weight in network.encoder.parameters():
        weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="NaN"):
        opened(pictures, network, codec="tiny").images(np.array([0]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"stroma/p002.png: has no mask under --masks"),
        (lambda path: Image.new("L", (30, 32)).save(path), r"p002.png: its mask is \(30, 32\) px"),
        (lambda path: Image.new("RGB", (32, 32)).save(path), r"p002.png: its mask is of mode RGB"),
        (lambda path: path.write_bytes(b"none"), r"p002.png: its mask cannot be read"),
    ],
)
def test_a_mask_that_does_not_fit_is_told_on_opening(pictures, tmp_path, damage, message):
    write_masks(pictures, tmp_path / "masks")
    damage(tmp_path / "masks" / "stroma" / "p002.png")
    with pytest.raises(InputError, match=message):
        opened(pictures, masks=tmp_path / "masks")


def test_masks_that_are_not_there_are_told(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "out")
    for patches in (opened(pictures), opened(tmp_path / "out", MeanAutoencoder())):
        assert not patches.has_masks
        with pytest.raises(InputError, match="has no masks"):
            patches.masks(np.array([0]))


def test_masks_never_go_through_a_codec(pictures, tmp_path):
    write_masks(pictures, tmp_path / "masks")
    plain = opened(pictures, masks=tmp_path / "masks")
    coded = opened(pictures, masks=tmp_path / "masks", codec="jpeg:5")
    rows = np.array([3, 30, 3])
    assert np.array_equal(plain.masks(rows), coded.masks(rows))
    source = Path(plain.table.sources[3])
    assert np.array_equal(plain.masks(rows)[2], np.asarray(Image.open(tmp_path / "masks" / source)))


def test_pictures_of_several_sizes_are_told(pictures):
    Image.fromarray(smooth_picture(0, 40)).save(pictures / "tumour" / "odd.png")
    with pytest.raises(InputError, match=r"pictures differ in size.*--resize, --tile or --pad"):
        opened(pictures)


def test_pictures_in_no_class_folder_are_told_in_these_words(pictures):
    Image.fromarray(smooth_picture(0)).save(pictures / "bare.png")
    with pytest.raises(InputError, match="--no-use-labels in an evaluation"):
        opened(pictures)


def test_several_unreadable_pictures_are_counted(pictures):
    for number in range(5):
        (pictures / "tumour" / f"p00{number}.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"tumour/p000.png.*; in all 5 of 33"):
        opened(pictures)


def test_damaged_codes_are_found_when_asked_for(pictures, tmp_path):
    manifest = convert_with_mean(pictures, tmp_path / "out")
    shard = tmp_path / "out" / manifest.shards[0].name
    flip_bit(shard, int(ShardSet(tmp_path / "out").packs["codes_offset"][0]) + 5)
    patches = opened(tmp_path / "out", MeanAutoencoder(), check_codes=True)
    with pytest.raises(FormatError, match=r"train-000000.tar"):
        patches.images(np.arange(33))


def test_a_foreign_decoder_object_is_refused(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "out")
    with pytest.raises(ContractError, match="latent_id"):
        opened(tmp_path / "out", MeanAutoencoder(latent_id="sha256:" + "d" * 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": " "}, "codec is empty"),
        ({"keep_mb": -1}, "keep_mb is -1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PatchInput(data=Path("x"), **options)


@pytest.mark.parametrize(
    ("given", "location"),
    [
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("s3://b/c", "s3://b/c"),
        ("file:///b/c", "file:///b/c"),
        ("a/b", "a/b"),
    ],
)
def test_locations_survive_a_path(given, location):
    assert PatchInput(data=Path(given)).location == location


def test_a_location_without_a_data_set_is_told(tmp_path):
    with pytest.raises(InputError, match="no latentds data set there; originals must lie on"):
        opened(Path(f"file://{tmp_path}/none"))


def test_a_data_set_at_a_location_is_read(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTDS_CACHE", str(tmp_path / "cache"))
    convert_with_mean(pictures, tmp_path / "out")
    remote = opened(Path(f"file://{tmp_path}/out"), MeanAutoencoder())
    local = opened(tmp_path / "out", MeanAutoencoder())
    assert_same_patches(remote, local)
    assert torch.equal(remote.images(np.arange(33)), local.images(np.arange(33)))


def test_settings_load_no_torch():
    names = "latentds.evaluation.patchsets.patch_set, latentds.evaluation.patchsets.patch_set"
    code = f"import sys, {names}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# Tables, slides, real material


def write_table(path: Path, rows: list[str], header: str) -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


def test_a_table_of_bags_names_slides_and_labels(pictures, tmp_path):
    files = sorted(p.relative_to(tmp_path).as_posix() for p in pictures.rglob("*.png"))
    rows = [f"{file},bag{number % 3},core{number % 2},{Path(file).parent.name}"
            for number, file in enumerate(files)]  # fmt: skip
    write_table(tmp_path / "labels.csv", rows, "path,bag,tma_core,label")
    convert_with_mean(tmp_path / "labels.csv", tmp_path / "out")
    originals = opened(tmp_path / "labels.csv")
    assert_same_patches(originals, opened(tmp_path / "out", MeanAutoencoder()))
    assert originals.slides() == ["bag0", "bag1", "bag2"] and originals.classes == [
        "stroma",
        "tumour",
    ]
    assert originals.table.sources[0] == "pictures/stroma/p000.png"


def test_two_columns_of_one_meaning_are_refused(pictures, tmp_path):
    write_table(tmp_path / "t.csv", ["pictures/tumour/p000.png,a,b"], "path,slide,bag")
    with pytest.raises(InputError, match="path, slide, bag: two columns are one"):
        opened(tmp_path / "t.csv")


def test_a_picture_listed_twice_is_refused(pictures, tmp_path):
    write_table(tmp_path / "t.csv", ["pictures/tumour/p000.png"] * 2, "path")
    with pytest.raises(InputError, match=r"p000.png is named twice"):
        opened(tmp_path / "t.csv")


@pytest.fixture
def slide_folder(tmp_path) -> Path:
    pytest.importorskip("openslide")
    from tests.test_slides import write_slide

    for number in (1, 2):
        write_slide(tmp_path / "slides" / f"TCGA-AA-000{number}-01Z-00-DX1.tiff")
    return tmp_path / "slides"


def test_slides_have_the_patches_of_their_shards(slide_folder, tmp_path):
    options = {"mpp": 0.5, "patch_size": 64, "min_tissue": 0.5}
    convert_with_mean(slide_folder, tmp_path / "out", **options)
    originals = opened(slide_folder, **options)
    shards = opened(tmp_path / "out", MeanAutoencoder())
    assert_same_patches(originals, shards)
    assert originals.table.size_px.tolist() == [128] * len(originals)
    own, decoded = (patches.images(np.arange(8)).float() for patches in (originals, shards))
    assert (own - decoded).mean((2, 3)).abs().max() < 8


def test_one_slide_needs_no_look_at_the_others(slide_folder):
    patches = opened(slide_folder, patch_size=64)
    (slide_folder / "TCGA-AA-0002-01Z-00-DX1.tiff").write_bytes(b"II*\0 broken")
    bag = patches.of_slide("TCGA-AA-0001-01Z-00-DX1")
    assert len(bag) > 1 and bag.images(np.array([0])).shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match=r"0002-01Z-00-DX1.tiff"):
        len(patches)


def test_a_fingerprint_of_slides_looks_for_no_tissue(slide_folder, monkeypatch):
    from latentds.sources.slides import Slides

    monkeypatch.setattr(Slides, "find_places", None)
    one = opened(slide_folder)
    before = one.fingerprint()
    path = min(path for path in slide_folder.rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes() + b"!")
    assert one.fingerprint() != before


def test_slides_have_no_masks(slide_folder, tmp_path):
    with pytest.raises(InputError, match="slides have no masks"):
        opened(slide_folder, masks=tmp_path)


def test_bytes_of_slides_are_measured(slide_folder):
    patches = opened(slide_folder, patch_size=64)
    held = sum(path.stat().st_size for path in slide_folder.iterdir())
    assert patches.facts().bytes_per_patch == pytest.approx(held / len(patches))
    assert opened(slide_folder, patch_size=64, codec="jpeg:10").facts().bytes_per_patch > 100


@pytest.mark.assets
def test_ucsb_opens_by_its_table_and_by_its_names(assets):
    folder = assets / "classification" / "ucsb_breast"
    table = opened(folder / "labels.csv", root=assets)
    pattern = r"(?P<slide>ytma\d+_\d+_[a-z]+\d+)__y(?P<y>\d+)_x(?P<x>\d+)"
    named = opened(folder, name_pattern=pattern)
    assert len(table) == len(named) == 360 and table.slides() == named.slides()
    assert len(table.slides()) == 40 and table.classes == ["benign", "malignant"]
    assert np.array_equal(table.table.labels, named.table.labels)
    assert table.table.slides == named.table.slides
    assert torch.equal(table.images(np.arange(9)), named.images(np.arange(9)))


@pytest.mark.assets
def test_a_real_slide_has_the_patches_of_its_shards(assets, tmp_path):
    convert_with_mean(assets / "wsi", tmp_path / "out", mpp=0.5, encode_batch=16)
    originals = opened(assets / "wsi", mpp=0.5)
    assert_same_patches(originals, opened(tmp_path / "out", MeanAutoencoder()))
    assert len(originals.of_slide("CMU-1-Small-Region")) == len(originals) > 30


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same_pixels(tmp_path, monkeypatch):
    # Traced, and run without the minutes of a code generator; that one is tested in test_decoding.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    save_pictures(tmp_path / "in", 5, 32)
    source = {"codec": "tiny+kmeans"}
    plain = opened(tmp_path / "in", **source)
    compiled = opened(tmp_path / "in", decode_compile=True, **source)
    rows = everything(plain)
    assert torch.equal(plain.images(rows), compiled.images(rows))
