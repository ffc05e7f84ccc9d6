"""What latentds bench fidelity judges on: crops, how their files are coded, their slides."""

from pathlib import Path

import numpy as np
import pytest
from latentds_tools.fidelity.fidelity_crops import find_slides, read_crops
from PIL import Image

from latentds.errors import InputError
from tests.conftest import save_pictures, smooth_picture

EDGE = 32


def test_whole_patches_are_taken_once_and_larger_pictures_cropped(tmp_path):
    save_pictures(tmp_path, 2, edge=EDGE)
    Image.fromarray(smooth_picture(9, 80)).save(tmp_path / "large.png")
    Image.fromarray(smooth_picture(9, 16)).save(tmp_path / "small.png")
    crops = read_crops([tmp_path], crop_px=EDGE, per_picture=3, most=99, seed=0)
    assert [c.source for c in crops.crops] == ["large.png"] * 3 + ["p000.png", "p001.png"]
    assert crops.too_small == 1 and {c.image.shape for c in crops.crops} == {(EDGE, EDGE, 3)}
    assert np.array_equal(crops.crops[3].image, smooth_picture(0))


def test_crops_depend_on_the_seed_alone(tmp_path):
    save_pictures(tmp_path, 9, edge=80)

    def digest(seed: int) -> str:
        options = {"crop_px": EDGE, "per_picture": 2, "most": 5}
        return read_crops([tmp_path], seed=seed, **options).digest()

    assert digest(0) == digest(0) != digest(1)


def test_no_picture_large_enough_is_an_error(tmp_path):
    save_pictures(tmp_path, 1)
    with pytest.raises(InputError, match="256 px or larger"):
        read_crops([tmp_path], crop_px=256, per_picture=1, most=1, seed=0)


def test_files_that_were_jpeg_are_told_apart(tmp_path):
    picture = Image.fromarray(smooth_picture(0))
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.jpg", quality=70)
    picture.save(tmp_path / "c.tif", compression="jpeg")
    picture.save(tmp_path / "d.tif")
    picture.save(tmp_path / "e.webp")
    picture.save(tmp_path / "f.tif", compression="tiff_lzw")
    picture.save(tmp_path / "h.jp2")
    crops = read_crops([tmp_path], crop_px=EDGE, per_picture=1, most=9, seed=0).crops
    assert [c.kind for c in crops] == [
        *("lossless", "jpeg", "jpeg", "lossless", "other", "lossless", "other")
    ]
    assert crops[1].encoding == "jpeg:q=70:4:2:0"


@pytest.mark.parametrize(
    ("names", "slides", "rule"),
    [
        (["TCGA-3C-AALI-01Z-00-DX1.abc/1_2.png", "x/TCGA-3C-AALI-01Z-00-DX2.png"],
         ["TCGA-3C-AALI-01Z-00-DX1", "TCGA-3C-AALI-01Z-00-DX2"], "barcode"),
        (["TCGA-DB-5270-R01.tif_a.png"], ["TCGA-DB-5270"], "patient"),
        (["c/s1/1.png", "c/s2/1.png"], ["c/s1", "c/s2"], "folder"),
        (["c/1.png", "d/1.png"], ["c/1.png", "d/1.png"], "each picture"),
    ],
)  # fmt: skip
def test_slides_of_names(tmp_path, names, slides, rule):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, said = find_slides([tmp_path], "auto")
    assert sorted(f.slide for f in found) == slides and rule in said[tmp_path.name]


def test_equal_folders_of_two_sources_are_two_slides(tmp_path):
    for name in ("one", "two"):
        save_pictures(tmp_path / name / "c" / "s", 1)
    found, _ = find_slides([tmp_path / "one", tmp_path / "two"], "folder")
    assert [f.slide for f in found] == ["one/c/s", "two/c/s"]


def save_mixed(root: Path) -> list[Path]:
    """A folder of TCGA patients, one of cores in its labels.csv, one whose names say nothing."""
    for name in ("gbm/TCGA-DB-5270-R01_1.png", "gbm/TCGA-DB-5270-R02_2.png", "tma/benign/c1_x.png",
                 "tma/benign/c2_x.png", "tma/malignant/c1_y.png", "plain/1.png"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    lines = ["benign/c1_x.png,1", "benign/c2_x.png,2", "malignant/c1_y.png,1"]
    text = "\n".join(["path,tma_core", *(f"elsewhere/tma/{line}" for line in lines)])
    (root / "tma" / "labels.csv").write_text(text.replace("elsewhere/", ""))
    return [root / "gbm", root / "tma", root / "plain"]


def test_every_folder_has_its_own_rule(tmp_path):
    found, rules = find_slides(save_mixed(tmp_path), "auto")
    assert [f.slide for f in found] == ["TCGA-DB-5270"] * 2 + ["1", "2", "1", "plain/1.png"]
    assert list(rules) == ["gbm", "tma", "plain"]
    assert "patient" in rules["gbm"] and "'tma_core' of labels.csv" in rules["tma"]
    assert "slide of its own" in rules["plain"]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "path,slide\nx.png,\n", "path,slide\nz,1\n"])
def test_a_table_that_does_not_tell_all_slides_is_left(tmp_path, text):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(b"")
    (tmp_path / "in" / "labels.csv").write_text(text)
    assert [f.rule for f in find_slides([tmp_path / "in"], "auto")[0]] == ["picture"]


def test_a_table_with_two_slides_of_a_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("path,slide\nx,1\nx,2\n")
    with pytest.raises(InputError, match=r"labels\.csv: two slides for x"):
        find_slides([tmp_path], "auto")


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "one" / "images", tmp_path / "two" / "images"]
    for folder in folders:
        save_pictures(folder, 1)
    found, _ = find_slides(folders, "auto")
    assert [f.slide for f in found] == ["one/images/p000.png", "two/images/p000.png"]
    with pytest.raises(InputError, match="given twice"):
        find_slides([folders[0]] * 2, "auto")
