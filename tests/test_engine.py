"""The training engine: resuming, ranks, ZeRO stages, and every way a run can end."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.errors import ContractError, InputError, MissingExtraError

pytest.importorskip("deepspeed")

from latentds_trainers.engine import training_log, wrapping
from latentds_trainers.engine.checkpoints import complete_checkpoints
from latentds_trainers.engine.training import TrainConfig

from tests import toy_recipe
from tests.launched import PATIENCE_S, ROOT, VARIABLES, deepspeed_command, run_launched, started
from tests.toy_recipe import Toy, ToyConfig, toy_engine
from tests.trainer_ranks import run_ranks, run_words


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    """Engines of this process run on the CPU, whatever the machine has."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def train(out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Run the toy in this process; the decoder's weights at the end."""
    config = ToyConfig(out=out, **options)
    engine = toy_engine(config)
    engine.run(Toy(engine, config))
    return engine.weights("decoder")


def test_several_processes_without_ranks_do_not_train_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # by another test
    with pytest.raises(InputError, match="RANK='' and WORLD_SIZE='4' in the environment"):
        train(tmp_path / "run")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, decoder's loss, critic's loss."""
    return [(line["step"], line["decoder/loss"], line["critic/loss"]) for line in lines(out)]


def names(out: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(out)]


def leftovers(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").glob(".*")]


def under_deepspeed(out: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the toy with the real launcher; stdout and stderr together."""
    return run_launched(deepspeed_command(ranks, "tests.toy_recipe", "--out", str(out), *options))


def cut_copy(whole: Path, parts: Path, step: int) -> Path:
    """A run's folder as it was when the checkpoint of a step was its newest."""
    shutil.copytree(whole, parts)
    for path in complete_checkpoints(parts):
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    log = (parts / "log.jsonl").read_text().splitlines(keepends=True)
    (parts / "log.jsonl").write_text("".join(log[:step]))
    return parts


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """The folder of a run of two steps; read only."""
    out = tmp_path_factory.mktemp("engine") / "two"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        train(out, steps=2)
    return out


@pytest.fixture
def own_two_steps(two_steps, tmp_path) -> Path:
    """A copy that a test may change or go on with."""
    return Path(shutil.copytree(two_steps, tmp_path / "two"))


