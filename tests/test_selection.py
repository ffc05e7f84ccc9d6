"""Conditions on columns, slide lists, balanced draws, splits by patient: from the tables alone."""

import numpy as np
import pyarrow.compute as pc
import pytest

from latentds.core.randomness import digest_of
from latentds.errors import InputError, LatentdsError, UnknownNameError, unknown_name
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Select
from latentds.loading.selection import patient_of, select_rows, split_patients
from latentds.store.format import PATCHES_TABLE
from latentds.store.open_files import LocalFiles
from latentds.store.reader import ShardSet
from tests.bad_shards import edit_table
from tests.conftest import convert_with_mean, save_pictures

SLIDES = [f"TCGA-A{n // 2}-000{n // 2}-01Z-00-DX{n % 2 + 1}" for n in range(8)]  # 4 patients


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory):
    """200 patches: class a rare, b frequent; 8 slides of 4 patients; mpp and x set by hand."""
    root = tmp_path_factory.mktemp("labelled")
    for number, slide in enumerate(SLIDES):
        save_pictures(root / "in" / "train" / "a" / slide, 2, 100 * number)
        save_pictures(root / "in" / "train" / "b" / slide, 23, 100 * number + 50)
    convert_with_mean(root / "in", root / "out", pack_size=16)

    def change(table: np.ndarray) -> None:
        table["mpp"] = np.where(np.arange(200) % 2, 0.25, 0.5)
        table["mpp"][:10] = np.nan
        table["x"] = np.arange(200)

    edit_table(root / "out", PATCHES_TABLE, change)
    return root / "out"


def truth(folder):
    """Columns in plain numpy."""
    shards = ShardSet(folder)
    table, manifest = shards.patches, shards.manifest
    label = np.array(manifest.classes)[table["label"]]
    slide = np.array(manifest.slides)[table["slide"]]
    patient = np.array([patient_of(name) for name in slide])
    return shards, {name: table[name] for name in ("x", "mpp")} | {
        "label": label,
        "slide": slide,
        "patient": patient,
    }


CONDITIONS = {
    "label == 'a'": lambda c: c["label"] == "a",
    "label == 'a' and mpp < 0.3": lambda c: (c["label"] == "a") & (c["mpp"] < 0.3),
    "not label == 'a'": lambda c: c["label"] != "a",
    "0.3 > mpp": lambda c: c["mpp"] < 0.3,
    "10 <= x < 20 or x in [1, 3]": lambda c: (
        ((c["x"] >= 10) & (c["x"] < 20)) | np.isin(c["x"], [1, 3])
    ),
    "mpp is None": lambda c: np.isnan(c["mpp"]),
    "mpp is not None and x > -1": lambda c: ~np.isnan(c["mpp"]),
    "mpp != 0.5": lambda c: c["mpp"] == 0.25,
    "patient == 'TCGA-A1-0001'": lambda c: c["patient"] == "TCGA-A1-0001",
    "patient not in ('TCGA-A1-0001',)": lambda c: c["patient"] != "TCGA-A1-0001",
    "slide.startswith('TCGA-A3')": lambda c: np.char.startswith(c["slide"], "TCGA-A3"),
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_condition_chooses_what_numpy_chooses(labelled, where):
    shards, columns = truth(labelled)
    found = select_rows(shards, "train", where)
    assert found.tolist() == np.flatnonzero(CONDITIONS[where](columns)).tolist()


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('true')",
        "label == label",
        "label",
        "1 < 2",
        "label == 'a' if x else 1",
        "(lambda: 1)() == x",
        "label.upper() == 'A'",
        "x == 'a'",
        "label == 3",
        "label is True",
        "x == None",
        "x == [1]",
        "label ==",
        "x == 1; import os",
        "not " * 5000 + "x == 1",
        "x[0] == 1",
        "f'{x}' == 'a'",
        "label in []",
        "x == 99999999999999999999",
        "mpp in [-99999999999999999999]",
        "x in [None, 1]",
        "x in {[]}",
        "mpp is None or slide.startswith('a\\ud800')",
        " or ".join(["x == 1"] * 20_000),
        " or ".join(["slide.startswith('a')"] * 20_000),
        b"x == 1",
        5,
        ["x == 1"],
        pc.field("x") == 1,
    ],
)
def test_what_is_no_condition_is_refused(labelled, where):
    with pytest.raises(InputError, match="where=.*; (it knows comparisons|ShardSet.table)") as told:
        select_rows(ShardSet(labelled), "train", where)
    assert len(str(told.value)) < 600 or "not not" in str(where)


