"""Which pictures a codec learns from, and the one file they are packed into."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from latentds_trainers.train_codec import tile_packs
from latentds_trainers.train_codec.tile_packs import (
    budgets,
    decoded,
    read_pack,
    spread,
    webp,
    write_pack,
)
from latentds_trainers.train_codec.tiles import (
    DEMO_HELD_OUT,
    HELD_OUT_PATIENTS,
    SOURCES,
    list_tiles,
    middles,
    pack_tiles,
    picture_files,
    read_tiles,
)
from PIL import Image

from latentds.errors import InputError
from tests.conftest import smooth_picture


@pytest.fixture(scope="module")
def own_tiles(tmp_path_factory):
    """Twenty pictures, one of them a JPEG."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(20):
        name = "00.jpg" if number == 0 else f"{number:02d}.png"
        Image.fromarray(smooth_picture(number, 264)).save(folder / name)
    return folder


def test_shares_of_the_open_tiles_sum_to_one():
    assert sum(source.share for source in SOURCES.values()) == pytest.approx(1)


def test_no_source_is_a_test_set():
    folders = [folder for source in SOURCES.values() for folder in source.folders]
    assert not [folder for folder in folders if "monuseg" in folder or "ucsb" in folder]


def test_of_ones_own_pictures_every_twentieth_is_judged_by(own_tiles):
    tiles = read_tiles(own_tiles)
    assert tiles.shares == {"tiles": 1.0} and len(tiles.pictures["tiles"]) == 19
    assert torch.equal(tiles.held_out, middles([smooth_picture(19, 264)]))


def test_pictures_of_any_suffix_are_tiles(tmp_path):
    for number, suffix in enumerate(["jpeg", "JPG", "tif", "webp"] * 5):
        picture = Image.fromarray(smooth_picture(number, 264))
        picture.save(tmp_path / f"{number:02d}.{suffix}")
    (tmp_path / "labels.csv").write_text("path\n")
    tiles = read_tiles(tmp_path)
    assert len(tiles.pictures["tiles"]) == 19 and len(tiles.held_out) == 1


def test_hidden_pictures_are_no_tiles(own_tiles, tmp_path):
    folder = Path(shutil.copytree(own_tiles, tmp_path / "tiles"))
    (folder / ".thumbs").mkdir()
    shutil.copy(min(folder.glob("*.png")), folder / ".thumbs" / "0.png")
    (folder / "._0.png").write_bytes(b"what macOS keeps beside a file")
    assert picture_files(folder) == sorted(folder / p.name for p in picture_files(own_tiles))


def test_a_folder_of_tiles_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such"):
        read_tiles(tmp_path / "gone")


def test_linked_folders_hold_tiles_as_they_hold_pictures(own_tiles, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(own_tiles, target_is_directory=True)
    (tmp_path / "linked" / "folder.png").mkdir()
    names = [p.name for p in picture_files(own_tiles)]
    assert picture_files(tmp_path / "linked") == [tmp_path / "linked" / "a" / n for n in names]


def test_a_picture_of_no_use_is_named(own_tiles, tmp_path):
    folder = Path(shutil.copytree(own_tiles, tmp_path / "tiles"))
    Image.fromarray(np.zeros((264, 264), np.uint16)).save(folder / "03.png")
    with pytest.raises(InputError, match=r"03\.png: mode I;16.*; repair it or take it out"):
        read_tiles(folder)


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match=": 0 pictures; training takes 20 or more"):
        read_tiles(tmp_path)


def test_pictures_that_are_too_small_are_named_and_counted(own_tiles, tmp_path):
    folder = Path(shutil.copytree(own_tiles, tmp_path / "tiles"))
    for name, size in (("03.png", (255, 400)), ("04.png", (96, 96))):
        Image.new("RGB", size).save(folder / name)
    message = r"2 of 20 pictures have less than 256 px each way: '03\.png', '04\.png'; take"
    with pytest.raises(InputError, match=message):
        read_tiles(folder)
    with pytest.raises(InputError, match=message):
        pack_tiles(folder, tmp_path / "tiles.zip")


def test_a_judged_picture_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="of 200x200 px; at least 256"):
        middles([smooth_picture(0, 200)])


