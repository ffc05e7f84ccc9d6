"""Patch classification: folds, protocols, features that stay, fine-tuning, bad input."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, WeightsError
from latentds.evaluation import probes
from latentds.evaluation.folds import Fold, split_id
from latentds.evaluation.predictions import read_predictions
from latentds.evaluation.records import RunRecord, read_record
from latentds.sources.csv_tables import read_table
from tests.conftest import smooth_picture
from tests.trainer_ranks import run_ranks, run_words, succeed

pytest.importorskip("sklearn")
pytest.importorskip("deepspeed")
pytest.importorskip("timm")

from latentds_trainers.classify_patches import patch_inputs
from latentds_trainers.classify_patches.__main__ import main
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.patch_inputs import open_labelled, protocol_folds
from latentds_trainers.classify_patches.task import notes_of
from latentds_trainers.engine.checkpoints import complete_checkpoints

EDGE = 32
NCT_CRC = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield
    gc.unfreeze()  # what `finetune` froze


def save_class(folder: Path, count: int, first_seed: int, tint: int, stem: str = "p") -> None:
    """Ramps with a stripe pattern and a tint of their class, PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = smooth_picture(first_seed + number, EDGE).astype(int)
        pixels[:, :: 2 + tint] //= 2
        pixels[..., tint % 3] += 25
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{stem}{number:03d}.png")


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures of stroma and 15 of tumour."""
    root = tmp_path_factory.mktemp("classes") / "pictures"
    save_class(root / "stroma", 18, 0, 0)
    save_class(root / "tumour", 15, 100, 1)
    return root


@pytest.fixture(scope="session")
def few(classes: Path) -> Path:
    """The first eight of each, for what is not to learn."""
    root = classes.with_name("few")
    for folder in classes.iterdir():
        (root / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:8]:
            shutil.copy(path, root / folder.name)
    return root


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network of timm with random weights."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return f"timm:test_resnet@{path}"


def settings(data: Path, out: Path, **options: Any) -> ClassifyConfig:
    small = {"folds": 3, "device": "cpu", "workers": 1, "batch_size": 8, "standardize": True}
    return ClassifyConfig(data=data, out=out, **(small | options))


def classify(data: Path, out: Path, **options: Any) -> RunRecord:
    main(settings(data, out, **options))
    return read_record(out)


def finetune(data: Path, out: Path, **options: Any) -> RunRecord:
    gc.collect()
    gc.freeze()  # a fold's full collection need not go through all libraries
    small = {"probe": "finetune", "arch": "test_resnet", "epochs": 2, "folds": 2, "log_every": 1}
    return classify(data, out, **(small | {"lr": 1e-3} | options))


def assigned_items(path: Path, part: str) -> list[str]:
    """Items in a column of CLAM's split file."""
    return [name for name in read_table(path).values(part) if name]


def blocks(out: Path) -> list[Path]:
    return sorted(out.glob("features/*/block-*.safetensors"))


# Probes


