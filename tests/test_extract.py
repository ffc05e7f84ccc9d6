"""extract and export: decoded pictures, Parquet rows, npy trees."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentds.edit import extracting
from latentds.edit.exporting import export_npy, export_parquet, file_stem, patch_path
from latentds.edit.extracting import extract
from latentds.edit.merging import merge
from latentds.errors import InputError, UnknownNameError
from latentds.quantizers.scalar import dequantize
from latentds.store.golden import decode_pixels
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.test_merge import codes_by_key, make_set
from tests.test_repack import make_masked_set
from tests.test_source_kinds import listed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """26 patches of two splits, two classes, three slides."""
    return make_set(tmp_path_factory.mktemp("small"), "a", 12, 0)


@pytest.fixture(scope="module")
def merged(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    merge([small, make_set(root, "b", 3, 700, levels=32)], root / "ab")
    return root / "ab"


def table(folder) -> list[dict]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_by_key(folder) -> dict[str, bytes]:
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    books = shards.manifest.codebooks
    pixels = decode_pixels(
        shards.read_codes(rows), books, MeanAutoencoder(), (32, 32), shards.codebook_numbers(rows)
    )
    keys = shards.read_columns(rows, ["key"])["key"]
    return {file_stem(key): image.tobytes() for key, image in zip(keys, pixels, strict=True)}


@pytest.mark.parametrize("which", ["small", "merged"])
def test_pictures_are_what_the_codes_decode_to(which, tmp_path, request):
    folder = request.getfixturevalue(which)
    extract(folder, tmp_path / "png", autoencoder=MeanAutoencoder())
    found = {path.stem: np.asarray(Image.open(path)).tobytes() for path in tmp_path.rglob("*.png")}
    assert found == pixels_by_key(folder)


def test_folders_are_split_class_and_slide_and_the_table_lists_them(small, tmp_path):
    extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())
    lines = table(tmp_path / "png")
    assert len(lines) == 29 and all((tmp_path / "png" / line["path"]).is_file() for line in lines)
    parts = {tuple(line["path"].split("/")[:3]) for line in lines}
    assert ("train", "tumour", "a.1") in parts and ("val", "tumour", "a.2") in parts
    assert lines[0].keys() == {"path", "label", "slide", "x", "y", "mpp", "split", "source"}


def test_one_split_needs_no_folder_for_it(small, tmp_path):
    extract(small, tmp_path / "png", split="val", autoencoder=MeanAutoencoder())
    assert {line["path"].split("/")[0] for line in table(tmp_path / "png")} == {"tumour"}


def test_extracted_pictures_convert_to_the_same_labels_and_slides(small, tmp_path):
    extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())
    convert_with_mean(tmp_path / "png", tmp_path / "again")
    again, before = read_manifest(tmp_path / "again"), read_manifest(small)
    assert (again.splits, again.classes, again.slides) == (
        before.splits, before.classes, before.slides)  # fmt: skip


def test_the_table_of_an_extracted_folder_keeps_all(tmp_path):
    lines = ["path,label,slide,x,y,mpp", "a.png,IDC / grade 2,s 1,512,0,0.25"]
    save_pictures(tmp_path / "in", 1)
    next((tmp_path / "in").glob("*.png")).rename(tmp_path / "in/a.png")
    (tmp_path / "in/own.csv").write_text("\n".join(lines))
    convert_with_mean(tmp_path / "in/own.csv", tmp_path / "set")
    extract(tmp_path / "set", tmp_path / "png", autoencoder=MeanAutoencoder())
    (note,) = (note for note in listed(tmp_path / "png")[1].notes if "not read" in note)
    assert "'table.csv' (1 row); --slide-table reads one, or convert it itself" in note
    convert_with_mean(tmp_path / "png/table.csv", tmp_path / "again")
    again, before = ShardSet(tmp_path / "again"), ShardSet(tmp_path / "set")
    assert (again.manifest.classes, again.manifest.slides) == (("IDC / grade 2",), ("s 1",))
    assert again.patches[:].tolist() == before.patches[:].tolist()


def test_a_killed_run_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    written = []
    whole = extracting.write_whole

    def die_after_five(path, content):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(extracting, "write_whole", die_after_five)
        with pytest.raises(KeyboardInterrupt):
            extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())
    assert not (tmp_path / "png" / "table.csv").exists()
    counts = extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())
    assert counts == {"written": 24, "found": 5} and len(table(tmp_path / "png")) == 29


def test_an_empty_file_of_a_power_failure_is_written_anew(small, tmp_path):
    extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())
    next((tmp_path / "png").rglob("*.png")).write_bytes(b"")
    assert extract(small, tmp_path / "png", autoencoder=MeanAutoencoder())["written"] == 1


def test_conditions_and_slides_choose(small, tmp_path):
    where = "label == 'stroma'"
    counts = extract(small, tmp_path / "a", where=where, autoencoder=MeanAutoencoder())
    assert counts["written"] == 12
    counts = extract(small, tmp_path / "b", slides=["a.2"], autoencoder=MeanAutoencoder())
    assert counts["written"] == 5


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"where": "label = 'x'"}, InputError, "not a condition"),
        ({"where": "x > 100000"}, InputError, "chooses no patch"),
        ({"slides": ["a.9"]}, UnknownNameError, "unknown slide 'a.9'"),
        ({"split": "test"}, UnknownNameError, "unknown split"),
    ],
)
def test_choices_that_choose_nothing_are_refused(small, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        extract(small, tmp_path / "png", autoencoder=MeanAutoencoder(), **options)


def test_jpeg_has_the_quality_asked_for(small, tmp_path):
    options = {"picture_format": "jpeg", "autoencoder": MeanAutoencoder()}
    extract(small, tmp_path / "a", quality=95, **options)
    extract(small, tmp_path / "b", quality=20, **options)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*.jpg")) for n in "ab"]
    assert sizes[0] > sizes[1] > 0


def test_another_extraction_in_the_folder_is_refused(small, tmp_path):
    extract(small, tmp_path / "out", autoencoder=MeanAutoencoder())
    options = {"picture_format": "jpeg", "autoencoder": MeanAutoencoder()}
    with pytest.raises(InputError, match=r"another extraction \(format, quality differ\)"):
        extract(small, tmp_path / "out", **options)
    extract(small, tmp_path / "out", overwrite=True, **options)
    assert {p.suffix for p in (tmp_path / "out").rglob("*.*g")} == {".jpg"}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"split": "val"}, "split"),
        ({"where": "label == 'stroma'"}, "where"),
        ({"slides": ["a.2"]}, "slides"),
    ],
)
def test_another_selection_is_not_mixed_into_the_folder(small, tmp_path, options, what):
    extract(small, tmp_path / "out", autoencoder=MeanAutoencoder())
    before = set((tmp_path / "out").rglob("*"))
    asked = {"autoencoder": MeanAutoencoder()} | options
    with pytest.raises(InputError, match=rf"\({what} differ\); choose another --out, or pass --ov"):
        extract(small, tmp_path / "out", **asked)
    assert set((tmp_path / "out").rglob("*")) == before
    extract(small, tmp_path / "out", overwrite=True, **asked)
    listed = {tmp_path / "out" / line["path"] for line in table(tmp_path / "out")}
    assert set((tmp_path / "out").rglob("*.png")) == listed


def test_the_same_slides_in_another_order_go_on(small, tmp_path):
    names = ["a.2", "a.1"]
    extract(small, tmp_path / "out", slides=names, autoencoder=MeanAutoencoder())
    again = extract(small, tmp_path / "out", slides=names[::-1], autoencoder=MeanAutoencoder())
    assert again["written"] == 0


def test_foreign_folders_are_not_written_to(small, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"not empty \(notes.txt\)"):
        extract(small, tmp_path, autoencoder=MeanAutoencoder(), overwrite=True)


NAMES = [
    "../../etc/passwd",
    "/abs",
    "..",
    ".",
    "",
    "a/../b",
    "x\0y",
    "ü",
    "a" * 300,
    ".hidden",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    from pathlib import Path

    for path in (patch_path(name, "s", "k", ".png"), patch_path("l", name, name, ".png")):
        whole = (tmp_path / path).resolve()
        assert tmp_path in whole.parents and len(Path(path).parts) == 3
        assert all(len(part) < 200 and not part.startswith(".") for part in Path(path).parts)


@pytest.mark.parametrize("name", ["con", "NUL.x", "Lpt1", "aux"])
def test_names_of_windows_devices_are_changed(name):
    device = name.partition(".")[0]
    for part in patch_path(name, name, name, ".png").split("/"):
        assert part.partition(".")[0] != device and part.startswith(device)
    assert patch_path("com²", None, "k", ".png").startswith("com²_-")
    assert patch_path("nul .y", None, "k", ".png").startswith("nul_ .y-")
    assert patch_path("bacon", None, "console", ".png") == "bacon/console.png"


def test_distinct_names_stay_distinct():
    keys = [
        "a/b",
        "a__b",
        "a_/b",
        "a/_b",
        "a_b",
        "/a/b",
        "a/b/",
        *(f"{'k' * 200}{i}" for i in "12"),
    ]
    assert len({file_stem(key) for key in keys}) == len(keys)
    folders = {patch_path(name, None, "k", "") for name in ("a b", "a_b", "a.b", "a.b.", "A b")}
    assert len(folders) == 5


def test_class_folders_keep_letters_and_spaces_and_the_table_its_numbers(tmp_path):
    names = ("Plattenepithel größer", "ожоги", "grade 2 (low)")
    for place, name in enumerate(names):
        save_pictures(tmp_path / "in" / name, 3, 10 * place)
    convert_with_mean(tmp_path / "in", tmp_path / "set", fit_patches=8, mpp=0.3)
    extract(tmp_path / "set", tmp_path / "png", autoencoder=MeanAutoencoder())
    export_npy(tmp_path / "set", tmp_path / "npy")
    assert {path.name for path in (tmp_path / "png").iterdir() if path.is_dir()} == set(names)
    assert {path.name for path in (tmp_path / "npy" / "train").iterdir()} == set(names)
    rows = table(tmp_path / "png") + table(tmp_path / "npy")
    assert {row["mpp"] for row in rows} == {"0.3"}
    assert all((tmp_path / "png" / row["path"]).is_file() for row in rows[:9])


def test_hostile_slides_of_a_set_stay_inside(tmp_path):
    save_pictures(tmp_path / "in" / "tumour", 9)
    pattern = r"(?P<label>tumour)/(?P<slide>p\d+)"
    convert_with_mean(tmp_path / "in", tmp_path / "set", name_pattern=pattern)
    from tests.bad_shards import edit_manifest

    names = [f"../../{number}" for number in range(9)]
    edit_manifest(tmp_path / "set", lambda m: m.update(slides=names))
    extract(tmp_path / "set", tmp_path / "deep" / "er" / "png", autoencoder=MeanAutoencoder())
    assert len(list((tmp_path / "deep" / "er" / "png").rglob("*.png"))) == 9
    assert {p.name for p in tmp_path.iterdir()} == {"in", "set", "deep"}


def test_datasets_reads_exported_rows(merged, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert export_parquet(merged, tmp_path / "out", file_bytes=48 * 10) == 40
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == read_manifest(merged).splits
    found = {row["key"]: bytes(row["codes"]) for rows in loaded.values() for row in rows}
    assert found == codes_by_key(merged)


def test_exported_rows_say_what_they_mean(merged, tmp_path):
    from latentds.store.format import Contract

    export_parquet(merged, tmp_path / "out", split="val")
    (path,) = (tmp_path / "out" / "data").iterdir()
    rows = pq.read_table(path)
    contracts = json.loads(rows.schema.metadata[b"latentds"])["contracts"]
    shards = ShardSet(merged)
    first, _ = shards.patch_range("val")
    row = rows.slice(0, 1).to_pylist()[0]
    contract = Contract.from_json(contracts[row["codebook_id"]], "row")
    codes = np.frombuffer(row["codes"], np.uint8).reshape(1, *contract.codes_shape)
    assert np.array_equal(codes, shards.read_codes(np.array([first])))
    assert row["split"] == "val" and row["slide"] == "a.2" and row["x"] is None
    assert str(rows.schema.field("codes").type) == "fixed_size_binary[48]"


@pytest.mark.parametrize("latents", [False, True])
def test_npy_trees_hold_codes_or_latents(merged, tmp_path, latents):
    export_npy(merged, tmp_path / "out", latents=latents)
    shards = ShardSet(merged)
    codes, books = codes_by_key(merged), {b.codebook_id: b for b in shards.manifest.codebooks}
    stems = {file_stem(key): np.frombuffer(c, np.uint8) for key, c in codes.items()}
    for line in table(tmp_path / "out"):
        values = np.load(tmp_path / "out" / line["path"], allow_pickle=False)
        expected = torch.from_numpy(
            stems[line["path"].split("/")[-1][:-4]].reshape(1, 3, 4, 4).copy()
        )
        if latents:
            expected = dequantize(expected, books[line["codebook_id"]])
        assert (
            np.array_equal(values, expected[0].numpy()) and values.dtype == expected.numpy().dtype
        )


def test_exports_appear_whole_or_not_at_all(small, tmp_path, monkeypatch):
    from latentds.edit import exporting

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "read_rows", die)
    for export in (export_parquet, export_npy):
        with pytest.raises(KeyboardInterrupt):
            export(small, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert export_npy(small, tmp_path / "out") == 29
    assert not (tmp_path / "out.partial").exists()


def test_exports_replace_exports_with_overwrite_and_nothing_else(small, tmp_path):
    export_npy(small, tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        export_parquet(small, tmp_path / "out")
    export_parquet(small, tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").rglob("*.npy"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        export_parquet(small, tmp_path / "mine", overwrite=True)


def test_commands_tell_counts(tmp_path, pictures, capsys):
    from tests.test_tools import call

    call(capsys, "convert", pictures, "--out", tmp_path / "set", "--device", "cpu")
    words = ("extract", tmp_path / "set", "--out", tmp_path / "png", "--device", "cpu", "--json")
    code, out, _ = call(capsys, *words)
    assert code == 0 and json.loads(out)["written"] == 33
    words = ("export", tmp_path / "set", "--to", "parquet", "--out", tmp_path / "parquet")
    code, out, _ = call(capsys, *words)
    assert code == 0 and "33 patches" in out
    code, _, err = call(capsys, *words, "--latents", "--overwrite")
    assert code == 1 and "--latents is for --to npy" in err


def test_parquet_rows_hold_the_masks(tmp_path):
    export_parquet(make_masked_set(tmp_path), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "data" / "train-00000.parquet").to_pylist()
    masks = {row["key"]: np.asarray(Image.open(io.BytesIO(row["mask_png"]))) for row in rows}
    assert {key: mask.max() for key, mask in masks.items()} == {key: int(key[1:]) for key in masks}
    assert len(masks) == 11


@pytest.mark.parametrize("write", [extract, export_npy])
def test_files_a_patch_say_that_masks_are_left_out(write, tmp_path, caplog):
    more = {"autoencoder": MeanAutoencoder()} if write is extract else {}
    write(make_masked_set(tmp_path), tmp_path / "out", **more)
    assert "its masks are not written; 'latentds export --to parquet'" in caplog.text
