"""Probes of frozen features, colour histograms, and the changes of training images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from latentds.errors import InputError

pytest.importorskip("sklearn")
pytest.importorskip("deepspeed")

from latentds_trainers.classify_patches.finetune_backbone import augmented

from latentds.evaluation import probes


def separable(count: int, dim: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 and labels that follow from them, with noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, dim)).astype(np.float32)
    directions = np.random.default_rng(1).normal(size=(dim, classes))
    noise = rng.normal(size=(count, classes)) * 3
    return features, (features @ directions + noise).argmax(1)


def torch_minimum(
    features: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, power: int
) -> np.ndarray:
    """Mean cross-entropy + |W|^power / (2 cost), minimized by torch's L-BFGS in float64."""
    cost = features.shape[1] * classes / 100
    layer = torch.nn.Linear(features.shape[1], classes).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    inputs, targets = torch.from_numpy(features).double(), torch.from_numpy(labels)
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.cross_entropy(layer(inputs), targets)
        error = error + 0.5 / cost * layer.weight.norm() ** power
        error.backward()
        return error

    optimizer.step(loss)
    return layer(torch.from_numpy(test).double()).softmax(1).detach().numpy()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("penalty", "power"), [("norm", 1), ("squared", 2)])
def test_the_linear_probe_finds_the_minimum_of_its_formula(classes, penalty, power):
    train, labels = separable(600, 200, classes)
    test, _ = separable(40, 200, classes, seed=2)
    fitted = probes.linear_probe(train, labels, test, classes, penalty=penalty)
    wanted = torch_minimum(train, labels, test, classes, power)
    assert fitted.remark == ""
    # 1e-3: both stop where the loss changes by 1e-9 of itself, in a flat valley
    assert np.abs(fitted.probabilities - wanted).max() < 1e-3


def test_weights_that_the_penalty_holds_at_zero_are_told():
    train, labels = separable(100, 4, 2)
    fitted = probes.linear_probe(train * 1e-3, labels, train, 2)
    assert "every weight of the logistic regression is 0" in fitted.remark
    assert np.ptp(fitted.probabilities[:, 0]) == 0
    assert probes.linear_probe(train * 1e-3, labels, train, 2, penalty="squared").remark == ""


def test_a_fit_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr(probes, "MAX_ITERATIONS", 2)
    train, labels = separable(200, 50, 3)
    for penalty in ("norm", "squared"):
        assert (
            "had not converged"
            in probes.linear_probe(train, labels, train, 3, penalty=penalty).remark
        )


def test_standardized_features_take_no_scale_along():
    train, labels = separable(300, 200, 3)
    scales = np.geomspace(1e-2, 1e2, 200).astype(np.float32)
    one = probes.linear_probe(train, labels, train, 3, standardize=True)
    other = probes.linear_probe(train * scales + 1, labels, train * scales + 1, 3, standardize=True)
    assert np.abs(one.probabilities - other.probabilities).max() < 1e-3  # float32 inputs


class Examples(NamedTuple):
    features: np.ndarray
    labels: np.ndarray


def eva(
    train: Examples, val: Examples, test: np.ndarray, classes: int, **options: Any
) -> probes.FittedProbe:
    own = (train.features, train.labels)
    return probes.eva_probe(*own, test, classes, val=(val.features, val.labels), **options)


def examples(count: int, seed: int = 0) -> Examples:
    features, labels = separable(count, 24, 3, seed)
    return Examples(features=features, labels=labels)


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of eva's steps, and with them of its patience, each ten times as long."""
    monkeypatch.setattr(probes, "STEPS", probes.STEPS // 10)
    monkeypatch.setattr(probes, "LEARNING_RATE", probes.LEARNING_RATE * 10)


@pytest.mark.usefixtures("brisk")
def test_evas_probe_learns_and_tests_the_weights_that_validated_best(monkeypatch):
    train, val, test = examples(600), examples(100, seed=2), examples(300, seed=3)
    reached = []
    judge = probes.balanced_accuracy
    monkeypatch.setattr(
        probes, "balanced_accuracy", lambda *args: reached.append(judge(*args)) or reached[-1]
    )
    features = np.concatenate([test.features, val.features])
    fitted = eva(train, val, features, 3, seed=0)
    assert fitted.remark == ""
    assert len(reached) == reached.index(max(reached)) + 1 + probes.patience_of(600)
    assert np.allclose(fitted.probabilities.sum(1), 1)
    on_test, on_val = np.split(fitted.probabilities.argmax(1), [len(test.labels)])
    assert (on_test == test.labels).mean() > 0.6  # chance is a third
    recalls = [(on_val[val.labels == k] == k).mean() for k in range(3)]
    assert np.mean(recalls) == pytest.approx(max(reached))


def test_evas_probe_is_the_same_for_a_seed_whatever_torch_drew_before(monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 100)
    train, val = examples(300), examples(60, seed=2)
    torch.manual_seed(7)
    one = eva(train, val, val.features, 3, seed=0).probabilities
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # the process's generator was left alone
    assert np.array_equal(one, eva(train, val, val.features, 3, seed=0).probabilities)
    other = eva(train, val, val.features, 3, seed=1).probabilities
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("patches", "epochs"), [(90_000, 7), (2_175, 70), (100, 625)])
def test_evas_patience_is_that_of_its_configurations(patches, epochs):
    assert probes.patience_of(patches) == epochs  # NCT-CRC, MHIST, and what has one step


