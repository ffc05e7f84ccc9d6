"""Scores of label maps: correct ones, and those of SAM-Path's code."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from latentds.errors import InputError, ShapeError
from latentds.evaluation.segmentation import (
    Confusion,
    correct_scores,
    derive_iou,
    derive_precision,
    sampath_compat_scores,
)

CRAG = ("unlabelled", "background", "gland")
BCSS = ("unlabelled", "tumor", "stroma", "inflammatory", "necrosis", "other")


def crag_toy() -> tuple[np.ndarray, np.ndarray]:
    """A gland of 385 pixels, of which 330 are found; 26 of background are taken for gland."""
    truth = np.ones((40, 40), np.uint8)
    truth[:35, :11] = 2
    prediction = np.ones_like(truth)
    prediction[5:35, :11] = 2
    prediction[5:18, 11:13] = 2
    return prediction, truth


def bcss_toy() -> tuple[np.ndarray, np.ndarray]:
    """Five classes of which one is empty, a sixth of the pixels unlabelled, a quarter wrong."""
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 6, (2, 40, 40))
    truth[truth == 4] = 3
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(1, 6, truth.shape))
    prediction = np.where(prediction == 0, 1, prediction)
    return np.where(prediction == 4, 5, prediction), truth


def counted(toy: tuple[np.ndarray, np.ndarray], classes, ignore: int | None = 0) -> Confusion:
    confusion = Confusion(classes)
    confusion.add(*toy, ignore=ignore)
    return confusion


def test_the_toy_of_crag_has_the_true_figures_of_the_spec():
    gland = correct_scores(counted(crag_toy(), CRAG), left_out=(0, 1)).per_class["gland"]
    figures = [gland[name] for name in ("dice", "jaccard", "recall")]
    assert figures == pytest.approx([0.8907, 0.8029, 0.8571], abs=5e-5)  # four decimals given


def test_sampath_compat_turns_f1_and_iou_of_crag_into_gland_recall():
    scores = sampath_compat_scores(counted(crag_toy(), CRAG), ignored_metric=1)
    expected = {"Dice": 0.8907, "Dice_Bal": 0.8907, "F1": 0.8571, "IOU_Jaccard": 0.8571}
    assert scores == pytest.approx(expected | {"IOU_Jaccard_Bal": 0.2857}, abs=5e-5)


def test_sampath_compat_is_what_torchmetrics_0_11_4_gives():
    """Figures made once with torchmetrics 0.11.4 itself, 7 classes and ignore_index 0."""
    expected = {
        "IOU_Jaccard_Bal": 0.4156592786312103,
        "IOU_Jaccard": 0.6321839094161987,
        "F1": 0.7746478915214539,
        "Dice": 0.7746478915214539,
        "Dice_Bal": 0.7667648792266846,
    }
    scores = sampath_compat_scores(counted(bcss_toy(), BCSS))
    assert scores == pytest.approx(expected, abs=1e-7)  # its float32


def test_sampath_compat_does_not_see_predictions_on_unlabelled_pixels():
    with_them = counted(bcss_toy(), BCSS, ignore=None)
    assert sampath_compat_scores(with_them) == sampath_compat_scores(counted(bcss_toy(), BCSS))


def test_micro_f1_is_pixel_accuracy_and_fixes_the_iou_without_a_class_left_out():
    confusion = counted(bcss_toy(), BCSS)
    scores = sampath_compat_scores(confusion)
    correct = correct_scores(confusion, left_out=(0,)).scores
    assert scores["F1"] == pytest.approx(correct["pixel_accuracy"], abs=1e-12)
    assert scores["F1"] == pytest.approx(correct["dice_micro"], abs=1e-12)
    assert scores["IOU_Jaccard"] == pytest.approx(derive_iou(scores["F1"]), abs=1e-12)


def test_dice_bal_of_bcss_is_the_correct_macro_dice():
    confusion = counted(bcss_toy(), BCSS)
    correct = correct_scores(confusion, left_out=(0,))
    assert sampath_compat_scores(confusion)["Dice_Bal"] == pytest.approx(
        correct.scores["dice_macro"], abs=1e-12
    )


@pytest.mark.parametrize(
    ("f1", "iou"), [(80.38, 67.20), (79.92, 66.56), (68.02, 51.54), (79.96, 66.62)]
)
def test_published_bcss_ious_follow_from_published_f1(f1, iou):
    assert 100 * derive_iou(f1 / 100) == pytest.approx(iou, abs=0.01)  # both rounded to 0.01


@pytest.mark.parametrize(
    ("dice", "recall", "iou", "precision"),
    [(87.16, 85.24, 77.24, 89.17), (87.20, 88.06, 77.30, 86.36)],
)
def test_true_iou_and_precision_of_published_crag_rows(dice, recall, iou, precision):
    assert 100 * derive_iou(dice / 100) == pytest.approx(iou, abs=0.02)
    assert 100 * derive_precision(dice / 100, recall / 100) == pytest.approx(precision, abs=0.02)


def test_macro_scores_are_those_of_scikit_learn():
    prediction, truth = bcss_toy()
    kept = truth > 0
    correct = correct_scores(counted((prediction, truth), BCSS), left_out=(0,)).scores
    labels = [1, 2, 3, 5]
    for name, function in (("f1", f1_score), ("jaccard", jaccard_score)):
        expected = function(truth[kept], prediction[kept], labels=labels, average="macro")
        assert correct[f"{name}_macro"] == pytest.approx(expected, abs=1e-12)


def test_empty_classes_are_named_and_left_out_of_the_means():
    correct = correct_scores(counted(bcss_toy(), BCSS), left_out=(0,))
    assert "necrosis" not in correct.per_class
    values = [row["dice"] for row in correct.per_class.values()]
    assert len(values) == 4 and correct.scores["dice_macro"] == pytest.approx(np.mean(values))


def test_a_class_predicted_and_never_true_has_dice_0_and_no_recall():
    confusion = Confusion(("background", "gland"), [[3, 1], [0, 0]])
    correct = correct_scores(confusion)
    assert correct.per_class["gland"] == {
        **{"dice": 0.0, "jaccard": 0.0, "f1": 0.0, "precision": 0.0, "pixels": 0.0}
    }
    assert correct.scores["recall_macro"] == 0.75


def test_false_positives_on_a_class_left_out_still_count():
    confusion = Confusion(("background", "gland"), [[90, 10], [0, 10]])
    gland = correct_scores(confusion, left_out=(0,)).per_class["gland"]
    assert gland["precision"] == 0.5 and gland["recall"] == 1.0


def test_counts_of_parts_add_up_to_those_of_the_whole():
    prediction, truth = bcss_toy()
    whole = counted((prediction, truth), BCSS)
    halves = [counted((prediction[i], truth[i]), BCSS) for i in range(2)]
    assert np.array_equal(halves[0].counts + halves[1].counts, whole.counts)


def test_an_ignored_label_may_lie_outside_the_classes():
    confusion = Confusion(("background", "gland"))
    confusion.add(np.array([0, 1, 1]), np.array([0, 1, 255]), ignore=255)
    assert confusion.counts.tolist() == [[1, 0], [0, 1]]


def test_an_unknown_label_is_named():
    with pytest.raises(InputError, match=r"truth holds labels \[7\]; there are 3 classes, 0 to 2"):
        Confusion(CRAG).add(np.array([1, 1]), np.array([1, 7]))


def test_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"prediction is \(4, 4\), truth \(4, 5\)"):
        Confusion(CRAG).add(np.zeros((4, 4), int), np.zeros((4, 5), int))


def test_probabilities_are_not_labels():
    with pytest.raises(ShapeError, match="labels are integers, not float64"):
        Confusion(CRAG).add(np.zeros((4, 4)), np.zeros((4, 4), int))


def test_scores_without_a_pixel_of_a_scored_class_are_undefined():
    correct = correct_scores(Confusion(CRAG, [[0, 0, 0], [0, 9, 0], [0, 0, 0]]), left_out=(0, 1))
    assert correct.scores == {"pixel_accuracy": 1.0} and correct.per_class == {}
    assert correct_scores(Confusion(CRAG), left_out=(0,)).scores == {}
