"""Embedders of the real classes with small random weights, and pictures for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentds.embedders import NetworkEmbedder, load_embedder
from latentds.embedders.embedder_cards import CARDS
from latentds.embedders.nic import NicEncoder

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}  # of timm's arguments


def random_images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def tissue(height: int = 256, width: int = 256) -> np.ndarray:
    from skimage.data import immunohistochemistry

    return np.ascontiguousarray(immunohistochemistry()[:height, :width])


def as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def save_vit(path: Path, name: str = "uni") -> Path:
    """Random weights of a known network, made small."""
    pytest.importorskip("timm")
    from latentds.embedders.timm_models import arguments, create

    torch.manual_seed(0)
    network = create(CARDS[name].class_name, **(arguments(name) | SMALL))
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("gamma"):  # 1e-5 would all but switch the layers off
            nn.init.ones_(parameter)
    tensors = network.state_dict()
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def small_vit(folder: Path, name: str = "uni", native: bool = False) -> NetworkEmbedder:
    from latentds.embedders.timm_models import load_known

    return load_known(name, save_vit(folder / "w.bin", name), native, **SMALL)


def save_conch(path: Path, cells: int = 14) -> Path:
    """Random weights of CONCH v1.5, made small, its positions of `cells` x `cells` patches."""
    pytest.importorskip("timm")
    from latentds.embedders.conch import Tower

    torch.manual_seed(0)
    network = Tower(16, **SMALL, img_size=16 * cells).to_empty(device="cpu")
    torch.save({n: torch.randn(t.shape) * 0.3 for n, t in network.state_dict().items()}, path)
    return path


def small_conch(folder: Path, cells: int = 14) -> NetworkEmbedder:
    from latentds.embedders.conch import load_conch

    return load_conch(save_conch(folder / "c.bin", cells), width=16, **SMALL)


def save_phikon(folder: Path, patch_px: int = 16) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=patch_px,
        image_size=224,
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def save_nic(path: Path) -> Path:
    torch.manual_seed(0)
    tensors = NicEncoder().state_dict()
    save_file({n: t for n, t in tensors.items() if t.ndim}, path)  # as published: no counters
    return path


MAKERS = {
    "uni-like": lambda folder: small_vit(folder),
    "uni2-like": lambda folder: small_vit(folder, "uni2-h"),
    "gigapath-like": lambda folder: small_vit(folder, "gigapath"),
    "virchow2-like": lambda folder: small_vit(folder, "virchow2"),
    "h-optimus-like": lambda folder: small_vit(folder, "h-optimus-1"),
    "conch-like": lambda folder: small_conch(folder),
    "midnight-like": lambda folder: load_embedder(f"midnight@{save_phikon(folder / 'm', 14)}"),
    "phikon-like": lambda folder: load_embedder(f"phikon-v2@{save_phikon(folder / 'p')}"),
    "efficientnet-lite0": lambda folder: load_embedder("efficientnet-lite0"),
    "nic": lambda folder: load_embedder(save_nic(folder / "n.safetensors")),
}