def test_a_pack_holds_the_folders_pictures(own_tiles, tmp_path):
    pack_tiles(own_tiles, tmp_path / "tiles.zip")
    packed, folder = read_tiles(tmp_path / "tiles.zip"), read_tiles(own_tiles)
    assert packed.shares == folder.shares and torch.equal(packed.held_out, folder.held_out)
    first, second = packed.pictures["tiles"][:2]
    assert np.array_equal(first, folder.pictures["tiles"][0])  # the JPEG, as it is
    assert np.array_equal(second, folder.pictures["tiles"][1][:256, :256])


def test_a_pack_is_no_larger_than_allowed_and_keeps_its_shares(tmp_path):
    pieces = {name: [webp(smooth_picture(s, 40)) for s in range(30)] for name in ("a", "b")}
    size = sum(len(piece) for piece in pieces["a"])
    write_pack(tmp_path / "p.zip", pieces, {"a": 0.8, "b": 0.2}, {"held_out": []}, size)
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        sizes = {
            n: sum(i.file_size for i in archive.infolist() if i.filename[0] == n) for n in "ab"
        }
    assert sum(sizes.values()) <= size
    assert sizes["a"] == pytest.approx(0.8 * size, rel=0.06)  # two pieces of 30


def test_what_a_source_does_not_need_others_get():
    assert budgets({"a": 10, "b": 900, "c": 900}, {"a": 0.5, "b": 0.25, "c": 0.25}, 110) == {
        "a": 10,
        "b": 50,
        "c": 50,
    }


def test_pieces_that_are_kept_are_spread_over_all():
    pieces = [bytes([number]) * 10 for number in range(10)]
    assert [piece[0] for piece in spread(pieces, 50)] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_a_file_that_is_no_pack_is_refused(tmp_path, content):
    path = tmp_path / "tiles.zip"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tiles\.zip: no pack of tiles"):
        read_pack(path)


@pytest.mark.parametrize("name", ["pack.json", "a/00000.webp"])
def test_a_pack_that_would_fill_the_memory_is_refused_before_it_is_read(
    tmp_path, name, monkeypatch
):
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1 << 20))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match=rf"p\.zip: '{name}', 1,048,576 bytes, is compressed,"):
        read_pack(tmp_path / "p.zip")


@pytest.mark.parametrize(
    ("bound", "most", "message"),
    [
        ("MAX_BYTES", 99, r"'pack\.json', \d\d\d bytes, is .* of more than 99 bytes"),
        ("MAX_PICTURES", 2, "4 entries; a pack has at most 2"),
        ("MAX_ALL_PIXELS", 3 * 40 * 40 - 1, "more than 4,799 pixels; pack fewer"),
    ],
)
def test_a_pack_of_more_than_a_pack_has_is_refused(tmp_path, monkeypatch, bound, most, message):
    pieces = [webp(smooth_picture(seed, 40)) for seed in range(2)]
    shares = {"a": 1.0} | {f"source-{n}": 0.0 for n in range(9)}
    write_pack(tmp_path / "p.zip", {"a": pieces}, shares, {"held_out": pieces[:1]})
    monkeypatch.setattr(tile_packs, bound, most)
    with pytest.raises(InputError, match=message):
        read_pack(tmp_path / "p.zip")


def test_a_pack_of_a_source_without_pictures_is_refused(tmp_path):
    write_pack(tmp_path / "p.zip", {"a": []}, {"a": 1.0}, {"held_out": []})
    with pytest.raises(InputError, match="no picture of 'a'"):
        read_pack(tmp_path / "p.zip")


def test_webp_of_a_pack_is_lossless():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert np.array_equal(decoded(webp(picture)), picture)


@pytest.mark.assets
def test_the_open_tiles_leave_out_held_out_patients_and_the_demos_specimen(assets):
    sources, held_out = list_tiles(assets)
    names = {file.name for files in sources.values() for file in files}
    assert len(names) > 1000
    assert not [name for name in names if name.startswith(HELD_OUT_PATIENTS + DEMO_HELD_OUT)]
    assert len(held_out) == 6 and not names & {file.name for file in held_out}
    demo = assets / "segmentation" / "dsb2018_he" / "images"
    assert all((demo / f"{name}.png").is_file() for name in DEMO_HELD_OUT)
