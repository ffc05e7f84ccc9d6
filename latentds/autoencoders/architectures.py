"""Decoders by a description in JSON: a closed list of classes, built on the meta device.

Nothing is allocated for a description: its shapes are compared with the tensors of a file first, so
a foreign decoder.json costs no more memory than its file has bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.bounded_configs import BUILD_ERRORS, check_bounded
from latentds.autoencoders.students import STUDENTS, Student, build_student
from latentds.autoencoders.taesd import Clamp, build_decoder, has_pool
from latentds.autoencoders.tiny import TinyDecoder
from latentds.errors import WeightsError, first_words, unknown_name

CELLS = 4  # latent cells each way of the trial that tells a decoder's factor


def architecture_of(autoencoder: NetworkAutoencoder) -> dict[str, Any]:
    """JSON values that `build` makes the autoencoder's decoder from again.

    raises  WeightsError where its decoder is of no class known here
    """
    decoder = autoencoder.decoder
    if isinstance(decoder, TinyDecoder):
        return {"class": "tiny"}
    if isinstance(decoder, Student):
        names = [name for name, spec in STUDENTS.items() if spec == decoder.spec]
        if names:
            return {"class": "student", "name": names[0]}
    if isinstance(decoder, nn.Sequential) and len(decoder) and isinstance(decoder[0], Clamp):
        return {"class": "taesd", "has_pool": has_pool(decoder.state_dict())}
    architecture = getattr(decoder, "architecture", None)
    if isinstance(architecture, dict):
        described: dict[str, Any] = json.loads(json.dumps(architecture))  # tuples become lists
        return described
    raise WeightsError(f"a decoder of class {type(decoder).__name__} cannot be described in JSON")


def build(architecture: Mapping[str, Any], channels: int, factor: int) -> nn.Module:
    """The decoder of an architecture on the meta device, in eval mode: shapes, no weights.

    channels, factor  of the latents; checked by a trial on the meta device
    raises            UnknownNameError for a class not known here, WeightsError for values that do
                      not fit, MissingExtraError
    """
    class_name = str(architecture.get("class"))
    if class_name not in BUILDERS:
        raise unknown_name("decoder class", class_name, BUILDERS)
    check_bounded(architecture, "architecture")
    pixels = CELLS * factor
    try:
        with torch.device("meta"), torch.no_grad():
            decoder = BUILDERS[class_name](architecture, channels, factor).eval()
            shape = list(decoder(torch.zeros(1, channels, CELLS, CELLS)).shape)
    except BUILD_ERRORS as error:
        reason = first_words(error, 200)
        raise WeightsError(f"cannot build a decoder of class {class_name} ({reason})") from error
    if shape != [1, 3, pixels, pixels]:
        raise WeightsError(
            f"a decoder of class {class_name} makes {shape} of {CELLS}x{CELLS} latents; factor "
            f"{factor} asks for {[1, 3, pixels, pixels]}"
        )
    return decoder


def build_diffusers(architecture: Mapping[str, Any], channels: int, factor: int) -> nn.Module:
    """The decoder half of a diffusers class."""
    from latentds.autoencoders.diffusers_ae import build_decoder

    del channels, factor
    return build_decoder(str(architecture["class"]), dict(architecture["config"]))


def build_taesd(architecture: Mapping[str, Any], channels: int, factor: int) -> nn.Module:
    """The decoder of a TAESD-style pair."""
    del factor
    return build_decoder(channels, architecture["has_pool"] is True)


def build_tiny(architecture: Mapping[str, Any], channels: int, factor: int) -> nn.Module:
    """The decoder of `tiny`."""
    del architecture, factor
    return TinyDecoder(channels)


BUILDERS: dict[str, Callable[[Mapping[str, Any], int, int], nn.Module]] = {
    "student": lambda words, *shape: build_student(str(words["name"]), *shape),
    "tiny": build_tiny,
    "taesd": build_taesd,
    "AutoencoderKL": build_diffusers,
    "AutoencoderDC": build_diffusers,
    "AutoencoderTiny": build_diffusers,
}