@pytest.fixture(scope="module")
def probed(
    one_rank_on_cpu: None, classes: Path, embedder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished linear probe; read only."""
    out = tmp_path_factory.mktemp("probed") / "run"
    classify(classes, out, embedder=embedder)
    return out


@pytest.fixture
def copy(probed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage and go on with."""
    return Path(shutil.copytree(probed, tmp_path / "copy"))


def test_a_probe_leaves_a_record_predictions_and_a_table(classes, embedder, copy, capsys):
    record = classify(classes, copy, embedder=embedder)
    assert (record.task, record.model, record.primary) == ("classify_patches", "linear", "accuracy")
    assert record.classes == ["stroma", "tumour"] and len(record.folds) == 3
    assert {"accuracy", "balanced_accuracy", "macro_f1"} <= set(record.metrics())
    assert record.related["colour-histogram"]["accuracy"]["n"] == 3
    confusion = read_table(copy / "confusion.csv").rows
    assert [row["label"] for row in confusion] == record.classes
    assert sum(int(row[name]) for row in confusion for name in record.classes) == 33
    found = read_predictions(copy)
    assert len(set(found.items)) == len(found) == 33  # every patch is tested once
    files = sorted((copy / "splits").glob("splits_*.csv"))
    tested = [name for path in files for name in assigned_items(path, "test")]
    assert len(files) == 3 and sorted(tested) == sorted(found.items)
    wins = found.probabilities.argmax(1) == found.labels
    shares = [wins[found.folds == fold["fold"]].mean() for fold in record.folds]
    assert shares == [fold["scores"]["accuracy"] for fold in record.folds]
    text = capsys.readouterr().out
    assert "33 patches of 32x32 px, 2 classes; linear of" in text
    assert text.count("±") >= 2 * 4 + 2 * 3
    assert "colour-histogram" in text and "folds are drawn patch by patch" in text


def test_json_prints_the_record(classes, embedder, tmp_path, capsys):
    record = classify(classes, tmp_path, embedder=embedder, probe="knn", neighbours=3, json=True)
    assert json.loads(capsys.readouterr().out)["folds"] == record.to_json()["folds"]


def test_the_same_seed_gives_the_same_figures_with_any_number_of_workers(
    classes, embedder, probed, tmp_path
):
    one, four = read_record(probed), classify(classes, tmp_path, embedder=embedder, workers=4)
    assert one.folds == four.folds and one.related == four.related
    predictions = [(out / "predictions.csv").read_bytes() for out in (probed, tmp_path)]
    assert predictions[0] == predictions[1]


def test_another_seed_draws_other_folds(classes, embedder):
    patches = open_labelled(settings(classes, Path("out"), embedder=embedder))
    one, again, other = (
        split_id(
            protocol_folds(settings(classes, Path("out"), embedder=embedder, seed=seed), patches),
            patches.items,
        )
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_the_same_command_takes_up_features_and_finished_folds(classes, embedder, probed, copy):
    made = {path: path.stat().st_mtime_ns for path in (*blocks(copy), copy / "fold-0/fold.json")}
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "fold-2")
    assert classify(classes, copy, embedder=embedder).folds == read_record(probed).folds
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_features_go_on_after_the_blocks_that_are_there(
    classes, embedder, probed, tmp_path, monkeypatch
):
    from latentds_trainers.classify_patches import patch_features

    monkeypatch.setattr(patch_features, "BLOCK", 10)
    whole = classify(classes, tmp_path, embedder=embedder)
    assert len(blocks(tmp_path)) == 4 and whole.folds == read_record(probed).folds
    for path in tmp_path.glob("fold-*"):
        shutil.rmtree(path)
    blocks(tmp_path)[1].unlink()
    assert classify(classes, tmp_path, embedder=embedder).folds == whole.folds


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "delete the file"),
        (lambda path: path.write_bytes(b"no tensors"), "delete the file"),
        (lambda path: save_file({"colours": torch.zeros(2, 96)}, path), "delete the file"),
    ],
)
def test_a_damaged_block_of_features_is_named(classes, embedder, copy, damage, words):
    (path,) = blocks(copy)
    damage(path)
    with pytest.raises(InputError, match=words) as caught:
        classify(classes, copy, embedder=embedder)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda _: "{", lambda text: text.replace('"found": [', '"found": [0.5, ')]
)
def test_a_damaged_fold_is_named(classes, embedder, copy, damage):
    path = copy / "fold-1" / "fold.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"fold-1/fold\.json is damaged.*delete .*fold-1"):
        classify(classes, copy, embedder=embedder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "the run there has seed 0, this one 1"),
        ({"codec": "jpeg:10"}, "the run there has codec 'original', this one 'jpeg:10'"),
        ({"penalty": "squared"}, "the run there has penalty 'norm'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(classes, embedder, probed, change, words):
    with pytest.raises(ContractError, match=words):
        classify(classes, probed, embedder=embedder, **change)


def test_a_table_of_splits_that_may_have_set_labels_is_of_the_run(classes, embedder, copy):
    values = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(values | {"splits": "other.csv"}))
    with pytest.raises(ContractError, match="has splits 'other.csv', this one None"):
        classify(classes, copy, embedder=embedder)


