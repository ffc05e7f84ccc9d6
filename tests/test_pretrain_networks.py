"""What `pretrain` gives its optimizer: groups, learning rates, layers that stay for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")

from latentds_trainers.pretrain.__main__ import main
from latentds_trainers.pretrain.schedules import RunConfig, settle, settle_batch
from latentds_trainers.pretrain.ssl_networks import (
    build_backbone,
    build_model,
    build_optimizer,
    build_views,
    trained_backbone,
)
from latentds_trainers.pretrain.task import PretrainTask

from latentds.errors import InputError
from latentds.models.self_distillation import is_last_layer
from tests.conftest import save_pictures
from tests.pretraining import config_of

LR = 1e-3


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("networks") / "pictures"
    save_pictures(root / "tumour", 12, edge=64)
    return root


def settled(tmp_path: Path, method: str, **changes: Any) -> RunConfig:
    config = config_of(tmp_path, originals=tmp_path, method=method, **changes)
    sized = settle_batch(config, 1)
    views = build_views(sized, None).record()
    return settle(sized, epoch_steps=3, edge_px=64, data_id="", views=views)


def groups_by_name(model: torch.nn.Module, config: RunConfig) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["global_px", "local_px"])
def test_crops_that_are_no_whole_tokens_are_refused_with_a_size_that_is(tmp_path, name):
    config = settled(tmp_path, "dino", **{name: 50})
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=rf"{name} is 50, .* has 16 px; .*{option} 48"):
        build_model(config, None)


def test_learning_rates_fall_towards_the_input_as_dinov2s_do(tmp_path):
    config = settled(tmp_path, "dinov2")
    groups = groups_by_name(build_model(config, None), config)
    rates = {name: group["lr"] / config.lr for name, group in groups.items()}
    depth = 6  # blocks of test_vit
    first = 0.9 ** (depth + 1)
    assert rates["mask_token"] == rates["student.backbone.cls_token"] == pytest.approx(first)
    assert rates["student.backbone.patch_embed.proj.weight"] == pytest.approx(0.2 * first)
    assert rates["student.backbone.blocks.1.attn.proj.weight"] == pytest.approx(0.9 ** (depth - 1))
    assert rates["student.head.last_layer.weight_v"] == rates["student.backbone.norm.weight"] == 1


def test_vectors_and_scales_do_not_decay(tmp_path):
    config = settled(tmp_path, "dinov2")
    groups = groups_by_name(build_model(config, None), config)
    still = {name for name, group in groups.items() if not group["decays"]}
    assert {"mask_token", "student.backbone.norm.weight"} < still
    assert "student.backbone.blocks.0.ls1.gamma" in still
    assert "student.backbone.blocks.0.attn.proj.weight" not in still


def test_a_masked_autoencoders_decoder_is_no_part_of_the_backbone(tmp_path):
    config = settled(tmp_path, "mae", layer_decay=0.5, mae_depth=8)
    groups = groups_by_name(build_model(config, None), config)
    rates = {name: group["lr"] / config.lr for name, group in groups.items()}
    assert rates["decoder.mask_token"] == rates["decoder.blocks.0.mlp.fc1.weight"] == 1
    assert rates["backbone.blocks.5.mlp.fc1.weight"] == 0.5


def test_dinov2_has_scales_and_even_stochastic_depth(tmp_path):
    model = build_model(settled(tmp_path, "dinov2"), None)
    blocks = model.student.backbone.blocks
    assert [block.drop_path1.drop_prob for block in blocks] == pytest.approx([0.3] * len(blocks))
    assert all((block.ls1.gamma == 1e-5).all() for block in blocks)
    plain = build_model(settled(tmp_path, "dino"), None).student.backbone
    assert not any("gamma" in name for name in plain.state_dict())


def test_the_network_that_is_exported_is_timms_own(tmp_path):
    config = settled(tmp_path, "dinov2")
    trained = build_backbone(config, None, 0.0).eval()
    exported = trained_backbone(config, None, trained.state_dict()).eval()
    images = torch.rand(2, 3, 64, 64)
    assert not any("gamma" in name for name in exported.state_dict())
    torch.testing.assert_close(exported(images), trained(images), atol=1e-5, rtol=0)


def last_layers(task: PretrainTask) -> dict[str, torch.nn.Parameter]:
    named = task.model.named_parameters()
    return {name: p for name, p in named if is_last_layer(name) and p.requires_grad}


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The last layers after every step of a run."""
    take, found = PretrainTask.step, []

    def watched(self: PretrainTask, number: int) -> Any:
        figures = take(self, number)
        found.append({name: p.detach().clone() for name, p in last_layers(self).items()})
        return figures

    monkeypatch.setattr(PretrainTask, "step", watched)
    return found


@pytest.mark.parametrize(("method", "stage"), [("dino", 0), ("dinov2", 1)])
def test_last_layers_stay_and_learn_after(tmp_path, pictures, method, stage, seen):
    options = {"method": method, "zero_stage": stage, "freeze_last_steps": 1, "lr": LR}
    config = settled(tmp_path, method)
    before = dict(build_model(config, None).named_parameters())
    run = {"originals": pictures, "schedule": "constant", "steps": 2}
    main(config_of(tmp_path / "run", **run, **options))
    frozen, thawed = seen
    assert frozen and all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    # a first step of Adam is at most about lr, and decay much less
    changes = [float((thawed[name] - tensor).abs().max()) for name, tensor in frozen.items()]
    assert all(0 < change < 2 * LR for change in changes)


def test_adams_moments_of_last_layers_go_on_while_they_stay(tmp_path, pictures):
    task = PretrainTask(config_of(tmp_path, originals=pictures, freeze_last_steps=9, steps=2))
    task.run()
    state = task.engine.wrapped["model"].engine.optimizer.state
    (layer,) = last_layers(task).values()
    assert state[layer]["exp_avg"].any() and state[layer]["exp_avg_sq"].any()
