"""What a cross-validation of bags refuses, and how it names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from latentds.errors import ContractError, FormatError, InputError, LatentdsError
from latentds.evaluation.predictions import read_predictions
from latentds.evaluation.records import read_record

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from tests.bag_files import DIM, SLIDES, bag_of, edit_labels, make_job, run, save_bag


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return make_job(tmp_path / "job")


def empty_bag(job: Path) -> None:
    with h5py.File(job / "features_toy" / "s04.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((0, DIM), "f4"), np.zeros((0, 2), "i8")
        file["features"].attrs["encoder"] = "toy"


def truncated(job: Path) -> None:
    path = job / "features_toy" / "s04.h5"
    path.write_bytes(path.read_bytes()[:300])


def damage_nan(job: Path) -> None:
    features = bag_of(4)
    features[2, 1] = np.nan
    save_bag(job / "features_toy" / "s04.h5", features)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda job: edit_labels(job, "p8,s17.svs,ILC\n", ""), InputError,
         r"labels\.csv: 1 slides have no label: 's17'"),
        (lambda job: edit_labels(job, "p8,s17.svs,ILC\n", "p8,s17.svs,ILC\np9,s99.svs,ILC\n"),
         InputError, r"labels are of slides that are not there: 's99\.svs'"),
        (lambda job: edit_labels(job, "p8,s17.svs,ILC\n", "p8,s17.svs,DCIS\n"), InputError,
         r"class 'DCIS' is in one group only \('p8'\)"),
        (lambda job: edit_labels(job, "ILC", "IDC"), InputError, "all items are of one class"),
        (empty_bag, InputError, r"s04\.h5: an empty bag"),
        (truncated, FormatError, r"s04\.h5: no whole HDF5 file"),
        (damage_nan, FormatError, r"s04\.h5: features that are not finite"),
        (lambda job: save_bag(job / "features_toy" / "s04.h5", bag_of(4)[:, :5]), ContractError,
         r"s04\.h5: features of 5 dimensions, 8 elsewhere"),
        (lambda job: save_bag(job / "features_toy" / "s04.h5", bag_of(4), "uni"), ContractError,
         r"s04\.h5: features of 'uni', of 'toy' elsewhere"),
    ],
)  # fmt: skip
def test_bad_input_is_named(job, spoil, error, words):
    spoil(job)
    with pytest.raises(error, match=words):
        run(job)


def test_features_of_another_embedder_than_asked_for_are_refused(job):
    with pytest.raises(LatentdsError, match="no folder features_uni"):
        run(job, embedder="uni")


def test_a_subset_is_taken_where_that_is_allowed(job):
    edit_labels(job, "p8,s17.svs,ILC\n", "p9,s99.svs,ILC\n")
    out = run(job, epochs=1, select="last", allow_subset=True)
    assert len(read_predictions(out)) == SLIDES - 1
    assert "'s17'" in " ".join(read_record(out).notes)


def test_a_patient_in_two_parts_of_a_split_file_is_refused(job, tmp_path):
    lines = ["train,val,test", "s00,s02,s04", "s03,s05,s01"]
    (tmp_path / "splits_0.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"groups are in train and in test: 'p0'"):
        run(job, splits=tmp_path / "splits_0.csv", allow_subset=True)


def test_best_weights_need_slides_to_validate_on(job, tmp_path):
    lines = ["train,test", *(f"s{n:02d},s{n + 8:02d}" for n in range(8))]
    (tmp_path / "splits_0.csv").write_text("\n".join(lines))
    options: dict[str, Any] = {"splits": tmp_path / "splits_0.csv", "allow_subset": True}
    with pytest.raises(InputError, match="fold 0: no slide to validate on"):
        run(job, **options)
    assert len(read_record(run(job, select="last", epochs=1, **options)).folds) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.5}, r"has lr 0\.01, this one 0\.5; set it back"),
        ({"seed": 3}, "has seed 0, this one 3"),
        ({"folds": 4}, "has folds 3, this one 4"),
    ],
)
def test_a_run_folder_of_other_settings_is_refused(job, change, words):
    run(job, epochs=1, select="last")
    with pytest.raises(ContractError, match=words):
        run(job, **({"epochs": 1, "select": "last"} | change))


def test_a_run_goes_on_with_as_many_bags_a_step_and_no_others(job):
    short = {"epochs": 1, "select": "last"}
    run(job, batch_size=4, **short)
    run(job, batch_size=2, accumulation=2, **short)
    with pytest.raises(ContractError, match="bags_a_step 4, this one 2; choose --batch-size"):
        run(job, batch_size=2, **short)
    path = job.parent / "run" / "run.json"  # a run of a version that did not record it
    values = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in values.items() if n != "bags_a_step"}))
    run(job, batch_size=2, **short)


def test_a_run_folder_of_other_labels_is_refused(job):
    run(job, epochs=1, select="last")
    edit_labels(job, "p0,s00.svs,IDC", "p0,s00.svs,ILC")
    with pytest.raises(ContractError, match="has labels_id '"):
        run(job, epochs=1, select="last")


def test_a_run_folder_of_other_features_is_refused(job):
    run(job, epochs=1, select="last")
    other = make_job(job.parent / "other")
    save_bag(other / "features_toy" / "s04.h5", bag_of(4) + 1)
    with pytest.raises(ContractError, match="has features {.*'content_id': '"):
        run(other, epochs=1, select="last")


def test_a_run_goes_on_where_its_features_have_moved(job):
    out = run(job, epochs=1, select="last")
    made = (out / "fold-0" / "fold.json").stat().st_mtime_ns
    moved = job.rename(job.with_name("moved"))
    assert run(moved, epochs=1, select="last") == out
    assert (out / "fold-0" / "fold.json").stat().st_mtime_ns == made


def test_a_label_file_that_is_not_there_is_named(job):
    with pytest.raises(InputError, match=r"nolabels\.csv: no such file; name a CSV"):
        run(job, labels=job / "nolabels.csv")


def test_a_damaged_fold_is_named(job):
    out = run(job, epochs=1, select="last")
    (out / "fold-1" / "fold.json").write_text("{")
    with pytest.raises(InputError, match=r"fold-1/fold\.json is damaged"):
        run(job, epochs=1, select="last")
