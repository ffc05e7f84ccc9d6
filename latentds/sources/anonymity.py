"""Names of slides and sources as keyed hashes: nobody without the key can tell whose they are."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from latentds.core.storage import check_regular
from latentds.errors import InputError

KEY_BYTES = 32
SHOWN_DIGITS = 16


class Anonymizer:
    """HMAC-SHA256 of names under a key that stays at home.

    A plain hash would not do: there are few barcodes, all of them can be tried.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
        check_regular(path, str(path))
        text = path.read_text().strip()
        if len(text) < KEY_BYTES:
            raise InputError(
                f"{path}: {len(text)} characters are no key; name a file that is not there yet, "
                "and one is made"
            )
        self.key = text.encode()

    @property
    def check(self) -> str:
        """What tells one key from another and nothing else of it."""
        return self("latentds: which key is this?")

    def __call__(self, name: str) -> str:
        """What stands for a name; the same name gets the same under the same key."""
        return hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()[:SHOWN_DIGITS]
