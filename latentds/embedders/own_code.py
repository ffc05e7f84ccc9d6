"""An embedder that a function of the user's own makes, in a local Python file."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import NetworkEmbedder
from latentds.errors import InputError, unknown_name


def load_own_code(text: str) -> NetworkEmbedder:
    """What FUNCTION of FILE.py returns, called without arguments; the file's code is run.

    Its card takes the name FILE:FUNCTION where it has none, and the hash of the weights.
    raises  InputError for no such file or what is no NetworkEmbedder, UnknownNameError for no such
            function
    """
    file, _, function = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file; --embedder FILE.py:FUNCTION needs a local file")
    name = f"latentds_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses of the file look their names up
    spec.loader.exec_module(module)
    known = [name for name, value in vars(module).items() if callable(value)]
    if function not in known:
        raise unknown_name(f"function of {path}", function, known)
    made = vars(module)[function]()
    if not isinstance(made, NetworkEmbedder):
        raise InputError(
            f"{text} returned {type(made).__name__}; a latentds.embedders.NetworkEmbedder(card, "
            "network, prepare) is wanted"
        )
    weights_id = made.card.weights_id or hash_tensors(made.network.state_dict(), {})
    own = made.card.name or f"{path.stem}:{function}"
    made.card = dataclasses.replace(made.card, name=own, weights_id=weights_id)
    return made
