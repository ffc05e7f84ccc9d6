"""What an input is, and what its names mean: all files are looked at, assumptions are told."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError
from latentds.sources import kinds
from latentds.sources.image_folder import (
    SPLITS,
    is_identifier,
    known_patient,
    note_numbers,
    path_fields,
    read_folders,
)
from latentds.sources.kinds import sort_files
from latentds.sources.names import pattern_patient, split_word, splits_of
from latentds.sources.opening import list_source, open_source
from latentds.store.format import joined_names, sorted_names
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures, smooth_picture

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("openslide")


def write_tiled(path: Path, edge: int = 64, pages: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for page in range(pages):
            writer.write(smooth_picture(seed, edge >> page), tile=(64, 64), photometric="rgb",
                         subfiletype=int(page > 0))  # fmt: skip


def listed(root: Path, **options):
    """Source and listing of an input; nothing is decoded."""
    config = ConvertConfig(source=root, out=root / "out", **options)
    source = open_source(config)
    return source, list_source(source, config)


def labels_of(root: Path, **options):
    _, found = listed(root, **options)
    return {p.source: (p.split, p.label, p.slide) for p in found.pictures}


def test_no_look_into_files_that_are_pictures_by_their_names(tmp_path, monkeypatch):
    save_pictures(tmp_path / "in" / "a", 3, edge=64)
    (tmp_path / "in" / "notes.txt").write_text("H&E")
    monkeypatch.setattr("latentds.sources.source.sort_files", None)
    source, found = listed(tmp_path / "in")
    assert source.kind == "a folder of pictures" and len(found.pictures) == 3


def test_a_list_of_sources_may_have_a_byte_order_mark_remarks_and_a_name_with_a_hash(tmp_path):
    save_pictures(tmp_path / "in" / "a", 3)
    save_pictures(tmp_path / "in" / "#b", 2)
    (tmp_path / "only.txt").write_text("a/p002.png\n\n# not p000\n#b/p001.png\n", "utf-8-sig")
    found = labels_of(tmp_path / "in", only=tmp_path / "only.txt")
    assert found.keys() == {"a/p002.png", "#b/p001.png"}


@pytest.mark.parametrize(
    ("text", "words"), [("a/p0.png\na/p001.png\n", "'a/p0.png' is"), ("# all\n", "nothing is")]
)
def test_a_listed_source_that_is_not_there_is_told_by_name(tmp_path, text, words):
    save_pictures(tmp_path / "in" / "a", 2)
    (tmp_path / "only.txt").write_text(text)
    match = f"only.txt: {words} no source of .*in, which has 'a/p000.png', 'a/p001.png'; "
    with pytest.raises(InputError, match=match):
        listed(tmp_path / "in", only=tmp_path / "only.txt")


def test_a_list_of_sources_is_read_as_tables_are(tmp_path):
    save_pictures(tmp_path / "in" / "a", 2)
    (tmp_path / "only.txt").write_bytes("a/p000.png".encode("utf-16"))
    _, found = listed(tmp_path / "in", only=tmp_path / "only.txt")
    assert [picture.source for picture in found.pictures] == ["a/p000.png"]
    (tmp_path / "only.txt").write_bytes("a/p000.png\nü".encode("latin-1"))
    with pytest.raises(InputError, match="only.txt, line 2: byte 0xfc is no UTF-8"):
        listed(tmp_path / "in", only=tmp_path / "only.txt")


@pytest.mark.parametrize("others", [0, 1])
def test_tiled_tiff_patches_are_pictures_alone_and_among_others(tmp_path, others):
    for number in range(3):
        write_tiled(tmp_path / "in" / "ab"[number % 2] / f"p{number}.tif", seed=number)
    save_pictures(tmp_path / "in" / "a", others, edge=64)
    source, found = listed(tmp_path / "in")
    assert source.kind == "a folder of pictures" and len(found.pictures) == 3 + others
    assert any("--kind slides" in note for note in found.notes)


def test_pyramids_are_slides_and_one_level_among_them_too(tmp_path):
    write_tiled(tmp_path / "in/a.tif", 256, pages=2)
    write_tiled(tmp_path / "in/b.tif", 128)
    source, found = listed(tmp_path / "in")
    assert source.kind == "whole slides" and [p.slide for p in found.pictures] == ["a", "b"]
    assert any("among slides" in note for note in found.notes)


def test_slides_and_pictures_in_one_folder_are_refused_by_name_and_chosen_by_kind(tmp_path):
    save_pictures(tmp_path / "one", 1)
    root = tmp_path / "in"
    root.mkdir()
    for number in range(1100):  # beyond where one used to look
        (root / f"a{number:04d}.png").symlink_to(tmp_path / "one" / "p000.png")
    write_tiled(root / "z.tif", 256, pages=2)
    with pytest.raises(InputError, match=r"slides \(1, e.g. z.tif\) and pictures \(1100, e.g. a0"):
        listed(root)
    assert len(listed(root, kind="slides")[1].pictures) == 1
    assert len(listed(root, kind="pictures")[1].pictures) == 1101


@pytest.mark.parametrize("kind", [None, "slides"])
def test_a_slide_alone_is_converted(tmp_path, kind):
    write_tiled(tmp_path / "in/tumor/s1.tif", 256, pages=3)
    write_tiled(tmp_path / "in/tumor/s2.tif", 256, pages=3, seed=1)
    options = {"kind": kind, "patch_size": 64, "tissue": "none", "assume_mpp": 0.5}
    manifest = convert_with_mean(tmp_path / "in/tumor/s1.tif", tmp_path / "out", **options)
    assert manifest.slides == ("s1",) and manifest.splits == {"train": 16}
    assert ShardSet(tmp_path / "out").read_columns([0], ["source"])["source"] == ["s1.tif"]


@pytest.mark.parametrize("kind", [None, "pictures"])
def test_a_picture_alone_is_converted(tmp_path, kind):
    save_pictures(tmp_path / "train", 3)
    source, found = listed(tmp_path / "train/p001.png", kind=kind)
    assert [p.source for p in found.pictures] == ["p001.png"] and source.kind == "a picture"
    manifest = convert_with_mean(tmp_path / "train/p001.png", tmp_path / "out", kind=kind)
    assert manifest.splits == {"train": 1} and manifest.made["ignored_files"] == 0


@pytest.mark.parametrize("name", ["p.zip", "p.tar.gz", "p.txt"])
def test_a_file_of_no_use_is_told_in_one_line_with_the_remedy(tmp_path, name, caplog):
    (tmp_path / name).write_bytes(b"PK")
    with (
        caplog.at_level("INFO"),
        pytest.raises(InputError, match=r"p\.\S+: no picture .*; unpack a zip or tar\.gz, and"),
    ):
        listed(tmp_path / name)
    assert caplog.messages == []


def test_the_jpegs_of_a_vms_slide_are_no_pictures(tmp_path):
    (tmp_path / "s.vms").write_text("")
    Image.fromarray(smooth_picture(0)).save(tmp_path / "s(1,0).jpg")
    found = sort_files(tmp_path, ["s.vms", "s(1,0).jpg"])
    assert found.slides == ["s.vms"] and found.others == ["s(1,0).jpg"] and not found.pictures


def test_numbers_in_names_are_places_or_classes_as_is_said(tmp_path):
    for number in range(4):
        save = tmp_path / "in" / "ab"[number % 2] / f"{number}_1.png"
        save.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_picture(number)).save(save)
    with pytest.raises(InputError, match="may be a slide or a class; pass --kind tiles"):
        listed(tmp_path / "in")
    assert labels_of(tmp_path / "in", kind="pictures")["a/0_1.png"] == ("train", "a", None)
    assert labels_of(tmp_path / "in", kind="tiles")["a/0_1.png"] == ("train", None, "a")


def test_tiles_in_folders_of_known_slides_are_places(tmp_path):
    folder = tmp_path / "in/TCGA-AA-0001-01Z-00-DX1"
    save_pictures(folder, 1)
    (folder / "p000.png").rename(folder / "3_4.png")
    (picture,) = listed(tmp_path / "in")[1].pictures
    assert (picture.slide, picture.x, picture.y) == (folder.name, 96, 128)


@pytest.mark.parametrize(
    "name",
    [
        *("ytma10_malignant2__y512_x256", "ys512_xs256", "a_X256_Y512", "x256y512"),
        *("18B_Region_8_16_xini_256_yini_512", "idx5_x256_y512_class0", "(x=256, y=512)"),
    ],
)
def test_places_in_names_are_read_in_either_order(name):
    assert path_fields(f"a/{name}.png") == {"x": 256, "y": 512}


@pytest.mark.parametrize(
    "name", ["xmax256_ymax512", "x256_x512", "y256_512", "max1_y2", "9f3x2y1c"]
)
def test_numbers_that_are_no_corner_are_no_place(name):
    assert path_fields(f"{name}.png") == {}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a_row{}_col5", "row#_col#"),
        ("{}_r2_c3", "#_r#_c#"),
        ("TCGA-AA-0001-01Z-00-DX1_{}_8001_0.98", "#_#_#_#"),
        ("Tile__{}_11776_", "#_#_"),
    ],
)
def test_numbers_of_a_grid_that_end_all_names_are_told_as_not_read(name, form):
    (note,) = note_numbers(f"{name.format(number)}.png" for number in range(3))
    assert f"names end in {form}, which is not read" in note


UUIDS = [f"{n}a1b2c3d-1111-4222-8333-444455556666" for n in range(2)]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([f"{UUIDS[0]}/s1.svs", f"{UUIDS[1]}/s2.svs"], [("train", None), ("train", None)]),
        (["TCGA-AA-0001/s1.svs", "TCGA-BB-0002/s2.svs"], [("train", None), ("train", None)]),
        (["1.2.840.113.7.8/a.dcm", "1.2.840.113.7.9/b.dcm"], [("train", None), ("train", None)]),
        (["patient_001/a.tif", "patient_002/b.tif"], [("train", None), ("train", None)]),
        (["training/center_0/a.tif", "testing/b.tif"], [("train", None), ("test", None)]),
        (["training/no/n.tif", "testing/tumor/t.tif"], [("train", "no"), ("test", "tumor")]),
        (["training/normal/n.tif", "testing/images/t.tif"], [("train", "normal"), ("test", None)]),
        (["images/a/x.png", "images/b/y.png"], [("train", "a"), ("train", "b")]),
        (["NCT-CRC-HE-100K/A/a.tif", "CRC-VAL-HE-7K/A/b.tif"], [("train", "A"), ("val", "A")]),
        (["TCGA-BRCA/a.svs", "TCGA-LUAD/b.svs"], [("train", "TCGA-BRCA"), ("train", "TCGA-LUAD")]),
    ],
)  # fmt: skip
def test_folders_say_splits_and_classes_and_no_more(paths, expected):
    rule = read_folders(Path("in"), paths, use_labels=True, use_splits=True)
    assert [(p.split, p.label) for p in map(rule.place, paths)] == expected


def test_a_split_without_labels_is_told(tmp_path):
    save_pictures(tmp_path / "in/training/normal", 1)
    save_pictures(tmp_path / "in/testing/images", 2)
    notes = listed(tmp_path / "in")[1].notes
    assert "split test has no labels (2)" in notes
    assert any("folder images is taken for no class" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("dataset_internal_train_part000.tar", "train"),
        ("camelyonpatch_level_2_split_valid_x.h5", "val"),
        ("train-00000-of-00001.parquet", "train"),
        ("testing/0.tar", "test"),
        ("contest.tar", None),
    ],
)
def test_split_words_are_found_between_separators(name, split):
    word = split_word(name)
    assert (SPLITS[word] if word else None) == split


def test_names_of_two_splits_are_refused():
    with pytest.raises(InputError, match=r"several splits \(train, test\)"):
        splits_of(Path("in"), ["train_test_0.tar"], use_splits=True)


def test_class_numbers_of_a_source_stay_with_classes_that_have_no_patch(tmp_path):
    datasets = pytest.importorskip("datasets")
    import io

    def encoded(number):
        buffer = io.BytesIO()
        Image.fromarray(smooth_picture(number)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    names = ["tumor", "normal", "never", "stroma"]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    labels = [0, 1, 3, 0]
    rows = datasets.Dataset.from_dict(
        {"image": [encoded(n) for n in range(4)], "label": labels, "scanner": ["x"] * 4},
        features=datasets.Features({**features, "scanner": datasets.Value("string")}),
    )
    (tmp_path / "in").mkdir()
    rows.to_parquet(tmp_path / "in/train.parquet")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.classes == tuple(names)
    assert manifest.made["source"]["notes"] == ["columns not used: scanner"]
    shards = ShardSet(tmp_path / "out")
    sources = shards.read_columns(np.arange(4), ["source"])["source"]
    own = {s.rpartition("/")[2]: n for s, n in zip(sources, shards.patches["label"], strict=True)}
    assert [own[str(n)] for n in range(4)] == labels


def test_names_that_are_numbers_are_sorted_as_numbers():
    assert sorted_names(["10", "9", "0", "9"]) == ["0", "9", "10"]
    assert sorted_names(["10", "9", "a"]) == ["10", "9", "a"]
    assert joined_names([["b", "a"], ["a", "c"]]) == ["b", "a", "c"]
    assert joined_names([["2", "10"], ["3"]]) == ["2", "3", "10"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_beside_pictures_gives_labels(tmp_path, name):
    save_pictures(tmp_path / "in/train", 2)
    rows = [{"file_name": f"p00{n}.png", "label": "ab"[n], "slide": f"s{n}"} for n in range(2)]
    lines = [json.dumps(row) for row in rows]
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (tmp_path / "in/train" / name).write_text("\n".join(lines) + "\n")
    assert labels_of(tmp_path / "in")["train/p001.png"] == ("train", "b", "s1")


def test_metadata_files_that_disagree_are_refused_and_rows_of_no_picture_told(tmp_path):
    save_pictures(tmp_path / "in/train", 2)
    own = tmp_path / "in/train/metadata.csv"
    own.write_text("file_name,label\np000.png,a\np001.png,b\nlost.png,b\n")
    assert "train/metadata.csv: 1 of its rows" in " ".join(listed(tmp_path / "in")[1].notes)
    (tmp_path / "in/metadata.csv").write_text("file_name,label\ntrain/p000.png,b\n")
    with pytest.raises(InputError, match=r"tells of train/p000\.png otherwise than another"):
        listed(tmp_path / "in")


@pytest.mark.parametrize("text", ['{"file_name": "p000.png", "label": "\\ud800"}', "{", "[" * 2000])
def test_lines_of_metadata_that_no_set_can_hold_are_named(tmp_path, text):
    save_pictures(tmp_path / "in", 1)
    (tmp_path / "in/metadata.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 1: no JSON"):
        listed(tmp_path / "in")


def test_tables_that_are_not_read_are_told_with_their_rows(tmp_path):
    save_pictures(tmp_path / "in", 2)
    (tmp_path / "in/clinical.tsv").write_text("case\tgrade\nx\t1\ny\t2\n")
    (note,) = listed(tmp_path / "in")[1].notes
    assert note.startswith("no labels; not read: 'clinical.tsv' (2 rows); --slide-table")


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-3C-AALI-01Z-00-DX1.F6E9", ("TCGA", "TCGA-3C-AALI")),
        ("C3L-00001-21", ("CPTAC", "C3L-00001")),
        ("GTEX-1117F-0126", ("GTEx", "GTEX-1117F")),
        ("patient_017_node_2", ("CAMELYON17", "patient_017")),
        ("tumor_012", ("CAMELYON16", "tumor_012")),
        ("patient_3_left", None),
        ("slide 7", None),
    ],
)
def test_patients_of_public_schemes_are_known(name, patient):
    assert known_patient(name) == patient and is_identifier(name) is (patient is not None)


def slides_listed(tmp_path, **options):
    for number in range(6):
        write_tiled(tmp_path / f"in/case{number // 2}_{number % 2}.tif", 128, pages=2)
    return listed(tmp_path / "in", split_patients="train=0.5,val=0.5", **options)[1]


def test_splits_by_patient_need_the_patient(tmp_path):
    with pytest.raises(InputError, match="no patient is known of 6 .*'case0_0'.*--patient-pattern"):
        slides_listed(tmp_path)


def test_splits_by_patient_take_a_pattern_or_a_table_and_count(tmp_path):
    by_pattern = slides_listed(tmp_path, patient_pattern=r"case\d")
    assert "split by patient: 3 by --patient-pattern" in by_pattern.notes
    parts = {(p.slide[:5], p.split) for p in by_pattern.pictures}
    assert len(parts) == 3
    rows = "".join(f"case{n // 2}_{n % 2}.svs,c{n // 2}\n" for n in range(6))
    (tmp_path / "t.csv").write_text(f"Slide ID,case_id\n{rows}")
    by_table = slides_listed(tmp_path, slide_table=tmp_path / "t.csv")
    assert "split by patient: 3 patients of a table or record" in by_table.notes
    assert len({(p.patient, p.split) for p in by_table.pictures}) == 3


def test_a_pattern_that_finds_no_patient_is_refused():
    assert pattern_patient(r"(\w+)-\d", "bob-1") == "bob"
    assert pattern_patient(r"(?P<site>\d)_(?P<patient>\w)", "3_x") == "x"
    with pytest.raises(InputError, match="finds no patient in 'bob'"):
        pattern_patient(r"\d", "bob")


class FakeSeries:
    """A DICOM instance as OpenSlide opens it: every file of a series is the whole slide."""

    def __init__(self, path: Path) -> None:
        self.properties = {"dicom.SeriesInstanceUID": path.stem[0]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_files_of_a_dicom_series_are_one_slide_named_by_its_folder(monkeypatch):
    monkeypatch.setattr(kinds, "asked", lambda path: "dicom")
    paths = ["s1/a0.dcm", "s1/a1.dcm", "s2/b0.dcm", "both/c0.dcm", "both/c1.dcm", "both/d0.dcm"]
    names = kinds.one_a_series(Path("in"), paths, FakeSeries)
    assert names == {"s1/a0.dcm": "s1", "s2/b0.dcm": "b0", "both/c0.dcm": "c0", "both/d0.dcm": "d0"}


def test_a_pipe_among_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.dcm")
    os.mkfifo(tmp_path / "p.tif")
    assert not sort_files(tmp_path, ["p.dcm", "p.tif"]).slides


UUID_SLIDE = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291"
SLIDES = [UUID_SLIDE, "TCGA-AA-0001-01A-01-TS1"]


def write_nanopath(folder: Path, paths: list[str]) -> None:
    """Parquet of `path` and `jpeg`, as MedARC's shards are."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    buffers = [io.BytesIO() for _ in paths]
    for number, buffer in enumerate(buffers):
        Image.fromarray(smooth_picture(number)).save(buffer, "JPEG")
    jpeg = [buffer.getvalue() for buffer in buffers]
    pq.write_table(pa.table({"path": paths, "jpeg": jpeg}), folder / "shard-00000.parquet")


