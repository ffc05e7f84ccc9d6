"""Embedders by name or by path."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import Embedder, EmbedderCard, NetworkEmbedder
from latentds.embedders.embedder_cards import ALIASES, CARDS, ELSEWHERE
from latentds.embedders.exported import LATENT_PREFIX, check_exported, is_exported, load_exported
from latentds.errors import InputError, ShapeError, WeightsError, unknown_name

__all__ = ["Embedder", "EmbedderCard", "NetworkEmbedder", "embedder_loader", "load_embedder"]

PATTERNS = (  # beside the names on the cards
    *("nic:FILE", "timm:NAME", "timm-dir:FOLDER", "timm:hf-hub:ORG/NAME"),
    *("latent-dir:FOLDER", "FILE.py:FUNCTION"),
)


def load_embedder(name_or_path: str | os.PathLike[str], *, native: bool = False) -> NetworkEmbedder:
    """The embedder of that name, or of that local file: fp32, on the CPU, frozen, in eval mode.

    name_or_path  uni, virchow2, ... (CARDS and ALIASES), `timm:NAME` for any network of timm; all
                  but aliases may be followed by `@PATH`, the weights in a local file (a folder for
                  phikon-v2 and midnight). `FILE.py:FUNCTION` for the NetworkEmbedder that a
                  function of a local file makes. `timm-dir:FOLDER`, or the folder alone, for one in
                  timm's format, as `pretrain` leaves it; `latent-dir:FOLDER[@AUTOENCODER]` for one
                  that reads latents, which images are encoded to; `timm:hf-hub:ORG/NAME[@REVISION]`
                  for one on the Hub. `nic:FILE.safetensors`, or the file alone, for a pathology
                  encoder of Neural Image Compression, which takes a patch as one field
    native        feed whole images, neither resized nor cropped (transformers of CARDS, folders):
                  both edges must be multiples of the network's patch of 16 or 14 px
    raises        UnknownNameError, WeightsError (what is missing, how to get it),
                  MissingExtraError, ShapeError (`native` for a network that has one size)
    """
    return embedder_loader(name_or_path, native=native)()


def embedder_loader(
    name_or_path: str | os.PathLike[str], *, native: bool = False
) -> Callable[[], NetworkEmbedder]:
    """What loads the embedder of `load_embedder`: its name and files looked at, no weights read.

    For whoever has long work to do before: a wrong name is told first.
    raises  as load_embedder, for what a name and the presence of files tell
    """
    text = os.fspath(name_or_path)
    kind, _, rest = text.partition(":")
    name, _, file = text.partition("@")
    path = Path(file) if file else None
    if text.startswith(LATENT_PREFIX):
        from latentds.embedders.latent_backbone import load_latent_backbone

        return partial(load_latent_backbone, text)
    if text in ALIASES:
        return partial(load_alias, text, native)
    if name in ALIASES:
        raise WeightsError(f"{text}: takes no @FILE; name its folder, timm-dir:FOLDER")
    if name in ELSEWHERE:
        raise WeightsError(f"{name}: {ELSEWHERE[name]}")
    if text.rpartition(":")[0].endswith(".py"):
        return partial(load_own_code, text)
    if text not in CARDS and is_exported(text):
        check_exported(text)
        return partial(load_exported, text, native=native)
    if native and (name not in CARDS or CARDS[name].multiple_px == 1):
        raise ShapeError(f"{text}: made for one size of input; it cannot be loaded as native")
    is_timm = kind == "timm" and bool(rest)
    if path is not None and (is_timm or name in CARDS) and not path.exists():
        raise WeightsError(f"{path}: no such file of weights")
    if is_timm:
        from latentds.embedders.timm_models import check_name, load_named

        check_name(name.removeprefix("timm:"))
        return partial(load_named, name.removeprefix("timm:"), path)
    if name in CARDS:
        return partial(load_card, name, path, native)
    is_nic = kind == "nic" and bool(rest)
    if is_nic or text.endswith(".safetensors"):
        from latentds.embedders.nic import load_nic

        return partial(load_nic, Path(rest if is_nic else text))
    if os.sep in text:
        raise WeightsError(f"{text}: which network is it of? Pass its name too, as in 'uni@{text}'")
    raise unknown_name("embedder", name, [*CARDS, *ALIASES, *PATTERNS])


def load_alias(name: str, native: bool) -> NetworkEmbedder:
    embedder = load_exported(ALIASES[name], native=native)
    embedder.card = dataclasses.replace(embedder.card, name=name)
    return embedder


def load_card(name: str, path: Path | None, native: bool) -> NetworkEmbedder:
    if CARDS[name].class_name == "Dinov2Model":
        from latentds.embedders.transformers_models import load_dinov2

        return load_dinov2(name, path, native)
    if name == "conch-v1.5":
        from latentds.embedders.conch import load_conch

        return load_conch(path)
    from latentds.embedders.timm_models import load_efficientnet_lite, load_known

    if name == "efficientnet-lite0":
        return load_efficientnet_lite(path)
    return load_known(name, path, native)


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
