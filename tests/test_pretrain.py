"""Pretraining: batches, schedules, feeds, runs that go on, ranks, and every refusal."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentds.errors import ContractError, InputError, UnknownNameError
from latentds.randomness import patch_seeds

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")
pytest.importorskip("kornia")

from latentds_trainers.pretrain import PretrainConfig, main
from latentds_trainers.pretrain_feed import FeedBatch, LoaderFeed, micro_batch
from latentds_trainers.pretrain_pictures import OwnOrder
from latentds_trainers.pretrain_schedule import settle, settle_batch
from latentds_trainers.pretrain_sources import open_source
from latentds_trainers.pretrain_task import PretrainTask

from tests.conftest import convert_with_mean, save_pictures

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "arch": "test_vit", "global_px": 64, "local_px": 32, "locals": 2, "out_dim": 64,
    "hidden_dim": 32, "bottleneck_dim": 16, "mae_dim": 32, "mae_depth": 1, "mae_heads": 4,
    "num_workers": 0, "global_batch_size": 8, "steps": 4, "save_every": 2, "log_every": 1,
    "lr": 1e-3, "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Class folders of 44 pictures of 64 px."""
    root = tmp_path_factory.mktemp("pretrain") / "pictures"
    save_pictures(root / "tumour", 24, edge=64)
    save_pictures(root / "stroma", 20, first_seed=100, edge=64)
    return root


@pytest.fixture(scope="module")
def latents(pictures) -> Path:
    """The same as a data set of `tiny`."""
    from latentds.conversion.config import ConvertConfig
    from latentds.conversion.pipeline import convert

    out = pictures.with_name("latents")
    convert(ConvertConfig(source=pictures, out=out, device="cpu", workers=2, fit_patches=16))
    return out


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """A data set of other latents, 64 px too, whose decoder is nowhere."""
    root = tmp_path_factory.mktemp("others")
    save_pictures(root / "in", 24, first_seed=300, edge=64)
    convert_with_mean(root / "in", root / "out")
    return root / "out"


def config_of(out: Path, **changes: Any) -> PretrainConfig:
    values = SMALL | changes
    data = values.get("data", ())
    return PretrainConfig(**values | {"out": out, "data": tuple(map(str, data))})


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["model/loss"] for line in log_of(out)]


class Killed(Exception):
    """What stops a run in a test."""


