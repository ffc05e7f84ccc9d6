"""What is assumed of splits and classes is said: nothing is merged or lost in silence."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError
from latentds.sources.opening import list_source, open_source
from tests.archives import encoded, write_members, write_samples
from tests.conftest import save_pictures


def listed(root: Path, **options):
    """The listing of an input; nothing is decoded."""
    config = ConvertConfig(source=root, out=root.parent / "out", **options)
    return list_source(open_source(config), config)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_sources_that_an_editor_marked_is_read_whole(tmp_path, encoding):
    save_pictures(tmp_path / "in", 3)
    names = sorted(path.name for path in (tmp_path / "in").iterdir())[:2]
    (tmp_path / "only.txt").write_text("\n".join(names), encoding)
    found = listed(tmp_path / "in", only=tmp_path / "only.txt")
    assert [picture.source for picture in found.pictures] == names


def picture_table(root: Path, columns: str, cells: list[str]) -> Path:
    """A table of a picture a row: its path, then these cells."""
    save_pictures(root, len(cells))
    rows = [f"p{number:03d}.png,{cell}" for number, cell in enumerate(cells)]
    (root / "t.csv").write_text("\n".join([f"path,{columns}", *rows, ""]))
    return root / "t.csv"


APART = [
    ("slide,patient,split", ["a,Bob,train", "b,Bob,test", "c,Eve,train"]),
    ("slide,split", ["GTEX-1117F-0126,train", "GTEX-1117F-0226,test", "c,test"]),
]


@pytest.mark.parametrize(("columns", "cells"), APART)
def test_a_patient_in_two_splits_is_told_by_slides(tmp_path, columns, cells):
    table = picture_table(tmp_path / "in", columns, cells)
    slides = [cell.partition(",")[0] for cell in cells]
    (told,) = [note for note in listed(table).notes if "more than one split" in note]
    assert told.startswith(f"1 patient is in more than one split (one has {slides[0]!r} in train "
                           f"and {slides[1]!r} in test)")  # fmt: skip
    assert "--split-patients" in told and "Bob" not in told


@pytest.mark.parametrize("column", ["slide", "patient"])
def test_a_table_of_slides_that_are_not_here_is_refused_with_one_of_each(tmp_path, column):
    table = picture_table(tmp_path / "in", "slide", ["a", "b", "b"])
    (tmp_path / "s.csv").write_text(f"{column},label\nx,p\ny,q\n")
    words = rf"s\.csv: no {column} in it is of .* it has 'x', 'y', here are 'a', 'b'; take"
    with pytest.raises(InputError, match=words):
        listed(table, slide_table=tmp_path / "s.csv")
    (tmp_path / "s.csv").write_text(f"{column},label\n")
    with pytest.raises(InputError, match="it has no rows, here are 'a', 'b'"):
        listed(table, slide_table=tmp_path / "s.csv")


def test_a_table_of_slides_may_miss_the_part_of_them_that_is_chosen(tmp_path):
    table = picture_table(tmp_path / "in", "slide", ["a", "b", "b"])
    (tmp_path / "s.csv").write_text("slide,label\na,p\n")
    (tmp_path / "only.txt").write_text("p001.png\n")
    found = listed(table, slide_table=tmp_path / "s.csv", only=tmp_path / "only.txt")
    assert [p.label for p in found.pictures] == [None]


@pytest.mark.parametrize("option", ["splits", "slide_table"])
def test_tables_of_slides_tell_patients_in_two_splits(tmp_path, option):
    table = picture_table(tmp_path / "in", "slide", ["a", "b", "c"])
    (tmp_path / "s.csv").write_text("slide,patient,split\na,p,train\nb,p,val\nc,q,val\n")
    notes = listed(table, **{option: tmp_path / "s.csv"}).notes
    assert any("(one has 'a' in train and 'b' in val)" in note for note in notes)


def test_whole_patients_are_no_note(tmp_path):
    table = picture_table(tmp_path / "in", "patient,split", ["p,train", "p,train", "q,test"])
    assert listed(table).notes == ()
    dealt = listed(table, split_patients="train=0.5,val=0.5")
    assert not any("more than one" in note for note in dealt.notes)


def tar_of(path: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_members(path, [(name, b"not looked into") for name in names])


def labels_of(root: Path, **options):
    """Split and label by source, and all notes as one text."""
    found = listed(root, **options)
    return {p.source: (p.split, p.label) for p in found.pictures}, "; ".join(found.notes)


IN_TARS = [  # archives and members, and what they are
    ({"all.tar": ["a/0.png", "b/1.png"]}, {"all.tar/a/0.png": ("train", "a"),
                                           "all.tar/b/1.png": ("train", "b")}),
    ({"0.tar": ["top/a/0.png"], "1.tar": ["top/b/1.png"]}, {"0.tar/top/a/0.png": ("train", "a"),
                                                            "1.tar/top/b/1.png": ("train", "b")}),
    ({"train.tar": ["train/a/0.png", "train/b/0.png"], "val.tar": ["val/b/0.png"]},
     {"train.tar/train/a/0.png": ("train", "a"), "train.tar/train/b/0.png": ("train", "b"),
      "val.tar/val/b/0.png": ("val", "b")}),
]  # fmt: skip


@pytest.mark.parametrize(("archives", "expected"), IN_TARS)
def test_class_folders_inside_tars_are_classes(tmp_path, archives, expected):
    for name, members in archives.items():
        tar_of(tmp_path / "in" / name, members)
    found, notes = labels_of(tmp_path / "in")
    assert found == expected and "are taken for classes ('" in notes
    bare, notes = labels_of(tmp_path / "in", labels=False)
    assert {label for _, label in bare.values()} == {None} and notes == ""


DEEPER = [  # members, and what they are taken for
    ["train/0.png", "val/1.png"],
    ["top/train/a/0.png", "top/train/b/0.png", "top/val/a/1.png"],
    ["val/a/0.png", "val/b/1.png"],
    ["a/s1/0.png", "b/s2/1.png"],
    ["top/a/s1/x/0.png", "top/b/s2/y/1.png"],
    ["train/images/0.png", "val/images/1.png"],
    ["train/a/s1/0.png", "train/b/s2/1.png", "test/a/s3/0.png"],
]


@pytest.mark.parametrize("members", DEEPER)
def test_folders_inside_tars_mean_what_they_mean_on_a_disk(tmp_path, members):
    tar_of(tmp_path / "in" / "all.tar", members)
    root = tmp_path / "disk"
    for member in members:
        (root / member).parent.mkdir(parents=True, exist_ok=True)
        (root / member).write_bytes(b"not looked into")
    wanted = listed(root / "top" if members[0].startswith("top/") else root).pictures
    found = listed(tmp_path / "in")
    facts = [{(Path(p.source).name, p.split, p.label, p.slide) for p in pictures}
             for pictures in (found.pictures, wanted)]  # fmt: skip
    assert facts[0] == facts[1]
    assert "folders inside tars are taken for " in "; ".join(found.notes)


def test_split_folders_inside_tars_can_be_left(tmp_path):
    tar_of(tmp_path / "in" / "all.tar", ["train/0.png", "val/1.png"])
    found, _ = labels_of(tmp_path / "in", split_folders=False)
    assert [*found.values()] == [("train", "train"), ("train", "val")]
    write_members(tmp_path / "b.tar", [(f"val/{n}", b"x") for n in ("0.png", "0.cls")])
    found, notes = labels_of(tmp_path / "b.tar")
    assert [*found.values()] == [("val", "x")] and "taken for splits ('val')" in notes


def test_masks_beside_pictures_inside_a_tar_are_refused(tmp_path):
    names = [f"{folder}/{number}.png" for folder in ("images", "masks") for number in range(3)]
    tar_of(tmp_path / "in" / "a.tar", names)
    with pytest.raises(InputError, match=r"no patches; unpack the tar, then pass .*a\.tar/images"):
        listed(tmp_path / "in")


def test_a_picture_called_by_a_masks_ending_alone_is_listed(tmp_path):
    tar_of(tmp_path / "a.tar", ["images/_mask.png", "images/0.png"])
    assert len(listed(tmp_path / "a.tar").pictures) == 2


def test_hidden_pictures_inside_tars_are_told(tmp_path):
    tar_of(tmp_path / "a.tar", ["a/0.png", "b/.x.png", "b/._1.png", "b/1.png", ".thumbs/a/2.png"])
    found, notes = labels_of(tmp_path / "a.tar")
    assert [*found] == ["a.tar/a/0.png", "a.tar/b/1.png"]
    assert "are hidden: 'a.tar/.thumbs/a/2.png', 'a.tar/b/.x.png'" in notes


@pytest.mark.parametrize(
    "archives",
    [
        {"all.tar": ["a/0.png", "b/1.png", "2.png"]},
        {"train.tar": ["val/a/0.png", "val/b/1.png"], "val.tar": ["train/a/2.png"]},
    ],
)
def test_other_folders_inside_tars_are_told(tmp_path, archives):
    for name, members in archives.items():
        tar_of(tmp_path / "in" / name, members)
    found, notes = labels_of(tmp_path / "in")
    assert {label for _, label in found.values()} == {None}
    assert "no classes and splits ('" in notes and "(?P<label>...)" in notes


def test_folders_of_patients_inside_tars_are_no_classes(tmp_path):
    tar_of(tmp_path / "in" / "all.tar", ["TCGA-3C-AALI/0.png", "TCGA-3C-AALJ/1.png"])
    found, notes = labels_of(tmp_path / "in")
    assert {label for _, label in found.values()} == {None} and "no labels: 2 folders are" in notes


def test_labels_beside_pictures_and_of_a_pattern_count_more_than_folders(tmp_path):
    write_members(tmp_path / "a.tar", [("a/0.png", b""), ("b/1.png", b""), ("a/0.cls", b"x")])
    found, notes = labels_of(tmp_path / "a.tar")
    assert set(found.values()) == {("train", "x"), ("train", None)} and "folders" not in notes
    tar_of(tmp_path / "in/b.tar", ["a/0.png", "b/1.png"])
    found, notes = labels_of(tmp_path / "in", name_pattern=r"(?P<label>\d)\.png")
    assert set(found.values()) == {("train", "0"), ("train", "1")} and notes == ""


WORDS = ["train", "VAL", "valid", "tuning", "0"]
TAKEN = ("split names taken for others: 'VAL' for val, 'valid' for val",
         "splits beside train, val and test: 0, tuning")  # fmt: skip


def test_split_words_of_a_table_are_told(tmp_path):
    found = listed(picture_table(tmp_path / "in", "split", [*WORDS, ""]))
    assert [p.split for p in found.pictures] == ["train", "val", "val", "tuning", "0", "train"]
    first = TAKEN[0].replace("'VAL'", "'' for train, 'VAL'")
    assert found.notes == (f"t.csv: {first}", f"t.csv: {TAKEN[1]}")


def test_split_words_of_a_table_beside_pictures_are_told(tmp_path):
    picture_table(tmp_path / "in", "split", WORDS).rename(tmp_path / "in/metadata.csv")
    notes = listed(tmp_path / "in").notes
    assert notes == tuple(f"metadata.csv: {words}" for words in TAKEN)


@pytest.mark.parametrize("option", ["splits", "slide_table"])
def test_split_words_of_slides_are_told(tmp_path, option):
    table = picture_table(tmp_path / "in", "slide", list("abcde"))
    rows = [f"{slide},{word}\n" for slide, word in zip("abcde", WORDS, strict=True)]
    (tmp_path / "s.csv").write_text(f"slide,split\n{''.join(rows)}")
    notes = listed(table, **{option: tmp_path / "s.csv"}).notes
    assert notes == tuple(f"s.csv: {words}" for words in TAKEN)


def test_usual_splits_are_no_note(tmp_path):
    assert listed(picture_table(tmp_path / "in", "split", ["train", "val", "test"])).notes == ()


def test_empty_class_folders_are_told(tmp_path):
    for folder in ("train/a", "train/b/slide", "val/a"):
        save_pictures(tmp_path / "in" / folder, 1)
    for folder in ("train/c", "val/b", "val/.hidden", "train/b/none"):
        (tmp_path / "in" / folder).mkdir()
    (tmp_path / "in/train/c/t.txt").write_text("no picture")
    told = "no classes, as nothing in them is taken: folders 'train/c', 'val/b'"
    assert listed(tmp_path / "in").notes == (told,)
    assert listed(tmp_path / "in", labels=False).notes == ()


@pytest.mark.parametrize("folder", ["", "images/"])
def test_an_empty_class_folder_without_splits_is_told(tmp_path, folder):
    save_pictures(tmp_path / f"in/{folder}a", 1)
    save_pictures(tmp_path / f"in/{folder}b", 1)
    (tmp_path / f"in/{folder}c").mkdir()
    assert f"nothing in them is taken: folders '{folder}c'" in listed(tmp_path / "in").notes[-1]
    (tmp_path / f"in/{folder}c").rmdir()
    assert "nothing in them" not in " ".join(listed(tmp_path / "in").notes)


def test_pictures_without_class_folders_have_no_empty_ones(tmp_path):
    save_pictures(tmp_path / "in", 2)
    (tmp_path / "in/c").mkdir()
    assert listed(tmp_path / "in").notes == ()


def test_hidden_pictures_are_told(tmp_path):
    root = tmp_path / "in"
    for folder in ("a", "b", "a/.thumbs/small", ".git"):
        save_pictures(root / folder, 1)
    (root / ".git/p000.png").rename(root / ".git/config")
    for hidden in (".p.png", "._p000.png", ".DS_Store"):  # the second is macOS's, no picture
        (root / "b" / hidden).write_bytes(b"")
    found = listed(root)
    assert [p.source for p in found.pictures] == ["a/p000.png", "b/p000.png"]
    told = "not taken, as names with a dot in front are hidden: 'a/.thumbs/', 'b/.p.png'"
    assert found.notes == (told,)


def test_files_that_are_named_as_no_picture_are_told(tmp_path):
    save_pictures(tmp_path / "in/a", 1)
    for name in ("x.heic", "bare", "notes.txt", "p000.XML"):
        (tmp_path / "in/a" / name).write_bytes(b"")
    told = "not taken, as their names are no picture's: 'a/bare', 'a/x.heic'"
    assert listed(tmp_path / "in").notes == (told,)


ROWS = ["a,train", ",train", "b,train", ",train", ",test"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_without_a_label_are_refused_by_table_and_picture(tmp_path, suffix):
    table = picture_table(tmp_path / "in", "Class,split", ROWS)
    if suffix == ".parquet":
        nulls = csv.ConvertOptions(strings_can_be_null=True)
        pq.write_table(csv.read_csv(table, convert_options=nulls), table.with_suffix(suffix))
        table = table.with_suffix(suffix)
    message = rf"in/t{suffix}: 2 of 5 pictures have no label.*\(first: p001\.png\).*--no-labels"
    with pytest.raises(InputError, match=message) as caught:
        listed(table)
    assert "folder" not in str(caught.value)
    assert len(listed(table, labels=False).pictures) == 5


def test_a_table_beside_pictures_that_lacks_a_label_is_named(tmp_path):
    picture_table(tmp_path / "in", "label", ["a", "", "b"]).rename(tmp_path / "in/metadata.csv")
    message = (
        r"1 of 3 pictures.*no label in metadata\.csv \(first: p001\.png\); give them one there"
    )
    with pytest.raises(InputError, match=message):
        listed(tmp_path / "in")


def tar_with_a_gap(path: Path) -> Path:
    """A tar of three samples, the last of which has no label."""
    path.mkdir()
    samples = {f"{n}": {"png": encoded(n), "cls": "a"} for n in range(3)}
    del samples["2"]["cls"]
    write_samples(path / "a.tar", samples)
    return path


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, r"give them one in a \.cls or \.json beside each, or pass --no-labels"),
        ({"name_pattern": r"(?P<label>0)?"}, r"mend --name-pattern, or pass --no-labels"),
        ({"slide_table": "s.csv"}, r"beside each or in \S+s\.csv, or pass --no-labels"),
    ],
)
def test_a_sample_without_a_label_is_told_what_it_lacks(tmp_path, options, way):
    root = tar_with_a_gap(tmp_path / "in")
    (tmp_path / "s.csv").write_text("slide,label\na.tar/1.png,a\n")
    options = {k: tmp_path / v if k == "slide_table" else v for k, v in options.items()}
    config = ConvertConfig(source=root, out=tmp_path / "out", **options)
    with pytest.raises(InputError, match=rf"1 of 3 pictures.*\(first: a\.tar/2\.png\); .*{way}"):
        make_plan(config)


def test_class_folders_that_differ_in_case_alone_are_refused(tmp_path):
    for number, folder in enumerate(("train/Tumor", "train/Stroma", "test/tumor", "test/Stroma")):
        save_pictures(tmp_path / "in" / folder, 2, 10 * number)
    message = r"in: classes 'tumor' \(2\) and 'Tumor' \(2\) would be two.*give them one name"
    with pytest.raises(InputError, match=message):
        listed(tmp_path / "in")
    assert len(listed(tmp_path / "in", labels=False).pictures) == 8


def test_a_class_called_na_is_told(tmp_path):
    found = listed(picture_table(tmp_path / "in", "label", ["a", "NA", "NA"]))
    assert [p.label for p in found.pictures] == ["a", "NA", "NA"]
    assert found.notes[0].startswith("label 'NA' (2) is taken for a class; where it means none")


def test_labels_of_a_table_of_slides_are_taken_where_folders_are_no_labels(tmp_path):
    for slide in ("s1", "s2"):
        save_pictures(tmp_path / "in" / slide, 1)
    (tmp_path / "s.csv").write_text("slide,label\ns1,pos\ns2,neg\n")
    found, _ = labels_of(tmp_path / "in", labels=False, slide_table=tmp_path / "s.csv")
    assert sorted(found.values()) == [("train", "neg"), ("train", "pos")]


def test_a_table_with_gaps_is_told_to_lose_its_labels_where_there_are_no_others(tmp_path):
    for slide in ("s1", "s2"):
        save_pictures(tmp_path / "in" / slide, 1)
    (tmp_path / "s.csv").write_text("slide,label\ns1,pos\n")
    config = ConvertConfig(
        source=tmp_path / "in", out=tmp_path / "o", labels=False, slide_table=tmp_path / "s.csv"
    )
    with pytest.raises(InputError, match=r"1 of 2 pictures.*take all labels out of \S+s\.csv"):
        make_plan(config)


def test_a_split_of_which_some_have_labels_is_not_said_to_have_none(tmp_path):
    found, notes = labels_of(tar_with_a_gap(tmp_path / "in"))
    assert len(found) == 3 and "has no labels" not in notes


def test_members_of_tars_that_nobody_reads_are_told(tmp_path):
    write_samples(tmp_path / "a.tar", {"0": {"png": encoded(0), "txt": "tumour"}})
    assert labels_of(tmp_path / "a.tar")[1] == "columns not used: .txt"


def test_a_number_that_stands_for_no_class_is_told(tmp_path):
    (note,) = listed(picture_table(tmp_path / "in", "label", ["0", "1", "-1"])).notes
    assert note.startswith("label '-1' (1) is taken for a class; where it means none")
