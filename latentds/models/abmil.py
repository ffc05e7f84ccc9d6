"""Attention-based multiple-instance learning: one prediction of a bag, and what it looked at."""
# N instances of a bag, D their dimensions, H hidden, A attention, C classes

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from latentds.errors import WeightsError
from latentds.storage import write_atomically

METADATA = "abmil"  # key of a weights file's metadata
SIZES = ("dim", "hidden", "attention", "dropout", "gated")


class GatedABMIL(nn.Module):
    """Logits of a bag of any length, by a weighted mean of its instances.

    dim        D, dimensions of an instance
    classes    C
    hidden     H, of the layer that instances go through first
    attention  A, of the attention's own layer
    dropout    after the first layer, in training
    gated      tanh and sigmoid branches multiplied; without, tanh alone

    a_k = softmax over k of w^T (tanh(V h_k) * sigmoid(U h_k)), z = sum of a_k h_k, logits of z.
    source  Ilse, Tomczak, Welling 2018, equations 8 and 9; the layer sizes are CLAM's (Lu et al.
            2021), whose single-branch model this is without the instance loss
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        hidden: int = 512,
        attention: int = 256,
        dropout: float = 0.25,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.tanh = nn.Linear(hidden, attention)
        self.gate = nn.Linear(hidden, attention) if gated else None
        self.score = nn.Linear(attention, 1)
        self.head = nn.Linear(hidden, classes)

    def scores(self, hidden: Tensor) -> Tensor:
        """Attention before the softmax (N,) of instances (N, H)."""
        branch = torch.tanh(self.tanh(hidden))
        if self.gate is not None:
            branch = branch * torch.sigmoid(self.gate(hidden))
        scores: Tensor = self.score(branch).squeeze(1)
        return scores.float()  # the softmax of a long bag needs float32 under autocast too

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (C,) and attention (N,), which sums to 1, of a bag's features float (N, D)."""
        hidden = self.embed(features)
        attention = torch.softmax(self.scores(hidden), dim=0)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(attention @ hidden.float())
        return logits, attention

    @torch.no_grad()
    def in_parts(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """What `forward` gives, of a bag that comes in parts (n, D): in the memory of one part.

        Sums in another order than `forward`: equal to some 1e-6.
        """
        scores, pooled, total, highest = [], torch.zeros(()), torch.zeros(()), -torch.inf
        for part in parts:
            hidden = self.embed(part)
            scores.append(self.scores(hidden))
            new_highest = max(highest, float(scores[-1].max()))
            weights = torch.exp(scores[-1] - new_highest)
            shrink = torch.exp(torch.tensor(highest - new_highest, device=weights.device))
            pooled = pooled.to(weights) * shrink + weights @ hidden.float()
            total = total.to(weights) * shrink + weights.sum()
            highest = new_highest
        logits: Tensor = self.head(pooled / total)
        return logits.float(), torch.exp(torch.cat(scores) - highest) / total


def save_abmil(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights as safetensors, atomically, with what `load_abmil` needs.

    facts  dim, hidden, attention, dropout, gated, classes (names), and what else is to be known
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, save(tensors, {METADATA: json.dumps(dict(facts))}))


def load_abmil(path: Path) -> tuple[GatedABMIL, dict[str, Any]]:
    """The network of a weights file, in eval mode on the CPU, and the facts saved with it.

    raises  FileNotFoundError; WeightsError for another file
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file of weights", str(path))
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = GatedABMIL(classes=len(facts["classes"]), **{n: facts[n] for n in SIZES})
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{path}: no weights of attention over bags ({reason})") from error
    return network.eval(), facts
