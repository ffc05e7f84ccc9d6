"""Masks of patches: from their PNG bytes, and the error of one that is missing."""

from __future__ import annotations

import io

import numpy as np

from latentds.core.untrusted_files import open_picture
from latentds.errors import FormatError, InputError


def no_mask(where: str) -> InputError:
    """The error of a patch without a mask where every one needs it: zeros would be a class."""
    return InputError(f"{where} has no mask; give it one, or leave the patch out")


def decode_mask(encoded: bytes, size_px: tuple[int, int], where: str) -> np.ndarray:
    """A mask (H, W) from its PNG bytes, size checked before a pixel is decoded."""
    try:
        with open_picture(io.BytesIO(encoded), ["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error