# One rank, in this process


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, precision):
    whole = train(tmp_path / "whole", precision=precision, steps=4)
    train(tmp_path / "parts", precision=precision, steps=3)
    parts = train(tmp_path / "parts", precision=precision, steps=4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_steps_before_a_validation_that_failed_are_not_lost(tmp_path):
    config = ToyConfig(out=tmp_path, save_every=4)
    engine = toy_engine(config)

    def validate() -> dict[str, float]:
        raise InputError("the probe's set is gone")

    with pytest.raises(InputError, match="is gone"):
        engine.run(Toy(engine, config), validate=validate)
    assert names(tmp_path) == ["step-000004"]
    assert toy_engine(config).step == 4


def test_accumulation_equals_a_larger_batch(tmp_path):
    options = {"clip": 0.5, "adaptive": False}  # an adaptive weight is one of a forward pass
    large = train(tmp_path / "large", batch_size=4, **options)
    small = train(tmp_path / "small", batch_size=2, accumulation=2, **options)
    assert (small.pop("seen"), large.pop("seen")) == (12, 6)
    # atol: float32 sums in another order, through six steps of Adam
    assert all(torch.allclose(small[name], large[name], atol=1e-5) for name in large)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The decoder's weights of a run that spreads nothing."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        return train(tmp_path_factory.mktemp("plain"), clip=0.5, adaptive=False)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_take_the_same_steps_as_none(tmp_path, plain, stage):
    zero = train(tmp_path, clip=0.5, adaptive=False, zero_stage=stage)
    assert all(torch.allclose(zero[name], plain[name], atol=1e-5) for name in plain)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is reserved")
def test_a_small_network_reserves_little_memory(tmp_path):
    """DeepSpeed's own buffers of gigabytes once kept this process from starting others."""
    before = reserved_mb()
    train(tmp_path / "run", steps=1, zero_stage=3)
    assert reserved_mb() - before < 500


def reserved_mb() -> int:
    """Private memory this process has asked for, filled or not."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmData:")[2].split()[0]) >> 10


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_stages_resume_to_the_same_losses(tmp_path, stage, precision):
    options = {"zero_stage": stage, "precision": precision}
    train(tmp_path / "whole", **options)
    parts = cut_copy(tmp_path / "whole", tmp_path / "parts", 4)
    train(parts, **options)
    assert losses(parts) == losses(tmp_path / "whole")


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(
        InputError, match=r"step 4: l1 is nan.*last good checkpoint is .*step-000002"
    ):
        train(tmp_path, nan_at=3)
    assert names(tmp_path) == ["step-000002"]


def test_a_gradient_that_is_not_a_number_stops_before_it_is_saved(tmp_path):
    with pytest.raises(InputError, match=r"step 2: decoder/grad_norm is nan"):
        train(tmp_path, nan_gradient_at=1)
    assert names(tmp_path) == []


def test_the_newest_checkpoints_are_kept_and_remains_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step-000099.partial").mkdir(parents=True)
    train(tmp_path, steps=5, save_every=1, keep=3)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-000005"]
    assert leftovers(tmp_path) == []


def test_the_log_has_every_step_once_after_a_resume(tmp_path):
    with pytest.raises(InputError):
        train(tmp_path, nan_at=3)  # logged three steps, saved two
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "decoder/lo')
    train(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines(tmp_path)] == [0.005] + 5 * [0.01]


def test_a_checkpoint_is_due_when_its_minutes_are_over(tmp_path):
    train(tmp_path, steps=4, save_every=100, save_minutes=1e-9, keep=9)
    assert names(tmp_path) == [f"step-{step:06d}" for step in (1, 2, 3, 4)]


def test_a_finished_run_takes_no_further_step(own_two_steps):
    before = losses(own_two_steps)
    train(own_two_steps, steps=2)
    assert losses(own_two_steps) == before


def test_a_recipe_ends_its_run_early_with_a_checkpoint(tmp_path):
    train(tmp_path, end_at=2, save_every=100)
    assert names(tmp_path) == ["step-000003"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_run_that_was_ended_early_takes_no_further_step(tmp_path):
    train(tmp_path, end_at=2)
    train(tmp_path, end_at=2, steps=9)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_run_cut_before_its_early_end_goes_on_to_it(tmp_path):
    whole = train(tmp_path / "whole", end_at=4)
    with pytest.raises(InputError):
        train(tmp_path / "parts", end_at=4, nan_gradient_at=3)
    parts = train(tmp_path / "parts", end_at=4)
    assert names(tmp_path / "parts")[-1] == "step-000005"
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_checkpoint_older_than_early_ends_is_read(own_two_steps):
    path = own_two_steps / "checkpoints" / "step-000002" / "state.json"
    state = json.loads(path.read_text())
    del state["ended"]
    path.write_text(json.dumps(state))
    assert not toy_engine(ToyConfig(out=own_two_steps)).has_ended


def test_a_checkpoint_of_another_recipe_is_refused(own_two_steps):
    with pytest.raises(ContractError, match="checkpoint of recipe toy, not of other; .*--out"):
        toy_engine(ToyConfig(out=own_two_steps), recipe="other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.5}, r"made with lr 0\.01, this run has 0\.5; .*--out"),
        ({"zero_stage": 1}, "made with zero_stage 0, this run has 1"),
        ({"batch_size": 3}, "made with 2 images a step on 1 ranks, this run has 3 on 1"),
        ({"steps": 1}, "is beyond steps 1"),
    ],
)
def test_a_checkpoint_of_another_setting_is_refused(own_two_steps, change, words):
    with pytest.raises(ContractError, match=words):
        toy_engine(ToyConfig(out=own_two_steps, **change))


def test_an_option_newer_than_the_checkpoint_had_its_default(own_two_steps):
    path = own_two_steps / "checkpoints" / "step-000002" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["schedule"]
    path.write_text(json.dumps(state))
    assert toy_engine(ToyConfig(out=own_two_steps)).step == 2
    with pytest.raises(ContractError, match="made with schedule 'constant'"):
        toy_engine(ToyConfig(out=own_two_steps, schedule="cosine"))


def test_a_log_that_cannot_be_written_ends_the_run_after_its_checkpoint(tmp_path):
    (tmp_path / "samples").write_text("no folder")
    with pytest.raises(InputError, match="samples"):
        toy_recipe.train(ToyConfig(out=tmp_path, sample_every=2))
    assert names(tmp_path) == ["step-000002"]


def test_a_log_that_cannot_be_started_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(InputError, match=r"log\.jsonl"):
        train(tmp_path)


def test_a_damaged_state_is_named(own_two_steps):
    (own_two_steps / "checkpoints" / "step-000002" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        toy_engine(ToyConfig(out=own_two_steps))


def test_a_step_beyond_the_spike_is_left_out(tmp_path):
    train(tmp_path, steps=2, clip=1e-3, spike=2.0)
    assert [line["decoder/left_out"] for line in lines(tmp_path)] == [1.0, 1.0]
    assert lines(tmp_path)[0]["decoder/grad_norm"] > 2e-3


class CountingLoader:
    """A loader whose state is the number of its batch."""

    def __init__(self) -> None:
        self.batch, self.bad = 0, ["pack 3"]

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def gather_bad_packs(self) -> list[str]:
        return self.bad

    def load_state_dict(self, state: dict[str, int], bad_packs: tuple[str, ...]) -> None:
        self.batch, self.bad = state["batch"], [*bad_packs, "resumed"]


def test_the_loaders_state_comes_back(tmp_path):
    config = ToyConfig(out=tmp_path, steps=2)
    loader, resumed = CountingLoader(), CountingLoader()
    engine = toy_engine(config, loader=loader)
    loader.batch = 17
    engine.run(Toy(engine, config))
    toy_engine(config, loader=resumed)
    assert (resumed.batch, resumed.bad) == (17, ["pack 3", "resumed"])


def test_pictures_figures_and_the_config_are_written(tmp_path):
    toy_recipe.train(ToyConfig(out=tmp_path, steps=4, sample_every=2, tensorboard=True))
    assert Image.open(tmp_path / "samples" / "step-000004.png").size == (18, 18)  # 2x2 of 8 px
    assert {"validation/l1", "images_per_s", "seconds"} <= lines(tmp_path)[-1].keys()
    assert "validation/l1" not in lines(tmp_path)[0]
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == "toy"
    state = json.loads((tmp_path / "checkpoints" / "step-000004" / "state.json").read_text())
    assert torch.__version__.startswith(state["versions"]["torch"]) and state["world_size"] == 1
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"deepspeed is not installed.*latentds\[train\]"):
        wrapping.load_deepspeed()


def test_a_full_disk_names_the_file_of_the_log_and_of_a_picture(tmp_path):
    log = training_log.TrainingLog(
        tmp_path, step=0, steps=2, seconds=0.0, images=1, tensorboard=False
    )
    (tmp_path / "samples").mkdir()
    for name in ("log.jsonl", "samples/step-000001.png"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
        log.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match=r"No space left on device: .*step-000001\.png"):
        log.picture(1, torch.rand(1, 3, 64, 64))


def test_a_grid_pads_with_white():
    grid = training_log.picture_grid(torch.zeros(3, 3, 4, 4), gap=1)
    assert grid.shape == (9, 9, 3) and np.all(grid[5:, 5:] == 255) and np.all(grid[:4, :4] == 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"lr": -1.0}, r"lr is -1\.0; a positive number"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"precision": "bf16"}, "bf16 needs zero_stage 1, 2 or 3"),
        ({"spike": 10.0}, "spike needs clip"),
        ({"clip": 1.0, "spike": 10.0, "zero_stage": 1}, "spike needs clip, and zero_stage 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**({"out": tmp_path, "steps": 1, "batch_size": 1, "lr": 1.0} | change))


def test_the_learning_rate_warms_up_then_follows_its_schedule(tmp_path):
    constant = ToyConfig(out=tmp_path, steps=100, warmup_steps=4)
    assert [constant.lr_share(step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(constant, schedule="cosine", warmup_steps=0)
    assert [cosine.lr_share(step) for step in (0, 50)] == pytest.approx([1.0, 0.5])
    assert cosine.lr_share(99) < 1e-3


def test_help_needs_no_torch():
    code = (
        "import sys; import latentds_trainers.train_codec.__main__; print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# Processes of their own


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The real refusal of a write: no file may grow beyond 8 KB, torch's do."""
    train(tmp_path, steps=2, width=32)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "tests.toy_recipe", "--out", str(tmp_path), "--width", "32"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | VARIABLES | {"PYTHONDONTWRITEBYTECODE": "1"},  # none is cut either
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "step-000004 could not be saved" in ended.stderr
    assert "last good checkpoint is" in ended.stderr and "step-000002" in ended.stderr
    assert names(tmp_path) == ["step-000002"] and leftovers(tmp_path) == []


@pytest.mark.slow
def test_one_ranks_full_disk_ends_all_ranks(tmp_path, processes):
    out = tmp_path / "run"
    words = ["--full-disk-at", "2", "--zero-stage", "1"]
    ended = run_words(processes, out, 2, "tests.toy_recipe", *words)
    assert [rank.code for rank in ended] == [1, 1]
    text = "".join(rank.text for rank in ended)
    assert "step-000004 could not be saved: [Errno 28] No space left on device" in text
    assert names(out) == ["step-000002"] and leftovers(out) == []


OF_TWO_RANKS = {"clip": 0.5, "adaptive": False}


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, processes) -> Callable[[int], Path]:
    """The folder of a run of six steps on two ranks, by its ZeRO stage; read only."""

    @functools.cache
    def folder(stage: int) -> Path:
        out = tmp_path_factory.mktemp(f"stage{stage}") / "two"
        config = ToyConfig(out=out, zero_stage=stage, **OF_TWO_RANKS)
        run_ranks(processes, toy_recipe.train, config, 2)
        return out

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_of_twice_the_batch_and_can_become_it(tmp_path, of_two_ranks, stage):
    """Also by DeepSpeed's universal checkpoint, for the stages that spread the optimizer."""
    cut_copy(of_two_ranks(stage), tmp_path / "two", 4)
    config = OF_TWO_RANKS | {"zero_stage": stage, "batch_size": 4}
    train(tmp_path / "one", **config)
    train(tmp_path / "two", **config)
    # atol: float32 sums in another order, through six steps of Adam
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    seen = [line["seen"] for line in lines(tmp_path / "two")]
    assert seen == [1, 2, 3, 4, 5, 6]  # buffers came along


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_converted_is_refused(tmp_path, of_two_ranks):
    out = cut_copy(of_two_ranks(1), tmp_path / "run", 4)
    (shard,) = (out / "checkpoints" / "step-000004" / "critic").glob("*rank_1*optim_states.pt")
    shard.write_bytes(b"no longer a checkpoint")
    with pytest.raises(ContractError, match="cannot be converted for another number of ranks"):
        toy_engine(ToyConfig(out=out, **OF_TWO_RANKS, zero_stage=1, batch_size=4))


