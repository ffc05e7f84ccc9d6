"""The segmentation recipe: folds, scores, resuming, sources, sizes; its pieces."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from latentds.core.randomness import patch_seeds
from latentds.evaluation.records import read_record

pytest.importorskip("deepspeed")
pytest.importorskip("segmentation_models_pytorch")

from latentds_trainers.engine.checkpoints import complete_checkpoints
from latentds_trainers.engine.settings import TrainConfig
from latentds_trainers.sampath import segmentation_fold
from latentds_trainers.sampath.__main__ import main
from latentds_trainers.sampath.config import SampathConfig, SegmentationSettings
from latentds_trainers.sampath.segmentation_data import draw_crops, group_plan, jitter

from tests.nuclei import one_fold, save_nuclei
from tests.trainer_ranks import run_ranks

SMALL = {"unet_channels": (16, 8), "image_size": 32, "batch_size": 2}
UNET = SMALL | {"model": "unet", "unet_encoder": "mobilenet_v2"}
CLASSES = ("classes", "mask_values")
SAM = {"sam": "tiny-random", "image_size": 64, "batch_size": 2}


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    """Engines of this process run on the CPU, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images and masks; read only, runs lie elsewhere."""
    return save_nuclei(tmp_path_factory.mktemp("images") / "nuclei")


@pytest.fixture(scope="module")
def finished(one_rank_on_cpu: None, nuclei: Path) -> Path:
    """The folder of a finished run of two folds; read only."""
    run(nuclei, nuclei.with_name("finished"))
    return nuclei.with_name("finished")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change and go on with."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sam_run(one_rank_on_cpu: None, nuclei: Path) -> Path:
    """The folder of a finished run of SAM-Path of one fold; read only."""
    run(nuclei, nuclei.with_name("sam"), model="sampath", **SAM, **one_fold(nuclei))
    return nuclei.with_name("sam")


def config_of(root: Path, out: Path, **options) -> SampathConfig:
    inputs = {"data": root / "images", "masks": root / "masks", "device": "cpu"}
    return SampathConfig(**(inputs | {"out": out, "steps": 2, "pictures": 1} | UNET | options))


def run(root: Path, out: Path, **options):
    """The record of a run."""
    if "folds" not in options and "fold_table" not in options:
        options["folds"] = 2
    main(config_of(root, out, **options))
    return read_record(out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def images_csv(out: Path) -> list[dict[str, str]]:
    with (out / "images.csv").open() as file:
        return list(csv.DictReader(file))


# What a run leaves


def test_a_finished_run_is_reported_without_its_networks(nuclei, copy, monkeypatch):
    def gone(*_):
        pytest.fail("a network was built")

    monkeypatch.setattr("latentds_trainers.sampath.task.build_network", gone)
    assert run(nuclei, copy) == read_record(copy)


def test_a_run_records_folds_scores_classes_and_pictures(nuclei, copy, capsys):
    record = run(nuclei, copy)
    assert (record.task, record.model, record.classes) == ("sampath", "unet", ["foreground"])
    assert record.data == "nuclei" and record.source["name"] == "original"
    assert [(f["fold"], f["train"], f["test"]) for f in record.folds] == [(0, 4, 4), (1, 4, 4)]
    assert {"dice_macro", "jaccard_micro", "sampath_F1", "sampath_Dice"} <= set(record.metrics())
    assert "foreground" in record.folds[0]["per_class"]
    assert len(images_csv(copy)) == 8
    assert sorted(p.name for p in (copy / "splits").iterdir()) == [
        "splits_0.csv", "splits_1.csv",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "correct    sampath-compat" in printed and "gland" not in record.classes
    assert any(note.startswith("sampath-compat is what") for note in record.notes)


def test_images_that_name_no_patient_are_noted(finished):
    notes = read_record(finished).notes
    assert any("each file is a group by itself" in note for note in notes)


def test_a_picture_shows_image_truth_and_prediction_side_by_side(nuclei, finished):
    found = sorted((finished / "predictions").iterdir())
    assert [path.name[:7] for path in found] == ["fold-0_", "fold-1_"]
    picture = np.asarray(Image.open(found[0]))
    source = nuclei / "images" / found[0].name.removeprefix("fold-0_").removesuffix(".png")
    assert picture.shape == (64 + 20, 3 * 64 + 16, 3)
    assert np.array_equal(picture[:64, :64], np.asarray(Image.open(source)))
    mask = np.asarray(Image.open(nuclei / "masks" / source.name)) > 0
    is_painted = (picture[:64, 72:136] != picture[:64, :64]).any(-1)
    assert np.array_equal(is_painted, mask)


def test_scores_of_compat_and_correct_agree_where_they_should(finished):
    for fold in read_record(finished).folds:
        scores = fold["scores"]
        assert scores["sampath_Dice"] == pytest.approx(scores["dice_micro"])
        assert scores["sampath_F1"] == pytest.approx(scores["recall_micro"])


def test_json_prints_the_record(nuclei, copy, capsys):
    run(nuclei, copy, json=True)
    assert json.loads(capsys.readouterr().out)["task"] == "sampath"


@pytest.mark.slow
def test_the_unet_learns_what_nuclei_are(nuclei, tmp_path):
    record = run(nuclei, tmp_path, steps=40, batch_size=4, lr=3e-3, **one_fold(nuclei))
    assert record.summarize("dice_macro").mean > 0.8


def test_sam_path_trains_and_saves_its_head_only(sam_run):
    record = read_record(sam_run)
    assert record.model == "sam-path" and record.embedder is None
    folder = sam_run / "fold-0"
    saved = weights(folder)
    assert saved and all(name.startswith(("neck.", "decoder.")) for name in saved)
    (checkpoint,) = complete_checkpoints(folder)
    held = torch.load(checkpoint / "segmentation/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    assert not [name for name in held if "vision" in name or "encoder" in name]
    with safe_open(folder / "weights.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["latentds"])
    assert facts["labels"] == ["unlabelled", "background", "foreground"]
    assert facts["frozen"]["sam"] == "tiny-random" and facts["settings"]["steps"] == 2


def test_training_moves_the_head_and_leaves_the_encoders(nuclei, sam_run):
    from latentds_trainers.sampath.segmentation_fold import build_network

    config = config_of(nuclei, sam_run, **({"model": "sampath"} | SAM))
    model, trained, _ = build_network(config, 3, config.seed)
    before, after = trained.state_dict(), weights(sam_run / "fold-0")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in model.encoders.parameters())


# Going on


def test_finished_folds_are_skipped_when_the_command_runs_again(
    nuclei, finished, copy, monkeypatch
):
    (copy / "fold-1/fold.json").unlink()
    trained = []
    real = segmentation_fold.SegmentationFold.run
    monkeypatch.setattr(
        "latentds_trainers.sampath.segmentation_fold.SegmentationFold.run",
        lambda fold: trained.append(fold.train.out.name) or real(fold),
    )
    again = run(nuclei, copy)
    assert trained == ["fold-1"]
    assert again.folds == read_record(finished).folds


RESUMED = {"steps": 3, "save_every": 2, "accumulation": 2, "pictures": 0}


@pytest.fixture(scope="module")
def whole(one_rank_on_cpu: None, nuclei: Path) -> Path:
    """The folder of a run of one fold that nothing stopped; read only."""
    run(nuclei, nuclei.with_name("whole"), **RESUMED, **one_fold(nuclei))
    return nuclei.with_name("whole")


@pytest.mark.slow
def test_a_resumed_fold_equals_one_that_never_stopped(nuclei, whole, tmp_path, monkeypatch):
    options = RESUMED | one_fold(nuclei)
    real = segmentation_fold.SegmentationFold.step

    def killed(fold, number, batch):
        if number == 2:  # the third
            raise KeyboardInterrupt
        return real(fold, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation_fold.SegmentationFold, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(nuclei, tmp_path, **options)
    run(nuclei, tmp_path, **options)
    wanted, found = weights(whole / "fold-0"), weights(tmp_path / "fold-0")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert images_csv(whole) == images_csv(tmp_path)


def test_a_fold_that_is_trained_again_by_other_workers_gives_the_same(nuclei, finished, copy):
    shutil.rmtree(copy / "fold-1")
    assert run(nuclei, copy, workers=3).folds == read_record(finished).folds
    again, first = weights(copy / "fold-1"), weights(finished / "fold-1")
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.slow
def test_every_seed_trains_every_fold_of_the_same_split(nuclei, copy):
    record = run(nuclei, copy, seeds=(0, 7))
    assert [(f["fold"], f["seed"]) for f in record.folds] == [(0, 0), (1, 0), (0, 7), (1, 7)]
    assert (copy / "fold-1-seed-7/weights.safetensors").exists()
    rows = images_csv(copy)
    tested = [{r["item"] for r in rows if (r["fold"], r["seed"]) == ("0", s)} for s in ("0", "7")]
    assert tested[0] == tested[1]
    first, second = (weights(copy / n) for n in ("fold-0", "fold-0-seed-7"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(nuclei, tmp_path, processes):
    options = {"model": "sampath", "log_every": 1, **SAM, **one_fold(nuclei)}
    run(nuclei, tmp_path / "one", **(options | {"batch_size": 4}))
    run_ranks(processes, main, config_of(nuclei, tmp_path / "two", **options), 2)
    losses = [
        [json.loads(line)["segmentation/loss"] for line in path.read_text().splitlines()]
        for path in (tmp_path / n / "fold-0/log.jsonl" for n in ("one", "two"))
    ]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # means of means, in float32
    assert read_record(tmp_path / "two").split_id == read_record(tmp_path / "one").split_id
    assert len(images_csv(tmp_path / "two")) == 4


def test_a_run_goes_on_with_the_same_images_elsewhere(nuclei, finished, copy, tmp_path):
    moved = Path(shutil.copytree(nuclei, tmp_path / "moved"))
    assert run(moved, copy).folds == read_record(finished).folds


# Sources and sizes


@pytest.fixture(scope="module")
def latents(nuclei: Path) -> Path:
    """The images as latents; read only."""
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    out = nuclei.with_name("latents")
    options = {"device": "cpu", "fit_patches": 4, "encode_batch": 4}
    convert(ConvertConfig(source=nuclei / "images", masks=nuclei / "masks", out=out, **options))
    return out


@pytest.mark.parametrize("kind", [pytest.param("codec", marks=pytest.mark.slow), "latents"])
def test_codecs_and_latents_are_tested_on_the_pixels_of_originals(
    nuclei, finished, latents, tmp_path, kind
):
    options = {"codec": {"codec": "jpeg:10"}, "latents": {"data": latents, "masks": None}}[kind]
    record = run(nuclei, tmp_path, steps=1, pictures=0, **options)
    originals = read_record(finished)
    assert [originals.source["kind"], record.source["kind"]] == ["original", kind]
    assert record.split_id == originals.split_id
    pixels = [
        [f["per_class"]["foreground"]["pixels"] for f in r.folds] for r in (originals, record)
    ]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize(
    ("codec", "odd_size"),
    [
        ("original", "pad"),
        ("tiny", "resize"),
        pytest.param("original", "resize", marks=pytest.mark.slow),
        pytest.param("tiny", "pad", marks=pytest.mark.slow),
    ],
)
def test_images_of_an_odd_size_work_both_ways(tmp_path, odd_size, codec):
    """CRAG's 1512x1516 px in small: no multiple of a network's step either way."""
    root = save_nuclei(tmp_path / "crag", 4, size_px=(63, 61), values=(0, 1))
    options = {"preset": "crag", "odd_size": odd_size, "image_size": 64, "codec": codec}
    options |= {"steps": 1, **one_fold(root, 4)}
    record = run(root, tmp_path / "out", **(options | {"accumulation": 1}))
    wanted = [64, 64] if odd_size == "resize" else [63, 61]
    assert list(record.source["patch_px"]) == wanted
    outcome = json.loads((tmp_path / "out/fold-0/fold.json").read_text())
    counted = np.array(outcome["found"]).sum((1, 2))
    assert set(counted.tolist()) == {wanted[0] * wanted[1]}


def test_latents_of_odd_sizes_are_resized_after_decoding(nuclei, latents, tmp_path):
    options = {"data": latents, "masks": None, "image_size": 96, "odd_size": "resize"}
    options |= {"steps": 1, **one_fold(nuclei)}
    run(nuclei, tmp_path / "out", **options)
    outcome = json.loads((tmp_path / "out/fold-0/fold.json").read_text())
    assert {int(np.sum(counts)) for counts in outcome["found"]} == {96 * 96}
    notes = read_record(tmp_path / "out").notes
    assert [n for n in notes if n.startswith("images are decoded at 64x64 px, then resized to 96")]


def test_sam_paths_own_layout_and_table_of_folds_are_read(tmp_path):
    root = save_nuclei(tmp_path / "bcss", 6, values=(1, 2))
    (root / "images").rename(root / "img")
    (root / "masks").rename(root / "mask")
    (root / "cv.csv").write_text(
        "img_id,fold\n" + "".join(f"n{i:02d},{f}\n" for i, f in enumerate((-1, -1, 0, 1, 2, 4)))
    )
    options = {"mask_values": "1:stroma,2:nuclei", "classes": ("stroma", "nuclei"), "unscored": ()}
    config = config_of(root, tmp_path / "out", **options)
    main(dataclasses.replace(config, data=root, masks=None))
    record = read_record(tmp_path / "out")
    (fold,) = record.folds
    assert (fold["train"], fold["val"], fold["test"]) == (3, 1, 2)
    assert record.classes == ["stroma", "nuclei"]
    lines = (tmp_path / "out/fold-0/log.jsonl").read_text().splitlines()
    assert "validation/dice_macro" in json.loads(lines[-1])


def test_a_table_of_folds_and_groups_decide_who_is_tested(nuclei, tmp_path):
    table = tmp_path / "cv.csv"
    rows = "".join(f"n{i:02d}.png,{-1 if i < 3 else 1}\n" for i in range(8))
    table.write_text("img_id,fold\n" + rows)
    groups = tmp_path / "groups.csv"
    groups.write_text("path,group\n" + "".join(f"n{i:02d}.png,g{i % 2}\n" for i in range(8)))
    options = {"fold_table": table, "groups": groups, "allow_shared_groups": True}
    record = run(nuclei, tmp_path / "out", **options)
    assert {row["item"] for row in images_csv(tmp_path / "out")} == {
        "n00.png", "n01.png", "n02.png",
    }  # fmt: skip
    assert "2 groups are in both train and test" in record.notes


def test_ignored_pixels_are_neither_learned_nor_counted(tmp_path):
    root = save_nuclei(tmp_path / "nuclei", 4)
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[:32] = 7
        Image.fromarray(mask).save(path)
    values = "0:background,255:foreground,7:ignore"
    run(root, tmp_path / "out", mask_values=values, **one_fold(root, 4))
    outcome = json.loads((tmp_path / "out/fold-0/fold.json").read_text())
    assert {int(np.sum(counts)) for counts in outcome["found"]} == {32 * 64}


# Presets


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("bcss", (1024, 12, 2, 32, 72, (1800, 2088), 0.75, 0.25, 0.0625, ())),
        ("crag", (1536, 6, 1, 60, 46, (1150, 1265), 0.875, 0.125, 0.0, ("background",))),
    ],
)
def test_presets_are_sam_paths_settings(tmp_path, preset, expected):
    config = SampathConfig(data=tmp_path, out=tmp_path / "out", preset=preset).settings
    names = ("image_size", "batch_size", "accumulation", "epochs", "warmup_steps", "milestones",
             "dice_weight", "focal_weight", "iou_weight", "unscored")  # fmt: skip
    assert tuple(getattr(config, name) for name in names) == expected
    assert (config.lr, config.weight_decay, config.ce_weight) == (1e-4, 1e-2, 0)
    assert (config.crop_scale, config.flip, config.jitter) == ((0.08, 1), 0.75, 0.1)


@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(SegmentationSettings) if f.name not in CLASSES],
)
def test_every_value_of_a_preset_can_be_set(tmp_path, name):
    changed = {
        "unscored": ("other",), "image_size": 512, "odd_size": "pad", "epochs": 3,
        "batch_size": 3, "accumulation": 3, "lr": 0.3, "weight_decay": 0.3, "warmup_steps": 3,
        "schedule": "cosine", "milestones": (3, 4), "dice_weight": 0.3, "focal_weight": 0.3,
        "ce_weight": 0.3, "iou_weight": 0.3, "crop_scale": (0.3, 0.3), "flip": 0.3, "turn": 0.3,
        "jitter": 0.3,
    }  # fmt: skip
    config = SampathConfig(
        data=tmp_path, out=tmp_path / "o", preset="bcss", **{name: changed[name]}
    )
    assert getattr(config.settings, name) == changed[name]


def test_crags_mask_values_become_labels_from_one_on(tmp_path):
    values = SampathConfig(data=tmp_path, out=tmp_path / "o", preset="crag").settings.values
    labels = values.labels(np.array([[[0, 1]]], np.uint8), ["a"])
    assert labels.tolist() == [[[1, 2]]] and values.names[0] == "unlabelled"


def test_the_learning_rate_falls_to_a_tenth_at_every_milestone(tmp_path):
    config = SampathConfig(data=tmp_path, out=tmp_path / "o", preset="bcss", steps=2304)
    shares = [
        config.of_fold(tmp_path, 0, 2304).lr_share(step)
        for step in (0, 35, 71, 1799, 1800, 2087, 2088, 2303)
    ]
    assert shares == pytest.approx([1 / 72, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "multistep"},
        {"schedule": "constant", "milestones": (3,)},
        {"schedule": "multistep", "milestones": (5, 3)},
        {"schedule": "multistep", "milestones": (0,)},
    ],
)
def test_milestones_that_make_no_sense_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="milestones"):
        TrainConfig(out=tmp_path, steps=9, batch_size=1, lr=1e-3, **options)


# Pieces


def test_draws_take_every_image_once_an_epoch_and_follow_from_the_place():
    rows, seeds = draw_crops(np.arange(10, 17), 3, np.arange(14))
    assert sorted(rows[:7]) == sorted(rows[7:]) == list(range(10, 17))
    assert list(rows[:7]) != list(rows[7:])
    again, same = draw_crops(np.arange(10, 17), 3, np.array([12, 5]))
    assert again.tolist() == rows[[12, 5]].tolist() and torch.equal(same, seeds[[12, 5]])
    assert len(set(seeds.tolist())) == 14


def test_half_of_the_images_change_colour_and_none_leaves_its_range():
    seeds = torch.from_numpy(patch_seeds(0, *(np.arange(200) for _ in range(3))))
    images = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = jitter(images, seeds, 0.1)
    assert 75 < int((changed != images).flatten(1).any(1).sum()) < 125
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert torch.equal(jitter(images[40:50], seeds[40:50], 0.1), changed[40:50])


def test_folds_of_groups_are_about_equal_and_whole():
    groups = [f"g{number // 3}" for number in range(30)]
    plan = group_plan(groups, 4, seed=1, rule="group")
    assert sorted(len(fold.test) for fold in plan.folds) == [6, 6, 9, 9]
    assert sorted(np.concatenate([fold.test for fold in plan.folds])) == list(range(30))
    for fold in plan.folds:
        assert not {groups[row] for row in fold.test} & {groups[row] for row in fold.train}
    other = group_plan(groups, 4, seed=2, rule="group")
    assert [f.test.tolist() for f in plan.folds] != [f.test.tolist() for f in other.folds]
