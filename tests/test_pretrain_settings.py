"""Settings of a pretraining: refusals, batches, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentds.errors import InputError

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")

from latentds_trainers.pretrain.schedules import settle, settle_batch

from tests.pretraining import config_of


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": (0.5, 0.6)}, "--weights 0.5 0.6: give one for each .* above 0 and 1 together"),
        ({"weights": (1.0,)}, "--weights 1: give one for each of the 2 sets"),
        ({"weights": (1.5, -0.5)}, "above 0 and 1 together"),
        ({"data": ("a", "a")}, "each set once"),
        ({"originals": Path("p")}, "either --data or --originals"),
        ({"codec": "jpeg:10"}, "--codec belongs to --originals"),
        ({"patch_size": 256}, "--patch-size belongs to --originals"),
        ({"mpp": 0.5}, "--mpp belongs to --originals"),
        ({"epochs": 2}, "--steps or --epochs"),
        ({"precision": "bf16", "zero_stage": 1}, "moving average lies below"),
        ({"zero_stage": 3}, "teacher follows whole weights"),
        ({"input": "latents", "sample_every": 2}, "--sample-every belongs to pictures"),
        ({"probe_every": 4}, "needs a --probe"),
        ({"probe": "p", "probe_every": 3}, "no multiple of save_every 2"),
        ({"momentum": 1.5}, "from 0 to 1"),
        ({"mask_ratio": 0.5}, "--mask-ratio belongs to mae; leave it out with --method dino"),
        ({"method": "dinov2", "mae_dim": 64}, "--mae-dim belongs to mae; leave it out with"),
        ({"method": "mae", "momentum": 0.9}, "--momentum belongs to dino and dinov2; leave it out"),
        ({"method": "mae", "out_dim": 64}, "--out-dim belongs to dino and dinov2"),
        ({"method": "mae", "teacher_temp": 0.05}, "--teacher-temp belongs to dino"),
        ({"method": "mae", "locals": 4}, "--locals belongs to dino"),
        ({"method": "mae", "mask_ratio": 1.0}, "mask_ratio is 1.0; take a share above 0"),
        ({"method": "mae", "mae_dim": 90, "mae_heads": 6}, "a multiple of 12"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        config_of(tmp_path, **({"data": ("a", "b")} | changes))


@pytest.mark.parametrize(
    ("changes", "ranks", "batch", "passes", "images"),
    [
        ({"global_batch_size": 1024}, 4, 64, 4, 1024),
        ({"global_batch_size": 1024, "batch_size": 32}, 2, 32, 16, 1024),
        ({"global_batch_size": 96}, 1, 48, 2, 96),
        ({"global_batch_size": None, "batch_size": 8}, 2, 8, 1, 16),
        ({"global_batch_size": None}, 8, 64, 2, 1024),
    ],
)
def test_passes_follow_from_the_global_batch(tmp_path, changes, ranks, batch, passes, images):
    settled = settle_batch(config_of(tmp_path, data=("a",), **changes), ranks)
    found = (settled.batch_size, settled.accumulation, settled.global_batch_size)
    assert found == (batch, passes, images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 100}, "100 is no multiple of 3, 3 ranks .*; take 99 or 102"),
        (
            {"global_batch_size": 96, "batch_size": 5},
            "96 is no multiple of 15, 3 ranks times batch_size 5; take 90 or 105",
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        settle_batch(config_of(tmp_path, data=("a",), **changes), 3)


def settled(tmp_path: Path, **changes: Any) -> Any:
    given = {"lr": None, "warmup_steps": None, "steps": 100} | changes
    config = settle_batch(config_of(tmp_path, data=("a",), **given), 1)
    return settle(config, epoch_steps=5, edge_px=64, data_id="", views={})


def test_schedules_start_and_end_where_the_sources_have_them(tmp_path):
    run = settled(tmp_path, global_batch_size=512, batch_size=64)
    assert run.lr == pytest.approx(5e-4 * 2)
    assert (run.warmup_steps, run.freeze_last_steps, run.teacher_temp_steps) == (10, 1, 30)
    assert [run.lr_share(step) for step in (0, 9, 10)] == pytest.approx([0.1, 1, 1])
    assert run.lr * run.lr_share(100) == pytest.approx(1e-6)
    assert [run.weight_decay_at(step) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [run.momentum_at(step) for step in (0, 100)] == pytest.approx([0.996, 1])
    assert [run.teacher_temp_at(s) for s in (0, 15, 30, 99)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({"method": "dinov2", "global_batch_size": 256}, 4e-3 / 2),
        ({"method": "mae", "global_batch_size": 1024}, 1.5e-4 * 4),
        ({"method": "dino", "global_batch_size": 1024, "lr": 0.1}, 0.1),
    ],
)
def test_the_learning_rate_follows_the_batch_by_the_methods_rule(tmp_path, changes, lr):
    assert settled(tmp_path, **changes).lr == pytest.approx(lr)


def test_a_learning_rate_that_would_rise_to_its_end_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"lr is 0\.001 and min_lr 0\.01: the cosine would rise"):
        settled(tmp_path, lr=1e-3, min_lr=1e-2)


def test_epochs_are_counted_in_steps_of_the_feed(tmp_path):
    assert settled(tmp_path, steps=None, epochs=3).steps == 15