@pytest.mark.parametrize(
    "form", ["{0}/{0}_x{1}_y{2}.jpeg", "/data/tiles/{0}/x={1},y={2}.jpg", "{0}-x_{1}_y_{2}.jpeg"]
)
def test_paths_in_parquet_tell_slides_and_places(tmp_path, form):
    places = [(SLIDES[0], 1024, 0), (SLIDES[0], 0, 2048), (SLIDES[1], 7, 9)]
    write_nanopath(tmp_path / "in", [form.format(*place) for place in places])
    found = listed(tmp_path / "in")[1].pictures
    assert [(p.slide, p.x, p.y) for p in found] == places
    assert patient_splits(tmp_path) == 2


def patient_splits(tmp_path):
    found = listed(tmp_path / "in", split_patients="train=0.5,test=0.5")[1].pictures
    return len({(p.slide, p.split) for p in found})


def test_a_name_pattern_is_searched_in_the_paths_of_parquet(tmp_path):
    write_nanopath(tmp_path / "in", ["liver/s1/64_0.jpg", "colon/s2/0_64.jpg"])
    pattern = r"(?P<label>\w+)/(?P<slide>s\d)/(?P<x>\d+)_(?P<y>\d+)"
    found = listed(tmp_path / "in", name_pattern=pattern)[1].pictures
    assert [(p.label, p.slide, p.x, p.y) for p in found] == [
        ("liver", "s1", 64, 0),
        ("colon", "s2", 0, 64),
    ]


def test_known_places_are_read_where_a_pattern_names_the_slide_alone(tmp_path):
    save_pictures(tmp_path / "in", 1)
    (only,) = (tmp_path / "in").iterdir()
    only.rename(tmp_path / "in/S01_x64_y128.png")
    (found,) = listed(tmp_path / "in", name_pattern=r"(?P<slide>S\d+)_")[1].pictures
    assert (found.slide, found.x, found.y) == ("S01", 64, 128)


def test_no_label_of_a_pattern_is_taken_where_there_are_to_be_none(tmp_path):
    save_pictures(tmp_path / "in", 1)
    (found,) = listed(tmp_path / "in", name_pattern="(?P<label>p)", labels=False)[1].pictures
    assert found.label is None


def test_unread_numbers_are_told_where_some_names_have_them(tmp_path):
    save_pictures(tmp_path / "in", 3)
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())[:2]):
        path.rename(tmp_path / f"in/s_12_{number}.png")
    (note,) = listed(tmp_path / "in")[1].notes
    assert note.startswith("2 names end in #_#, which is not read")
