"""One file of tiles, for a machine that has no folder of them.

    pack.json                   latentds-tiles/1, shares of the crops by source
    SOURCE/0001.jpg, .webp      JPEG files as they are; the pixels of others in squares, lossless
    held_out/0000.webp          what is judged by

A pack is a plain zip of pictures, of bounded size. A source gets bytes in proportion to its share
of the crops; what it does not need, others get.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from latentds.core.storage import open_picture, write_atomically
from latentds.errors import InputError

HELD_OUT = "held_out"  # what a pack calls the pictures that are judged by
FORMAT = "latentds-tiles/1"
RECORD = "pack.json"
MAX_BYTES = 54_000_000
ENCRYPTED = 1  # flag of a zip's member
SQUARE_PX = 256
LEAST_PX = 96  # of a square at a picture's right and bottom edge
MAX_PICTURES, MAX_PIXELS = 100_000, 64_000_000
MAX_ALL_PIXELS = 1 << 30  # 3 GB; the open tiles have a seventh of it


def in_squares(picture: np.ndarray) -> list[bytes]:
    """A picture (H, W, 3) in squares of 256 px; smaller ones at its edges, where worth keeping."""
    height, width = picture.shape[:2]
    found = [
        picture[top : top + SQUARE_PX, left : left + SQUARE_PX]
        for top in range(0, height, SQUARE_PX)
        for left in range(0, width, SQUARE_PX)
    ]
    return [webp(square) for square in found if min(square.shape[:2]) >= LEAST_PX]


def webp(picture: np.ndarray) -> bytes:
    """A picture uint8 (H, W, 3) as lossless WebP."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "webp", lossless=True, quality=60)
    return file.getvalue()


def write_pack(
    path: Path,
    pieces: Mapping[str, list[bytes]],
    shares: Mapping[str, float],
    whole: Mapping[str, list[bytes]],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write a pack of at most so many bytes.

    pieces  pictures by source, of which a part is kept: evenly spread ones
    whole   pictures that are all kept
    """
    sizes = {name: sum(map(len, found)) for name, found in pieces.items()}
    room = max_bytes - sum(len(piece) for found in whole.values() for piece in found)
    allowed = budgets(sizes, shares, room)
    kept = dict(whole) | {name: spread(pieces[name], allowed[name]) for name in pieces}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(RECORD, json.dumps({"format": FORMAT, "shares": dict(shares)}))
        for source, found in kept.items():
            for number, piece in enumerate(found):
                suffix = "jpg" if piece.startswith(b"\xff\xd8") else "webp"
                archive.writestr(f"{source}/{number:05d}.{suffix}", piece)
    write_atomically(path, file.getvalue())


def budgets(sizes: Mapping[str, int], shares: Mapping[str, float], room: int) -> dict[str, int]:
    """Bytes of each source: all it has where its share of the room allows it, else its share."""
    given: dict[str, int] = {}
    while len(given) < len(sizes):
        open_shares = sum(shares[name] for name in sizes if name not in given)
        left = room - sum(given.values())
        fair = {n: int(left * shares[n] / open_shares) for n in sizes if n not in given}
        satisfied = {name: sizes[name] for name in fair if sizes[name] <= fair[name]}
        given |= satisfied or fair
    return given


def spread(pieces: list[bytes], budget: int) -> list[bytes]:
    """Pieces of about so many bytes, never more, spread evenly over all."""
    total = sum(map(len, pieces))
    if total <= budget:
        return pieces
    kept: list[bytes] = []
    used = seen = 0
    for piece in pieces:
        seen += len(piece)
        if used + len(piece) <= budget * seen / total:
            kept.append(piece)
            used += len(piece)
    return kept


def read_pack(path: Path) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Pictures uint8 (H, W, 3) by source, those that are judged by among them, and the shares.

    raises  InputError where the file is no pack, a damaged one, or of more than a pack has
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = checked_names(path, archive)
            record = json.loads(archive.read(RECORD))
            if record["format"] != FORMAT:
                raise InputError(f"{path}: {record['format']!r:.60}, this version reads {FORMAT}")
            pictures: dict[str, list[np.ndarray]] = {}
            pixels = 0
            for name in names:
                picture = decoded(archive.read(name))
                pixels += picture.shape[0] * picture.shape[1]
                if pixels > MAX_ALL_PIXELS:
                    raise InputError(f"{path}: more than {MAX_ALL_PIXELS:,} pixels; pack fewer")
                pictures.setdefault(name.split("/")[0], []).append(picture)
            shares = {str(source): float(share) for source, share in record["shares"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise InputError(f"{path}: no pack of tiles, or a damaged one ({error})") from error
    missing = [source for source in (*shares, "held_out") if not pictures.get(source)]
    if missing:
        raise InputError(f"{path}: no picture of {missing[0]!r}; pack the tiles again")
    return pictures, shares


def checked_names(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """Names of a pack's pictures; InputError for more of them, or larger ones, than a pack has."""
    members = archive.infolist()
    if len(members) > MAX_PICTURES + 1:
        raise InputError(f"{path}: {len(members):,} entries; a pack has at most {MAX_PICTURES:,}")
    for member in members:
        is_plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & ENCRYPTED
        if not is_plain or member.file_size > MAX_BYTES:
            raise InputError(
                f"{path}: {member.filename!r:.80}, {member.file_size:,} bytes, is compressed, "
                f"encrypted or of more than {MAX_BYTES:,} bytes; write the pack with --pack"
            )
    return [member.filename for member in members if member.filename != RECORD]


def decoded(content: bytes) -> np.ndarray:
    with open_picture(io.BytesIO(content)) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"a picture of {picture.width}x{picture.height} px")
        return np.asarray(picture.convert("RGB"))