def test_a_folder_of_other_patches_is_refused(classes, embedder, probed, tmp_path):
    other = Path(shutil.copytree(classes, tmp_path / "other"))
    save_class(other / "tumour", 2, 500, 1, stem="q")
    with pytest.raises(ContractError, match="the run there has (split_id|data_content)"):
        classify(other, probed, embedder=embedder)


def change_pixels(folder: Path) -> None:
    """Other pixels in files of the same names."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        Image.fromarray(smooth_picture(900 + number, EDGE)).save(path)


@pytest.fixture(scope="module")
def val7k_run(one_rank_on_cpu: None, halves: Path, embedder: str) -> Path:
    """The folder of a finished run that tests every fold on a test set; read only."""
    out = halves.with_name("val7k")
    data = {"data": halves / "train", "test_data": halves / "test"}
    classify(out=out, embedder=embedder, protocol="val7k", **data)
    return out


@pytest.mark.parametrize("changed", ["train", "test"])
def test_other_pixels_under_the_same_names_are_refused_and_moved_data_go_on(
    halves, val7k_run, embedder, tmp_path, changed
):
    moved = Path(shutil.copytree(halves, tmp_path / "moved"))
    out = Path(shutil.copytree(val7k_run, tmp_path / "run"))
    options: dict[str, Any] = {"out": out, "embedder": embedder, "protocol": "val7k"}
    options |= {"data": moved / "train", "test_data": moved / "test"}
    assert classify(**options).folds == read_record(val7k_run).folds
    change_pixels(moved / changed)
    name = "data_content" if changed == "train" else "test_data_content"
    with pytest.raises(ContractError, match=f" has {name} "):
        classify(**options)


def test_features_of_other_pixels_are_not_taken_up(classes, embedder, copy, tmp_path):
    data = Path(shutil.copytree(classes, tmp_path / "in"))
    change_pixels(data)
    (copy / "run.json").unlink()
    classify(data, copy, embedder=embedder)
    assert len({path.parent for path in blocks(copy)}) == 2


def test_other_weights_of_the_embedder_are_refused(few, tmp_path):
    import timm

    own = tmp_path / "w.safetensors"
    options = {"embedder": f"timm:test_resnet@{own}", "folds": 2}
    save_file(timm.create_model("test_resnet").state_dict(), own)
    classify(few, tmp_path / "run", **options)
    torch.manual_seed(9)
    save_file(timm.create_model("test_resnet").state_dict(), own)
    with pytest.raises(ContractError, match="the run there has embedder_weights"):
        classify(few, tmp_path / "run", **options)


# Sources, groups, protocols


def test_sources_share_their_folds(classes, embedder, probed, tmp_path):
    options = {"source": classes, "out": tmp_path / "latents", "autoencoder": "tiny"}
    convert(ConvertConfig(**options, device="cpu", workers=1))
    runs = [
        read_record(probed),
        classify(classes, tmp_path / "jpeg", embedder=embedder, codec="jpeg:10"),
        classify(tmp_path / "latents", tmp_path / "shards", embedder=embedder),
    ]
    assert {run.split_id for run in runs} == {runs[0].split_id}
    assert [run.source["kind"] for run in runs] == ["original", "codec", "latents"]
    assert runs[0].folds != runs[1].folds
    items = [
        read_predictions(out).items for out in (probed, tmp_path / "jpeg", tmp_path / "shards")
    ]
    assert items[0] == items[1] == items[2]


def test_groups_stay_together(classes, embedder, tmp_path):
    table = tmp_path / "groups.csv"
    names = [
        f"{folder.name}/{path.name}"
        for folder in sorted(classes.iterdir())
        for path in sorted(folder.iterdir())
    ]
    lines = [f"{name},case{place % 7}" for place, name in enumerate(names)]
    table.write_text("\n".join(["path,patient", *lines]))
    record = classify(classes, tmp_path / "run", embedder=embedder, groups=table)
    found = read_predictions(tmp_path / "run")
    folds = [
        {group for group, fold in zip(found.groups, found.folds, strict=True) if fold == n}
        for n in range(3)
    ]
    assert sum(len(groups) for groups in folds) == len(set.union(*folds)) == 7
    assert "column 'patient' of groups.csv" in record.split_rule
    assert not any("patch by patch" in note for note in record.notes)


def test_a_table_of_groups_that_lacks_patches_is_refused(classes, embedder, tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("path,patient\nstroma/p000.png,case1\n")
    with pytest.raises(InputError, match=r"groups\.csv: its column 'path' lacks 32 items"):
        classify(classes, tmp_path / "run", embedder=embedder, groups=table)


@pytest.fixture(scope="module")
def halves(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train and test of the same classes; read only."""
    root = tmp_path_factory.mktemp("halves") / "pictures"
    shutil.copytree(classes, root / "train")
    save_class(root / "test" / "stroma", 5, 300, 0, stem="t")
    save_class(root / "test" / "tumour", 6, 400, 1, stem="t")
    return root


