"""The encodings of latentds/1 and the codebook of each: the one place that knows them all."""

from __future__ import annotations

from typing import Any

from latentds.errors import FormatError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, Codebook
from latentds.version import __version__

ENCODINGS: dict[str, type[Codebook] | type[AdditiveCodebook] | type[EntropyCodebook]] = {
    book.encoding: book for book in (Codebook, AdditiveCodebook, EntropyCodebook)
}


def check_encoding(value: object, where: str, made_by: object = None) -> None:
    """Refuse codes that are packed in a way this reader does not know.

    made_by  version of latentds that wrote them, where a manifest tells
    """
    if not isinstance(value, str) or value not in ENCODINGS:
        known = ", ".join(map(repr, ENCODINGS))
        needed = f" to {made_by:.40} or later, which made them" if isinstance(made_by, str) else ""
        raise FormatError(
            f"{where}: codes are encoded as {value!r}, this reader (latentds {__version__}) knows "
            f"{known}; upgrade latentds{needed}"
        )


def codebook_from_json(encoding: str, record: Any) -> AnyCodebook:
    """The codebook inside a contract's JSON; KeyError, TypeError or ValueError if damaged."""
    return ENCODINGS[encoding].from_json(record)