def test_a_name_is_in_no_empty_list(labelled):
    assert len(select_rows(ShardSet(labelled), "train", "label not in []")) == 200


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lable == 'a'", "where=.*lable == 'a'.*: unknown column 'lable'; did you mean 'label'"),
        ("label == 'aa'", "unknown label 'aa'.*known: a, b"),
        ("slide in ['nope']", "unknown slide 'nope'"),
        ("key == 'x'", "unknown column 'key'"),
    ],
)
def test_misspelt_names_are_refused(labelled, where, message):
    with pytest.raises(UnknownNameError, match=message):
        select_rows(ShardSet(labelled), "train", where)


@pytest.mark.parametrize(("name", "end"), [("n02500x", "n02520"), ("a", "n00039"), ("z", "n04999")])
def test_of_thousands_of_names_the_next_ones_are_listed(name, end):
    text = str(unknown_name("slide", name, [f"n{number:05d}" for number in range(5000)]))
    assert text.count("n0") >= 40 and len(text) < 400 and f"{end}, ... (5,000 in all)" in text
    assert ("did you mean 'n02500'?" in text) is (name == "n02500x")


def test_forty_names_are_all_listed():
    names = [f"n{number:02d}" for number in range(40)]
    assert str(unknown_name("slide", "n39", names)).endswith(", ".join(names))


def test_a_choice_of_nothing_is_refused(labelled):
    with pytest.raises(InputError, match="'x > 1000' chooses no patch of split 'train'"):
        LatentDataset(labelled, select=Select(where="x > 1000"))


def test_slide_lists_choose_their_patches(labelled):
    data = LatentDataset(labelled, select=Select(slides=SLIDES[2:4]), shuffle=True, batch_size=7)
    slides = [slide for batch in data for slide in batch.slides]
    assert set(slides) == set(SLIDES[2:4]) and len(slides) == data.patches == 50
    with pytest.raises(UnknownNameError, match="unknown slide 'x'"):
        LatentDataset(labelled, select=Select(slides=["x"]))


@pytest.mark.parametrize("kind", [list, set, tuple, np.array, iter, lambda s: [*s, *s]])
def test_equal_lists_of_slides_are_one_selection(labelled, kind):
    wanted = Select(slides=SLIDES[2:5])
    state = LatentDataset(labelled, select=wanted).state_dict()
    assert state["selection"] == digest_of([None, SLIDES[2:5]])  # as states have always had it
    select = Select(slides=kind(SLIDES[4:1:-1]))
    assert select == wanted
    LatentDataset(labelled, select=select).load_state_dict(state)
    assert len(LatentArray(labelled, decode="codes", select=select)) == 75


@pytest.mark.parametrize("slides", ["TCGA", [1, 2], [None]])
def test_what_is_no_list_of_slides_is_refused(slides):
    with pytest.raises(ValueError, match="slides=.*; a list of names is wanted"):
        Select(slides=slides)


def test_a_text_is_no_list_of_columns(labelled):
    with pytest.raises(ValueError, match="columns='source'; a list of names is wanted"):
        LatentDataset(labelled, columns="source")


def test_selection_reads_no_shard(labelled, monkeypatch):
    def refuse(*_):
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(LocalFiles, "open", refuse)
    assert (
        LatentDataset(
            labelled, select=Select(where="label == 'a'", balance="slide"), shuffle=True
        ).patches
        == 16
    )


@pytest.mark.parametrize("by", ["label", "slide", "patient"])
def test_balanced_draws_show_every_group_equally_often(labelled, by):
    _, columns = truth(labelled)
    data = LatentDataset(labelled, select=Select(balance=by), shuffle=True, batch_size=100)
    rows = np.concatenate([data.batch(e, n).rows for e in range(8) for n in range(len(data))])
    groups, counts = np.unique(columns[by][rows], return_counts=True)
    assert len(groups) == len(set(columns[by]))
    assert counts.max() - counts.min() <= len(rows) * 0.04  # the last block of 1,024 is not full
    for group in groups:  # inside a group, none again before all were there
        times = np.bincount(rows[columns[by][rows] == group], minlength=200)
        assert np.ptp(times[columns[by] == group]) <= 1


def test_balancing_by_what_nobody_has_is_refused(tmp_path):
    save_pictures(tmp_path / "in", 5)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="no chosen patch has a label"):
        LatentDataset(tmp_path / "out", select=Select(balance="label"), shuffle=True)
    with pytest.raises(ValueError, match="balance='colour'; one of label, slide, patient"):
        LatentDataset(tmp_path / "out", select=Select(balance="colour"), shuffle=True)


def test_patients_are_never_in_two_parts(labelled):
    shards = ShardSet(labelled)
    parts = split_patients(shards, {"train": 0.5, "val": 0.25, "test": 0.25}, seed=3)
    patients = {name: {patient_of(slide) for slide in slides} for name, slides in parts.items()}
    assert sorted(s for slides in parts.values() for s in slides) == sorted(SLIDES)
    assert [len(patients[name]) for name in ("train", "val", "test")] == [2, 1, 1]
    assert not patients["train"] & patients["val"] | patients["train"] & patients["test"]
    assert split_patients(shards, {"train": 0.5, "val": 0.25, "test": 0.25}, seed=3) == parts


