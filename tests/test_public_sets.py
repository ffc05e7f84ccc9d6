"""Public sets as they are published: three pictures in the true layout convert without an option.

Where a layout comes from stands beside what writes it.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError
from latentds.sources import patch_arrays
from latentds.sources.data_cards import card_files
from latentds.sources.image_folder import known_patient
from latentds.sources.opening import list_source, open_source
from latentds.sources.picture_tars import read_scale
from latentds.store.reader import ShardSet
from tests.archives import encoded, rows_of, write_samples
from tests.conftest import convert_with_mean, smooth_picture

SLIDES = ("TCGA-FS-A1Z7-06Z-00-DX7", "TCGA-N8-A4PN-01Z-00-DX2", "TCGA-E2-A1L9-01Z-00-DX1")


def listed(root: Path, **options):
    """Source and listing of an input; nothing is decoded."""
    config = ConvertConfig(source=root, out=root.parent / "out", **options)
    source = open_source(config)
    return source, list_source(source, config)


def told(root: Path, *fields: str, **options):
    """Those fields of all pictures, in their order."""
    return [
        tuple(getattr(picture, field) for field in fields)
        for picture in listed(root, **options)[1].pictures
    ]


def save(path: Path, seed: int = 0, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, kind))


# huggingface.co/datasets/dakomura/tcga-ut: README.md, the viewer's keys, and the names of its tars.
TCGA_UT = """---
license: cc-by-nc-sa-4.0
configs:
- config_name: internal
  data_files:
  - {split: train, path: data/dataset_internal_train_part*.tar}
  - {split: valid, path: data/dataset_internal_valid_part*.tar}
  - {split: test, path: data/dataset_internal_test_part*.tar}
  default: true
- config_name: external
  data_files:
  - split: train
    path: data/dataset_external_train_part*.tar