def run_until(config: PretrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train up to a step, then die."""
    take = PretrainTask.step

    def dying(self: PretrainTask, number: int) -> Any:
        if number == step:
            raise Killed
        return take(self, number)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PretrainTask, "step", dying)
        main(config)


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": (0.5, 0.6)}, "sum to 1.1, not to 1; .*--weights 0.454545 0.545455"),
        ({"weights": (1.0,)}, "1 for 2 sets"),
        ({"weights": (1.5, -0.5)}, "every one must be above 0"),
        ({"data": ("a", "a")}, "each set once"),
        ({"originals": Path("p")}, "either --data or --originals"),
        ({"codec": "jpeg:10"}, "--codec is of --originals"),
        ({"epochs": 2}, "--steps or --epochs"),
        ({"precision": "bf16", "zero_stage": 1}, "moving average lies below"),
        ({"zero_stage": 3}, "teacher follows whole weights"),
        ({"input": "latents", "sample_every": 2}, "--sample-every is of pictures"),
        ({"probe_every": 4}, "without a --probe"),
        ({"probe": "p", "probe_every": 3}, "a multiple of save_every 2"),
        ({"momentum": 1.5}, "from 0 to 1"),
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
        ({"global_batch_size": None, "batch_size": 8, "accumulation": 3}, 2, 8, 3, 48),
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
        ({"global_batch_size": 100}, "over 3 ranks leaves 1 images; take a multiple of 3: 99, 102"),
        (
            {"global_batch_size": 96, "batch_size": 5},
            "32 images for each of 3 ranks, which batch_size 5 does not divide; "
            "take batch_size 2, 4, 8",
        ),
        ({"global_batch_size": 96, "accumulation": 2}, "accumulation 2 follows from"),
        (
            {"global_batch_size": 3 * 67},
            "passes of at most 64 would have 1; take a multiple of 192",
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
    assert [run.is_last_frozen(step) for step in (0, 1)] == [True, False]


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


def test_epochs_are_counted_in_steps_of_the_feed(tmp_path):
    assert settled(tmp_path, steps=None, epochs=3).steps == 15


# Feeds


def test_an_own_order_shows_every_patch_once_an_epoch_on_any_ranks():
    def epoch(ranks: int, number: int) -> list[np.ndarray]:
        orders = [
            OwnOrder(patches=24, global_batch=8, rank=rank, ranks=ranks, seed=3)
            for rank in range(ranks)
        ]
        steps = range(number * 3, number * 3 + 3)
        return [np.concatenate([order.share(step)[0] for order in orders]) for step in steps]

    assert sorted(np.concatenate(epoch(1, 0)).tolist()) == list(range(24))
    assert np.array_equal(epoch(1, 1), epoch(4, 1)) and not np.array_equal(epoch(1, 0), epoch(1, 1))


def patches_of(config: PretrainConfig, rank: int, ranks: int, state: Any = None) -> Any:
    """A feed on one of several ranks, going on from a state."""
    feed = open_source(settle_batch(config, ranks), CPU, rank, ranks).feed
    if state is not None:
        feed.load_state_dict(state)
    return feed


def steps_of(feed: Any, count: int) -> list[FeedBatch]:
    return [groups[0] for groups, _ in zip(feed, range(count), strict=False)]


@pytest.mark.parametrize("source", ["latents", "originals"])
def test_a_feed_goes_on_with_the_right_patches_on_other_ranks(tmp_path, pictures, latents, source):
    given = {"data": (latents,)} if source == "latents" else {"originals": pictures}
    config = config_of(tmp_path, **given)
    whole = steps_of(patches_of(config, 0, 1), 12)
    first = patches_of(config, 0, 1)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    parts = [steps_of(patches_of(config, rank, 2, state), 8) for rank in (0, 1)]
    for step, pair in zip(whole[4:], zip(*parts, strict=True), strict=True):
        assert torch.equal(step.seeds, torch.cat([part.seeds for part in pair]))
        assert torch.allclose(
            step.values, torch.cat([part.values for part in pair]), atol=1e-5
        )  # atol: float32 convolutions of other batch sizes
    seeds = torch.cat([step.seeds for step in whole[:5]])
    assert len(seeds.unique()) == 40  # an epoch: each patch at most once


def test_originals_are_paired_with_the_set_made_of_them(tmp_path, pictures, latents):
    decoded = steps_of(patches_of(config_of(tmp_path, data=(latents,)), 0, 1), 6)
    config = config_of(tmp_path, originals=pictures, paired_with=str(latents), codec="jpeg:90")
    coded = steps_of(patches_of(config, 0, 1), 6)
    for one, other in zip(decoded, coded, strict=True):
        assert torch.equal(one.seeds, other.seeds)
        # The same pictures: tiny's error on ramps; other pictures are 0.3 away.
        assert float((one.values - other.values).abs().mean()) < 0.08


def test_a_feed_does_not_go_on_in_another_order(tmp_path, pictures):
    state = patches_of(config_of(tmp_path, originals=pictures), 0, 1).state_dict()
    with pytest.raises(ContractError, match="patches with seed 0, these have 1"):
        patches_of(config_of(tmp_path, originals=pictures, seed=1), 0, 1, state)


def test_a_split_that_is_not_there_is_refused(tmp_path, latents):
    with pytest.raises(UnknownNameError, match=r"unknown split of .*val.*known: train"):
        patches_of(config_of(tmp_path, data=(latents,), split="val"), 0, 1)


def test_originals_of_another_set_are_refused(tmp_path, pictures, others):
    config = config_of(tmp_path, originals=pictures, paired_with=str(others))
    with pytest.raises(InputError, match=r"24 of its 24 patches are not in .*pictures"):
        patches_of(config, 0, 1)


def test_a_set_smaller_than_a_step_is_refused(tmp_path, latents, pictures):
    for given in ({"data": (latents,)}, {"originals": pictures}):
        config = config_of(tmp_path, **given, global_batch_size=64)
        with pytest.raises(InputError, match=r"44 patches .*before one step of 64 is filled"):
            patches_of(config, 0, 1)


class ShortLoader:
    """A loader of three batches an epoch that gives fewer."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        for size in self.sizes:
            yield type("B", (), {"images": torch.zeros(size, 1), "seeds": torch.zeros(size)})


@pytest.mark.parametrize(
    ("sizes", "words"), [([4, 4], "ended after 2 of 3 steps"), ([4, 3], "3 patches for a step")]
)
def test_a_set_that_ends_early_is_told(sizes, words):
    feed = LoaderFeed(ShortLoader(sizes), 4, {"source": "brca"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"brca: {words}"):
        list(feed)


@pytest.mark.parametrize("sizes", [(6, 2), (5, 3)])
def test_passes_of_a_step_take_every_patch_once(sizes):
    groups = [FeedBatch(torch.arange(n)[:, None] + 10 * k, torch.arange(n) + 10 * k)
              for k, n in enumerate(sizes)]  # fmt: skip
    passes = [micro_batch(groups, number, 2) for number in range(2)]
    taken = [torch.cat([part.seeds for part in parts]).tolist() for parts in passes]
    assert [len(part) for part in taken] == [4, 4]
    assert sorted(itertools.chain(*taken)) == [*range(sizes[0]), *range(10, 10 + sizes[1])]


def test_seeds_are_of_patch_and_epoch_alone():
    order = OwnOrder(patches=16, global_batch=8, rank=0, ranks=1, seed=5)
    rows, seeds = order.share(2)  # the second epoch's first step
    zeros = np.zeros_like(rows)
    assert np.array_equal(seeds, patch_seeds(5, zeros + 1, zeros, rows))


# Runs on one rank, in this process


@pytest.fixture(scope="module")
def finished(tmp_path_factory, latents) -> Path:
    """The folder of a run of DINO."""
    out = tmp_path_factory.mktemp("run") / "ssl"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        main(config_of(out, data=(latents,), sample_every=4))
    return out


def test_a_run_tells_what_it_took_and_reached(finished):
    result = json.loads((finished / "result.json").read_text())
    assert (result["method"], result["steps"], result["images"]) == ("dino", 4, 32)
    assert result["source"]["source"] == "tiny-v1+kmeans"
    assert result["bytes_read"] == 32 * result["source"]["bytes_per_patch"] == 32 * 256
    assert 0 < result["waited_s"] < result["wall_s"] and result["cpu_s"] > 0
    assert result["last"]["model/loss"] == losses(finished)[-1]
    assert (finished / "samples" / "step-000004.png").exists()


def test_the_exported_backbone_is_the_teacher_of_the_last_checkpoint(finished):
    timm = pytest.importorskip("timm")
    network = timm.create_model(f"local-dir:{finished / 'backbone'}", pretrained=True)
    saved = torch.load(
        finished / "checkpoints" / "step-000004" / "model" / "mp_rank_00_model_states.pt",
        weights_only=False,
    )["module"]
    name = "patch_embed.proj.weight"
    assert torch.equal(network.state_dict()[name], saved[f"network.teacher.backbone.{name}"])
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "mae"}, "made with method dino, this run has mae"),
        ({"arch": "test_vit2"}, "made with arch test_vit, this run has test_vit2"),
        (
            {"local_scale": (0.1, 0.3)},
            r"views' local_scale \[0.05, 0.4\], this run has \[0.1, 0.3\]",
        ),
        ({"weights": (1.0,)}, r"made with weights \[\], this run has \[1.0\]"),
        ({"data": "others", "input": "latents"}, "made with input images, this run has latents"),
        ({"global_batch_size": 16}, "made with global_batch_size 8, this run has 16"),
        ({"seed": 1}, "made with seed 0, this run has 1"),
    ],
)
def test_a_run_does_not_go_on_as_another(finished, latents, others, changes, words):
    data = (others,) if "data" in changes else (latents,)
    with pytest.raises(ContractError, match=words):
        main(config_of(finished, **(changes | {"data": data})))


