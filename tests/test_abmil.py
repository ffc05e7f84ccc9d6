"""Attention over bags: the network, its settings, draws, and how bags are read."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from latentds.errors import WeightsError
from latentds.models.attention_mil import GatedABMIL, load_abmil, save_abmil

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers.abmil import bag_source
from latentds_trainers.abmil.bag_training import KeepingBest, Stopping, draw_bags, loss_weights
from latentds_trainers.abmil.config import PRESETS, AbmilConfig

from tests.bag_files import DIM, SLIDES, bag_of, make_job, reader_of, save_bag, settings


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return make_job(tmp_path / "job")


# The network


def test_the_network_is_ilses_gated_attention():
    torch.manual_seed(0)
    network = GatedABMIL(DIM, 3, hidden=6, attention=4).eval()
    features = torch.randn(5, DIM)
    logits, attention = network(features)
    w = {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}
    h = np.maximum(features.double().numpy() @ w["embed.0.weight"].T + w["embed.0.bias"], 0)
    branch = np.tanh(h @ w["tanh.0.weight"].T + w["tanh.0.bias"])
    branch = branch / (1 + np.exp(-(h @ w["gate.0.weight"].T + w["gate.0.bias"])))
    scores = np.exp((branch @ w["score.weight"].T + w["score.bias"])[:, 0])
    expected = scores / scores.sum()
    assert np.allclose(attention.detach(), expected, atol=1e-6)  # float32
    wanted = expected @ h @ w["head.weight"].T + w["head.bias"]
    assert np.allclose(logits.detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_bag_in_parts_gives_what_the_whole_gives(gated):
    torch.manual_seed(0)
    network = GatedABMIL(DIM, 2, gated=gated).eval()
    features = 30 * torch.randn(50, DIM)  # scores far apart
    whole, parts = network(features), network.in_parts(features.split(7))
    assert torch.allclose(parts[0], whole[0], atol=1e-4)  # float32, logits of some 10
    assert torch.allclose(parts[1], whole[1], atol=1e-6)


def test_the_order_of_patches_does_not_matter():
    network = GatedABMIL(DIM, 2).eval()
    features = torch.randn(9, DIM)
    assert torch.allclose(network(features)[0], network(features.flip(0))[0], atol=1e-6)


def test_a_bag_of_one_patch_has_all_the_attention():
    assert GatedABMIL(DIM, 2).eval().in_parts([torch.randn(1, DIM)])[1].tolist() == [1.0]


@pytest.mark.parametrize("gated", [True, False])
def test_weights_come_back_with_what_they_are_of(tmp_path, gated):
    network = GatedABMIL(DIM, 2, hidden=6, attention=4, gated=gated).eval()
    facts = {"dim": DIM, "hidden": 6, "attention": 4, "dropout": 0.0, "gated": gated}
    facts |= {"attention_dropout": 0.0, "activation": "relu", "post_attention": False}
    save_abmil(tmp_path / "w.safetensors", network.state_dict(), facts | {"classes": ["a", "b"]})
    loaded, found = load_abmil(str(tmp_path / "w.safetensors"))
    features = torch.randn(3, DIM)
    assert torch.equal(loaded(features)[0], network(features)[0]) and found["classes"] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"no safetensors", save({"x": torch.ones(1)})])
def test_weights_of_something_else_are_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.safetensors: no weights of attention over bags"):
        load_abmil(tmp_path / "w.safetensors")


# Settings


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(tmp_path, preset):
    config = AbmilConfig(
        bags=tmp_path, labels=tmp_path / "l.csv", out=tmp_path, preset=preset, lr=0.5
    )
    assert config.settings == dataclasses.replace(PRESETS[preset], lr=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bags": None}, "give --bags, or --data with --embedder"),
        ({"bags": None, "data": Path("x")}, "needs an --embedder"),
        ({"on_the_fly": True}, "--on-the-fly makes features of --data"),
        ({"folds": 1}, "folds is 1; at least 2"),
        ({"epochs": 0}, "epochs is 0; at least 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0; from 0 to below 1"),
        ({"lr": -1.0}, r"lr is -1\.0; a positive number"),
        ({"max_patches": 0}, "max_patches is 0; at least 1"),
        ({"cache_gb": -1.0}, r"cache_gb is -1\.0; 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        settings(tmp_path, **options)


def test_help_needs_no_torch():
    code = "import sys; import latentds_trainers.abmil.__main__; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# Draws, weights, early stopping


def test_balanced_draws_take_every_class_equally_often():
    targets = np.array([0] * 90 + [1] * 10)
    drawn = targets[draw_bags(targets, 4000, key=7, is_balanced=True)]
    assert abs(drawn.mean() - 0.5) < 0.03  # four standard deviations of 4000 fair coins


def test_plain_draws_take_every_bag_before_any_twice():
    drawn = draw_bags(np.array([0, 1, 0, 1, 1]), 10, key=7, is_balanced=False)
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]


def test_loss_weights_are_one_on_average():
    targets = np.array([0, 0, 0, 1])
    weights = loss_weights(targets, 2, is_weighted=True)
    assert weights.tolist() == pytest.approx([2 / 3, 2.0])
    assert float(weights[targets].mean()) == pytest.approx(1.0)


def test_early_stopping_counts_epochs_since_the_lowest_loss():
    stopping = Stopping()
    assert [stopping.is_better(loss, e) for e, loss in enumerate([3, 2, 2, 4], 1)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert stopping.state_dict() == {"lowest": 2, "epoch": 2, "waited": 2}


def test_the_best_weights_are_part_of_the_state():
    network = KeepingBest(torch.nn.Linear(2, 2))
    network.keep()
    best = network.network.weight.detach().clone()
    torch.nn.init.zeros_(network.network.weight)
    other = KeepingBest(torch.nn.Linear(2, 2))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.best()["weight"], best) and not other.network.weight.any()


# Reading


def test_bags_are_the_same_from_memory_and_from_their_file(job):
    rows = np.array([1, 4])
    for cache_gb in (0.0, 1.0):
        reader = reader_of(job, cache_gb)
        assert np.array_equal(reader.read("s03"), bag_of(3))
        assert np.array_equal(reader.read("s03", rows), bag_of(3)[rows])
        assert np.array_equal(torch.cat(list(reader.parts("s03"))), bag_of(3))


def test_memory_for_bags_is_bounded(job):
    reader = reader_of(job, cache_gb=2.5 * bag_of(0).nbytes / bag_source.GB)
    for number in range(SLIDES):
        reader.read(f"s{number:02d}")
    assert sorted(reader.kept) == ["s00", "s01"]


def test_few_rows_of_a_bag_are_read_without_the_others(tmp_path):
    features = np.random.default_rng(0).random((100, DIM), np.float32)
    save_bag(tmp_path / "features_toy" / "s.h5", features)
    reader = reader_of(tmp_path, cache_gb=1.0)
    rows = np.array([70, 3])
    assert np.array_equal(reader.read("s", rows), features[rows]) and not reader.kept
    assert np.array_equal(reader.read("s", np.arange(50)), features[:50]) and list(reader.kept)


def test_a_large_bag_is_read_in_parts(job, monkeypatch):
    monkeypatch.setattr(bag_source, "PART", 3)
    sizes = {cache: [len(p) for p in reader_of(job, cache).parts("s03")] for cache in (0.0, 1.0)}
    assert sizes == {0.0: [3, 3, 1], 1.0: [3, 3, 1]}


def test_a_bag_that_does_not_fit_is_read_in_the_memory_of_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(bag_source, "PART", 500)
    features = np.random.default_rng(0).random((10_000, 64), np.float32)
    save_bag(tmp_path / "features_toy" / "s.h5", features)
    reader = reader_of(tmp_path, cache_gb=0.0)
    tracemalloc.start()
    count = sum(len(part) for part in reader.parts("s"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000 and peak < features.nbytes / 5
