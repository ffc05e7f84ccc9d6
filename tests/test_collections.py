"""Everyone's patch collections: DSMIL trees, tables, SAM-Path's folders, TCGA barcodes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from latentds.errors import InputError, UnknownNameError
from latentds.sources.names import parse_shares, patient_of
from latentds.sources.slide_names import describe_barcodes, parse_barcode
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures, smooth_picture


def save(path, seed=0, edge=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth_picture(seed, edge)).save(path)


def columns_of(out, *names):
    shards = ShardSet(out)
    return shards.read_columns(np.arange(len(shards)), names)


def test_a_dsmil_tree_gives_slides_labels_and_places(tmp_path):
    for label, slide in (("IDC", "TCGA-AA-0001-01Z-00-DX1"), ("ILC", "TCGA-BB-0002-01Z-00-DX1")):
        for column, row in ((0, 0), (3, 7), (12, 5)):
            save(tmp_path / "WSI/single" / label / slide / f"{column}_{row}.jpeg", column + row)
    convert_with_mean(tmp_path / "WSI", tmp_path / "out")
    found = columns_of(tmp_path / "out", "label", "slide", "x", "y", "size_px")
    assert set(zip(found["x"], found["y"], strict=True)) == {(0, 0), (96, 224), (384, 160)}
    assert set(zip(found["label"], found["slide"], strict=True)) == {
        ("IDC", "TCGA-AA-0001-01Z-00-DX1"),
        ("ILC", "TCGA-BB-0002-01Z-00-DX1"),
    }


def test_split_folders_of_a_tree_are_no_classes(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / "in" / split / f"{split}1" / "1_2.jpeg")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", tile_downsample=2.0)
    assert manifest.splits == {"test": 1, "train": 1} and manifest.classes == ()
    found = columns_of(tmp_path / "out", "x", "y", "size_px")
    assert (found["x"][0], found["y"][0], found["size_px"][0]) == (64, 128, 64)


def test_a_slide_in_two_folders_of_a_tree_is_refused(tmp_path):
    save(tmp_path / "in/a/s1/0_0.jpeg")
    save(tmp_path / "in/b/s1/0_0.jpeg", 1)
    with pytest.raises(InputError, match="a/s1 and b/s1 are both slide 's1'"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")


@pytest.fixture
def table(tmp_path):
    for number in range(6):
        save(tmp_path / "in" / "deep" / f"p{number}.png", number)
        Image.fromarray(np.full((32, 32), number, np.uint8)).save(
            tmp_path / "in" / f"m{number}.png"
        )
    rows = [
        f"deep/p{n}.png,{'a' if n % 2 else 'b'},slide0{n // 2},{n * 64},{n * 32},0.25,64,"
        f"{'train' if n < 4 else 'validation'},m{n}.png\n"
        for n in range(6)
    ]
    path = tmp_path / "in" / "patches.csv"
    path.write_text("path,label,slide,x,y,mpp,size_px,split,mask\n" + "".join(rows))
    return path


def test_a_table_says_everything_of_its_pictures(table, tmp_path):
    manifest = convert_with_mean(table, tmp_path / "out")
    assert manifest.splits == {"train": 4, "val": 2} and manifest.slides[0] == "slide00"
    names = ["source", "label", "x", "y", "mpp", "size_px"]
    found = columns_of(tmp_path / "out", *names)
    by_source = {row[0]: row[1:] for row in zip(*(found[n] for n in names), strict=True)}
    assert by_source["deep/p3.png"] == ("a", 192, 96, 0.25, 64)
    shards = ShardSet(tmp_path / "out")
    masks = shards.read_masks(np.arange(6))
    numbers = [int(source[-5]) for source in found["source"]]
    assert [int(mask[0, 0]) for mask in masks] == numbers


def test_a_parquet_table_serves_as_well(table, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    rows = pyarrow.csv.read_csv(table)
    pyarrow.parquet.write_table(rows, table.with_suffix(".parquet"))
    convert_with_mean(table, tmp_path / "a")
    convert_with_mean(table.with_suffix(".parquet"), tmp_path / "b")
    assert columns_of(tmp_path / "a", "x", "label") == columns_of(tmp_path / "b", "x", "label")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("path\n../secret.png\n", InputError, "row 1: ../secret.png lies outside"),
        ("path\n/etc/passwd\n", InputError, "lies outside .* --root"),
        ("path,lable\np.png,a\n", UnknownNameError, "'lable'; did you mean 'label'"),
        ("label\na\n", InputError, "no column .path. of files"),
        ("path,x\ndeep/p0.png,left\n", InputError, "row 1: x is 'left', not a number"),
        ("path,split\ndeep/p0.png,Big One\n", InputError, r"split 'Big One'; use \[a-z0-9_\]"),
        ("path,split\ndeep/p0.png,train\ndeep/p0.png,test\n", InputError, "is named twice"),
        ("path,x\ndeep/p0.png,6.5\n", InputError, "x is '6.5', not a whole number"),
        ("", InputError, "is empty"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(table, tmp_path, text, error, message):
    table.write_text(text)
    with pytest.raises(error, match=message):
        convert_with_mean(table, tmp_path / "out")


def test_sampath_folders_carry_masks_and_folds(tmp_path):
    for number in range(4):
        save(tmp_path / "in/img" / f"t{number}.jpg", number)
        save_mask = np.full((32, 32), number, np.uint8)
        (tmp_path / "in/mask").mkdir(exist_ok=True)
        Image.fromarray(save_mask).save(tmp_path / "in/mask" / f"t{number}.png")
    (tmp_path / "in/bcss.csv").write_text("img_id,fold\nt0,-1.0\nt1.jpg,0\nt2,1\nt3,4.0\n")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", labels=False)
    assert manifest.splits == {"test": 1, "train": 2, "val": 1}
    shards = ShardSet(tmp_path / "out")
    sources = columns_of(tmp_path / "out", "source")["source"]
    masks = shards.read_masks(np.arange(4))
    assert [int(m[5, 5]) for m in masks] == [int(s[len("img/t")]) for s in sources]
    (tmp_path / "in/mask/t2.png").unlink()
    with pytest.raises(InputError, match="img/t2.jpg has no mask/t2.png"):
        convert_with_mean(tmp_path / "in", tmp_path / "other", labels=False)


def test_barcodes_are_parsed():
    name = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291"
    found = parse_barcode(name)
    assert found.patient == patient_of(name) == "TCGA-3C-AALI" and found.site == "3C"
    assert found.sample == "TCGA-3C-AALI-01Z" and found.slide == "TCGA-3C-AALI-01Z-00-DX1"
    assert not found.is_frozen and parse_barcode("TCGA-3C-AALI-01A-01-TS1").is_frozen
    assert parse_barcode("slide 7") is None and patient_of("slide 7") == "slide 7"


def test_barcodes_together_tell_patients():
    slides = [
        "TCGA-3C-AALI-01Z-00-DX1.F6E9",
        "TCGA-3C-AALI-01A-01-TS1",
        "TCGA-AA-0001-01Z-00-DX1",
        "x",
    ]
    found = describe_barcodes(slides)
    assert found == {
        "patients": 2,
        "samples": 3,
        "slides": 3,
        "frozen_slides": 1,
    }
    assert describe_barcodes(["slide 7"]) == {}


@pytest.mark.parametrize("text", ["train", "train=0.5", "train=1.5,val=-0.5", "a=b"])
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="split shares"):
        parse_shares(text)


def test_split_patients_needs_slides(tmp_path):
    save_pictures(tmp_path / "in", 4)
    with pytest.raises(InputError, match="no patient is known of 4 .* --patient-pattern"):
        convert_with_mean(tmp_path / "in", tmp_path / "out", split_patients="train=0.5,val=0.5")
    shutil.rmtree(tmp_path / "in")
