"""Rows of the paper's Table 1, and which of them one of ours corresponds to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from latentds_tools.reports.paper_tables import paper_tables

from latentds.autoencoders.cards import CARDS
from latentds.codecs import CodecSpec, LatentSpec, parse_quantizer


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A row of Table 1.

    codec       as --codecs has it
    label       as the paper has it
    kilobytes   of 1,024 bytes
    similarity  by embedder
    """

    codec: str
    label: str
    kilobytes: int
    similarity: dict[str, float]
    ssim: float
    psnr_db: float


@functools.cache
def paper_rows() -> tuple[PaperRow, ...]:
    table = paper_tables("fidelity")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return tuple(
        PaperRow(similarity={name: row.pop(name) for name in table["embedders"]}, **row)
        for row in rows
    )


def find_paper_row(
    spec: CodecSpec, encoder: str = "", class_name: str = ""
) -> tuple[PaperRow, str] | None:
    """The row of Table 1 that a codec corresponds to, and how its setting differs.

    encoder     for a decoder alone: the autoencoder whose latents it reads. A decoder that one
                trained oneself corresponds to the authors' fine-tuned one
    class_name  of that decoder: one of another class than the autoencoder's, such as a student,
                corresponds to none
    """
    if not isinstance(spec, LatentSpec):
        return next(((row, "") for row in paper_rows() if row.codec == spec.text), None)
    base = CARDS.get(encoder)
    is_own = base is not None and base.class_name == class_name
    own = [(f"{encoder}-path", "a decoder of one's own")] if is_own else []
    for name, note in ((spec.name, ""), *own):
        for row in paper_rows():
            theirs, _, quantizer = row.codec.partition("+")
            if theirs == name and parse_quantizer(quantizer or "none").text == spec.quantizer.text:
                return row, note
    return None


def differences(config: dict[str, Any], kinds: dict[str, int]) -> list[str]:
    """How this run's settings differ from the paper's, or may differ, in sentences."""
    settings = paper_tables("fidelity")["settings"]
    notes = [
        "The paper's patches are of other tiles (TCGA Breast, Colon and Prostate at 20x).",
        f"The coding of its patches: {settings['source_encoding']}. Here: "
        + ", ".join(f"{count} crops of {name} files" for name, count in kinds.items())
        + ".",
        f"Its K-means: {settings['kmeans']}. Its {settings['int8_range']}.",
        "Its settings of SSIM and PSNR are not stated; SSIM here: gaussian.",
    ]
    if config["crop_px"] != settings["patch_px"]:
        notes.append(f"Crops here have {config['crop_px']} px, its patches {settings['patch_px']}.")
    return notes
