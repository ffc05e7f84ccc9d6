"""What the errors of servers and of their clients mean: worth another try, or told at once."""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
from collections.abc import Iterator
from typing import Any

from latentds.errors import InputError

DIGITS = re.compile(r"[0-9]{1,18}")


class TransientError(Exception):
    """Worth another try; `wait_s` where the server said when."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@contextlib.contextmanager
def client_errors(where: str) -> Iterator[None]:
    """Turn what a file system of fsspec raises into what it means for us."""
    try:
        yield
    except FileNotFoundError as error:
        raise judge(404, {}, where) from error
    except PermissionError as error:
        raise judge(403, {}, where) from error
    except Exception as error:  # botocore's are no OSError
        if is_network(error):
            raise TransientError(type(error).__name__) from None
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise judge(401, {}, where) from None
        raise


def judge(status: int, headers: Any, where: str) -> Exception:
    """What an HTTP status means for us."""
    if status == 404:
        return FileNotFoundError(f"{where}: not there (404); check the address, tell its publisher")
    if status in (401, 403):
        return InputError(
            f"{where}: access refused ({status}); log in ('hf auth login', cloud credentials) or "
            "ask for access"
        )
    if status in (408, 425, 429) or status >= 500:
        return TransientError(f"status {status}", wait_of(headers.get("retry-after")))
    return InputError(f"{where}: the server answers {status}")


def is_network(error: Exception) -> bool:
    """Whether an error of a client library is one of the connection."""
    names = {kind.__name__ for kind in type(error).__mro__}
    network = {"TransportError", "TimeoutException", "EndpointConnectionError", "ClientError",
               "HTTPClientError", "RequestException"}  # fmt: skip
    return isinstance(error, OSError) or bool(names & network)


def wait_of(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date; None for anything else."""
    if not value:
        return None
    if DIGITS.fullmatch(value.strip()):
        return float(value)
    try:
        moment = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else None
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
