"""Names of slides and sources as keyed hashes: nobody without the key can tell whose they are."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from latentds.errors import InputError
from latentds.storage import write_atomically

KEY_BYTES = 32
SHOWN_DIGITS = 16


class Anonymizer:
    """HMAC-SHA256 of names under a key that stays at home.

    A plain hash would not do: there are few barcodes, all of them can be tried.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_atomically(path, secrets.token_hex(KEY_BYTES).encode())
            path.chmod(0o600)
        text = path.read_text().strip()
        if len(text) < KEY_BYTES:
            raise InputError(
                f"{path}: {len(text)} characters are no key; name a file that is not there yet, "
                "and one is made"
            )
        self.key = text.encode()

    def __call__(self, name: str) -> str:
        """What stands for a name; the same name gets the same under the same key."""
        return hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()[:SHOWN_DIGITS]
