"""What a cross-validation of bags refuses, and how it names it."""

from __future__ import annotations

import itertools
import shutil
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

SHORT: dict[str, Any] = {"epochs": 1, "select": "last"}


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def finished(one_rank_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with features and labels, and beside it a finished run of one epoch; read only."""
    job = make_job(tmp_path_factory.mktemp("finished") / "job")
    run(job, **SHORT)
    return job


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """Features and labels that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


@pytest.fixture
def run_job(finished: Path, job: Path) -> Path:
    """The same with its run."""
    shutil.copytree(finished.with_name("run"), job.with_name("run"))
    return job


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
         r"labels\.csv: 1 slide has no label: 's17'"),
        (lambda job: edit_labels(job, "p8,s17.svs,ILC\n", "p8,s17.svs,ILC\np9,s99.svs,ILC\n"),
         InputError, r"label is of a slide that is not there: 's99\.svs'"),
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
    out = run(job, allow_subset=True, **SHORT)
    assert len(read_predictions(out)) == SLIDES - 1
    assert "'s17'" in " ".join(read_record(out).notes)


def write_split(folder: Path, *columns: str) -> dict[str, Any]:
    """Settings of one fold of these slides."""
    cells = [column.split() for column in columns[1:]]
    rows = itertools.zip_longest(*cells, fillvalue="")
    (folder / "splits_0.csv").write_text("\n".join([columns[0], *map(",".join, rows)]))
    return SHORT | {"splits": folder / "splits_0.csv", "allow_subset": True}


def test_a_patient_in_two_parts_of_a_split_file_is_refused(job, tmp_path):
    options = write_split(tmp_path, "train,val,test", "s00 s03", "s02 s05", "s04 s01")
    with pytest.raises(InputError, match=r"groups are in train and in test: 'p0'"):
        run(job, **options)


def test_best_weights_need_slides_to_validate_on(job, tmp_path):
    options = write_split(tmp_path, "train,test", "s00 s01 s02 s03", "s04 s05")
    with pytest.raises(InputError, match=r"fold 0: no slide to validate on.*--folds 3"):
        run(job, **(options | {"select": "best"}))
    assert len(read_record(run(job, **options)).folds) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.5}, r"has lr 0\.03, this one 0\.5; give what"),
        ({"seed": 3}, "has seed 0, this one 3"),
        ({"folds": 4}, "has folds 3, this one 4"),
    ],
)
def test_a_run_folder_of_other_settings_is_refused(finished, change, words):
    with pytest.raises(ContractError, match=words):
        run(finished, **(SHORT | change))


def test_a_run_goes_on_with_as_many_bags_a_step_and_no_others(job, tmp_path):
    options = write_split(tmp_path, "train,val,test", "s00 s01 s02 s03", "s04 s05", "s06 s07")
    run(job, batch_size=4, **options)
    run(job, batch_size=2, accumulation=2, **options)
    with pytest.raises(ContractError, match="bags_a_step 4, this one 2; choose --batch-size"):
        run(job, batch_size=2, **options)


def test_a_run_folder_of_other_labels_is_refused(run_job):
    edit_labels(run_job, "p0,s00.svs,IDC", "p0,s00.svs,ILC")
    with pytest.raises(ContractError, match="has labels_id '.*; give what"):
        run(run_job, **SHORT)


def test_a_run_folder_of_other_features_is_refused(run_job):
    save_bag(run_job / "features_toy" / "s04.h5", bag_of(4) + 1)
    with pytest.raises(ContractError, match="has features {.*'content_id': '"):
        run(run_job, **SHORT)


def test_a_run_goes_on_where_its_features_have_moved(run_job):
    made = (run_job.with_name("run") / "fold-0" / "fold.json").stat().st_mtime_ns
    out = run(run_job.rename(run_job.with_name("moved")), **SHORT)  # first made elsewhere
    assert (out / "fold-0" / "fold.json").stat().st_mtime_ns == made


def test_a_label_file_that_is_not_there_is_named(job):
    with pytest.raises(InputError, match=r"nolabels\.csv: no such file; name a CSV"):
        run(job, labels=job / "nolabels.csv")


def test_a_damaged_fold_is_named(run_job):
    (run_job.with_name("run") / "fold-1" / "fold.json").write_text("{")
    with pytest.raises(InputError, match=r"fold-1/fold\.json is damaged"):
        run(run_job, **SHORT)
