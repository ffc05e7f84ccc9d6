"""JSON as one text, so that a digest of it can be an identity."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(record: Any) -> str:
    """JSON with sorted keys and no spaces, ASCII only: the same text for the same values."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(record: Any) -> str:
    """`sha256:...` of the canonical JSON."""
    return f"sha256:{hashlib.sha256(canonical_json(record).encode()).hexdigest()}"