---
Histology images
"""


def write_tcga_ut(root: Path) -> None:
    for number, split in enumerate(("train", "valid", "test")):
        label = json.dumps(
            {"label": ("Skin_Cutaneous_Melanoma", "Uterine_Carcinosarcoma")[number % 2]}
        )
        sample = {f"{SLIDES[number]}/0_8_521": {"jpg": encoded(number, "JPEG"), "json": label}}
        write_samples(root / f"data/dataset_internal_{split}_part000.tar", sample)
    (root / "train_val_test_split.csv").write_text("a,b\n1,2\n")


def test_tcga_ut_has_its_splits_classes_slides_and_patients(tmp_path):
    write_tcga_ut(tmp_path / "in")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"test": 1, "train": 1, "val": 1}
    assert manifest.labels() == {"Skin_Cutaneous_Melanoma": 2, "Uterine_Carcinosarcoma": 1}
    assert sorted(manifest.slides) == sorted(SLIDES)
    found = told(tmp_path / "in", "slide", "split", "mpp")
    assert "names end in #_#_#, which is not read" in " ".join(listed(tmp_path / "in")[1].notes)
    assert {(known_patient(slide)[1], split, mpp) for slide, split, mpp in found} == {
        ("TCGA-FS-A1Z7", "train", None),
        ("TCGA-N8-A4PN", "val", None),
        ("TCGA-E2-A1L9", "test", None),
    }


@pytest.mark.parametrize("inside", ["", "data"])
def test_the_default_config_of_a_card_wins_and_what_it_leaves_is_told(tmp_path, inside):
    write_tcga_ut(tmp_path / "in")
    external = tmp_path / "in/data/dataset_external_train_part000.tar"
    external.write_bytes((tmp_path / "in/data/dataset_internal_test_part000.tar").read_bytes())
    (tmp_path / "in/README.md").write_text(TCGA_UT)
    _, found = listed(tmp_path / "in" / inside)
    assert sorted(picture.split for picture in found.pictures) == ["test", "train", "val"]
    assert "splits of its config 'internal'" in found.notes[0]
    assert "1 file left out, not named by this config" in found.notes[1]


@pytest.mark.parametrize(
    ("files", "paths", "expected"),
    [
        ("data/train-*", ["data/train-0.tar"], {"data/train-0.tar": "train"}),
        ("[{split: a, path: '**/x*'}]", ["d/e/x0.png", "y"], {"d/e/x0.png": "a"}),
        ("{dev: [one.tar, two.tar]}", ["one.tar", "two.tar"], {"one.tar": "dev", "two.tar": "dev"}),
        ("[{split: a, path: 'x*'}]", ["d/x0.tar"], None),
        ("[{split: a}]", ["x0.tar"], None),
        ("7", ["x0.tar"], None),
        ("[{split: [[a]], path: x0.tar}]", ["x0.tar"], {"x0.tar": "train"}),
    ],
)
def test_data_files_are_read_as_the_hub_reads_them(tmp_path, files, paths, expected):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: {files}\n---\n")
    found = card_files(tmp_path, paths)
    assert (None if found is None else found.splits) == expected


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("- {config_name: a, data_files: x}\n- {config_name: b, data_files: x}", "none is the def"),
        ("- data_files: {a: x, b: x}", "x is in split a and in b"),
        ("- [", "no YAML"),
    ],
)
def test_cards_that_could_mean_several_things_are_refused(tmp_path, configs, message):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with pytest.raises(InputError, match=message):
        card_files(tmp_path, ["x"])


def test_a_card_tells_the_splits_of_picture_folders(tmp_path):
    for number, folder in enumerate(("fold_a/x", "fold_b/x", "rest/x")):
        save(tmp_path / f"in/{folder}/p.png", number)
    card = "---\nconfigs:\n- data_files: {train: fold_a/**, test: fold_b/**}\n---\n"
    (tmp_path / "in/README.md").write_text(card)
    assert told(tmp_path / "in", "source", "split") == [
        ("fold_a/x/p.png", "train"),
        ("fold_b/x/p.png", "test"),
    ]


@pytest.mark.parametrize(
    "names", [("val-0.tar", "validation-0.tar"), ("train-0.tar", "training-0.tar")]
)
def test_archives_of_two_words_for_one_split_are_refused(tmp_path, names):
    for number, name in enumerate(names):
        write_samples(tmp_path / "in" / name, {f"s{number}": {"png": encoded(number)}})
    with pytest.raises(InputError, match=f"{names[0]} and {names[1]} would both be split"):
        listed(tmp_path / "in")
    assert {split for (split,) in told(tmp_path / "in", "split", split_folders=False)} == {"train"}


def test_keys_of_records_that_nobody_reads_are_told(tmp_path):
    record = json.dumps({"label": "a", "scanner": "x", "stain": 1})
    write_samples(tmp_path / "in/x.tar", {"s": {"png": encoded(0), "json": record}})
    assert listed(tmp_path / "in")[1].notes == ("columns not used: scanner, stain",)


# zenodo.org/records/1214456; kaiko-ai/eva docs/datasets/crc.md has the same tree.
def test_nct_crc_he_has_its_splits_and_classes(tmp_path):
    save(tmp_path / "in/NCT-CRC-HE-100K/ADI/ADI-AAAFLCLY.tif", 0, "TIFF")
    save(tmp_path / "in/NCT-CRC-HE-100K/TUM/TUM-AAAFLCLY.tif", 1, "TIFF")
    save(tmp_path / "in/CRC-VAL-HE-7K/ADI/ADI-TCGA-AAICEQFN.tif", 2, "TIFF")
    assert told(tmp_path / "in", "split", "label", "slide", "mpp") == [
        ("val", "ADI", None, None),
        ("train", "ADI", None, None),
        ("train", "TUM", None, None),
    ]


def test_one_set_in_two_colours_is_refused(tmp_path):
    save(tmp_path / "in/NCT-CRC-HE-100K/ADI/a.tif", 0, "TIFF")
    save(tmp_path / "in/NCT-CRC-HE-100K-NONORM/ADI/a.tif", 1, "TIFF")
    with pytest.raises(InputError, match="would both be split 'train'"):
        listed(tmp_path / "in")


# huggingface.co/datasets/bifold-pathomics/PathoROB-camelyon: data/train-*.parquet; its columns are
# those of bifold-pathomics/PathoROB pathorob/features/data_manager.py, and an image.
def test_pathorob_has_its_classes_slides_and_patients(tmp_path):
    (tmp_path / "in/data").mkdir(parents=True)
    slides = ["patient_004_node_4", "patient_004_node_4", "patient_010_node_4"]
    columns = {
        "image": [{"bytes": encoded(n), "path": None} for n in range(3)],
        "slide_id": slides,
        "patch_id": ["0", "1", "2"],
        "biological_class": ["normal", "tumor", "tumor"],
        "medical_center": ["RUMC", "RUMC", "CWZ"],
    }
    pq.write_table(pa.table(columns), tmp_path / "in/data/train-00000-of-00001.parquet")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"train": 3} and manifest.labels() == {"normal": 1, "tumor": 2}
    assert sorted(manifest.slides) == ["patient_004_node_4", "patient_010_node_4"]
    assert manifest.made["source"]["notes"] == ["columns not used: medical_center, patch_id"]
    dealt = listed(tmp_path / "in", split_patients="train=0.5,test=0.5")[1]
    assert "split by patient: 2 CAMELYON17 patients" in dealt.notes


# medarc/TCGA-12K-parquet: folders 1/ and 2/; columns as dinov2/train/train.py of
# MedARC-AI/OpenMidnight reads them.
def test_tcga_12k_has_slides_places_and_patients(tmp_path):
    rows = [
        {
            "task_id": "t", "slide_path": f"/data/TCGA/{SLIDES[n]}.0F2A6C4C.svs", "x": 448 * n,
            "y": 0, "level": 0, "tile_size": 32, "level_downsample": 1.0, "image_dtype": "jpeg",
            "image_bytes": encoded(n, "JPEG"),
        }
        for n in range(3)
    ]  # fmt: skip
    for folder in ("1", "2"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "in/1/a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "in/2/b.parquet")
    fields = ("split", "label", "slide", "x", "y", "size_px", "mpp")
    assert told(tmp_path / "in", *fields) == [
        ("train", None, f"{SLIDES[n]}.0F2A6C4C", 448 * n, 0, 32, None) for n in range(3)
    ]
    assert "columns not used: level, task_id" in listed(tmp_path / "in")[1].notes


# QuPath's documentation, "Exporting images", TileExporter: tiles/IMAGE/IMAGE [d=..,x=..,...].tif, d
# only where it is not 1; x, y, w and h in pixels of the full image; masks end in ]-labelled.png.
@pytest.mark.parametrize(("scale", "size"), [("", 32), ("d=2.01345,", 64)])
def test_tiles_of_qupath_have_slide_and_place(tmp_path, scale, size):
    names = [("CMU-1 (2)", 64, 0), ("CMU-1 (2)", 128, 0), (SLIDES[0], 0, 512)]
    for number, (slide, x, y) in enumerate(names):
        path = f"tiles/{slide}/{slide} [{scale}x={x},y={y},w={size},h={size}].tif"
        save(tmp_path / "in" / path, number, "TIFF")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert sorted(manifest.slides) == ["CMU-1 (2)", SLIDES[0]] and manifest.labels() == {}
    found = told(tmp_path / "in", "slide", "x", "y", "size_px", "label")
    assert sorted(found) == sorted((slide, x, y, size, None) for slide, x, y in names)


def test_tiles_of_qupath_keep_class_folders(tmp_path):
    for number, label in enumerate(("Tumor", "Stroma")):
        save(tmp_path / f"in/{label}/s1 [x={32 * number},y=0,w=32,h=32].png", number)
    assert told(tmp_path / "in", "label", "slide", "x") == [
        ("Stroma", "s1", 32),
        ("Tumor", "s1", 0),
    ]


# github.com/basveeling/pcam and zenodo.org/records/2546921: x uint8 (N, 96, 96, 3), y (N, 1, 1, 1)
# in a file of their own, a mask of the training part, a table of pandas with an index.
PCAM = "camelyonpatch_level_2_split_"


def write_pcam(root: Path, rows: int = 3, edge: int = 96) -> None:
    h5py = pytest.importorskip("h5py")
    root.mkdir()
    for number, split in enumerate(("train", "valid", "test")):
        pixels = np.stack([smooth_picture(10 * number + n, edge) for n in range(rows)])
        labels = np.arange(rows, dtype=np.uint8).reshape(rows, 1, 1, 1) % 2
        for name, values in (("x", pixels), ("y", labels)):
            with h5py.File(root / f"{PCAM}{split}_{name}.h5", "w") as file:
                file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]))
        header = ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n"
        part, kind = ("test", "test") if split == "test" else ("train", "tumor")
        lines = [
            f"{n},64,128,True,{n % 2 > 0},camelyon16_{part}_{kind}_00{n}\n" for n in range(rows)
        ]
        if part == "test":
            lines = [line.replace("camelyon16_test_test_", "camelyon16_test_") for line in lines]
        (root / f"{PCAM}{split}_meta.csv").write_text(header + "".join(lines))
    with h5py.File(root / f"{PCAM}train_mask.h5", "w") as file:
        file["mask"] = np.zeros((rows, edge, edge, 1), bool)


def test_pcam_has_its_splits_classes_slides_patients_and_resolution(tmp_path):
    write_pcam(tmp_path / "in")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"test": 3, "train": 3, "val": 3}
    assert manifest.classes == ("0", "1") and manifest.labels() == {"0": 6, "1": 3}
    rows = rows_of(tmp_path / "out", "slide", "mpp", "label", "x")
    assert rows[f"{PCAM}train_x.h5/1"] == (
        "camelyon16_train_tumor_001",
        np.float32(0.972),
        "1",
        None,
    )
    assert known_patient("camelyon16_train_tumor_001") == ("CAMELYON16", "tumor_001")
    assert known_patient("camelyon16_test_001") == ("CAMELYON16", "test_001")
    notes = " ".join(manifest.made["source"]["notes"])
    assert "columns not used: center_tumor_patch, coord_x, coord_y, tumor_patch" in notes
    assert f"not read: '{PCAM}train_mask.h5'" in notes


def test_patches_of_arrays_are_those_of_pictures(tmp_path):
    write_pcam(tmp_path / "in")
    for number in range(3):
        save(tmp_path / f"plain/p{number}.png", number)
        Image.fromarray(smooth_picture(number, 96)).save(tmp_path / f"plain/p{number}.png")
    for name, source in (("a", "in/" + PCAM + "train_x.h5"), ("b", "plain")):
        convert_with_mean(tmp_path / source, tmp_path / name, order="path", labels=False)
    codes = [ShardSet(tmp_path / name).read_codes(np.arange(3)) for name in "ab"]
    np.testing.assert_array_equal(*codes)


def test_blocks_of_rows_are_read_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_arrays, "BLOCK_BYTES", 2 * 32 * 32 * 3)
    write_pcam(tmp_path / "in", rows=5, edge=32)
    source, found = listed(tmp_path / "in" / f"{PCAM}train_x.h5")
    read = [np.asarray(Image.open(source.file(picture))) for picture in found.pictures]
    np.testing.assert_array_equal(np.stack(read), [smooth_picture(n, 32) for n in range(5)])
    assert {len(future.result()) for future in source.blocks.futures.values()} == {1, 2}
    assert [source.chunk(p)[-2:] for p in found.pictures] == ["/0", "/0", "/1", "/1", "/2"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.__setitem__("y", np.zeros(2, np.uint8)), "'y' is uint8 .2,., not whole"),
        (lambda file: file.__setitem__("y", np.zeros(3, np.float32)), "'y' is float32"),
        (
            lambda file: file.__setitem__("y", ["b", "a", "b"]),
            "'y' is text .3,., not .*; write 3 whole numbers, or pass --no-labels",
        ),
    ],
)
def test_labels_that_do_not_fit_an_array_are_refused(tmp_path, spoil, message):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.zeros((3, 16, 16, 3), np.uint8)
        spoil(file)
    with pytest.raises(InputError, match=message):
        listed(tmp_path / "x.h5")


def test_labels_of_an_array_are_read_and_what_else_lies_there_is_told(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        file["images"] = np.zeros((3, 16, 16, 3), np.uint8)
        file["labels"], file["barcode"] = np.array([2, 0, 10]), np.arange(3)
    assert told(tmp_path / "in", "label") == [("2",), ("0",), ("10",)]
    assert "columns not used: barcode" in listed(tmp_path / "in")[1].notes


def test_a_table_of_other_rows_beside_an_array_is_refused(tmp_path):
    write_pcam(tmp_path / "in")
    path = tmp_path / "in" / f"{PCAM}test_meta.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="2 rows for 3 patches"):
        listed(tmp_path / "in")


def test_arrays_that_would_fill_memory_or_lie_elsewhere_are_not_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (10**6, 96, 96, 3), np.uint8, chunks=(1, 96, 96, 3))
    with pytest.raises(InputError, match="announces 27,648,000,000 bytes"):
        listed(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = h5py.ExternalLink("a.h5", "x")
    with pytest.raises(InputError):
        listed(tmp_path / "b.h5")


# mahmoodlab/HEST src/hest: patches/ID.h5 has img (N, 224, 224, 3), coords (N, 2), corners in pixels
# of the full image, and barcode.
def test_hest_patches_have_slide_and_place(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in/patches").mkdir(parents=True)
    for name in ("TENX95", "NCBI783"):
        with h5py.File(tmp_path / f"in/patches/{name}.h5", "w") as file:
            file["img"] = np.stack([smooth_picture(n, 32) for n in range(2)])
            file["coords"] = np.array([[64, 0], [128, 32]])
    assert told(tmp_path / "in", "slide", "x", "y", "split") == [
        ("NCBI783", 64, 0, "train"),
        ("NCBI783", 128, 32, "train"),
        ("TENX95", 64, 0, "train"),
        ("TENX95", 128, 32, "train"),
    ]


# histai/SPIDER scripts: metadata.json is a list of such records, images/ is flat; the 24 pictures
# around a patch have no class.
def write_spider(root: Path) -> None:
    for number, name in enumerate(("c0", "c1", "c2", "around0", "around1")):
        save(root / f"images/{name}.png", number)
    records = [
        {
            "slide_id": f"slide_{n:04d}",
            "image_name": f"c{n}.png",
            "context_info": {"0_0": f"around{n % 2}.png"},
            "class": ("Fat", "Mucus")[n % 2],
            "split": ("train", "test")[n // 2],
        }
        for n in range(3)
    ]
    (root / "metadata.json").write_text(json.dumps(records))


def test_spider_has_its_splits_classes_and_slides_and_tells_of_what_lies_around(tmp_path):
    write_spider(tmp_path / "in/SPIDER-colorectal")
    assert told(tmp_path / "in", "split", "label", "slide") == [
        ("train", "Fat", "slide_0000"),
        ("train", "Mucus", "slide_0001"),
        ("test", "Fat", "slide_0002"),
    ]
    notes = listed(tmp_path / "in")[1].notes
    assert "metadata.json: columns not used: context_info" in notes
    assert any(note.startswith("2 pictures left out") for note in notes)


# The same after its convert_to_imagenet.py: split/class/slide/picture.
def test_spider_as_folders_has_its_splits_classes_and_slides(tmp_path):
    for number, path in enumerate(("train/Fat/slide_0000", "test/Fat/slide_0002")):
        save(tmp_path / f"in/{path}/c{number}.png", number)
    assert told(tmp_path / "in", "split", "label", "slide") == [
        ("test", "Fat", "slide_0002"),
        ("train", "Fat", "slide_0000"),
    ]


def save_slide(path: Path, seed: int = 0) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for level in range(2):
            writer.write(smooth_picture(seed, 128 >> level), tile=(64, 64), photometric="rgb",
                         subfiletype=int(level > 0))  # fmt: skip


# camelyon16.grand-challenge.org; kaiko-ai/eva reads testing/reference.csv without a header, and
# takes its classes in lower case.
def test_camelyon16_has_its_splits_classes_and_patients(tmp_path):
    for path in (
        "training/normal/normal_001",
        "training/tumor/tumor_001",
        "testing/images/test_001",
    ):
        save_slide(tmp_path / f"in/{path}.tif")
    (tmp_path / "in/testing/reference.csv").write_text(
        "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n"
    )
    fields = ("slide", "split", "label")
    assert told(tmp_path / "in", *fields) == [
        ("test_001", "test", "tumor"),
        ("normal_001", "train", "normal"),
        ("tumor_001", "train", "tumor"),
    ]
    dealt = listed(tmp_path / "in", split_patients="train=0.5,test=0.5")[1]
    assert "split by patient: 3 CAMELYON16 patients" in dealt.notes


# camelyon17.grand-challenge.org: folders of centres, stages.csv of patients' archives and slides.
def test_camelyon17_has_its_splits_classes_and_patients(tmp_path):
    nodes = ["training/center_0/patient_000_node_0", "training/center_1/patient_020_node_4",
             "testing/patient_100_node_0"]  # fmt: skip
    for path in nodes:
        save_slide(tmp_path / f"in/{path}.tif")
    (tmp_path / "in/training/stages.csv").write_text(
        "patient,stage\npatient_000.zip,pN0\npatient_000_node_0.tif,negative\n"
        "patient_020.zip,pN1\npatient_020_node_4.tif,macro\n"
    )
    assert told(tmp_path / "in", "slide", "split", "label") == [
        ("patient_100_node_0", "test", None),
        ("patient_000_node_0", "train", "negative"),
        ("patient_020_node_4", "train", "macro"),
    ]
    dealt = listed(tmp_path / "in", split_patients="train=0.5,test=0.5")[1]
    assert "split by patient: 3 CAMELYON17 patients" in dealt.notes


# docs.gdc.cancer.gov, Data Transfer Tool: UUID/slide.svs, logs/ and annotations.txt beside it.
def test_a_download_of_gdc_has_slides_and_patients_and_no_classes(tmp_path):
    for number, slide in enumerate(SLIDES):
        uuid = f"{number}d1f2a3b-1111-4222-8333-444455556666"
        save_slide(tmp_path / f"in/{uuid}/{slide}.{uuid.upper()}.tif", number)
        (tmp_path / f"in/{uuid}/logs").mkdir()
        (tmp_path / f"in/{uuid}/logs/{slide}.svs.parcel").write_text("")
        (tmp_path / f"in/{uuid}/annotations.txt").write_text("id\tentity\n")
    (tmp_path / "in/gdc_manifest.txt").write_text("id\tfilename\tmd5\tsize\tstate\n")
    found = told(tmp_path / "in", "slide", "split", "label")
    assert [(known_patient(slide)[1], split, label) for slide, split, label in found] == [
        (slide[:12], "train", None) for slide in SLIDES
    ]


# mahmoodlab/TRIDENT, --dump_patches: patch_images/SLIDE/000000_x0_y512.png
def test_patches_dumped_by_trident_have_slide_and_place(tmp_path):
    for number, slide in enumerate(("CMU-1", "CMU-2", "CMU-2")):
        save(tmp_path / f"in/{slide}/{number:06d}_x{512 * number}_y0.png", number)
    assert told(tmp_path / "in", "slide", "x", "y", "label") == [
        ("CMU-1", 0, 0, None),
        ("CMU-2", 512, 0, None),
        ("CMU-2", 1024, 0, None),
    ]


# clemsgrs/hs2p: sections since docs/artifacts.md, before that one flat object with targets.
@pytest.mark.parametrize(
    "meta",
    [
        {"slide": {"base_spacing_um": 0.25}, "tiling": {"requested_tile_size_px": 32}},
        {"tiling": {"requested_tile_size_px": 32, "requested_spacing_um": 0.5}},
        {"target_tile_size_px": 32, "target_spacing_um": 0.5, "read_spacing_um": 0.25,
         "read_tile_size_px": 64, "sample_id": "s", "tissue_threshold": 0.1},
    ],
)  # fmt: skip
def test_scales_of_all_versions_of_hs2p_are_read(tmp_path, meta):
    meta.get("tiling", meta)["tile_size_lv0"] = 64
    (tmp_path / "m.json").write_text(json.dumps(meta))
    assert read_scale(tmp_path / "m.json") == {"size_px": 64, "mpp": 0.5}


def test_labelled_tiles_of_qupath_are_masks(tmp_path):
    for number in range(2):
        tile = tmp_path / f"in/s1/s1 [d=4,x={number * 128},y=0,w=128,h=128]"
        save(Path(f"{tile}.jpg"), number, "JPEG")
        Image.fromarray(np.full((32, 32), number, np.uint8)).save(f"{tile}-labelled.png")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.patches == 2
    found = told(tmp_path / "in", "slide", "x", "size_px", "mask")
    mask = "s1/s1 [d=4,x=128,y=0,w=128,h=128]-labelled.png"
    assert found[0] == ("s1", 0, 128, mask.replace("x=128", "x=0"))
    assert found[1] == ("s1", 128, 128, mask)


def test_names_that_hugging_face_keeps_beside_the_bytes_tell_slide_and_place(tmp_path):
    (tmp_path / "in").mkdir()
    names = [f"{SLIDES[0]}_x64_y0.png", None, "plain.png"]
    column = [{"bytes": encoded(n), "path": name} for n, name in enumerate(names)]
    pq.write_table(pa.table({"image": column}), tmp_path / "in/test.parquet")
    assert told(tmp_path / "in", "slide", "x", "split") == [
        (SLIDES[0], 64, "test"),
        (None, None, "test"),
        (None, None, "test"),
    ]


def test_an_array_is_read_by_a_source_that_was_sent_elsewhere(tmp_path):
    write_pcam(tmp_path / "in")
    source, found = listed(tmp_path / "in")
    there = pickle.loads(pickle.dumps(source))
    here = [source.file(picture).read() for picture in found.pictures]
    assert [there.file(picture).read() for picture in found.pictures] == here
    assert len(set(here)) == 9


def test_a_split_that_no_patient_came_into_is_told(tmp_path):
    for number in range(3):
        path = tmp_path / "in" / f"TCGA-A{number}-B{number}CD-01Z-00-DX1.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    _, found = listed(tmp_path / "in", split_patients="train=0.999,test=0.001")
    assert any(
        note.startswith("no patient came into 'test': 3 are few for such a share")
        for note in found.notes
    )


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \(2, 3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \(2, 8, 8, 3\)"),
    ],
)
def test_a_file_without_an_array_of_patches_tells_what_it_has(tmp_path, array, told):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = array
    with pytest.raises(
        InputError, match=rf"a\.h5: no array of patches.*called x.*it has 'x {told}'"
    ):
        listed(tmp_path / "a.h5")


def test_a_broken_file_of_arrays_is_said_to_be_unreadable(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "a.h5").write_bytes(b"none")
    with pytest.raises(InputError, match=r"a\.h5: is no readable h5 file"):
        listed(tmp_path / "a.h5")