def test_impossible_parts_are_refused(labelled):
    shards = ShardSet(labelled)
    with pytest.raises(ValueError, match="1 together"):
        split_patients(shards, {"train": 0.5})
    with pytest.raises(LatentdsError, match="4 patients leave 'b' without any"):
        split_patients(shards, {"a": 0.99, "b": 0.01})


@pytest.mark.parametrize(("where", "count"), [("mpp <= 0.3", 4), ("mpp == 0.3", 4),
                                              ("mpp in [0.3]", 4), ("mpp < 0.3", 0),
                                              ("mpp >= 0.3", 4)])  # fmt: skip
def test_a_resolution_is_compared_as_it_is_stored(tmp_path, where, count):
    save_pictures(tmp_path / "in" / "a", 4)
    convert_with_mean(tmp_path / "in", tmp_path / "out", mpp=0.3)
    shards = ShardSet(tmp_path / "out")
    if count:
        assert len(select_rows(shards, "train", where)) == count
    else:
        with pytest.raises(InputError, match="chooses no patch"):
            select_rows(shards, "train", where)


def test_a_mixture_is_selected_by_the_names_of_all_its_sets(labelled, tmp_path):
    save_pictures(tmp_path / "in" / "other" / "elsewhere", 6)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    own = ShardSet(labelled).manifest.slides[0]
    mixture = Mixture({str(labelled): 0.5, str(tmp_path / "out"): 0.5})
    data = LatentDataset(
        mixture, batch_size=8, select=Select(slides=[own, "elsewhere"]), shuffle=True
    )
    seen = {name for batch in data for name in batch.slides}
    assert seen == {own, "elsewhere"}
    with pytest.raises(UnknownNameError, match="'nowhere'"):
        LatentDataset(mixture, select=Select(slides=["nowhere"]))


def test_patients_that_no_name_tells_are_asked_for(tmp_path):
    for slide in ("case1_a", "case1_b", "case2_a"):
        save_pictures(tmp_path / "in" / "x" / slide, 2)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    shares = {"train": 0.5, "test": 0.5}
    with pytest.raises(InputError, match=r"no patient is known of 3 slides .*patients=\{slide"):
        split_patients(shards, shares)
    parts = split_patients(shards, shares, patients={s: s[:5] for s in shards.manifest.slides})
    assert sorted(parts.values(), key=len) == [["case2_a"], ["case1_a", "case1_b"]]
    with pytest.raises(InputError, match="no patient is known.*balance='slide'"):
        LatentDataset(tmp_path / "out", select=Select(balance="patient"), shuffle=True)


def test_labels_take_the_numbers_that_a_head_was_trained_with(shared_dataset):
    numbers = {"tumour": 3, "stroma": 0, "fat": 1}
    select = Select(class_to_idx=numbers)
    own = LatentDataset(shared_dataset, "val", batch_size=100)
    data = LatentDataset(shared_dataset, "val", batch_size=100, select=select)
    (theirs,), (ours,) = list(own), list(data)
    named = [own.classes[label] for label in theirs.labels.tolist()]
    assert ours.labels.tolist() == [numbers[name] for name in named]
    assert data.class_to_idx == numbers and data.classes == ["stroma", "fat", "", "tumour"]
    array = LatentArray(shared_dataset, "val", decode="codes", select=select)
    assert array.labels.tolist() == ours.labels.tolist() and array.classes == data.classes
    bags = SlideBags(shared_dataset, "val", select=select)
    assert {bag.label for bag in bags} == {0, 3}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"tumour": 0}, "no number for 'stroma' of its 2 classes"),
        ({"tumour": 1, "stroma": 1}, "each once"),
        ({"tumour": -1, "stroma": 0}, "0 or more"),
    ],
)
def test_numbers_that_cannot_be_labels_are_refused(shared_dataset, numbers, words):
    with pytest.raises(InputError, match=words):
        LatentDataset(shared_dataset, select=Select(class_to_idx=numbers))


@pytest.mark.parametrize("reader", [LatentDataset, LatentLoader, LatentArray, SlideBags])
def test_a_condition_outside_its_group_is_answered_with_the_group(shared_dataset, reader):
    with pytest.raises(TypeError, match=r"select='x > 5': pass select=Select\(\.\.\.\)"):
        reader(shared_dataset, select="x > 5")


def test_options_of_the_decoder_outside_their_group_are_answered_with_it(shared_dataset):
    with pytest.raises(TypeError, match=r"pass decoding=Decode"):
        LatentLoader(shared_dataset, decode="codes", decoding={"compile": True})
    with pytest.raises(TypeError, match=r"pass order=Order"):
        LatentLoader(shared_dataset, order="drop")
