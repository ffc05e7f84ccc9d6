"""What the segmentation recipe refuses, and how it says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.errors import ContractError, InputError, UnknownNameError, WeightsError

pytest.importorskip("deepspeed")
pytest.importorskip("segmentation_models_pytorch")

from latentds_trainers.sampath.__main__ import main
from latentds_trainers.sampath.config import SampathConfig, parse_mask_values
from latentds_trainers.sampath.segmentation_data import (
    FoldPlan,
    LabelledImages,
    check_classes,
    named_plan,
)

from latentds.evaluation.folds import Fold
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from tests.nuclei import save_nuclei
from tests.test_sampath import config_of, run


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    """Engines of this process run on the CPU, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def finished(one_rank_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four images and masks, and beside it a finished run, `out`; read only."""
    root = save_nuclei(tmp_path_factory.mktemp("finished") / "nuclei", 4)
    run(root, root.with_name("out"), pictures=0, steps=1)
    return root


@pytest.fixture
def nuclei(finished: Path, tmp_path: Path) -> Path:
    """Images and masks that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "nuclei"))


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished.with_name("out"), tmp_path / "out"))


def refused(root: Path, tmp_path: Path, error: type[Exception], text: str, **options) -> None:
    """The run is refused before anything is trained."""
    with pytest.raises(error, match=text):
        run(root, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("fold-*"))


# Masks


def test_a_mask_of_another_size_names_the_file(nuclei, tmp_path):
    Image.new("L", (32, 64)).save(nuclei / "masks/n02.png")
    refused(nuclei, tmp_path, InputError, r"n02\.png: its mask is \(32, 64\) px, the picture")


def test_unknown_values_name_the_file_the_values_and_the_remedy(nuclei, tmp_path):
    root = save_nuclei(tmp_path / "other", 4, values=(0, 1))
    text = (
        r"n00\.png: its mask has the values \[0, 1\], and .* does not say what \[1\] stand for.*"
        r"--mask-values 0:background,255:foreground,1:ignore"
    )
    refused(root, tmp_path, InputError, text)


def test_an_image_without_a_mask_is_named(nuclei, tmp_path):
    (nuclei / "masks/n03.png").unlink()
    refused(nuclei, tmp_path, InputError, r"n03\.png: has no mask under --masks")


def test_originals_without_masks_are_refused(nuclei, tmp_path):
    refused(nuclei, tmp_path, InputError, "has no masks; give --masks", masks=None)


def test_shards_without_masks_are_refused(nuclei, tmp_path):
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    out = tmp_path / "latents"
    convert(ConvertConfig(source=nuclei / "images", out=out, device="cpu", fit_patches=4))
    refused(nuclei, tmp_path, InputError, "has no masks; give --masks", data=out, masks=None)


def test_a_class_that_no_mask_has_is_named(nuclei, tmp_path):
    options = {"classes": ("background", "foreground", "gland")}
    options["mask_values"] = "0:background,255:foreground,3:gland"
    refused(nuclei, tmp_path, InputError, "no mask has a pixel of 'gland'", **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0:background", "no value stands for nuclei"),
        ("0:background,255:cells", "no class 'cells'; there are background, nuclei"),
        ("0:background,300:nuclei", "'300:nuclei' is not VALUE:CLASS"),
        ("0:background,nuclei", "'nuclei' is not VALUE:CLASS"),
        ("0:background,0:nuclei", "the value 0 is there twice"),
        ("0:background,255:3", "no class '3'"),
    ],
)
def test_a_mapping_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_mask_values(text, ("background", "nuclei"))


def test_values_are_mapped_by_name_number_or_to_nothing():
    values = parse_mask_values(" 0:1, 255:nuclei ,9:ignore", ("background", "nuclei"))
    labels = values.labels(np.array([[[0, 255, 9]]], np.uint8), ["a"])
    assert labels.tolist() == [[[1, 2, 0]]]


# Folds


def test_a_fold_table_with_images_that_are_not_there_is_refused(nuclei, tmp_path):
    table = tmp_path / "cv.csv"
    rows = [f"n{i:02d},{(-1, 1)[i % 2]}\n" for i in range(5)]
    table.write_text("img_id,fold\n" + "".join(rows))
    refused(nuclei, tmp_path, InputError, "1 of its images are not in.*'n04'", fold_table=table)


def test_a_fold_table_that_lacks_images_is_refused(nuclei, tmp_path):
    table = tmp_path / "cv.csv"
    table.write_text("img_id,fold\nn00,-1\nn01,1\n")
    refused(
        nuclei, tmp_path, InputError, r"2 images it lacks.*'n02\.png', 'n03\.png'", fold_table=table
    )


def test_a_fold_table_without_its_columns_is_refused(nuclei, tmp_path):
    table = tmp_path / "cv.csv"
    table.write_text("image,fold\nn00,-1\n")
    refused(nuclei, tmp_path, InputError, "no column for img_id", fold_table=table)


def test_data_without_splits_ask_for_folds(nuclei, tmp_path):
    config = config_of(nuclei, tmp_path / "out")
    with pytest.raises(InputError, match="has one split, 'train'; say what is tested"):
        main(config)


