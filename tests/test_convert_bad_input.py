"""Bad input to a conversion; nothing lost.

One clear error with file, value and remedy, or a quarantine list.
"""

import shutil
import signal
import struct
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from latentds.conversion import workdir
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import (
    REASONS,
    ContractError,
    FormatError,
    InputError,
    LatentdsError,
    TooManyBadSamplesError,
)
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.scalar import Codebook
from latentds.store.format import MANIFEST
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder
from tests.processes import call_apart, limit_file_size
from tests.test_convert import data_bytes


def spoil_truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def spoil_16_bit(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)


def spoil_alpha(path: Path) -> None:
    image = Image.fromarray(smooth_picture(0)).convert("RGBA")
    image.putalpha(100)
    image.save(path)


def spoil_16_bit_rgb(path: Path) -> None:
    """A 16-bit RGB PNG, which Pillow opens as 8-bit; written by hand, for Pillow writes none."""
    rows = b"".join(b"\0" + bytes(32 * 6) for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def spoil_16_bit_tiff(path: Path) -> None:
    """16 bits in separate planes, which Pillow opens as 8-bit noise."""
    tifffile = pytest.importorskip("tifffile")
    planes = np.zeros((3, 32, 32), np.uint16)
    with path.open("wb") as file:  # Pillow looks at the content, not at the name
        tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate")


def spoil_16_bit_ppm(path: Path) -> None:
    path.write_bytes(b"P6 32 32 65535\n" + bytes(32 * 32 * 6))


def spoil_12_bit_jpeg2000(path: Path) -> None:
    """A JPEG 2000 whose header says 12 bits; Pillow scales them."""
    Image.fromarray(smooth_picture(0)).save(path, "JPEG2000", no_jp2=True)
    content = bytearray(path.read_bytes())
    content[42:51:3] = bytes([11] * 3)  # depth - 1 of every component in the marker SIZ
    path.write_bytes(content)


def spoil_text(path: Path) -> None:
    path.write_text("not a picture")


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


SPOILERS = {
    spoil_truncated: "cannot be decoded",
    spoil_16_bit: "16-bit",
    spoil_16_bit_rgb: "16 bits",
    spoil_16_bit_tiff: "16 bits",
    spoil_16_bit_ppm: "16 bits",
    spoil_12_bit_jpeg2000: "12 bits",
    spoil_alpha: "transparent",
    spoil_text: "not a picture",
    spoil_empty: "not a picture",
}


def test_a_picture_that_a_table_of_splits_lacks_is_named(pictures, tmp_path):
    (tmp_path / "splits.csv").write_text("slide,split\ntumour/p000.png,train\n")
    with pytest.raises(InputError, match=r"names neither picture 'stroma/p000.png' nor"):
        convert_with_mean(pictures, tmp_path / "out", splits=tmp_path / "splits.csv")


@pytest.mark.parametrize(("spoil", "reason"), SPOILERS.items())
def test_bad_pictures_are_refused_by_name(pictures, tmp_path, spoil, reason):
    spoil(pictures / "tumour" / "p003.png")
    with pytest.raises(
        TooManyBadSamplesError, match=rf"tumour/p003\.png: .*{reason}.*--max-bad is 0"
    ):
        convert_with_mean(pictures, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(("spoil", "reason"), SPOILERS.items())
def test_bad_pictures_within_the_budget_are_listed(pictures, tmp_path, spoil, reason):
    spoil(pictures / "tumour" / "p003.png")
    manifest = convert_with_mean(pictures, tmp_path / "out", max_bad=1, pack_size=8)
    assert manifest.patches == 32
    (left_out,) = manifest.made["left_out"]
    assert left_out["source"] == "tumour/p003.png" and reason in left_out["detail"]
    assert str(tmp_path) not in left_out["detail"] and left_out["reason"] in REASONS
    assert verify(tmp_path / "out", "members").is_good


def test_a_run_past_its_budget_goes_on_once_the_budget_is_raised(pictures, tmp_path):
    spoil_truncated(pictures / "tumour" / "p003.png")
    with pytest.raises(TooManyBadSamplesError):
        convert_with_mean(pictures, tmp_path / "out")
    convert_with_mean(pictures, tmp_path / "out", max_bad=1)
    convert_with_mean(pictures, tmp_path / "unbroken", max_bad=1)
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "unbroken")


def test_pictures_beyond_max_px_are_refused(pictures, tmp_path):
    with pytest.raises(TooManyBadSamplesError, match="32x32 px is more than --max-px 1000"):
        convert_with_mean(pictures, tmp_path / "out", max_px=1000)


def test_two_files_with_one_key_are_refused(pictures, tmp_path):
    Image.fromarray(smooth_picture(1)).save(pictures / "tumour" / "p003.jpg")
    with pytest.raises(InputError, match=r"p003\.jpg and tumour/p003\.png have one key"):
        convert_with_mean(pictures, tmp_path / "out")


def test_labels_missing_for_some_are_refused_and_can_be_dropped(pictures, tmp_path):
    Image.fromarray(smooth_picture(1)).save(pictures / "bare.png")
    with pytest.raises(
        InputError, match=r"1 of 34 pictures lie in no class folder.*bare\.png.*--no-labels"
    ):
        convert_with_mean(pictures, tmp_path / "out")
    assert convert_with_mean(pictures, tmp_path / "out", labels=False).classes == ()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.txt").write_text("x")
    with pytest.raises(InputError, match="no pictures in it"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_with_mean(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differing_sizes_offer_the_ways_out(pictures, tmp_path):
    save_pictures(pictures / "tumour" / "big", 1, edge=64)
    with pytest.raises(
        InputError, match=r"32x32 \(33 files.*64x64 \(1 file,.*--resize, --tile or --pad"
    ):
        convert_with_mean(pictures, tmp_path / "out")


def test_missing_and_misfitting_masks_are_refused(pictures, tmp_path):
    with pytest.raises(TooManyBadSamplesError, match="has no mask.*and 28 more. 33 bad pictures"):
        convert_with_mean(pictures, tmp_path / "out", masks=tmp_path)


def test_name_pattern_that_does_not_match_names_the_file(pictures, tmp_path):
    with pytest.raises(InputError, match=r"stroma/p000\.png: does not match"):
        convert_with_mean(pictures, tmp_path / "out", name_pattern=r"_x(?P<x>\d+)")


def test_pack_by_slide_without_slides_is_refused(pictures, tmp_path):
    with pytest.raises(InputError, match="names no slide"):
        convert_with_mean(pictures, tmp_path / "out", pack_by_slide=True)


def test_nothing_foreign_is_overwritten(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"not empty \(thesis\.tex\)"):
        convert_with_mean(pictures, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_a_finished_data_set_is_replaced_only_when_asked(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        convert_with_mean(pictures, tmp_path / "out", pack_size=3)
    assert convert_with_mean(pictures, tmp_path / "out", overwrite=True, pack_size=3).packs == 11


def test_a_set_is_replaced_only_by_a_run_that_can_begin(pictures, tmp_path):
    out = tmp_path / "out"
    convert_with_mean(pictures, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    png = (pictures / "stroma" / "p000.png").read_bytes()
    (damaged / "p.png").write_bytes(png[:60] + bytes(20) + png[80:])
    with pytest.raises(InputError, match="none of the patches drawn"):
        convert_with_mean(damaged, out, overwrite=True, max_bad=9)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_overwriting_starts_anew_where_a_run_was_killed_as_it_tidied_up(
    pictures, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        convert_with_mean(pictures, out)
    shard = out / "data" / "train-000000.tar"
    before = shard.read_bytes()
    shard.write_bytes(before[:2000] + bytes(len(before) - 2000))
    convert_with_mean(pictures, out, overwrite=True)
    assert shard.read_bytes() == before


def test_output_inside_the_input_is_refused(pictures):
    with pytest.raises(InputError, match="lies in the input folder"):
        convert_with_mean(pictures, pictures / "out")


def test_codebook_of_other_latents_is_refused(pictures, tmp_path):
    stored = StoredCodebook(
        codebook=Codebook(np.array([[0.0, 1.0]], np.float32), "kmeans"),
        latent_id="sha256:0",
        made={},
    )
    save_codebook(stored, tmp_path / "cb.safetensors")
    with pytest.raises(ContractError, match="fitted to other latents"):
        convert_with_mean(pictures, tmp_path / "out", codebook=tmp_path / "cb.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a codebook file"):
        convert_with_mean(pictures, tmp_path / "out2", codebook=tmp_path / "bad.safetensors")


def convert_within(limit: int, source: Path, out: Path) -> None:
    limit_file_size(limit)
    convert_with_mean(source, out)


def test_a_full_disk_leaves_a_run_that_goes_on(processes, pictures, tmp_path):
    """The operating system refuses the write: a file size limit stands in for a full disk."""
    with pytest.raises(RuntimeError, match="File too large") as raised:
        call_apart(processes, convert_within, 7000, pictures, tmp_path / "out")
    assert str(tmp_path / "out") in str(raised.value)
    assert not (tmp_path / "out" / MANIFEST).exists()
    convert_with_mean(pictures, tmp_path / "out")
    convert_with_mean(pictures, tmp_path / "unbroken")
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "unbroken")


class Interrupt(RuntimeError):
    pass


class FailingAutoencoder(MeanAutoencoder):
    """Fails after some encode calls, as a killed process does.

    Black batches of the shape check count too.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def encode(self, images):
        self.calls -= 1
        if self.calls < 0:
            raise Interrupt
        return super().encode(images)


RUN = {"fit_patches": 16, "encode_batch": 4, "pack_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """76 pictures in each of two splits: a call to fit, four to take, 19 to encode each."""
    root = tmp_path_factory.mktemp("two") / "in"
    save_pictures(root / "train", 76)
    save_pictures(root / "val", 76, first_seed=900)
    return root


@pytest.fixture(scope="module")
def unbroken(two_splits: Path) -> dict[str, bytes]:
    """What a run that nothing stopped makes of them."""
    out = two_splits.with_name("out")
    convert(ConvertConfig(source=two_splits, out=out, **RUN), MeanAutoencoder())
    return data_bytes(out)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point to resume from behind every 64 patches, 16 calls."""
    monkeypatch.setattr("latentds.conversion.workdir.SYNC_SECONDS", 0.0)
    monkeypatch.setattr("latentds.conversion.conversion_plan.BLOCK_PATCHES", 64)


@pytest.mark.parametrize("calls", [3, 8, 21, 22, 31, 41])
def test_a_run_stopped_anywhere_resumes_to_the_same_bytes(
    two_splits, unbroken, tmp_path, small_blocks, calls
):
    config = ConvertConfig(source=two_splits, out=tmp_path / "out", **RUN)
    with pytest.raises(Interrupt):
        convert(config, FailingAutoencoder(calls))
    convert(config, MeanAutoencoder())
    assert data_bytes(tmp_path / "out") == unbroken


def test_a_torn_journal_line_and_bytes_after_the_last_sync_are_dropped(
    two_splits, unbroken, tmp_path, small_blocks
):
    config = ConvertConfig(source=two_splits, out=tmp_path / "out", **RUN)
    with pytest.raises(Interrupt):
        convert(config, FailingAutoencoder(23))  # behind the first block of the first shard
    journal = tmp_path / "out" / ".latentds" / "work" / "train-000000.jsonl"
    assert journal.read_text().count("\n") > 0
    with journal.open("a") as file:
        file.write('{"end": 99')
    with (tmp_path / "out" / "data" / "train-000000.tar.partial").open("ab") as file:
        file.write(b"half a pack")
    convert(config, MeanAutoencoder())
    assert data_bytes(tmp_path / "out") == unbroken


def test_resuming_with_other_options_or_input_is_refused(pictures, tmp_path):
    options = {
        "source": pictures,
        "out": tmp_path / "out",
        "fit_patches": 16,
        "encode_batch": 4,
        "device": "cpu",
    }
    with pytest.raises(Interrupt):
        convert(ConvertConfig(**options), FailingAutoencoder(8))
    with pytest.raises(InputError, match="differs in pack_size was 256, is 4"):
        convert(ConvertConfig(**options, pack_size=4), MeanAutoencoder())
    (pictures / "tumour" / "p000.png").unlink()
    with pytest.raises(InputError, match=r"differs in input \(other files"):
        convert(ConvertConfig(**options), MeanAutoencoder())


def convert_block_by_block(source: Path, out: Path) -> None:
    workdir.SYNC_SECONDS = 0.0
    options = {"encode_batch": 8, "pack_size": 64, "device": "cpu"}
    convert(ConvertConfig(source=source, out=out, **options))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes_to_the_same_bytes(processes, tmp_path):
    save_pictures(tmp_path / "in", 700, edge=64)
    convert_block_by_block(tmp_path / "in", tmp_path / "unbroken")
    out, partial = tmp_path / "out", tmp_path / "out" / "data" / "train-000000.tar.partial"
    for size in (1, 60_000, 120_000):  # of about 190,000
        victim = processes.Process(target=convert_block_by_block, args=(tmp_path / "in", out))
        victim.start()
        while victim.is_alive() and not (partial.is_file() and partial.stat().st_size >= size):
            time.sleep(0.005)
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        with pytest.raises((FormatError, FileNotFoundError)):
            ShardSet(out)
    convert_block_by_block(tmp_path / "in", out)
    assert data_bytes(out) == data_bytes(tmp_path / "unbroken")


def test_two_conversions_into_one_folder_keep_apart(pictures, tmp_path):
    from latentds.core.storage import exclusive_lock

    with (
        exclusive_lock(tmp_path / "out" / ".latentds" / "work" / "lock"),
        pytest.raises(InputError, match="another run is writing here"),
    ):
        convert_with_mean(pictures, tmp_path / "out")


def test_overwrite_goes_on_with_an_unfinished_run(two_splits, tmp_path, small_blocks):
    config = ConvertConfig(source=two_splits, out=tmp_path / "out", overwrite=True, **RUN)
    with pytest.raises(Interrupt):
        convert(config, FailingAutoencoder(38))
    counting = FailingAutoencoder(30)  # a new start would need 5 + 38 calls
    assert convert(config, counting).patches == 152


def test_a_refused_resumption_leaves_the_unfinished_run_as_it_was(pictures, tmp_path):
    options = {"source": pictures, "out": tmp_path / "out", "fit_patches": 16, "encode_batch": 4}
    with pytest.raises(Interrupt):
        convert(ConvertConfig(**options, device="cpu"), FailingAutoencoder(8))
    before = data_bytes(tmp_path / "out")
    with pytest.raises(InputError, match="levels was 256, is 8"):
        convert(ConvertConfig(**options, device="cpu", levels=8), MeanAutoencoder())
    assert data_bytes(tmp_path / "out") == before


def test_stray_shards_are_neither_adopted_nor_deleted_unasked(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(InputError, match="a shard without a manifest"):
        convert_with_mean(pictures, tmp_path / "out")
    assert (tmp_path / "out" / "data" / "train-000000.tar").exists()
    assert convert_with_mean(pictures, tmp_path / "out", overwrite=True).patches == 33


@pytest.mark.parametrize("name", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_named(pictures, tmp_path, name):
    with pytest.raises(InputError, match=f"device '{name}' is not available here"):
        convert_with_mean(pictures, tmp_path / "out", device=name)


@pytest.mark.parametrize("field", ["x", "mpp"])
def test_fields_that_are_no_numbers_are_refused_early(pictures, tmp_path, field):
    with pytest.raises(InputError, match=f"{field} is .stroma"):
        convert_with_mean(pictures, tmp_path / "out", name_pattern=f"(?P<{field}>stroma|tumour)")


class NanAutoencoder(MeanAutoencoder):
    def encode(self, images):
        return super().encode(images) * float("nan")


def test_an_autoencoder_that_gives_nan_is_named_with_the_picture(pictures, tmp_path):
    from latentds.quantizers.codebooks import StoredCodebook, save_codebook

    codebook = Codebook(np.array([[0.0, 1.0]], np.float32), "kmeans")
    stored = StoredCodebook(codebook=codebook, latent_id=MeanAutoencoder().card.latent_id, made={})
    save_codebook(stored, tmp_path / "cb.safetensors")
    config = ConvertConfig(
        source=pictures, out=tmp_path / "out", codebook=tmp_path / "cb.safetensors", device="cpu"
    )
    with pytest.raises(ContractError, match=r"mean8: latents contain NaN.*p\d+\.png"):
        convert(config, NanAutoencoder())


def test_split_names_beside_others_are_refused_and_can_be_classes(tmp_path):
    """Else test pictures would be trained on as a class called test."""
    for top in ("Train", "test", "holdout"):
        save_pictures(tmp_path / "in" / top, 2)
    with pytest.raises(InputError, match=r"Train, test are named like splits, holdout is not"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", split_folders=False)
    assert manifest.classes == ("Train", "holdout", "test")


def test_split_folders_may_be_capitalized(tmp_path):
    for top in ("Train", "VAL"):
        save_pictures(tmp_path / "in" / top / "tumour", 2)
    assert convert_with_mean(tmp_path / "in", tmp_path / "out").splits == {"train": 2, "val": 2}


def test_pictures_of_several_pages_are_refused(pictures, tmp_path):
    pages = [Image.fromarray(smooth_picture(seed)) for seed in (1, 2, 3)]
    pages[0].save(pictures / "tumour" / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(TooManyBadSamplesError, match=r"stack\.tif: has 3 pages"):
        convert_with_mean(pictures, tmp_path / "out")


def test_resuming_with_other_masks_is_refused(tmp_path):
    save_pictures(tmp_path / "in", 40)
    for folder, value in (("a", 1), ("b", 200)):
        (tmp_path / folder).mkdir()
        for number in range(40):
            mask = np.full((32, 32), value, np.uint8)
            mask[: number % 20] = np.random.default_rng(value).integers(0, 9, (number % 20, 32))
            Image.fromarray(mask).save(tmp_path / folder / f"p{number:03d}.png")
    options = {"source": tmp_path / "in", "out": tmp_path / "out", "fit_patches": 16}
    options |= {"encode_batch": 4, "device": "cpu"}
    with pytest.raises(Interrupt):
        convert(ConvertConfig(**options, masks=tmp_path / "a"), FailingAutoencoder(8))
    with pytest.raises(InputError, match="differs in input"):
        convert(ConvertConfig(**options, masks=tmp_path / "b"), MeanAutoencoder())


def test_masks_that_do_not_fit_are_found_before_anything_is_encoded(pictures, tmp_path):
    masks = tmp_path / "masks"
    for path in pictures.rglob("*.png"):
        target = masks / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(target)
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(masks / "tumour" / "p003.png")
    with pytest.raises(TooManyBadSamplesError, match=r"p003\.png: its mask is \(32, 16\) px"):
        convert_with_mean(pictures, tmp_path / "out", masks=masks)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        convert_with_mean(pictures, tmp_path / "out", masks=tmp_path / "nowhere")


def test_pictures_that_hold_no_tile_are_left_out_within_the_budget(tmp_path):
    save_pictures(tmp_path / "in", 2, edge=64)
    save_pictures(tmp_path / "in" / "edge", 1, edge=24)
    options = {"tile": True, "patch_size": 32, "labels": False}
    with pytest.raises(TooManyBadSamplesError, match="24x24 px holds no tile of 32"):
        convert_with_mean(tmp_path / "in", tmp_path / "out", **options)
    assert convert_with_mean(tmp_path / "in", tmp_path / "out", max_bad=1, **options).patches == 8


def test_patches_too_small_for_the_factor_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(smooth_picture(1)[:3, :3]).save(tmp_path / "in" / "dot.png")
    with pytest.raises(InputError, match=r"dot\.png: patches of 3x3 px are too small for mean8"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")


def test_a_codebook_file_and_quantizer_options_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="leave --quantizer and --levels"):
        ConvertConfig(source=tmp_path, out=tmp_path, codebook=tmp_path / "c", levels=16)
    with pytest.raises(InputError, match="leave --quantizer and --levels, which choose"):
        ConvertConfig(source=tmp_path, out=tmp_path, bytes=2048, quantizer="kmeans-channel")


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        ("images/a.png", "masks/a.png"),
        ("train/images/tumour/a.png", "train/Masks/tumour/a_mask.png"),
        ("img/a.png", "gt/a.png"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"labels": False}])
def test_masks_beside_pictures_are_no_patches(tmp_path, pictures, masks, options):
    for path in (pictures, masks):
        save_pictures((tmp_path / "in" / path).parent, 1)
        (tmp_path / "in" / path).parent.joinpath("p000.png").rename(tmp_path / "in" / path)
    with pytest.raises(InputError, match=r"no patches; pass .*, and --masks .* where they"):
        convert_with_mean(tmp_path / "in", tmp_path / "out", **options)


def test_classes_that_share_a_few_names_are_classes(tmp_path):
    save_pictures(tmp_path / "in/images", 4)
    save_pictures(tmp_path / "in/labels", 1)
    for number in range(4):
        (tmp_path / f"in/labels/other{number}.png").write_bytes(
            (tmp_path / "in/images/p000.png").read_bytes()
        )
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.classes == ("images", "labels")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"autoencoder": "tyny"}, "unknown autoencoder 'tyny'"),
        ({"codebook": Path("gone.safetensors")}, r"gone\.safetensors"),
        ({"device": "gpu"}, "gpu"),
        ({"out": "taken"}, r"taken: not empty \(notes\)"),
    ],
)
def test_wrong_choices_are_told_before_headers_are_read(tmp_path, options, told):
    save_pictures(tmp_path / "in", 1)
    spoil_16_bit(next((tmp_path / "in").iterdir()))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    out = tmp_path / options.get("out", "out")
    with pytest.raises((LatentdsError, FileNotFoundError), match=told):
        convert(ConvertConfig(source=tmp_path / "in", **options | {"out": out}))
    assert not (tmp_path / "out").exists()
