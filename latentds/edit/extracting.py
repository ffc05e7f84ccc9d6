"""Extract a data set: pictures in class folders, a table of them; lists of slides to do it by."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.processes import choose_device
from latentds.core.storage import MARK, exclusive_lock, naming, write_atomically
from latentds.edit.exporting import (
    TABLE,
    blocks,
    patch_path,
    read_rows,
    sources_of,
    table_line,
    tell_of_masks,
)
from latentds.edit.outputs import check_apart, refuse_foreign
from latentds.errors import InputError
from latentds.loading.decoding import Decoder, find_autoencoder
from latentds.loading.selection import select_rows
from latentds.sources.csv_tables import read_lines, write_table
from latentds.store.reader import ShardSet

BLOCK_PATCHES = 256
DECODE_CHUNK = 32  # a batch of the decoder: what a laptop's memory holds at 1024 px
FIELDS = ("path", "label", "slide", "x", "y", "mpp", "split", "source")
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def extract(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    picture_format: Literal["png", "jpeg"] = "png",
    quality: int = 95,
    split: str | None = None,
    where: str | None = None,
    slides: Sequence[str] | None = None,
    autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
    device: torch.device | str = "auto",
    overwrite: bool = False,
) -> dict[str, int]:
    """Write `[SPLIT/]LABEL/SLIDE/KEY.png` for every chosen patch, and last `table.csv`.

    Levels that the data set does not have are left out; SPLIT is there where several are written. A
    killed run goes on where it stopped: a picture that lies there is not decoded again.

    returns  pictures written now, and those that were there
    """
    out, shards = Path(out), ShardSet(folder)
    check_apart(out, sources_of(folder))
    refuse_foreign(out, MARK)
    chosen = choose(shards, split, where, slides)
    tell_of_masks(shards)
    decoder = Decoder(find_autoencoder(shards, autoencoder), shards.manifest.codebooks,
                      shards.manifest.contract.patch_px, choose_device(device))  # fmt: skip
    lock = out.with_name(f"{out.name}.lock")
    with exclusive_lock(lock):
        try:
            asked = {"split": split, "where": where, "slides": slides and sorted(set(slides))}
            asked |= describe(shards, decoder, picture_format, quality)
            begin(out, asked, overwrite)
            return write_pictures(shards, decoder, chosen, out, picture_format, quality)
        finally:
            lock.unlink()


def choose(
    shards: ShardSet, split: str | None, where: str | None, slides: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Rows to extract by split; InputError where none is chosen in any."""
    chosen, nothing = {}, None
    for name in [split] if split else sorted(shards.manifest.splits):
        try:
            rows = select_rows(shards, name, where, slides)
        except InputError as error:  # it chooses nothing of this split, or is no condition at all
            nothing = error
            continue
        chosen[name] = np.arange(*shards.patch_range(name)) if rows is None else rows
    if nothing is not None and not chosen:
        raise nothing
    return chosen


def describe(
    shards: ShardSet, decoder: Decoder, picture_format: str, quality: int
) -> dict[str, Any]:
    """What a run must agree in with the one it goes on from."""
    assert decoder.autoencoder is not None
    return {
        "dataset_id": shards.manifest.dataset_id,
        "decoder_id": decoder.autoencoder.card.decoder_id,
        "format": picture_format,
        "quality": quality if picture_format == "jpeg" else None,
    }


def begin(out: Path, asked: dict[str, Any], overwrite: bool) -> None:
    """Mark the folder as this extraction's; InputError where it is another's."""
    mark = out / MARK
    earlier = json.loads(mark.read_text() or "{}") if mark.is_file() else None
    if earlier == asked:
        return
    if earlier is not None:
        changed = sorted(name for name in asked if earlier.get(name, ...) != asked[name])
        if not overwrite:
            raise InputError(
                f"{out}: holds pictures of another extraction ({', '.join(changed)} differ); "
                "choose another --out, or pass --overwrite"
            )
        (out / TABLE).unlink(missing_ok=True)
        for path in [path for suffix in SUFFIXES.values() for path in out.rglob(f"*{suffix}")]:
            path.unlink()
    write_atomically(mark, json.dumps(asked, sort_keys=True).encode())


def write_pictures(
    shards: ShardSet,
    decoder: Decoder,
    chosen: dict[str, np.ndarray],
    out: Path,
    picture_format: str,
    quality: int,
) -> dict[str, int]:
    """Write what is not there yet, then the table of all; counts of both."""
    lines, counts = [], {"written": 0, "found": 0}
    for split, rows in blocks(chosen, BLOCK_PATCHES, desc="pictures", unit="picture"):
        known = read_rows(shards, split, rows)
        paths = [picture_path(shards, row, len(chosen) > 1, picture_format) for row in known]
        missing = np.array([not is_there(out / path) for path in paths])
        images = decode(shards, decoder, rows[missing])
        for path, image in zip(np.array(paths)[missing], images, strict=True):
            write_whole(out / path, encode(image, picture_format, quality))
        lines += [table_line(path, row, FIELDS) for path, row in zip(paths, known, strict=True)]
        counts["written"] += int(missing.sum())
        counts["found"] += int((~missing).sum())
    write_table(out / TABLE, FIELDS, lines, line_end="\r\n")  # last: all pictures are there
    return counts


def picture_path(
    shards: ShardSet, row: dict[str, Any], has_splits: bool, picture_format: str
) -> str:
    label = row["label"] or ("unlabelled" if shards.manifest.classes else None)
    slide = row["slide"] or ("no-slide" if shards.manifest.slides else None)
    path = patch_path(label, slide, row["key"], SUFFIXES[picture_format])
    return f"{row['split']}/{path}" if has_splits else path


def is_there(path: Path) -> bool:
    """Whether a picture was written; a power failure may leave a name without content."""
    return path.is_file() and path.stat().st_size > 0


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name and rename; no sync, which would be most of a small file's time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path):
        temporary.write_bytes(content)
        temporary.replace(path)


def decode(shards: ShardSet, decoder: Decoder, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Pictures uint8 (H, W, 3) of the patches at `rows`, a chunk at a time."""
    for start in range(0, len(rows), DECODE_CHUNK):
        part = rows[start : start + DECODE_CHUNK]
        codes = torch.from_numpy(shards.read_codes(part)).to(decoder.device)
        books = torch.from_numpy(shards.codebook_numbers(part)).to(decoder.device)
        images = decoder(codes, books).float().mul(255).round().to(torch.uint8)
        yield from images.permute(0, 2, 3, 1).cpu().numpy()


def encode(image: np.ndarray, picture_format: str, quality: int) -> bytes:
    """A picture's bytes; JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if picture_format == "jpeg":
        options = {"quality": quality, "subsampling": 0}
    Image.fromarray(image).save(buffer, picture_format, **options)
    return buffer.getvalue()


def read_slide_list(path: Path) -> list[str]:
    """Slide names, one a line; empty lines and those that begin with # are passed over."""
    return [line for line in read_lines(path) if not line.startswith("#")]