def test_more_folds_than_groups_are_refused(nuclei, tmp_path):
    groups = tmp_path / "groups.csv"
    groups.write_text("path,group\n" + "".join(f"n{i:02d}.png,g{i % 2}\n" for i in range(4)))
    refused(nuclei, tmp_path, InputError, "2 groups of images", folds=3, groups=groups)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_patient_who_is_tested_and_seen_before_is_refused(part):
    splits, groups = [part, "train", "val", "test", "test"], ["p1", "p2", "p3", "p1", "p4"]
    text = f"fold table: 1 groups are in both {part} and test: 'p1'.*--allow-shared-groups"
    with pytest.raises(InputError, match=text):
        named_plan(splits, groups, "fold table")
    plan = named_plan(splits, groups, "fold table", allow_shared=True)
    assert plan.notes == (f"1 groups are in both {part} and test",)


def test_a_patient_in_train_and_val_is_noted():
    plan = named_plan(["train", "val", "test"], ["p1", "p1", "p2"], "fold table")
    assert plan.notes == ("1 groups are in both train and val",)


def test_a_class_in_one_fold_only_is_refused():
    counts = np.array([[0, 5, 0], [0, 5, 0], [0, 5, 9], [0, 5, 0]])
    none = np.empty(0, np.int64)
    halves = [np.arange(2), np.arange(2, 4)]
    plan = FoldPlan(
        folds=[Fold(halves[1], none, halves[0]), Fold(halves[0], none, halves[1])], rule="groups"
    )
    names = ("unlabelled", "stroma", "tumor")
    with pytest.raises(InputError, match="fold 1: class 'tumor' is in 1 images, all tested"):
        check_classes(plan, counts, names)
    assert check_classes(FoldPlan(folds=plan.folds[:1], rule=""), counts, names) == (
        "fold 0 tests no pixel of class 'tumor'",
    )


# Settings


def test_a_set_of_another_size_than_the_presets_is_refused(tmp_path):
    root = save_nuclei(tmp_path / "nuclei", 4, values=(1, 2))
    options = {"preset": "bcss", "image_size": None, "patch_size": 64, "resize": True}
    refused(root, tmp_path, InputError, "images of 64x64 px; --preset bcss is for 1024", **options)


def test_a_folder_of_sam_that_is_not_there_is_refused(nuclei, tmp_path):
    text = f"{re.escape(str(tmp_path / 'sam'))}"
    with pytest.raises((WeightsError, UnknownNameError), match=text):
        run(nuclei, tmp_path / "out", model="sampath", sam=f"{tmp_path}/sam")


def test_an_unknown_encoder_of_the_unet_lists_some(nuclei, tmp_path):
    with pytest.raises(UnknownNameError, match="'resnet19'; did you mean 'resnet18'"):
        run(nuclei, tmp_path / "out", unet_encoder="resnet19")


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"seed": 1}, "folds|seed"), ({"jitter": 0.2}, "jitter"), ({"codec": "jpeg:10"}, "codec")],
)
def test_a_run_folder_of_other_settings_is_refused(nuclei, out, changed, name):
    before = (out / "result.json").read_bytes()
    with pytest.raises(ContractError, match=f"the run there has ({name}).*give another --out"):
        run(nuclei, out, pictures=0, **({"steps": 1} | changed))
    assert (out / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("folder", "text"),
    [("images", "content .*give what it was"), ("masks", "(content|labels) .*give what ")],
)
def test_a_rerun_with_other_files_of_the_same_names_is_refused(nuclei, out, tmp_path, folder, text):
    other = save_nuclei(tmp_path / "other", 4, first=9)
    for new, path in zip(
        sorted((other / folder).iterdir()), sorted((nuclei / folder).iterdir()), strict=True
    ):
        new.replace(path)
    with pytest.raises(ContractError, match=f"the run there has {text}"):
        run(nuclei, out, pictures=0, steps=1)


def test_masks_with_as_many_pixels_of_every_class_are_told_apart(nuclei, tmp_path):
    config = config_of(nuclei, tmp_path / "out")
    counted = []
    for _ in range(2):
        images = LabelledImages(config.settings, open_patches(config))
        counted.append(images.count_pixels())
        for path in (nuclei / "masks").iterdir():
            turned = Image.open(path).transpose(Image.Transpose.ROTATE_180)
            turned.save(path)
    assert np.array_equal(counted[0][0], counted[1][0]) and counted[0][1] != counted[1][1]


def test_a_run_that_does_not_say_what_it_was_made_of_is_refused(nuclei, out):
    path = out / "run.json"
    values = json.loads(path.read_text())
    del values["labels"]
    path.write_text(json.dumps(values))
    with pytest.raises(ContractError, match="the run there has labels None"):
        run(nuclei, out, pictures=0, steps=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"folds": 2, "fold_table": Path("cv.csv")}, "--folds or --fold-table"),
        ({"folds": 1}, "folds is 1"),
        ({"precision": "bf16", "zero_stage": 1}, "take autocast"),
        ({"zero_stage": 3}, "zero_stage 3"),
        ({"unscored": ("background", "foreground")}, "not all"),
        ({"unscored": ("gland",)}, "some of the classes"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"jitter": 0.6}, "jitter is 0.6"),
        ({"dice_weight": 0.0, "focal_weight": 0.0}, "one above"),
        ({"iou_weight": -1.0}, "none below 0"),
        ({"image_size": 16}, "image_size is 16"),
        ({"seeds": (1, 1)}, "each once"),
        ({"steps": 0}, "steps is 0"),
        ({"classes": ("a", "a")}, "each once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        SampathConfig(data=tmp_path, out=tmp_path / "out", **options)
