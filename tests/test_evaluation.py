"""Folds, split files, groups, labels, scores, statistics and records of evaluations."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from latentds.errors import InputError, ShapeError
from latentds.evaluation.folds import (
    Fold,
    check_disjoint,
    fixed_test_folds,
    predefined_fold,
    read_splits,
    split_id,
    stratified_group_folds,
    write_clam_splits,
)
from latentds.evaluation.groups import count_alone, groups_of, match_labels, read_labels
from latentds.evaluation.predictions import (
    Predictions,
    join_predictions,
    read_predictions,
    write_predictions,
)
from latentds.evaluation.records import RunRecord, read_record, write_record
from latentds.evaluation.scores import METRICS, classification_scores, weighted_score
from latentds.evaluation.statistics import (
    paired_bootstrap_groups,
    paired_difference,
    paired_images,
    summary,
)
from latentds.sources.csv_tables import read_table
from latentds.sources.slide_names import NameIndex
from tests.run_folders import fold_predictions

CLASSES = ["a", "b", "c"]


@dataclasses.dataclass
class Cohort:
    """150 slides of 60 patients, each of one class."""

    slides: list[str]
    patients: list[str]
    labels: np.ndarray

    @classmethod
    def draw(cls, seed: int = 0) -> "Cohort":
        numbers = np.random.default_rng(seed).permutation(np.arange(150) % 60)
        patients = [f"TCGA-AA-{number:04d}" for number in numbers]
        slides = [f"{name}-01Z-00-DX{row}.{row:08x}" for row, name in enumerate(patients)]
        return cls(slides, patients, numbers % 3)

    def folds(self, **options: object) -> list[Fold]:
        return stratified_group_folds(
            self.labels, self.patients, **{"folds": 5, "seed": 0} | options
        )


UNKNOWN = "slide, as no patient is known"


@pytest.fixture
def cohort() -> Cohort:
    return Cohort.draw()


def same_folds(some: list[Fold], others: list[Fold]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(one.parts()[part], other.parts()[part])
        for one, other in zip(some, others, strict=True)
        for part in one.parts()
    )


# --- folds


def test_folds_cover_every_item_once_and_cut_no_patient(cohort: Cohort) -> None:
    folds = cohort.folds()
    tests = np.concatenate([fold.test for fold in folds])
    assert sorted(tests.tolist()) == list(range(150))
    names = np.array(cohort.patients)
    for number, fold in enumerate(folds):
        sides = [set(names[rows]) for rows in fold.parts().values()]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 60
        assert np.array_equal(fold.val, folds[(number + 1) % 5].test)
        assert np.bincount(cohort.labels[fold.test]).min() >= 8  # 150 / 5 folds / 3 classes = 10


def test_folds_are_a_function_of_the_seed(cohort: Cohort) -> None:
    assert same_folds(cohort.folds(), cohort.folds())
    assert not same_folds(cohort.folds(), cohort.folds(seed=1))


def test_folds_without_validation_train_on_the_rest(cohort: Cohort) -> None:
    for fold in cohort.folds(val=False):
        assert len(fold.val) == 0 and len(fold.train) + len(fold.test) == 150


def test_items_that_are_their_own_groups_are_stratified_exactly() -> None:
    labels = np.arange(90) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folds = stratified_group_folds(labels, [str(i) for i in range(90)], folds=10, seed=0)
    assert all(np.bincount(labels[fold.test]).tolist() == [3, 3, 3] for fold in folds)


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "message"),
    [
        ([0, 0, 1, 1], ["p", "q", "p", "q"], 3, r"2 groups \('p', 'q'\) for 3 folds"),
        ([0, 0, 0, 1], ["p", "q", "r", "r"], 3, r"class 'b' is in one group only \('r'\)"),
        ([0, 0, 0, 1, 1], ["p", "q", "r", "r", "q"], 3, "class 'b' is in 2 groups .* at most 2"),
        ([0, 0, 0], ["p", "q", "r"], 3, "one class"),
        ([0, -1, 1], ["p", "q", "r"], 3, "1 item has no label"),
        ([0, 0, 1, 1], ["p", "q", "p", "q"], 2, "2 folds; at least 3"),
        ([0, 1], ["p"], 3, "2 labels for 1 groups"),
    ],
)
def test_cohorts_that_cannot_be_cut_are_refused(
    labels: list[int], groups: list[str], folds: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        stratified_group_folds(labels, groups, folds=folds, seed=0, classes=CLASSES)


def test_a_class_may_lack_in_some_test_sets_when_asked() -> None:
    labels, groups = [0, 1, 0, 1, 0, 1, 0], list("ppqqrrs")
    folds = stratified_group_folds(labels, groups, folds=4, seed=0, allow_missing=True)
    assert sorted(len(fold.test) for fold in folds) == [1, 2, 2, 2]


def test_fixed_test_folds_share_a_test_set_and_validate_on_what_they_leave_out() -> None:
    labels = np.arange(120) % 3
    is_test = np.arange(120) >= 90
    folds = fixed_test_folds(labels, [str(i) for i in range(120)], is_test, folds=10, seed=0)
    assert all(np.array_equal(fold.test, np.arange(90, 120)) for fold in folds)
    assert sorted(np.concatenate([fold.val for fold in folds]).tolist()) == list(range(90))
    assert all(len(fold.train) == 81 for fold in folds)


def test_fixed_test_folds_refuse_a_patient_on_both_sides() -> None:
    groups = [f"p{i}" for i in range(20)]
    groups[15] = "p3"
    with pytest.raises(InputError, match="p3"):
        fixed_test_folds(np.arange(20) % 2, groups, np.arange(20) >= 10, folds=2, seed=0)


def test_predefined_splits_take_the_usual_words() -> None:
    fold = predefined_fold(["Training", "valid", "test", "train"])
    assert [rows.tolist() for rows in fold.parts().values()] == [[0, 3], [1], [2]]


@pytest.mark.parametrize("splits", [["train", "holdout"], ["train", "train"], ["test"]])
def test_predefined_splits_that_are_none_are_refused(splits: list[str]) -> None:
    with pytest.raises(InputError, match="train"):
        predefined_fold(splits)


def test_a_patient_on_two_sides_is_named() -> None:
    fold = Fold(np.array([0, 1]), np.array([2]), np.array([3]))
    with pytest.raises(InputError, match="fold 0: 1 groups are in train and in test: 'p1'"):
        check_disjoint([fold], ["p0", "p1", "p2", "p1"])


def test_split_ids_depend_on_items_and_places_not_on_order(cohort: Cohort) -> None:
    folds, order = cohort.folds(), np.random.default_rng(1).permutation(150)
    place = np.argsort(order)
    moved = [Fold(*(np.sort(place[rows]) for rows in f.parts().values())) for f in folds]
    names = [cohort.slides[row] for row in order]
    assert split_id(folds, cohort.slides) == split_id(moved, names)
    assert split_id(folds, cohort.slides) != split_id(folds[::-1], cohort.slides)
    assert split_id(folds, cohort.slides) != split_id(folds, names)


# --- split files


def test_clam_files_come_back_as_they_were_written(cohort: Cohort, tmp_path: Path) -> None:
    folds = cohort.folds()
    write_clam_splits(tmp_path, folds, cohort.slides)
    assert (tmp_path / "splits_4.csv").read_text().startswith(",train,val,test\n0,TCGA-AA-")
    assert same_folds(read_splits(tmp_path, cohort.slides, cohort.patients), folds)


def test_clam_files_are_read_in_the_order_of_their_numbers(cohort: Cohort, tmp_path: Path) -> None:
    folds = cohort.folds(folds=12)
    write_clam_splits(tmp_path, folds, cohort.slides)
    assert same_folds(read_splits(tmp_path, cohort.slides, cohort.patients), folds)


def test_a_table_of_patho_bench_is_read(cohort: Cohort, tmp_path: Path) -> None:
    folds, path = cohort.folds(), tmp_path / "k=all.tsv"
    rows = [["case_id", "slide_id", "label", *(f"fold_{i}" for i in range(5))]]
    for row, slide in enumerate(cohort.slides):
        parts = [next(p for p, rows in f.parts().items() if row in rows) for f in folds]
        rows.append([cohort.patients[row], slide, CLASSES[cohort.labels[row]], *parts])
    path.write_text("\n".join("\t".join(row) for row in rows))
    files = [f"/data/{name}.svs" for name in cohort.slides]
    assert same_folds(read_splits(path, files, cohort.patients), folds)


SPLITS = ",train,val,test\n0,s1,s3,s4\n1,s2,,\n"


@pytest.mark.parametrize(
    ("text", "slides", "message"),
    [
        (SPLITS, "s1 s2 s3", "1 slide is not there: 's4'"),
        (SPLITS, "s1 s2 s3 s4 s5", "1 slide is in no fold: 's5'"),
        (",train,val,test\n0,s1,s1,s4\n", "s1 s4", "slide 's1' is in train and in val"),
        (",train,val,test\n0,s1,,\n", "s1", "train and test need some"),
        ("slide_id,part\ns1,train\n", "s1", "neither train, val, test nor fold_0"),
        ("slide_id\tfold_0\ns1\tholdout\n", "s1", "line 2: fold_0 is 'holdout'"),
        ("slide_id\tfold_0\ns1\n", "s1", "line 2: 1 values for 2 columns"),
        ("", "s1", "is empty"),
    ],
)
def test_split_files_that_do_not_fit_are_refused(
    text: str, slides: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "splits_0.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_splits(path, slides.split(), slides.split())


def test_split_files_of_more_slides_serve_a_subset_when_asked(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_text(SPLITS)
    (fold,) = read_splits(tmp_path, ["s4", "s2", "s9"], ["4", "2", "9"], allow_subset=True)
    assert [rows.tolist() for rows in fold.parts().values()] == [[1], [], [0]]


def test_split_files_that_cut_a_patient_are_refused(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_text(SPLITS)
    with pytest.raises(InputError, match=r"fold 0: 1 groups are in train and in test: 'p'"):
        read_splits(tmp_path, ["s1", "s2", "s3", "s4"], ["p", "q", "r", "p"])


def test_a_folder_without_split_files_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no splits_0\.csv"):
        read_splits(tmp_path, ["s1"], ["s1"])


# --- names


SLIDE = "TCGA-3C-AALI-01Z-00-DX1"


@pytest.mark.parametrize(
    ("known", "name"),
    [
        (SLIDE, f"{SLIDE}.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291.svs"),
        (f"{SLIDE}.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291", SLIDE),
        (f"{SLIDE}.F6E9A5DF.svs", f"slides/{SLIDE}.f6e9a5df.h5"),
        ("slide.7.svs", "slide.7"),
        ("slide.7", "slides/slide.7.ndpi"),
        ("brca/slide7.tif", "slide7"),
        (r"brca\slide7", "./brca/slide7.png"),
    ],
)
def test_names_are_matched_forgivingly(known: str, name: str) -> None:
    assert NameIndex(["other", known, "slide77"]).find(name, "here") == 1


@pytest.mark.parametrize(
    ("known", "name"),
    [("slide.7", "slide"), ("slide7", "slide"), (f"{SLIDE}.AA", f"{SLIDE}.BB"), ("b/1", "c/1")],
)
def test_names_of_other_slides_are_not_matched(known: str, name: str) -> None:
    assert NameIndex([known]).find(name, "here") is None


@pytest.mark.parametrize(
    ("known", "name"),
    [
        (["a/1.png", "b/1.png"], "1"),
        (["s.svs", "s.tif"], "s"),
        ([f"{SLIDE}.AA", f"{SLIDE}.BB"], SLIDE),
    ],
)
def test_names_that_can_mean_several_are_refused(known: list[str], name: str) -> None:
    with pytest.raises(InputError, match=f"here: '{name}' can mean .*give the whole name"):
        NameIndex(known).find(name, "here")


def test_two_names_for_one_slide_are_refused() -> None:
    with pytest.raises(InputError, match="would both be"):
        NameIndex([SLIDE]).match([f"{SLIDE}.AA", f"{SLIDE}.BB"], "here")


# --- groups and labels


def test_groups_are_tcga_patients_else_slides_else_items() -> None:
    slides = [f"{SLIDE}.F6E9", "TCGA-3C-AALI-01A-01-TS1.svs"]
    assert groups_of(slides, ["x", "y"], None) == (["TCGA-3C-AALI"] * 2, "TCGA patient")
    assert groups_of(["s1", "s1"], ["x", "y"], None) == (["s1", "s1"], UNKNOWN)
    groups, rule = groups_of([None, None], ["x.png", "y.png"], None)
    assert groups == ["x.png", "y.png"] and rule == "each file by itself, as no slide is known"
    assert "(1 items)" in groups_of(["s1", None], ["x", "y"], None)[1]
    recorded = groups_of(["s1", "s2", None], ["x", "y", "z"], None, ["a", "a", None])
    assert recorded[0] == ["a", "a", "z"] and "recorded patient (2 items)" in recorded[1]
    assert groups_of(["a/1", "b/1.svs"], ["x", "y"], None)[0] == ["a/1", "b/1"]


def test_tiles_named_after_a_tcga_slide_are_grouped_by_its_patient() -> None:
    sources = [f"img/{SLIDE}_xmin0_ymin{y}.png" for y in (0, 512)]
    slides: list[str | None] = [None] * 3
    groups, rule = groups_of(slides, [*sources, "img/TCGA.png"], None)
    assert groups == ["TCGA-3C-AALI", "TCGA-3C-AALI", "img/TCGA.png"]
    assert rule == "TCGA patient (2 items); each file by itself, as no slide is known (1 items)"
    assert count_alone(slides, [*sources, "img/TCGA.png"]) == 1


CORES = """path,bag,tma_core,label
set/benign/a__y0_x0.png,a,core1,benign
set/benign/a__y0_x256.png,a,core1,benign
set/malignant/b__y0_x0.png,b,core2,malignant
"""


@pytest.mark.parametrize(
    ("slides", "sources", "by"),
    [
        (["a", "b"], ["0", "1"], "bag"),
        ([None, None], ["benign/a__y0_x256.png", "malignant/b__y0_x0.png"], "path"),
    ],
)
def test_groups_come_from_a_table_by_slide_or_by_file(
    slides: list[str | None], sources: list[str], by: str, tmp_path: Path
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(CORES)
    groups, rule = groups_of(slides, sources, table)
    assert groups == ["core1", "core2"] and rule == f"column 'tma_core' of labels.csv, by '{by}'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,patient\na,p\n", "column 'slide' lacks 1 item: 'b'"),
        ("slide,patient\na,p\na,q\nb,p\n", "line 3: 'a' has the patient 'q', before it had 'p'"),
        ("slide,patient\na,\nb,p\n", "line 2: 'slide' is 'a' and 'patient' is ''"),
        ("slide,core\na,p\n", r"no column for groups \(group, patient"),
        ("core,patient\na,p\n", r"no column for slides or files"),
        ("slide,slide,patient\na,a,p\n", "a column is there twice"),
    ],
)
def test_group_tables_that_do_not_serve_are_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        groups_of(["a", "b"], ["x", "y"], tmp_path / "g.csv")


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_bytes("slide,patient\na,Müller\n".encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        groups_of(["a"], ["x"], tmp_path / "g.csv")


@pytest.fixture
def labels_csv(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(
        "case_id,slide_id,label\np1,s1.svs,IDC\np1,s2.svs,IDC\np2,s3.svs,ILC\np3,s4.svs,IDC\n"
    )
    return path


def test_labels_meet_their_slides(labels_csv: Path) -> None:
    found = match_labels(read_labels(labels_csv), ["s3", "s1", "s2", "s4"])
    assert found.slides == ["s3", "s1", "s2", "s4"] and found.classes == ["IDC", "ILC"]
    assert found.targets.tolist() == [1, 0, 0, 0] and found.targets.dtype == np.int64
    assert found.groups == ["p2", "p1", "p1", "p3"]
    assert found.group_rule == "patients of labels.csv" and found.notes == []


@pytest.mark.parametrize(
    ("slides", "message"),
    [
        (["s1", "s2"], r"2 labels are of slides that are not there: 's3.svs', 's4.svs'"),
        (["s1", "s2", "s3", "s4", "s5"], "1 slide has no label: 's5'"),
    ],
)
def test_labels_without_slides_and_the_reverse_are_refused_unless_a_subset_is_asked_for(
    labels_csv: Path, slides: list[str], message: str
) -> None:
    table = read_labels(labels_csv)
    with pytest.raises(InputError, match=message):
        match_labels(table, slides)
    with pytest.raises(InputError, match=r"\. Mend the table, or pass --allow-subset$"):
        match_labels(table, slides)
    found = match_labels(table, slides, allow_subset=True)
    assert len(found.slides) == len(set(slides) - {"s5"}) and len(found.notes) == 1


def test_labels_of_none_of_the_slides_are_refused_even_as_a_subset(labels_csv: Path) -> None:
    with pytest.raises(InputError, match="4 labels are of slides that are not there"):
        match_labels(read_labels(labels_csv), ["x"], allow_subset=True)


def test_many_lost_names_are_counted_and_a_few_listed(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label\n" + "".join(f"s{i},a\n" for i in range(1000)))
    with pytest.raises(InputError, match="999 labels .*'s5' and 994 more"):
        match_labels(read_labels(path), ["s0"])


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide,label\na,10\nb,9\nc,2\n")
    found = match_labels(read_labels(path), ["a", "b", "c"])
    assert found.classes == ["2", "9", "10"] and found.groups == ["a", "b", "c"]
    assert found.group_rule == UNKNOWN


SLIDES = ["TCGA-3C-AALI-01Z-00-DX1", "TCGA-3C-AALI-01Z-00-DX2", "TCGA-AO-A0J4-01Z-00-DX1"]


@pytest.mark.parametrize(
    ("column", "groups", "is_cut"),
    [
        ("case_id", SLIDES, True),
        ("case_id", ["a", "a", "b"], False),
        ("group", ["a", "b", "a"], True),
        ("group", ["a", "a", "a"], False),
    ],
)
def test_a_table_that_parts_a_patient_whom_names_tell_is_refused(
    tmp_path: Path, column: str, groups: list[str], is_cut: bool
) -> None:
    path = tmp_path / "labels.csv"
    rows = zip(SLIDES, groups, "xyx", strict=True)
    path.write_text(f"slide_id,{column},label\n" + "".join(f"{','.join(row)}\n" for row in rows))
    ways = (
        lambda: match_labels(read_labels(path), SLIDES).groups,
        lambda: groups_of(SLIDES, SLIDES, path)[0],
    )
    for way in ways:
        if not is_cut:
            assert way() == groups
            continue
        told = "both are of patient TCGA-3C-AALI, who has to be on one side; name.*or give none"
        with pytest.raises(InputError, match=told):
            way()
    assert groups_of(SLIDES, SLIDES, None)[0][0] == "TCGA-3C-AALI"  # as the error promises


def test_classes_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    for one, other in (("Tumor", "tumor"), ("low_grade", "low-grade")):
        path.write_text(f"slide,label\na,{one}\nb,{other}\nc,normal\n")
        told = rf"classes '{one}' \(1\) and '{other}' \(1\) would be two.*, spaces, - or _ alone"
        with pytest.raises(InputError, match=told):
            match_labels(read_labels(path), ["a", "b", "c"])


def test_a_label_that_says_none_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide,label\na,1\nb,0\nc,NA\n")
    found = match_labels(read_labels(path), ["a", "b", "c"])
    assert len(found.notes) == 1 and "label 'NA' (1) is taken for a class" in found.notes[0]


def test_signs_tell_classes_apart(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide,label\na,-1\nb,1\nc,1-\n")
    assert len(match_labels(read_labels(path), ["a", "b", "c"]).classes) == 3


def test_slides_whose_label_is_empty_have_none(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,case_id,label\ns1,p1,a\ns2,p1,\ns3,p2,b\n")
    table = read_labels(path)
    with pytest.raises(InputError, match="1 slide has no label: 's2'. Mend the table, or pass"):
        match_labels(table, ["s1", "s2", "s3"])
    found = match_labels(table, ["s1", "s2", "s3"], allow_subset=True)
    assert found.slides == ["s1", "s3"] and found.notes == ["1 slide has no label: 's2'"]


def test_a_slide_with_two_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label\ns1,a\ns1,b\n")
    with pytest.raises(InputError, match="line 3: 's1' has the label 'b', before it had 'a'"):
        read_labels(path)


# --- scores


def drawn_predictions(
    classes: int, items: int = 60, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(items) % classes
    logits = generator.normal(size=(items, classes)) + 1.5 * np.eye(classes)[labels]
    powers = np.exp(np.round(logits, 1))  # rounded: some are tied
    return labels, powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    labels, probabilities = drawn_predictions(classes)
    names = [f"c{i}" for i in range(classes)]
    found = classification_scores(labels, probabilities, names)
    taken = probabilities.argmax(axis=1)
    area = (
        roc_auc_score(labels, probabilities[:, 1])
        if classes == 2
        else roc_auc_score(labels, probabilities, multi_class="ovr")
    )
    assert found.values == pytest.approx(
        {
            "accuracy": accuracy_score(labels, taken),
            "balanced_accuracy": balanced_accuracy_score(labels, taken),
            "macro_f1": f1_score(labels, taken, average="macro"),
            "auc": area,
        },
        abs=1e-12,
    )
    columns = precision_recall_fscore_support(labels, taken, zero_division=0)
    for place, name in enumerate(("precision", "recall", "f1", "support")):
        ours = [found.per_class[c][name] for c in names]
        assert ours == pytest.approx(columns[place].tolist(), abs=1e-12)
    assert np.array(found.confusion).sum() == 60 and found.notes == []


def test_a_test_set_of_one_class_has_no_auc_and_says_so() -> None:
    found = classification_scores([1, 1], np.array([[0.2, 0.8], [0.6, 0.4]]), ["a", "b"])
    assert found.values == {
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
        "auc": None,
    }
    assert found.notes == ["all test items are of class 'b': no AUC"]
    assert found.per_class["a"]["recall"] is None


def test_a_class_without_items_is_left_out_and_named() -> None:
    labels, probabilities = drawn_predictions(2)
    padded = np.pad(probabilities, ((0, 0), (0, 1)))
    found = classification_scores(labels, padded, CLASSES)
    each = [roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 1)]
    assert found.values["auc"] == pytest.approx(np.mean(each))
    assert found.notes == ["no test item of class 'c': left out of the means over classes"]


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [[0.5, 0.5], [np.nan, 1]], "1 items are not finite, first 1"),
        ([0, 1], [[2.0, -1.0], [0, 1]], "not logits"),
        ([0, 1], [[0.5, 0.2], [0, 1]], "not logits"),
        ([0, 2], [[0.5, 0.5], [0, 1]], "labels from 0 to 2 for 2 classes"),
        ([], np.empty((0, 2)), "0 items"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    labels: list[int], probabilities: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        classification_scores(labels, np.array(probabilities), ["a", "b"])


def test_probabilities_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match="of 3 classes"):
        classification_scores([0, 1], np.full((2, 2), 0.5), CLASSES)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [2, 3])
def test_weights_are_items_counted_several_times(metric: str, classes: int) -> None:
    labels, probabilities = drawn_predictions(classes)
    weights = np.random.default_rng(1).integers(0, 4, (5, 60))
    found = weighted_score(metric, labels, probabilities, weights)
    for row, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(60), row)
        one = classification_scores(labels[rows], probabilities[rows], CLASSES[:classes])
        assert value == pytest.approx(one.values[metric], abs=1e-12)


# --- statistics


def test_summary_is_mean_and_sample_deviation_of_what_is_defined() -> None:
    found = summary([0.5, None, 0.7, float("nan")])
    assert found.to_json() == pytest.approx({"mean": 0.6, "sd": np.sqrt(0.02), "n": 2})
    assert summary([0.5]).sd is None and summary([None]).mean is None


def test_paired_differences_leave_out_undefined_folds_and_count_wins() -> None:
    found = paired_difference([0.9, 0.8, 0.7, None], [0.8, 0.8, 0.75, 0.1], seed=0)
    assert found.mean == pytest.approx(0.05 / 3)
    assert (found.wins, found.ties, found.n, found.unit) == (1, 1, 3, "folds")
    assert found.low == pytest.approx(-0.05) and found.high == pytest.approx(0.1)
    assert paired_difference([0.9, 0.8, 0.7], [0.8, 0.8, 0.75], seed=0) == found


def test_one_fold_has_a_difference_without_an_interval() -> None:
    found = paired_difference([0.9], [0.7], seed=0)
    assert found.mean == pytest.approx(0.2) and found.low is found.high is None


def test_pairing_is_refused_for_other_numbers_of_folds() -> None:
    with pytest.raises(InputError, match="3 folds against 2"):
        paired_difference([1, 2, 3], [1, 2], seed=0)


def test_intervals_over_folds_cover_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        first = generator.normal(0.3, 1.0, 40)
        found = paired_difference(first.tolist(), [0.0] * 40, seed=seed, draws=400)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99  # 95 %, 200 trials, a percentile interval of 40 values


def predictions_of(cohort: Cohort, strength: float, seed: int = 0) -> Predictions:
    logits = np.random.default_rng(seed).normal(size=(150, 3))
    powers = np.exp(logits + strength * np.eye(3)[cohort.labels])
    values = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return join_predictions(
        [
            fold_predictions(
                number, 0, fold, items=cohort.slides, groups=cohort.patients,
                labels=cohort.labels, probabilities=values, classes=CLASSES,
            )
            for number, fold in enumerate(cohort.folds())
        ]
    )  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_over_patients_is_of_the_mean_over_folds(cohort: Cohort, metric: str) -> None:
    strong, weak = predictions_of(cohort, 2.0), predictions_of(cohort, 0.5)
    found = paired_bootstrap_groups(strong, weak, metric, seed=0, draws=300)
    by_fold = [
        classification_scores(run.labels[rows], run.probabilities[rows], CLASSES).values[metric]
        for run in (strong, weak)
        for rows in [np.flatnonzero(run.folds == fold) for fold in range(5)]
    ]
    assert found.mean == pytest.approx(np.mean(by_fold[:5]) - np.mean(by_fold[5:]), abs=1e-12)
    assert 0 < found.low < found.mean < found.high and found.unit == "groups"
    assert found == paired_bootstrap_groups(strong, weak, metric, seed=0, draws=300)


def test_bootstrap_over_patients_does_not_depend_on_the_order_of_lines(cohort: Cohort) -> None:
    strong, weak = predictions_of(cohort, 2.0), predictions_of(cohort, 0.5)
    shuffled = weak.select(np.random.default_rng(3).permutation(150))
    found = paired_bootstrap_groups(strong, shuffled, "auc", seed=0, draws=50)
    assert found == paired_bootstrap_groups(strong, weak, "auc", seed=0, draws=50)


def test_bootstrap_over_patients_refuses_other_items(cohort: Cohort) -> None:
    strong = predictions_of(cohort, 2.0)
    with pytest.raises(InputError, match="other items"):
        paired_bootstrap_groups(strong, strong.select(np.arange(149)), "auc", seed=0)


def test_images_are_paired_over_their_groups() -> None:
    first = np.array([0.9, 0.8, np.nan, 0.7, 0.6, 0.5])
    second = np.array([0.8, 0.8, 0.1, 0.6, 0.4, 0.5])
    found = paired_images(first, second, list("ppqrrs"), seed=0, draws=200)
    assert found.mean == pytest.approx(0.08) and found.low <= found.mean <= found.high
    assert (found.n, found.wins, found.ties, found.counted) == (5, 3, 2, "images")
    single = paired_images(first, second, ["p"] * 6, seed=0)
    assert single.low is None and single.mean == found.mean


# --- records


def record(**changes: object) -> RunRecord:
    fold = {"fold": 0, "seed": 0, "train": 8, "val": 1, "test": 2}
    scores = [{"auc": 0.75, "accuracy": 0.5}, {"auc": None, "accuracy": 0.75}]
    values: dict[str, object] = {
        "task": "abmil", "data": "brca", "source": {"name": "original"}, "embedder": "uni",
        "model": "abmil", "classes": ["IDC", "ILC"], "seeds": [0], "split_id": "0123",
        "split_rule": "StratifiedGroupKFold", "primary": "auc",
        "folds": [fold | {"fold": i, "scores": s, "per_class": {"IDC": {"recall": 1.0}}}
                  for i, s in enumerate(scores)],
    }  # fmt: skip
    return RunRecord(**(values | changes))


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    given = record(notes=["small"], related={"colour-histogram": {"auc": {"mean": 0.5}}})
    write_record(tmp_path, given)
    assert read_record(tmp_path) == given
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["format"] == "latentds-run/1"
    assert values["summary"]["auc"] == {"mean": 0.75, "sd": None, "n": 1}
    assert dataclasses.astuple(given.summarize("accuracy"))[:2] == pytest.approx(
        (0.625, np.std([0.5, 0.75], ddof=1))
    )


def test_a_figure_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    bad = record()
    bad.folds[0]["scores"]["auc"] = float("nan")
    with pytest.raises(InputError, match=r"folds\[0\], scores, auc is nan"):
        write_record(tmp_path, bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "latentds-run/9"}, "format is 'latentds-run/9'"),
        ({"task": "survival"}, "task is 'survival'"),
        ({"folds": []}, "primary is 'auc'"),
        ({"primary": "dice"}, "primary is 'dice'"),
        ({"classes": "IDC"}, "classes is 'IDC'"),
        ({"folds": [{"fold": 0}]}, r"folds\[0\], seed is None"),
        ({"source": {"bytes_per_patch": "2 KB"}}, "source, bytes_per_patch is '2 KB'"),
        ({"related": {"colour": {"auc": 0.5}}}, "related, colour, auc is 0.5"),
        ({"related": {"colour": {"auc": {"mean": "high"}}}}, "auc, mean is 'high'"),
    ],
)
def test_damaged_records_name_file_and_key(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_record(tmp_path, record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"result.json.*{message}"):
        read_record(tmp_path)


def test_records_without_a_key_or_cut_short_are_refused(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    values = json.loads(path.read_text())
    del values["split_id"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="a key is missing .*split_id"):
        read_record(tmp_path)
    path.write_text(json.dumps(values)[:-20])
    with pytest.raises(InputError, match="not JSON"):
        read_record(tmp_path)


def test_a_folder_without_a_finished_run_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"no finished run in {folder}: it has no result.json"):
            read_record(folder)


def test_a_table_that_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.csv: no such file"):
        read_table(tmp_path / "no.csv")
    with pytest.raises(InputError, match="a folder, not a regular file"):
        read_table(tmp_path)


def test_a_fold_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folds = record().folds
    with pytest.raises(InputError, match="fold 0 with seed 0 is there 2 times"):
        write_record(tmp_path, record(folds=[folds[0], folds[0]]))


def test_predictions_come_back_as_they_were_written(cohort: Cohort, tmp_path: Path) -> None:
    given = predictions_of(cohort, 1.0)
    write_predictions(tmp_path, given)
    found = read_predictions(tmp_path)
    assert (found.items, found.groups, found.classes) == (given.items, given.groups, CLASSES)
    assert np.array_equal(found.labels, given.labels) and np.array_equal(found.folds, given.folds)
    assert np.array_equal(found.probabilities.astype(np.float32), given.probabilities)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",0.", ",x", r"predictions.csv, line 2: could not convert"),
        ("probability_a", "score_a", "are not among its classes"),
        ("group", "patient", r"no column for predictions \(group\)"),
    ],
)
def test_damaged_predictions_name_the_line_or_column(
    cohort: Cohort, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = write_predictions(tmp_path, predictions_of(cohort, 1.0))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_predictions(tmp_path)
