"""Presets with a published name build the published network, layer by layer, in training."""

import pytest
import torch
from latentds_trainers.abmil.bag_training import build_network
from latentds_trainers.abmil.config import PRESETS, AbmilConfig
from latentds_trainers.abmil.task import best_is_last
from torch import nn

from latentds.models.attention_mil import load_abmil, save_abmil

DIM, CLASSES = 1024, 2
# What is called in a training step, in order. Written down from the originals; nothing here is
# computed: CLAM models/model_clam.py, CLAM_SB(gate=True, size_arg="small", dropout=0.25), its
# instance classifiers left out as they are in evaluation.
CLAM = [
    *("Linear 1024 512", "ReLU", "Dropout 0.25"),
    *("Linear 512 256", "Tanh", "Dropout 0.25"),
    *("Linear 512 256", "Sigmoid", "Dropout 0.25"),
    *("Linear 256 1", "Linear 512 2"),
]
# TRIDENT slide_encoder_models/load.py, ABMILSlideEncoder, and its ABMIL block, as Patho-Bench's
# configs/finetune/abmil.yaml builds it (n_heads 1, head_dim 512, dropout 0.25, gated False), with a
# linear classifier.
PATHO_BENCH = [
    *("Linear 1024 1024", "GELU", "Dropout 0.1"),
    *("Linear 1024 512", "Tanh", "Dropout 0.25", "Linear 512 1"),
    *("Linear 1024 1024", "GELU", "Dropout 0.1", "Linear 1024 2"),
]
# AMLab's AttentionDeepMIL, model.py, GatedAttention: M 500, L 128, behind its convolutions.
ILSE = [
    *("Linear 1024 500", "ReLU", "Dropout 0"),
    *("Linear 500 128", "Tanh", "Dropout 0", "Linear 500 128", "Sigmoid", "Dropout 0"),
    *("Linear 128 1", "Linear 500 2"),
]


def config(tmp_path, **options) -> AbmilConfig:
    return AbmilConfig(bags=tmp_path, labels=tmp_path / "l.csv", out=tmp_path / "out", **options)


def layers_called(network: nn.Module) -> list[str]:
    """Every layer that a training step goes through, with what distinguishes it."""
    called: list[str] = []

    def note(layer: nn.Module, *_: object) -> None:
        if isinstance(layer, nn.Linear):
            called.append(f"Linear {layer.in_features} {layer.out_features}")
        elif isinstance(layer, nn.Dropout):
            assert layer.training
            called.append(f"Dropout {layer.p:g}")
        elif not isinstance(layer, nn.Identity):
            called.append(type(layer).__name__)

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    network.train()(torch.randn(3, DIM))
    return called


@pytest.mark.parametrize(
    ("preset", "layers"), [("clam", CLAM), ("patho-bench", PATHO_BENCH), ("ilse", ILSE)]
)
def test_a_preset_is_the_network_it_is_named_after(tmp_path, preset, layers):
    assert layers_called(build_network(config(tmp_path, preset=preset), DIM, CLASSES)) == layers
    assert set(PRESETS) == {"clam", "patho-bench", "ilse"}


@pytest.mark.parametrize("preset", PRESETS)
def test_networks_of_presets_are_saved_read_and_run_in_parts(tmp_path, preset):
    made = config(tmp_path, preset=preset)
    network = build_network(made, 8, 2).eval()
    facts = made.settings.layers
    path = tmp_path / "w.safetensors"
    save_abmil(path, network.state_dict(), facts | {"dim": 8, "classes": ["a", "b"]})
    loaded, found = load_abmil(path)
    bag = torch.randn(7, 8)
    assert torch.equal(loaded(bag)[0], network(bag)[0]) and found["gated"] == made.settings.gated
    parts = loaded.in_parts([bag[:3], bag[3:]])
    assert torch.allclose(parts[0], network(bag)[0], atol=1e-5)  # sums in another order


@pytest.mark.parametrize(("epochs", "best", "select", "told"), [
    (20, 20, "best", 1), (20, 9, "best", 0), (20, 20, "last", 0),
])  # fmt: skip
def test_a_best_epoch_that_is_the_last_is_remarked(epochs, best, select, told):
    notes = best_is_last(3, epochs, best, select)
    assert len(notes) == told and all("fold 3: the best epoch is the last" in n for n in notes)
