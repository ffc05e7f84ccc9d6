"""Tables as others write them: every reader of tables takes all of them."""

from pathlib import Path

import numpy as np
import pytest

from latentds.edit.extracting import extract
from latentds.errors import InputError, LatentdsError, UnknownNameError
from latentds.evaluation.groups import groups_of, read_labels
from latentds.sources.csv_tables import read_table
from latentds.sources.names import columns_of, note_unused
from latentds.sources.picture_tables import read_slide_table
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures

ROWS = "slide,patient,split,label\ns1,p1,train,a\ns2,p2,test,b\n"
FORMS = {  # the same table by other hands
    "plain": ROWS.encode(),
    "mark": ROWS.encode("utf-8-sig"),
    "excel's unicode text": ROWS.replace(",", "\t").encode("utf-16"),
    "semicolons": ROWS.replace(",", ";").encode(),
    "tabs": ROWS.replace(",", "\t").encode(),
    "bars": ROWS.replace(",", "|").encode(),
    "windows lines": ROWS.replace("\n", "\r\n").encode(),
    "pandas' index": b",slide,patient,split,label\n0,s1,p1,train,a\n1,s2,p2,test,b\n",
    "an index read and written": b"Unnamed: 0,slide,patient,split,label\n0,s1,p1,train,a\n"
    b"1,s2,p2,test,b\n",
    "clam's names": b"Case ID, Slide-ID ,SPLIT,Label\np1,s1.svs,train,a\np2,s2.svs,test,b\n",
    "columns nobody reads": b"slide,patient,split,label,notes\ns1,p1,train,a,\ns2,p2,test,b,x\n",
}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def table(request, tmp_path) -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(request.param)
    return path


def test_groups_and_labels_are_read_from_all_forms(table):
    groups, _ = groups_of(["s1", "s2"], ["x", "y"], table)
    assert groups == ["p1", "p2"]
    assert [label for _, label in sorted(read_labels(table).labels.items())] == ["a", "b"]


def test_splits_of_a_repacking_are_read_from_all_forms(table):
    found = read_slide_table(table, use_labels=False)
    splits = [facts["split"] for facts in found.facts.values()]
    assert found.by == "slide" and splits == ["train", "test"]


def test_splits_and_labels_of_a_conversion_are_read_from_all_forms(table, tmp_path):
    for slide in ("s1", "s2"):
        save_pictures(tmp_path / "in" / slide, 2)
    options = {"splits": table, "name_pattern": r"(?P<slide>s\d)"}
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", **options)
    assert manifest.splits == {"test": 2, "train": 2} and manifest.classes == ("a", "b")


