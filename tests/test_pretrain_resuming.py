"""Pretraining runs that go on: after a kill, on other ranks, and not as another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentds.autoencoders.decoders import architecture_of, save_decoder
from latentds.autoencoders.tiny import load_tiny
from latentds.errors import ContractError, InputError

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")

from latentds_trainers.pretrain import task
from latentds_trainers.pretrain.__main__ import main

from tests.pretraining import config_of, losses, options_of, run_until
from tests.trainer_ranks import run_ranks, run_words, succeed


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "mae"}, "method 'dino', this run has 'mae'"),
        ({"arch": "vit_tiny_patch16_224"}, "with arch 'test_vit', this run has 'vit_tiny_pa"),
        (
            {"local_scale": (0.1, 0.3)},
            r"local_scale None, this run has \[0.1, 0.3\]",
        ),
        ({"weights": (1.0,)}, r"with weights \[\], this run has \[1.0\]"),
        ({"data": "others", "input": "latents"}, "input 'images', this run has 'latents'"),
        ({"global_batch_size": 16}, "global_batch_size 8, this run has 16"),
        ({"seed": 1}, "with seed 0, this run has 1"),
        (
            {"steps": 6},
            r"made with steps 4, this run has 6: the learning rate, the weight decay, the "
            r"teacher's momentum would jump",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another(dino_run, tiny_latents, mean_latents, changes, words):
    data = (mean_latents,) if "data" in changes else (tiny_latents,)
    with pytest.raises(ContractError, match=words):
        main(config_of(dino_run, **(changes | {"data": data})))


def test_a_run_does_not_go_on_with_other_patches(dino_run, class_pictures):
    with pytest.raises(ContractError, match=r"data_id '\w+', this run has '\w+'"):
        main(config_of(dino_run, originals=class_pictures))


def another_decoder(folder: Path) -> Path:
    """tiny's decoder, trained on by nothing but noise."""
    tiny = load_tiny()
    for parameter in tiny.decoder.parameters():
        parameter.mul_(1.01)
    save_decoder(folder, tiny.decoder, tiny.card, architecture_of(tiny), {})
    return folder


def test_a_run_does_not_go_on_with_another_decoder(dino_run, tiny_latents, tmp_path):
    folder = str(another_decoder(tmp_path / "mine"))
    words = r"made with decoder_ids \['sha256:\w+'\], this run has \['sha256:\w+'\]"
    with pytest.raises(ContractError, match=words):
        main(config_of(dino_run, data=(tiny_latents,), decoder=(folder,)))


@pytest.fixture(scope="module")
def constant(tmp_path_factory, tiny_latents) -> tuple[Path, dict[str, Any]]:
    """A run of one step with constant schedules, its decoder moved since; how it goes on."""
    root = tmp_path_factory.mktemp("constant")
    options = {"data": (tiny_latents,), "method": "mae", "schedule": "constant"}
    first, moved = another_decoder(root / "mine"), root / "moved"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        main(config_of(root / "run", **options, decoder=(str(first),), steps=1))
    shutil.move(first, moved)
    return root / "run", options | {"decoder": (str(moved),)}


def test_a_run_goes_on_with_its_decoder_from_elsewhere(tmp_path, constant):
    copy = shutil.copytree(constant[0], tmp_path / "run")
    main(config_of(copy, **constant[1], steps=1))
    (found,) = json.loads((copy / "result.json").read_text())["source"]["sets"]
    assert found["decoder"]["name"] == "mine" and found["decoder"]["decoder_id"]


def test_nothing_depends_on_the_steps_of_constant_schedules(tmp_path, constant):
    copy = shutil.copytree(constant[0], tmp_path / "run")
    main(config_of(copy, **constant[1], steps=2))
    assert len(losses(copy)) == 2


def test_a_failure_after_the_last_step_loses_nothing(tmp_path, tiny_latents, monkeypatch):
    config = config_of(tmp_path, data=(tiny_latents,), method="mae", steps=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="No space left"):
        patched.setattr(task, "write_backbone", fail)
        main(config)
    before = losses(tmp_path)
    assert not (tmp_path / "result.json").exists()
    main(config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["last"]["model/loss"]) == (1, before[-1])
    assert losses(tmp_path) == before and (tmp_path / "backbone" / "latentds.json").exists()


def test_a_finished_run_whose_set_moved_is_finished_again(dino_run, tiny_latents, tmp_path):
    moved = shutil.copytree(tiny_latents, tmp_path / "moved")
    copy = shutil.copytree(dino_run, tmp_path / "run")
    (copy / "result.json").unlink()
    main(config_of(copy, data=(moved,)))
    results = [json.loads((out / "result.json").read_text()) for out in (dino_run, copy)]
    assert results[0]["last"] == results[1]["last"]


def test_a_run_whose_log_a_full_disk_left_empty_is_finished(dino_run, tiny_latents, tmp_path):
    copy = shutil.copytree(dino_run, tmp_path / "run")
    (copy / "result.json").unlink()
    (copy / "log.jsonl").write_text("")
    main(config_of(copy, data=(tiny_latents,)))
    assert json.loads((copy / "result.json").read_text())["last"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "batch"), [("dinov2", 4), ("mae", 8)])
def test_a_killed_run_goes_on_to_the_same_losses(
    tmp_path, tiny_latents, method, batch, monkeypatch
):
    options = {"data": (tiny_latents,), "method": method, "drop_path": 0.2, "steps": 6}
    options["batch_size"] = batch  # of 8 images a step
    main(config_of(tmp_path / "whole", **options))
    run_until(config_of(tmp_path / "parts", **options), 3, monkeypatch)
    main(config_of(tmp_path / "parts", **options))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_masked_autoencoder_trains_with_weights_spread_over_ranks(
    tmp_path, tiny_latents, processes
):
    options = {"method": "mae", "steps": 2, "save_every": 2}
    main(config_of(tmp_path / "one", data=(tiny_latents,), **options))
    options |= {"zero_stage": 3}
    run_ranks(processes, main, config_of(tmp_path / "two", data=(tiny_latents,), **options), 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two" / "backbone" / "model.safetensors").is_file()


def words_of(config: dict[str, Any]) -> list[str]:
    """Options as on a command line."""
    return [word for name, value in config.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [("mae", 0), ("dino", 1), ("dinov2", 0)])
def test_two_ranks_go_on_to_the_losses_of_one(
    tmp_path, tiny_latents, method, stage, monkeypatch, processes
):
    options = {"method": method, "zero_stage": stage, "drop_path": 0.0}
    options |= {"steps": 6, "save_every": 3} | ({} if method == "mae" else {"momentum": 0.5})
    one, two = tmp_path / "one", tmp_path / "two"
    main(config_of(one, data=(tiny_latents,), **options))
    run_until(config_of(two, data=(tiny_latents,), **options), 3, monkeypatch)
    words = words_of(options_of(**options) | {"data": tiny_latents})
    succeed(run_words(processes, two, 2, "latentds_trainers.pretrain", *words))
    assert json.loads((two / "result.json").read_text())["ranks"] == 2
    # rel: float32 sums in another order, through three steps of Adam
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
