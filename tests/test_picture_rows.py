"""Pictures in rows: Parquet, Hugging Face data sets."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.sources import parquet_files
from latentds.sources.opening import open_source
from latentds.sources.picture_rows import hub_id
from tests.archives import encoded, hugging_face_rows, midnight_rows, rows_of, write_parquet
from tests.conftest import convert_with_mean, save_pictures


@pytest.fixture
def parquet(tmp_path):
    return write_parquet(tmp_path / "in")


def test_openmidnights_columns_are_read(parquet, tmp_path):
    manifest = convert_with_mean(parquet, tmp_path / "out")
    assert manifest.made["source"]["kind"] == "Parquet of encoded pictures"
    rows = rows_of(tmp_path / "out", "slide", "x", "y", "size_px", "label")
    assert len(rows) == 40 and rows["part-0.parquet/17"] == ("w1.x", 544, 5, 128, None)
    encodings = manifest.made["source_encodings"]
    assert encodings["raw"] == 13 and encodings["png"] == 13
    stored = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"secret" not in stored


def test_row_groups_are_mixed_but_each_is_read_once(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr("latentds.sources.picture_rows.GROUPS_KEPT", 4)
    read = []
    original = parquet_files.EncodedTable.read_group
    monkeypatch.setattr(
        parquet_files.EncodedTable, "read_group",
        lambda table, number: read.append(number) or original(table, number),
    )  # fmt: skip
    plan = make_plan(ConvertConfig(source=parquet, out=tmp_path / "out", workers=1))
    assert read == list(range(8))  # for the headers, in the file's order
    rows = [int(plan.pictures[i].source.rpartition("/")[2]) for i in plan.regions["picture"]]
    assert sorted(rows) == list(range(40)) and rows != sorted(rows)
    first, second = ({row // 5 for row in part} for part in (rows[:20], rows[20:]))
    assert len(first) == len(second) == 4 and not first & second


def test_packs_by_slide_keep_row_groups_whole(parquet, tmp_path):
    plan = make_plan(ConvertConfig(source=parquet, out=tmp_path / "out", pack_by_slide=True))
    rows = [int(plan.pictures[i].source.rpartition("/")[2]) for i in plan.regions["picture"]]
    assert [row // 10 for row in rows] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    assert all(len({row // 5 for row in rows[n : n + 5]}) == 1 for n in range(0, 40, 5))


def test_columns_of_notes_are_never_read(parquet, tmp_path):
    table = midnight_rows(4).append_column("notes", pa.array(["John Doe"] * 4))
    pq.write_table(table, parquet / "part-0.parquet")
    source = open_source(ConvertConfig(source=parquet, out=tmp_path))
    source.listing()
    (found,) = source.tables.values()
    assert "notes" not in found.facts and "task_id" not in found.facts


def test_parquet_of_hugging_face_has_names_of_classes(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        path = tmp_path / "in/data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        hugging_face_rows(count).to_parquet(str(path))
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"test": 2, "train": 6}
    assert manifest.labels() == {"benign": 4, "tumour": 4}


def test_texts_serve_as_labels_of_parquet(tmp_path):
    table = pa.table({"png": [encoded(n) for n in range(3)], "label": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert convert_with_mean(tmp_path / "x.parquet", tmp_path / "out").labels() == {"a": 2, "b": 1}


def test_row_groups_too_large_for_memory_are_refused(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "MAX_GROUP_BYTES", 1000)
    message = r"row group 0 announces [\d,]+ bytes of pictures, more than 1,000; .*row_group_size"
    with pytest.raises(InputError, match=message):
        convert_with_mean(parquet, tmp_path / "out")


def test_more_bytes_than_announced_are_not_held(tmp_path, monkeypatch):
    """One picture a thousand times is small in a dictionary, and large when it is read."""
    large = encoded(0, "BMP", edge=128)
    table = pa.table({"image_bytes": [large] * 1000, "label": ["a"] * 1000})
    pq.write_table(table, tmp_path / "x.parquet", dictionary_pagesize_limit=1 << 20)
    monkeypatch.setattr(parquet_files, "MAX_GROUP_BYTES", 10 * len(large))
    monkeypatch.setattr(parquet_files, "check_footer", lambda *rest: None)
    with pytest.raises(TooManyBadSamplesError, match="has more bytes than it announces"):
        convert_with_mean(tmp_path / "x.parquet", tmp_path / "out")


def test_more_pictures_than_bytes_are_refused(parquet):
    table = pa.table({"image_bytes": pa.nulls(100_000, pa.binary())})
    pq.write_table(table, parquet / "part-0.parquet", row_group_size=100_000)
    with pytest.raises(InputError, match="announces 100,000 pictures in"):
        parquet_files.open_table(parquet / "part-0.parquet")


def test_files_without_pictures_are_refused(parquet, tmp_path):
    pq.write_table(pa.table({"path": ["a"]}), parquet / "part-1.parquet")
    with pytest.raises(InputError, match="part-1.parquet: no column of pictures .* among path"):
        convert_with_mean(parquet, tmp_path / "out")


def test_several_columns_of_pictures_are_refused(tmp_path):
    kind = pa.array([{"bytes": encoded(0)}])
    pq.write_table(pa.table({"left": kind, "right": kind}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="pictures in left, right; rename"):
        convert_with_mean(tmp_path / "x.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_bytes": None}, "has no bytes in its row"),
        ({"image_bytes": b"none"}, "cannot be read"),
        ({"image_dtype": "raw"}, "raw bytes are not RGB pixels of tile_size 32"),
        ({"x": -5}, "its record: x is -5"),
    ],
)
def test_rows_that_cannot_be_used_count_as_bad(parquet, tmp_path, changes, message):
    rows = midnight_rows(6).to_pylist()
    rows[1] |= changes
    pq.write_table(pa.Table.from_pylist(rows), parquet / "part-0.parquet")
    with pytest.raises(TooManyBadSamplesError, match=f"part-0.parquet/1: .*{message}"):
        convert_with_mean(parquet, tmp_path / "out")
    assert convert_with_mean(parquet, tmp_path / "out", max_bad=1).patches == 5


def test_a_truncated_parquet_is_refused(parquet, tmp_path):
    path = parquet / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="part-0.parquet: damaged Parquet"):
        convert_with_mean(parquet, tmp_path / "out")


def test_a_saved_data_set_is_read(tmp_path):
    parts = {"train": hugging_face_rows(6), "validation": hugging_face_rows(3)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "in")
    manifest = convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"train": 6, "val": 3}
    assert manifest.labels() == {"benign": 5, "tumour": 4}
    assert rows_of(tmp_path / "out", "label")["validation/1"] == ("tumour",)


def test_a_saved_data_set_of_one_part_keeps_its_order(tmp_path):
    rows = hugging_face_rows(6).select([5, 0, 3])  # through indices
    rows.save_to_disk(tmp_path / "in")
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert rows_of(tmp_path / "out", "label") == {
        "train/0": ("tumour",), "train/1": ("benign",), "train/2": ("tumour",)
    }  # fmt: skip


def test_files_outside_a_saved_data_set_are_not_opened(tmp_path):
    """save_to_disk would embed the file; who means harm writes its path into a row."""
    hugging_face_rows(1).save_to_disk(tmp_path / "in")
    save_pictures(tmp_path / "private", 1)
    path = tmp_path / "in/data-00000-of-00001.arrow"
    schema = pa.ipc.open_stream(path.read_bytes()).schema
    image = {"bytes": None, "path": str(tmp_path / "private/p000.png")}
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist([{"image": image, "label": 0}], schema=schema))
    with pytest.raises(
        TooManyBadSamplesError, match="train/0: has no bytes in its row, nor a file"
    ):
        convert_with_mean(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_saved_data_set_is_refused(tmp_path, name):
    hugging_face_rows(2).save_to_disk(tmp_path / "in")
    (tmp_path / "in" / name).write_bytes(b"{")
    with pytest.raises(InputError, match="'datasets' cannot load it"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")


def test_a_data_set_by_its_id_goes_through_load_dataset(tmp_path, monkeypatch):
    """The id names a folder here, which load_dataset takes before it asks the Hub."""
    (tmp_path / "org/name/data").mkdir(parents=True)
    for split in ("train", "test"):
        hugging_face_rows(4).to_parquet(str(tmp_path / f"org/name/data/{split}-0.parquet"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from latentds_tools import cli

    words = ["convert", "hf://datasets/org/name", "--out", "out", "--device", "cpu", "--dry-run"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(words)
    config = ConvertConfig(source="hf://datasets/org/name", out=tmp_path / "out")
    pictures = make_plan(config).pictures
    assert {p.split for p in pictures} == {"train", "test"} and len(pictures) == 8


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://datasets/org/name", ("org/name", None)),
        ("hf:/datasets/org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("hf://models/org/name", None),
        ("datasets/org/name", None),
    ],
)
def test_addresses_of_the_hub_survive_as_paths(address, expected):
    assert hub_id(Path(address)) == expected