def test_a_run_does_not_go_on_with_other_patches(finished, pictures):
    with pytest.raises(
        ContractError, match=r"made with the patches of .*latents.*others in .*pict"
    ):
        main(config_of(finished, originals=pictures))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dinov2", "mae"])
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, latents, method, monkeypatch):
    options = {"data": (latents,), "method": method, "drop_path": 0.2, "steps": 6}
    main(config_of(tmp_path / "whole", **options))
    run_until(config_of(tmp_path / "parts", **options), 3, monkeypatch)
    main(config_of(tmp_path / "parts", **options))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_forward_passes_of_a_step_add_up_to_one(tmp_path, latents):
    options = {"data": (latents,), "method": "mae", "steps": 3}
    main(config_of(tmp_path / "large", **options, batch_size=8))
    main(config_of(tmp_path / "small", **options, batch_size=2))
    # atol: float32 sums in another order
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-5)


def test_latents_are_trained_on_without_decoding_and_without_a_decoder(tmp_path, others):
    main(config_of(tmp_path, data=(others,), input="latents", steps=2))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["source"]["source"] == "mean8+kmeans, not decoded"
    assert result["views"]["kind"] == "LatentCrops"


@pytest.mark.slow
def test_a_run_is_probed_with_every_checkpoint(tmp_path, latents):
    pytest.importorskip("sklearn")
    options = {"probe": str(latents), "probe_neighbours": 3, "steps": 2, "method": "mae"}
    main(config_of(tmp_path, data=(latents,), **options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 <= result["probe"]["knn_accuracy"] <= 1 and result["probe_s"] > 0
    assert log_of(tmp_path)[-1]["validation/knn_accuracy"] == result["probe"]["knn_accuracy"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A data set of `tiny` with patches of 96 px."""
    from latentds.conversion.config import ConvertConfig
    from latentds.conversion.pipeline import convert

    root = tmp_path_factory.mktemp("larger")
    save_pictures(root / "in", 24, first_seed=300, edge=96)
    convert(ConvertConfig(source=root / "in", out=root / "out", device="cpu", fit_patches=16))
    return root / "out"


def test_sets_of_other_patch_sizes_are_trained_on_together(tmp_path, latents, larger):
    options = {"data": (latents, larger), "weights": (0.75, 0.25), "method": "mae"}
    main(config_of(tmp_path / "whole", **options, steps=3))
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert [part["weight"] for part in result["source"]["sets"]] == [0.75, 0.25]
    assert result["source"]["bytes_per_patch"] == 0.75 * 256 + 0.25 * 576


@pytest.mark.parametrize("name", ["larger", "others"])
def test_latents_of_several_kinds_are_no_one_input(tmp_path, latents, name, request):
    data = (latents, request.getfixturevalue(name))
    with pytest.raises(ContractError, match=r"only sets of one latent_id.*as pixels, others mix"):
        main(config_of(tmp_path, data=data, input="latents"))


def test_sets_that_show_fields_of_unlike_size_are_refused_by_name(tmp_path):
    for name, mpp in (("fine", 0.25), ("coarse", 0.5)):
        save_pictures(tmp_path / name / "in", 12, edge=64)
        convert_with_mean(tmp_path / name / "in", tmp_path / name / "out", mpp=mpp)
    data = [tmp_path / name / "out" for name in ("fine", "coarse")]
    config = config_of(tmp_path, data=data, input="latents")
    with pytest.raises(ContractError, match=r"fine/out: .* show 16 um, .*coarse/out: .* 32 um"):
        patches_of(config, 0, 1)


def test_a_finished_run_whose_set_moved_is_finished_again(finished, latents, tmp_path):
    moved = shutil.copytree(latents, tmp_path / "moved")
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "result.json").unlink()
    main(config_of(copy, data=(moved,)))
    results = [json.loads((out / "result.json").read_text()) for out in (finished, copy)]
    assert results[0]["last"] == results[1]["last"]


# Ranks, with the real launcher


def under_deepspeed(ranks: int, words: list[str]) -> None:
    """Run the recipe to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    command += ["--master_port", port, "--module", "latentds_trainers.pretrain", *words]
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]


def words_of(config: dict[str, Any]) -> list[str]:
    """Options as on a command line."""
    return [word for name, value in config.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [("mae", 0), ("dino", 1), ("dinov2", 0)])
def test_two_ranks_go_on_to_the_losses_of_one(tmp_path, latents, method, stage, monkeypatch):
    options = {"method": method, "zero_stage": stage, "drop_path": 0.0, "momentum": 0.5}
    options |= {"steps": 6, "save_every": 3}
    one, two = tmp_path / "one", tmp_path / "two"
    main(config_of(one, data=(latents,), **options))
    run_until(config_of(two, data=(latents,), **options), 3, monkeypatch)
    words = words_of(SMALL | options | {"out": two, "data": latents})
    under_deepspeed(2, words)
    assert json.loads((two / "result.json").read_text())["ranks"] == 2
    # rel: float32 sums in another order, through three steps of Adam
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