def test_a_parquet_table_is_a_table_like_any(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"slide": ["s1", "s2"], "patient": [1.0, None], "thumbnail": [b"x", b"y"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet")
    assert found.columns == ("slide", "patient") and found.values("patient") == ["1", ""]


def test_a_parquet_table_that_unpacks_to_much_is_refused_unread(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"slide": pa.nulls(100_000), "label": pa.nulls(100_000)})
    pq.write_table(rows, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 2000
    monkeypatch.setattr("latentds.sources.csv_tables.MAX_CELLS", 199_999)
    with pytest.raises(InputError, match=r"t.parquet: 100,000 rows of 2 columns.*at most 199,999"):
        read_table(tmp_path / "t.parquet")


def test_places_as_pandas_and_excel_write_them(tmp_path):
    save_pictures(tmp_path, 2)
    text = "path;x;y;mpp;slide\np000.png;64.0;0.0;0,25;12.0\np001.png;128.0;0.0;0,5;\n"
    (tmp_path / "t.csv").write_text(text)
    convert_with_mean(tmp_path / "t.csv", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    found = shards.read_columns(np.arange(2), ["source", "x", "y", "mpp", "slide"])
    rows = sorted(zip(*found.values(), strict=True))
    assert rows == [("p000.png", 64, 0, 0.25, "12"), ("p001.png", 128, 0, 0.5, None)]


@pytest.mark.parametrize("begin", [r"C:\data\in\tumour\\", "/home/alice/in/tumour/", r"tumour\\"])
def test_paths_of_other_systems_lead_to_the_files_here(tmp_path, begin):
    save_pictures(tmp_path / "tumour", 2)
    begin = begin.replace("\\\\", "\\")
    (tmp_path / "t.csv").write_text(f"path\n{begin}p000.png\n{begin}p001.png\n")
    convert_with_mean(tmp_path / "t.csv", tmp_path / "out")
    sources = ShardSet(tmp_path / "out").read_columns(np.arange(2), ["source"])["source"]
    assert sorted(sources) == ["tumour/p000.png", "tumour/p001.png"]


def refusal(table: Path, text: str, **options) -> str:
    table.write_text(text)
    with pytest.raises(LatentdsError) as error:
        convert_with_mean(table, table.parent / "out", **options)
    return str(error.value)


def test_a_table_none_of_whose_files_is_there_is_told_with_the_way_to_them(tmp_path):
    save_pictures(tmp_path / "elsewhere", 2)
    text = "path,label\np000.png,a\np001.png,b\n"
    told = refusal(tmp_path / "t.csv", text, max_bad=2)
    assert f"none of the files that it names is there (first: {tmp_path}/p000.png)" in told
    assert "pass --root with the folder" in told and "--max-bad" not in told


def test_a_file_that_a_table_names_in_vain_is_told_below_its_root(tmp_path):
    save_pictures(tmp_path / "elsewhere", 2)
    told = refusal(tmp_path / "t.csv", "path\np000.png\np009.png", root=tmp_path / "elsewhere")
    assert told.startswith(f"{tmp_path}/elsewhere/p009.png: is not there; --root names")


@pytest.mark.parametrize("text", ["label,x,y\na,1,2\n", "p000.png\np001.png\n"])
def test_a_table_without_a_column_of_files_is_told_what_to_call_it(tmp_path, text):
    first = ", ".join(text.splitlines()[0].split(","))
    told = refusal(tmp_path / "t.csv", text)
    assert f"no column 'path' of files; its first line names {first}. Call the column" in told


def test_what_extract_writes_convert_reads(dataset, tmp_path):
    from tests.fakes import MeanAutoencoder

    extract(dataset, tmp_path / "pictures", split="val", autoencoder=MeanAutoencoder())
    manifest = convert_with_mean(tmp_path / "pictures/table.csv", tmp_path / "back")
    stored = ShardSet(dataset).manifest
    assert manifest.splits == {"val": stored.splits["val"]}
    assert (manifest.classes, manifest.slides) == (stored.classes, stored.slides)


def test_columns_that_nobody_reads_are_told(tmp_path):
    (tmp_path / "t.csv").write_text("path,Label,stain,site\na.png,x,HE,1\n")
    table = read_table(tmp_path / "t.csv")
    used = columns_of(table, ("path", "label"))
    assert used == {"path": "path", "label": "Label"}
    assert note_unused(table, used.values()) == ("t.csv: columns not used: stain, site",)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"slide,split\ns1\xe9,train\n", InputError, r"t\.csv, line 2: byte 0xe9 .*windows-1252"),
        (b"slide,Slide,split\na,b,c\n", InputError, "a column is there twice"),
        (b"slide,split\ns1,train,x\n", InputError, "line 2: 3 values for 2 columns"),
        (b"slide,bag,split\ns1,s2,train\n", InputError, r"two columns are one \(slide, bag\)"),
        (b"slide,splt\ns1,train\n", UnknownNameError, "'splt'; did you mean 'split'"),
    ],
)
def test_tables_that_could_mean_two_things_are_refused(tmp_path, content, error, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(error, match=message):
        read_slide_table(tmp_path / "t.csv")


def test_clams_split_file_is_a_table_of_splits(tmp_path):
    for slide in ("s1", "s2", "s3"):
        save_pictures(tmp_path / "in" / slide, 1)
    path = tmp_path / "splits_0.csv"
    path.write_text(",train,val,test\n0,s1.svs,s2.svs,s3.svs\n")
    options = {"splits": path, "labels": False}
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out", **options)
    assert manifest.splits == {"test": 1, "train": 1, "val": 1}
