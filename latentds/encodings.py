"""The encodings of latentds/1 and the codebook of each: the one place that knows them all."""

from __future__ import annotations

from typing import Any

from latentds.additive import AdditiveCodebook
from latentds.entropy_codebook import EntropyCodebook
from latentds.errors import FormatError
from latentds.quantizer import AnyCodebook, Codebook

ENCODINGS: dict[str, type[Codebook] | type[AdditiveCodebook] | type[EntropyCodebook]] = {
    book.encoding: book for book in (Codebook, AdditiveCodebook, EntropyCodebook)
}


def check_encoding(value: object, where: str) -> None:
    """Refuse codes that are packed in a way this reader does not know."""
    if not isinstance(value, str) or value not in ENCODINGS:
        known = ", ".join(map(repr, ENCODINGS))
        raise FormatError(
            f"{where}: codes are encoded as {value!r}, this reader knows {known}; upgrade latentds"
        )


def codebook_from_json(encoding: str, record: Any) -> AnyCodebook:
    """The codebook inside a contract's JSON; KeyError, TypeError or ValueError if damaged."""
    return ENCODINGS[encoding].from_json(record)
