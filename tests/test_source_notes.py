"""What is assumed of splits and classes is said: nothing is merged or lost in silence."""

from pathlib import Path

import pytest

from latentds.conversion.convert_config import ConvertConfig
from latentds.sources.opening import list_source, open_source
from tests.conftest import save_pictures


def listed(root: Path, **options):
    """The listing of an input; nothing is decoded."""
    config = ConvertConfig(source=root, out=root.parent / "out", **options)
    return list_source(open_source(config), config)


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
    assert told.startswith(f"1 patients are in more than one split (one has {slides[0]!r} in train "
                           f"and {slides[1]!r} in test)")  # fmt: skip
    assert "--split-patients" in told and "Bob" not in told


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
