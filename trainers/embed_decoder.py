"""Put a fine-tuned decoder into the weights of `tiny` that ship with latentds.

    python -m latentds_trainers.embed_decoder runs/tiny/decoder

The encoder's tensors stay as they are, so latent_id stays, and data sets made before decode with
the new one. The file's metadata say how the decoder was made.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from latentds_trainers.engine.launching import launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Put a fine-tuned decoder into tiny's weights."""

    decoder: Annotated[Path, tyro.conf.Positional]
    """Decoder folder, or the folder of the run that made it."""
    weights: Path | None = None
    """Where to write; in place of those that ship by default (a checkout only)."""


def embed(config: EmbedConfig) -> None:
    """Write the weights."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    from latentds.autoencoders.autoencoder import check_decoder
    from latentds.autoencoders.decoders import find_decoder_folder, load_decoder
    from latentds.autoencoders.tiny import load_tiny, weights_folder
    from latentds.core.storage import write_atomically

    shipped = Path(str(weights_folder() / "tiny-v1.safetensors"))
    decoder = load_decoder(config.decoder)
    check_decoder(decoder.card, load_tiny().card.latent_id, str(config.decoder))
    with safe_open(shipped, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = dict(file.metadata() or {})
    new = {
        f"decoder.{name}": t.to(torch.float16) for name, t in decoder.decoder.state_dict().items()
    }
    assert new.keys() == {name for name in tensors if name.startswith("decoder.")}
    folder = find_decoder_folder(config.decoder)
    assert folder is not None
    facts["decoder"] = json.dumps(json.loads((folder / "decoder.json").read_text())["trained"])
    tensors |= {name: tensor.contiguous() for name, tensor in new.items()}
    write_atomically(config.weights or shipped, save(tensors, facts))


if __name__ == "__main__":
    launch(embed, EmbedConfig, __doc__)