@pytest.mark.usefixtures("brisk")
def test_evas_probe_learns_from_few_patches_too():
    train, val, test = examples(240), examples(60, seed=2), examples(300, seed=3)
    fitted = eva(train, val, test.features, 3, seed=0)
    linear = probes.linear_probe(train.features, train.labels, test.features, 3, penalty="squared")
    reached, wanted = (
        (found.probabilities.argmax(1) == test.labels).mean() for found in (fitted, linear)
    )
    assert reached > wanted - 0.05 and wanted > 0.5  # chance is a third


@pytest.mark.usefixtures("brisk")
def test_a_feature_that_is_constant_in_training_says_nothing_of_others():
    train, val = examples(300), examples(60, seed=2)
    constant = [np.full((len(part.labels), 1), 0.1, np.float32) for part in (train, val)]
    parts = [
        part._replace(features=np.hstack([part.features, more]))
        for part, more in zip((train, val), constant, strict=True)
    ]
    test = parts[1].features.copy()
    test[:, -1] = 0.1001
    one = eva(*parts, parts[1].features, 3, seed=0, standardize=True)
    other = eva(*parts, test, 3, seed=0, standardize=True)
    assert np.abs(one.probabilities - other.probabilities).max() < 1e-3


def test_steps_of_evas_probe_that_ran_out_are_told(monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 5)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step, steps))
    train, val = examples(600), examples(60, seed=2)
    fitted = eva(train, val, val.features, 3, seed=0)
    assert "ended after" in fitted.remark and len(steps) == 5  # 3 batches an epoch: one and a part


def counted(function, calls: list[int]):
    def called(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return called


@pytest.mark.usefixtures("brisk")
def test_evas_probe_with_standardized_features_takes_no_scale_along():
    train, val = examples(300), examples(60, seed=2)
    scales = np.geomspace(1e-2, 1e2, 24).astype(np.float32)
    wide = [part._replace(features=part.features * scales) for part in (train, val)]
    one = eva(train, val, val.features, 3, seed=0, standardize=True)
    other = eva(*wide, wide[1].features, 3, seed=0, standardize=True)
    assert np.abs(one.probabilities - other.probabilities).max() < 1e-3


def test_evas_probe_needs_patches_to_validate_on():
    train = examples(30)
    nothing = Examples(features=train.features[:0], labels=train.labels[:0])
    with pytest.raises(InputError, match="no patch to validate on"):
        eva(train, nothing, train.features, 3, seed=0)


def test_neighbours_vote():
    train = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]], np.float32)
    labels = np.array([0, 0, 1, 1, 2])
    fitted = probes.nearest_neighbours(train, labels, train[[0, 2]], 4, neighbours=2)
    assert fitted.probabilities.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_more_neighbours_than_patches_are_refused():
    train, labels = separable(12, 4, 2)
    with pytest.raises(InputError, match="12 patches, fewer than --neighbours 20"):
        probes.nearest_neighbours(train, labels, train, 2, neighbours=20)


def test_colour_histograms_count_every_pixel_once():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (5, 3, 12, 20), np.uint8)
    found = probes.colour_histograms(torch.from_numpy(images))
    wanted = [
        [np.histogram(channel, bins=32, range=(0, 256))[0] / 240 for channel in image]
        for image in images
    ]
    assert np.array_equal(found, np.array(wanted).reshape(5, 96).astype(np.float32))


def test_colour_alone_tells_red_from_blue():
    rng = np.random.default_rng(4)
    images = rng.integers(0, 128, (40, 3, 8, 8), np.uint8)
    labels = np.arange(40) % 2
    images[labels == 1, 2] += 100
    colours = probes.colour_histograms(torch.from_numpy(images))
    fitted = probes.colour_probe(colours[:20], labels[:20], colours[20:], 2)
    assert np.array_equal(fitted.probabilities.argmax(1), labels[20:])


def seeds(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64) * 7919


def test_an_images_changes_do_not_depend_on_its_neighbours():
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = augmented(images, seeds(9), 0.1)
    alone = torch.cat([augmented(images[i : i + 1], seeds(9)[i : i + 1], 0.1) for i in range(9)])
    assert torch.allclose(whole, alone, rtol=0, atol=1e-6)  # means summed in another order


@pytest.mark.parametrize(("width", "ways"), [(16, 8), (20, 4)])
def test_images_are_flipped_and_turned_without_loss(width, ways):
    image = torch.rand(1, 3, 16, width, generator=torch.Generator().manual_seed(0))
    changed = augmented(image.repeat(200, 1, 1, 1), seeds(200), 0.0)
    distinct = {picture.numpy().tobytes() for picture in changed}
    assert len(distinct) == ways
    assert all(torch.equal(p.flatten().sort()[0], image.flatten().sort()[0]) for p in changed)


def test_jitter_stays_within_its_share():
    images = torch.full((50, 3, 8, 8), 0.5)
    changed = augmented(images, seeds(50), 0.2)  # grey: contrast and saturation change nothing
    assert 0.4 - 1e-6 <= changed.min() < 0.45 and 0.55 < changed.max() <= 0.6 + 1e-6
