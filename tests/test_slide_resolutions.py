"""Slides at other resolutions than asked, without tissue, with broken parts: told, never lost."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from latentds_tools.reports.set_lines import mpp_text

from latentds.errors import InputError, TooManyBadSamplesError
from latentds.sources.originals import Originals
from latentds.store.channel_statistics import are_several, resolutions
from tests.test_slides import PLACES, convert, slide_pixels, write_job, write_slide

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("openslide")

MPP = {"mpp": 0.5, "pack_size": 64}


def write_blank(path: Path) -> None:
    """A slide without tissue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for page in range(2):
            pixels = np.full((768 >> page, 1024 >> page, 3), 245, np.uint8)
            writer.write(pixels, photometric="rgb", tile=(128, 128), subfiletype=page,
                         resolution=(40000, 40000), resolutionunit="CENTIMETER")  # fmt: skip


def spoil_tile(path: Path, page: int, number: int) -> None:
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        offset, size = found.dataoffsets[number], found.databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"x" * size
    path.write_bytes(content)


def test_slides_are_not_enlarged_unless_asked(tmp_path):
    write_slide(tmp_path / "in/coarse.tif", mpp=2.0)
    write_slide(tmp_path / "in/fine.tif", mpp=0.52)  # within 5 %
    shards, _ = convert(tmp_path / "in", tmp_path / "out", max_bad=1, **MPP)
    (entry,) = shards.manifest.made["left_out"]
    assert entry["source"] == "coarse.tif" and "enlarged 4 times" in entry["detail"]
    assert entry["reason"] == "resolution"
    assert shards.manifest.slides == ("fine",)
    asked, _ = convert(tmp_path / "in", tmp_path / "asked", enlarge=True, **MPP)
    assert asked.manifest.slides == ("coarse", "fine")
    assert asked.manifest.made["options"]["enlarge"] is True


def test_coordinates_that_enlarge_are_refused(tmp_path):
    write_slide(tmp_path / "slides/a.tif")
    write_job(tmp_path / "job", "a", PLACES, patch_size_level0=32)
    with pytest.raises(TooManyBadSamplesError, match="enlarged 2 times"):
        convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")


@pytest.mark.parametrize("way", ["assumed", "table"])
def test_pixels_that_are_not_square_have_a_way_out(tmp_path, way):
    write_slide(tmp_path / "in/a.tif")
    with tifffile.TiffFile(tmp_path / "in/a.tif", mode="r+") as file:
        file.pages[0].tags["YResolution"].overwrite((400, 1))
        file.pages[0].tags["XResolution"].overwrite((40000, 1))
        file.pages[0].tags["YResolution"].overwrite((36000, 1))
    with pytest.raises(TooManyBadSamplesError, match=r"not square .*--assume-mpp.*--slide-table"):
        convert(tmp_path / "in", tmp_path / "no", **MPP)
    (tmp_path / "t.csv").write_text("wsi,mpp\na.tif,0.25\n")
    option = {"assume_mpp": 0.25} if way == "assumed" else {"slide_table": tmp_path / "t.csv"}
    _, columns = convert(tmp_path / "in", tmp_path / "out", **MPP, **option)
    assert set(columns["size_px"]) == {128} and set(columns["mpp"]) == {0.5}


def test_a_table_of_slides_overrules_files_and_folders(tmp_path):
    for name in ("x/a", "y/b"):
        write_slide(tmp_path / "in" / f"{name}.tif")
    table = tmp_path / "t.csv"
    table.write_text("slide_id;label;split;mpp;scanner\nA.svs;z;test;0,5;S\n".replace("A", "a"))
    shards, columns = convert(tmp_path / "in", tmp_path / "out", slide_table=table, **MPP)
    assert shards.manifest.classes == ("y", "z")
    assert set(shards.manifest.splits) == {"test", "train"}
    sizes = dict(zip(columns["slide"], columns["size_px"], strict=True))
    assert sizes == {"a": 64, "b": 128}
    notes = shards.manifest.made["source"]["notes"]
    assert "t.csv: columns not used: scanner" in notes
    assert "t.csv: 1 slide not in it: 'b'" in notes


def test_originals_are_read_at_the_resolution_that_a_table_gave(tmp_path):
    write_slide(tmp_path / "in/a.tif")
    (tmp_path / "t.csv").write_text("slide,mpp\na,0.5\n")
    shards, columns = convert(
        tmp_path / "in", tmp_path / "out", slide_table=tmp_path / "t.csv", **MPP
    )
    rows = np.arange(len(shards))
    coords = np.stack([shards.patches[rows]["x"], shards.patches[rows]["y"]], 1)
    found = Originals(shards, tmp_path / "in").read(["a.tif"] * len(rows), coords)
    x, y = coords[5]
    assert set(columns["size_px"]) == {64}
    assert np.array_equal(found[5], slide_pixels()[y : y + 64, x : x + 64])


