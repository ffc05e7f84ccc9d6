"""Attention-based multiple-instance learning: one prediction of a bag, and what it looked at."""
# N instances of a bag, D their dimensions, H hidden, A attention, C classes

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from latentds.core.storage import write_atomically
from latentds.errors import WeightsError

METADATA = "abmil"  # key of a weights file's metadata
SIZES = (
    *("dim", "hidden", "attention", "dropout", "gated"),
    *("attention_dropout", "activation", "post_attention"),
)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class GatedABMIL(nn.Module):
    """Logits of a bag of any length, by a weighted mean of its instances.

    dim        D, dimensions of an instance
    classes    C
    hidden     H, of the layer that instances go through first; None for D
    attention  A, of the attention's own layer
    dropout    after the first layer, in training
    gated      tanh and sigmoid branches multiplied; without, tanh alone
    attention_dropout  after each of these branches, in training
    activation  relu or gelu, of the first layer and of the one after the mean
    post_attention  whether the mean goes through such a layer, too, before the logits

    a_k = softmax over k of w^T (tanh(V h_k) * sigmoid(U h_k)), z = sum of a_k h_k, logits of z.
    source  Ilse, Tomczak, Welling 2018, equations 8 and 9; the layer sizes are CLAM's (Lu et al.
            2021), whose single-branch model this is without the instance loss; with gelu and
            post_attention the slide encoder of TRIDENT that Patho-Bench trains (Zhang et al. 2025)
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        hidden: int | None = 512,
        attention: int = 256,
        dropout: float = 0.25,
        gated: bool = True,
        attention_dropout: float = 0.0,
        activation: str = "relu",
        post_attention: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden or dim

        def layer(inputs: int, outputs: int, curve: type[nn.Module], share: float) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, outputs), curve(), nn.Dropout(share))

        curve = ACTIVATIONS[activation]
        self.embed = layer(dim, hidden, curve, dropout)
        self.tanh = layer(hidden, attention, nn.Tanh, attention_dropout)
        self.gate = layer(hidden, attention, nn.Sigmoid, attention_dropout) if gated else None
        self.score = nn.Linear(attention, 1)
        self.post = layer(hidden, hidden, curve, dropout) if post_attention else nn.Identity()
        self.head = nn.Linear(hidden, classes)

    def scores(self, hidden: Tensor) -> Tensor:
        """Attention before the softmax (N,) of instances (N, H)."""
        branch = self.tanh(hidden)
        if self.gate is not None:
            branch = branch * self.gate(hidden)
        scores: Tensor = self.score(branch).squeeze(1)
        return scores.float()  # the softmax of a long bag needs float32 under autocast too

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (C,) and attention (N,), which sums to 1, of a bag's features float (N, D)."""
        hidden = self.embed(features)
        attention = torch.softmax(self.scores(hidden), dim=0)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(self.post(attention @ hidden.float()))
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
        logits: Tensor = self.head(self.post(pooled / total))
        return logits.float(), torch.exp(torch.cat(scores) - highest) / total


def save_abmil(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights as safetensors, atomically, with what `load_abmil` needs.

    facts  dim, hidden, attention, dropout, gated and the like, classes (names), and what else is to
           be known
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, save(tensors, {METADATA: json.dumps(dict(facts))}))


def load_abmil(path: str | os.PathLike[str]) -> tuple[GatedABMIL, dict[str, Any]]:
    """The network of a weights file, in eval mode on the CPU, and the facts saved with it.

    raises  FileNotFoundError; WeightsError for another file
    """
    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such file of weights", str(path))
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = {name: facts[name] for name in SIZES}
        network = GatedABMIL(classes=len(facts["classes"]), **sizes)
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{path}: no weights of attention over bags ({reason})") from error
    return network.eval(), facts