@pytest.mark.parametrize("form", ["test split", "test data"])
def test_val7k_tests_every_fold_on_the_test_set(halves, val7k_run, embedder, tmp_path, form):
    out = val7k_run
    if form == "test split":
        out = tmp_path / "run"
        classify(halves, out, embedder=embedder, protocol="val7k")
    record = read_record(out)
    assert [(fold["train"], fold["val"], fold["test"]) for fold in record.folds] == [
        (22, 11, 11)
    ] * 3
    found = read_predictions(out)
    assert len(set(found.items)) == 11 and all("test" in name for name in found.items)
    assert not any("patch by patch" in note for note in record.notes)


@pytest.mark.parametrize("protocol", ["val7k", "kfold"])
def test_evas_probe_validates_on_patches_it_does_not_test(
    halves, embedder, tmp_path, monkeypatch, protocol
):
    monkeypatch.setattr(probes, "STEPS", 100)
    options = {"protocol": protocol, "embedder": embedder, "probe": "eva", "folds": 3}
    record = classify(halves, tmp_path / "run", **options)
    assert record.model == "eva"
    assert all(fold["val"] > 0 for fold in record.folds)
    parts = [assigned_items(tmp_path / "run" / "splits" / "splits_0.csv", part)
             for part in ("train", "val", "test")]  # fmt: skip
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_patients_that_a_table_names_stay_together(classes, embedder, tmp_path):
    shutil.copytree(classes, tmp_path / "pictures")
    paths = sorted((tmp_path / "pictures").rglob("*.png"))
    lines = [f"{path},{path.parent.name},case {row % 6}" for row, path in enumerate(paths)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient", *lines]) + "\n")
    record = classify(tmp_path / "table.csv", tmp_path / "run", embedder=embedder)
    assert "recorded patient" in record.split_rule
    case = {f"{path.parent.name}/{path.name}": row % 6 for row, path in enumerate(paths)}
    for number in range(3):
        split = tmp_path / "run" / "splits" / f"splits_{number}.csv"
        sides = [{case["/".join(name.split("/")[-2:])] for name in assigned_items(split, part)}
                 for part in ("train", "test")]  # fmt: skip
        assert not sides[0] & sides[1] and sides[1]


def test_a_fold_that_tests_a_class_it_does_not_train_on_is_refused(classes, embedder, monkeypatch):
    patches = open_labelled(settings(classes, Path("out"), embedder=embedder))
    other = np.flatnonzero(patches.labels == 0)
    fold = Fold(np.flatnonzero(patches.labels == 1), np.empty(0, np.int64), other)
    monkeypatch.setattr(patch_inputs, "drawn_folds", lambda *_: [fold])
    with pytest.raises(InputError, match=r"fold 0 tests 'stroma' and does not train on it"):
        protocol_folds(settings(classes, Path("out"), embedder=embedder), patches)


def test_folds_that_share_a_test_set_are_told_of(val7k_run):
    record = read_record(val7k_run)
    assert any("do not contain the sampling error" in note for note in record.notes)
    counted = read_table(val7k_run / "confusion.csv").rows
    assert sum(int(row[name]) for row in counted for name in record.classes) == 3 * 11


def write_patients(
    table: Path, halves: Path, names: dict[str, str], shared: tuple[str, ...] = ()
) -> Path:
    """A table of patients of the parts' pictures, a prefix before names; one patient has some."""
    lines = ["path,patient"]
    for part, prefix in names.items():
        for path in sorted((halves / part).glob("*/*.png")):
            patient = "case-7" if path.stem in shared else f"{part}-{path.stem}"
            lines.append(f"{prefix}{path.parent.name}/{path.name},{patient}")
    table.write_text("\n".join(lines))
    return table


@pytest.mark.parametrize(
    ("names", "is_told"),
    [
        ({"train": "", "test": ""}, False),
        ({"train": "", "test": "test/"}, False),
        ({"train": ""}, True),
    ],
)
def test_a_table_of_groups_is_held_against_both_sets(halves, tmp_path, names, is_told):
    table = write_patients(tmp_path / "groups.csv", halves, names)
    patches = open_labelled(val7k_of(halves, tmp_path, groups=table))
    assert any("could not be compared" in note for note in patches.notes) == is_told
    expected = "test/stroma/t000.png" if is_told else "test-t000"
    assert patches.groups[33] == expected


def test_a_patient_of_the_table_in_both_sets_is_refused(halves, tmp_path):
    names = {"train": "", "test": ""}
    table = write_patients(tmp_path / "groups.csv", halves, names, shared=("p003", "t001"))
    with pytest.raises(InputError, match="1 groups are in (train|val) and in test: 'case-7'"):
        config = val7k_of(halves, tmp_path, groups=table)
        protocol_folds(config, open_labelled(config))


def val7k_of(halves: Path, tmp_path: Path, **options: Any) -> ClassifyConfig:
    return settings(
        halves / "train",
        tmp_path / "run",
        embedder="uni",
        protocol="val7k",
        test_data=halves / "test",
        **options,
    )


@pytest.mark.parametrize(
    ("data", "options", "is_told"),
    [
        ("train", {}, True),
        ("train", {"codec": "tiny+kmeans"}, False),  # its levels ship
        ("", {"protocol": "val7k"}, False),
        ("", {"protocol": "intra100k"}, True),
    ],
)
def test_a_codebook_fitted_to_test_patches_is_told(halves, data, options, is_told):
    options = {"embedder": "uni", "codec": "tiny+kmeans:16"} | options
    config = settings(halves / data, Path("out"), **options)
    notes = " ".join(notes_of(config, open_labelled(config), []))
    assert ("test patches among them; --codebook avoids" in notes) == is_told


def test_a_run_tells_of_the_codebook_fitted_to_test_patches(few, embedder, tmp_path):
    record = classify(few, tmp_path, embedder=embedder, codec="tiny+kmeans:16", folds=2)
    assert "test patches among them; --codebook avoids" in " ".join(record.notes)


def test_a_test_set_of_its_own_goes_through_the_same_fitted_codebook(halves, embedder, tmp_path):
    config = settings(
        halves / "train",
        tmp_path / "run",
        embedder=embedder,
        protocol="val7k",
        test_data=halves / "test",
        codec="tiny+kmeans:16",
    )
    train, test = open_labelled(config).sets
    ids = [patches.facts().codebook["codebook_id"] for patches in (train, test)]
    assert ids[0] == ids[1] and train.facts().codebook["origin"].startswith("fitted")


def test_intra100k_leaves_the_test_split_and_tells_that_it_leaks(halves, embedder, tmp_path):
    record = classify(halves, tmp_path / "run", embedder=embedder, protocol="intra100k")
    assert sum(fold["test"] for fold in record.folds) == 33
    assert any("patches of one patient are in training and test sets" in n for n in record.notes)


@pytest.mark.parametrize(
    ("options", "is_told"),
    [({}, True), ({"split": "train"}, False), ({"protocol": "val7k"}, False)],
)
def test_folds_drawn_across_the_sets_own_splits_are_told(halves, options, is_told):
    found = open_labelled(settings(halves, Path("out"), embedder="uni", **options))
    told = [note for note in found.notes if "(test 11, train 33) play no part" in note]
    assert bool(told) is is_told and len(found.notes) == len(told)


def test_copies_that_are_trained_on_and_tested_are_told(halves, val7k_run, embedder, tmp_path):
    root = Path(shutil.copytree(halves, tmp_path / "pictures"))
    with Image.open(root / "train" / "tumour" / "p003.png") as picture:
        picture.transpose(Image.Transpose.ROTATE_90).save(root / "test" / "stroma" / "turned.png")
    for split in ("train", "test"):  # no copy: nothing can be seen on glass
        Image.new("RGB", (EDGE, EDGE), "white").save(root / split / "stroma" / "glass.png")
    record = classify(root, tmp_path / "run", embedder=embedder, protocol="val7k")
    (told,) = (note for note in record.notes if "copies" in note)
    assert told.startswith("1 tested patches are in training too")
    assert "'test/stroma/turned.png'" in told
    assert not any("copies" in note for note in read_record(val7k_run).notes)


@pytest.mark.parametrize(("mpp", "is_told"), [(0.25, True), (0.51, False), (None, False)])
def test_a_test_set_at_another_scale_is_told(halves, tmp_path, mpp, is_told):
    root = Path(shutil.copytree(halves, tmp_path / "halves"))
    for split, own in {"train": 0.5, "test": mpp}.items():
        paths = sorted((root / split).rglob("*.png"))
        lines = [f"{path},{path.parent.name},{own or ''}\n" for path in paths]
        (tmp_path / f"{split}.csv").write_text("path,label,mpp\n" + "".join(lines))
    options = {"protocol": "val7k", "test_data": tmp_path / "test.csv", "embedder": "uni"}
    found = open_labelled(settings(tmp_path / "train.csv", tmp_path / "run", **options))
    told = [note for note in found.notes if "0.5 um a pixel, those of --test-data 0.25" in note]
    assert bool(told) is is_told and len(found.notes) == len(told)


@pytest.mark.parametrize("protocol", ["val7k", "intra100k"])
def test_protocols_without_a_test_split_are_refused(classes, embedder, tmp_path, protocol):
    with pytest.raises(InputError, match=f"--protocol {protocol} needs folders train and test"):
        classify(classes, tmp_path, embedder=embedder, protocol=protocol)


def test_a_test_set_with_other_classes_is_refused(classes, embedder, tmp_path):
    save_class(tmp_path / "test" / "necrosis", 4, 700, 2)
    with pytest.raises(InputError, match="fold 0 tests 'necrosis' and does not train on it"):
        classify(
            classes,
            tmp_path / "run",
            embedder=embedder,
            protocol="val7k",
            test_data=tmp_path / "test",
        )


def test_a_patient_in_train_and_test_is_refused(halves, embedder, tmp_path):
    pattern = r"(?P<label>stroma|tumour)/(?P<slide>[pt]\d+)"
    root = Path(shutil.copytree(halves, tmp_path / "halves"))
    for path in sorted((root / "test").glob("*/*.png")):
        path.rename(path.with_name(path.name.replace("t0", "p0")))
    with pytest.raises(InputError, match="are in train and in test"):
        classify(root, tmp_path / "run", embedder=embedder, protocol="val7k", name_pattern=pattern)


def test_the_bias_of_nct_crc_is_told(embedder, tmp_path, capsys):
    for number, name in enumerate(NCT_CRC):
        save_class(tmp_path / "nct" / name, 2, 50 * number, number % 3)
    record = classify(tmp_path / "nct", tmp_path / "run", embedder=embedder, folds=2)
    assert any("arXiv 2409.11546" in note for note in record.notes)
    assert "alone reaches over 82 % accuracy" in capsys.readouterr().out


# Bad input


def test_patches_without_labels_are_refused(embedder, tmp_path):
    save_class(tmp_path / "flat", 8, 0, 0)
    with pytest.raises(InputError, match="8 of 8 patches have no label"):
        classify(tmp_path / "flat", tmp_path / "run", embedder=embedder)


def test_one_class_is_refused(embedder, tmp_path):
    save_class(tmp_path / "in" / "tumour", 8, 0, 0)
    with pytest.raises(InputError, match="all items are of one class"):
        classify(tmp_path / "in", tmp_path / "run", embedder=embedder)


def test_a_class_in_one_fold_only_is_refused(classes, embedder, tmp_path):
    data = Path(shutil.copytree(classes, tmp_path / "in"))
    save_class(data / "necrosis", 1, 0, 2)
    with pytest.raises(InputError, match="class 'necrosis' is in one group only"):
        classify(data, tmp_path / "run", embedder=embedder)


def test_features_that_are_not_finite_are_refused(classes, tmp_path):
    import timm

    weights = timm.create_model("test_resnet").state_dict()
    first = next(iter(weights))
    save_file(
        weights | {first: torch.full_like(weights[first], torch.nan)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(InputError, match=r"stroma/p000\.png: its features are not finite"):
        name = f"timm:test_resnet@{tmp_path / 'w.safetensors'}"
        classify(classes, tmp_path / "run", embedder=name)


def test_weights_that_are_not_there_are_named(classes, tmp_path):
    with pytest.raises(WeightsError, match="no such file of weights"):
        classify(classes, tmp_path / "run", embedder="timm:test_resnet@nowhere.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--probe linear needs an --embedder"),
        ({"probe": "finetune"}, "--probe finetune needs --arch"),
        ({"probe": "finetune", "arch": "resnet18", "embedder": "uni"}, "--embedder belongs to"),
        ({"embedder": "uni", "arch": "resnet18"}, "--arch belongs to --probe finetune"),
        ({"embedder": "uni", "test_data": Path("x")}, "--test-data belongs to --protocol val7k"),
        ({"embedder": "uni", "protocol": "val7k", "split": "train"}, "leave out --split"),
        ({"embedder": "uni", "folds": 1}, "folds is 1; at least 2"),
        ({"embedder": "uni", "folds": 2, "probe": "eva"}, "folds is 2, at least 3"),
        ({"embedder": "uni", "probe": "eva", "lr": 1e-3}, "--lr belongs to --probe finetune"),
        ({"embedder": "uni", "probe": "knn", "penalty": "squared"}, "--penalty belongs to --probe"),
        ({"embedder": "uni", "jitter": 1.0}, r"jitter is 1\.0"),
        ({"embedder": "uni", "lr": 0.0}, r"lr is 0\.0; a positive number"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        ClassifyConfig(data=tmp_path, out=tmp_path / "run", **options)


def test_help_needs_no_torch():
    module = "latentds_trainers.classify_patches.__main__"
    code = f"import sys, {module}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# Fine-tuning


VIT: dict[str, Any] = {"arch": "test_vit", "epochs": 1, "standardize": False}
TUNED: dict[str, Any] = {"epochs": 3, "lr": 5e-3, "save_every": 2}


@pytest.fixture(scope="module")
def tuned(one_rank_on_cpu: None, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fine-tuning; read only."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    finetune(classes, out, **TUNED)
    return out


@pytest.fixture(scope="module")
def tuned_vit(one_rank_on_cpu: None, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a network without batch norm, whose figures depend on the forward pass."""
    out = tmp_path_factory.mktemp("tuned") / "vit"
    finetune(few, out, **VIT, batch_size=8)
    return out


def test_finetuning_learns_and_records_its_network(tuned):
    record = read_record(tuned)
    assert record.model == "finetune:test_resnet" and record.embedder is None
    assert (record.summarize("auc").mean or 0) > 0.7  # chance is 0.5
    logs = [json.loads(line) for line in (tuned / "fold-0" / "log.jsonl").read_text().splitlines()]
    assert logs[-1]["step"] == 3 * 2 and logs[-1]["classifier/loss"] < logs[0]["classifier/loss"]
    assert "colour-histogram" in record.related


@pytest.mark.slow
def test_a_finetuning_that_was_stopped_equals_one_that_never_was(
    classes, tuned, tmp_path, monkeypatch
):
    from latentds_trainers.classify_patches.finetune_backbone import FoldTraining

    step = FoldTraining.step

    def stop(training: FoldTraining, number: int) -> dict[str, torch.Tensor]:
        if training.engine.config.out.name == "fold-1" and number == 3:
            raise KeyboardInterrupt
        return step(training, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FoldTraining, "step", stop)
        finetune(classes, tmp_path, **TUNED)
    assert len(complete_checkpoints(tmp_path / "fold-1")) == 1
    assert finetune(classes, tmp_path, **TUNED).folds == read_record(tuned).folds
    files = [(out / "predictions.csv").read_bytes() for out in (tuned, tmp_path)]
    assert files[0] == files[1]


def test_steps_of_other_images_are_refused(classes, tuned, tmp_path):
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    finetune(classes, out, **TUNED, batch_size=4, accumulation=2)
    with pytest.raises(ContractError, match="has images_a_step 8, this one 4; choose --batch-size"):
        finetune(classes, out, **TUNED, batch_size=4)


def test_finetuning_starts_from_a_file_of_weights(classes, embedder, tuned, tmp_path):
    record = finetune(classes, tmp_path, weights=embedder.partition("@")[2], **TUNED)
    assert record.folds != read_record(tuned).folds


def test_accumulation_equals_a_larger_batch(few, tuned_vit, tmp_path):
    finetune(few, tmp_path, batch_size=4, accumulation=2, **VIT)
    large, small = read_predictions(tuned_vit), read_predictions(tmp_path)
    # float32 sums in another order, through a few steps of Adam
    assert np.abs(large.probabilities - small.probabilities).max() < 1e-3


def test_bfloat16_operations_train_and_test(few, tmp_path):
    record = finetune(few, tmp_path, precision="autocast", epochs=1)
    assert len(record.folds) == 2


# Ranks


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(classes, embedder, probed, tmp_path, processes):
    run_ranks(processes, main, settings(classes, tmp_path / "two", embedder=embedder), 2)
    assert read_record(tmp_path / "two").folds == read_record(probed).folds


@pytest.mark.slow
def test_two_ranks_finetune_as_one_with_twice_the_batch(few, tuned_vit, tmp_path, processes):
    words = ["--data", str(few), "--device", "cpu", "--probe", "finetune", "--arch", "test_vit"]
    words += [
        "--folds",
        "2",
        "--epochs",
        "1",
        "--workers",
        "1",
        "--batch-size",
        "4",
        "--lr",
        "1e-3",
    ]
    module = "latentds_trainers.classify_patches"
    succeed(run_words(processes, tmp_path / "two", 2, module, *words))
    two, one = read_predictions(tmp_path / "two"), read_predictions(tuned_vit)
    assert two.items == one.items
    # float32 sums in another order, through a few steps of Adam
    assert np.abs(two.probabilities - one.probabilities).max() < 1e-3