def test_a_table_of_slides_is_an_input(tmp_path):
    for name in ("a", "b", "c"):
        write_slide(tmp_path / f"{name}.tif")
    (tmp_path / "list.csv").write_text("wsi,label,mpp\na.tif,z,0.5\nb.tif,w,\n")
    shards, columns = convert(tmp_path / "list.csv", tmp_path / "out", **MPP)
    assert shards.manifest.slides == ("a", "b") and shards.manifest.classes == ("w", "z")
    sizes = dict(zip(columns["slide"], columns["size_px"], strict=True))
    assert sizes == {"a": 64, "b": 128}


def test_a_slide_without_tissue_is_listed_with_its_reason(tmp_path):
    write_slide(tmp_path / "in/a.tif")
    write_blank(tmp_path / "in/pale.tif")
    shards, _ = convert(tmp_path / "in", tmp_path / "out", **MPP)
    made = shards.manifest.made
    assert made["converted"] == 1 and made["left_out"] == []
    (entry,) = made["without_patches"]
    assert entry["source"] == "pale.tif" and entry["reason"].startswith("no tissue in any of 48")


def test_slides_without_tissue_alone_are_refused_with_the_reason(tmp_path):
    write_blank(tmp_path / "in/pale.tif")
    with pytest.raises(InputError, match=r"no patch in 1 picture \(pale.tif: no tissue"):
        convert(tmp_path / "in", tmp_path / "out", **MPP)


@pytest.mark.parametrize(
    ("broken", "tissue"),
    [
        ((1,), "otsu"),
        ((0, 1), "otsu"),
        ((0, 1), "dsmil"),
        pytest.param((1,), "dsmil", marks=pytest.mark.slow),
    ],
)
def test_a_broken_background_tile_of_an_overview_loses_no_patch(tmp_path, broken, tissue):
    write_slide(tmp_path / "in/a.tif")
    options = {"patch_size": 128, "tissue": tissue, **MPP}
    _, whole = convert(tmp_path / "in", tmp_path / "whole", **options)
    for page in broken:
        spoil_tile(tmp_path / "in/a.tif", page, 0)
    _, found = convert(tmp_path / "in", tmp_path / "out", max_bad=1, **options)
    assert sorted(zip(found["x"], found["y"], strict=True)) == sorted(
        zip(whole["x"], whole["y"], strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "size_px"), [({"custom_downsample": 2}, 256), ({"custom_downsample": 1}, 128)]
)
def test_custom_downsample_of_clam_is_read(tmp_path, changes, size_px):
    write_slide(tmp_path / "slides/a.tif")
    write_job(tmp_path / "job", "a", [(128, 256)], trident=False, **changes)
    _, columns = convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")
    assert set(columns["size_px"]) == {size_px}


@pytest.mark.parametrize(
    ("trident", "lacking"),
    [(True, ("level0_width", "level0_height")), (False, ("downsample",))],
    ids=["TRIDENT 0.1", "forks of CLAM"],
)
def test_coordinates_of_earlier_versions_are_read(tmp_path, trident, lacking):
    write_slide(tmp_path / "slides/a.tif")
    with h5py.File(write_job(tmp_path / "job", "a", [(128, 256)], trident), "r+") as file:
        for name in lacking:
            del file["coords"].attrs[name]
    _, columns = convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")
    assert set(columns["size_px"]) == {128} and set(columns["x"]) == {128}


def test_coordinates_of_a_level_that_a_slide_lacks_are_refused(tmp_path):
    write_slide(tmp_path / "slides/a.tif")
    path = write_job(tmp_path / "job", "a", [(0, 0)], trident=False, patch_level=9)
    with h5py.File(path, "r+") as file:
        del file["coords"].attrs["downsample"]
    with pytest.raises(TooManyBadSamplesError, match="are of level 9, it has"):
        convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")


def test_corners_that_are_there_twice_are_one_patch_and_counted(tmp_path):
    write_slide(tmp_path / "slides/a.tif")
    write_job(tmp_path / "job", "a", [*PLACES, PLACES[0]])
    shards, _ = convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")
    keys = shards.read_columns(np.arange(len(shards)), ["key"])["key"]
    assert len(keys) == len(set(keys)) == len(PLACES)
    assert shards.manifest.made["source"]["there_twice"] == 1


def test_resolutions_are_counted_and_several_noticed():
    found = resolutions(np.array([0.25, 0.25, 0.2501, 0.5, np.nan], np.float32))
    assert found == {"0.25": 3, "0.5": 1, "unknown": 1}
    assert are_several(found) and are_several({"0.25": 1, "0.5": 1})
    assert not are_several({"0.25": 1, "0.252": 1}) and not are_several({"unknown": 5})


def test_several_resolutions_are_told_without_an_option_that_jobs_refuse():
    text = mpp_text({"0.25": 1, "0.5": 2})
    assert text.endswith("patches of several resolutions; slides cut at --mpp have one")