@pytest.mark.slow
def test_two_ranks_resume_bit_by_bit(tmp_path, of_two_ranks, processes):
    whole = of_two_ranks(2)
    parts = cut_copy(whole, tmp_path / "parts", 4)
    config = ToyConfig(out=parts, zero_stage=2, **OF_TWO_RANKS)
    run_ranks(processes, toy_recipe.train, config, 2)
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_one_ranks_nan_stops_all_ranks(tmp_path, processes):
    out = tmp_path / "run"
    ended = run_words(processes, out, 2, "tests.toy_recipe", "--nan-at", "3")
    assert [rank.code for rank in ended] == [1, 1]
    assert "step 4: l1 is nan" in "".join(rank.text for rank in ended)
    assert names(out) == ["step-000002"]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_same_command_goes_on(tmp_path, processes):
    out = tmp_path / "run"
    ended = under_deepspeed(out, 2, "--die-at", "3")
    assert ended.returncode != 0
    run_ranks(processes, toy_recipe.train, ToyConfig(out=out), 2)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_a_rank_stops_all_with_a_checkpoint(tmp_path, processes, name):
    out = tmp_path / "run"
    words = ["--terminate-at", "2", "--terminate-by", name, "--save-every", "100"]
    ended = run_words(processes, out, 2, "tests.toy_recipe", *words)
    assert [rank.code for rank in ended] == [143, 143]
    assert "stopped at step 3" in "".join(rank.text for rank in ended)
    assert names(out) == ["step-000003"]
    train(out, batch_size=4)  # goes on, here on one rank
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, processes):
    words = ["--terminate-at", "2", "--terminate-by", "SIGINT", "SIGINT", "--save-every", "100"]
    (ended,) = run_words(processes, tmp_path / "run", 1, "tests.toy_recipe", *words)
    assert ended.code not in (0, 143) and "KeyboardInterrupt" in ended.text
    assert (
        "stopping after this step, with a checkpoint; a further Ctrl-C ends at once" in ended.text
    )
    assert names(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the deepspeed command", "its node launcher"])
def test_sigterm_to_the_launcher_stops_all_with_a_checkpoint(tmp_path, whom):
    options = ["--out", str(tmp_path), "--sleep-s", "0.1", "--steps", "100000"]
    options += ["--save-every", "100000"]
    with started(deepspeed_command(2, "tests.toy_recipe", *options)) as launcher:
        while launcher.poll() is None and not (tmp_path / "log.jsonl").exists():
            time.sleep(0.2)
        process = launcher.pid if whom == "the deepspeed command" else child_of(launcher.pid)
        os.kill(process, signal.SIGTERM)
        text, _ = launcher.communicate(timeout=PATIENCE_S)  # the ranks have let go of stdout
    assert launcher.returncode != 0
    assert "stopped at step" in text, text[-3000:]
    assert len(names(tmp_path)) == 1


def child_of(process: int) -> int:
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)


@pytest.mark.slow
def test_torchrun_and_plain_python_run_the_same(tmp_path):
    module = ["-m", "tests.toy_recipe", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", *module]
    plain = [sys.executable, *module]
    for command, out in ((torchrun, tmp_path / "torchrun"), (plain, tmp_path / "plain")):
        ended = subprocess.run(
            [*command, str(out)],
            cwd=ROOT,
            env=os.environ | VARIABLES,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "plain")
