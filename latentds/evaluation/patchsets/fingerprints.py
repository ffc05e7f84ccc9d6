"""Whether pictures are the same as before: an identity of their bytes, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentds.core.untrusted_files import open_regular
from latentds.errors import InputError
from latentds.sources.picture import Header, Picture
from latentds.sources.source import Source

SAMPLED = 64  # pictures whose bytes are read, spread evenly over all
READ_BYTES = 1 << 16  # of each, from its start


def fingerprint_pictures(
    source: Source, pictures: Sequence[Picture], headers: Sequence[Header] | None
) -> str:
    """Hash, 16 hex digits, of the sizes of all files and the first bytes of some, with masks.

    headers  of the pictures, None where they are not known: then files are asked for their size
    raises   InputError, OSError for a file that cannot be read
    """
    known = [None] * len(pictures) if headers is None else headers
    sizes = [
        (size_of(source, picture), 0) if header is None else (header.bytes, header.mask_bytes)
        for picture, header in zip(pictures, known, strict=True)
    ]
    digest = hashlib.sha256(np.array(sizes, np.int64).tobytes())
    chosen = np.linspace(0, len(pictures) - 1, min(SAMPLED, len(pictures))).round().astype(int)
    for number in chosen.tolist():
        try:
            contents = first_bytes(source, pictures[number], known[number])
        except InputError as error:
            raise InputError(f"{pictures[number].source}: {error}") from error
        for content in contents:
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def size_of(source: Source, picture: Picture) -> int:
    """Bytes of a picture's file, 0 for one in an archive."""
    file = source.file(picture)
    return file.stat().st_size if isinstance(file, Path) else 0


def first_bytes(source: Source, picture: Picture, header: Header | None) -> list[bytes]:
    """What the files of a picture and of its mask, where it has one, start with."""
    mask = None if header is None else source.mask_file(picture, header.size_px)
    found = []
    for file in (source.file(picture), mask):
        if file is not None:
            with open_regular(file) if isinstance(file, Path) else file as content:
                found.append(content.read(READ_BYTES))
    return found
