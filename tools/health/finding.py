"""A finding: what was looked at, how it is, what to do about it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Literal, TypeVar

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    group    heading it stands under
    state    ok; missing: something optional is not here; problem: something does not work, or will
             not
    remedy   what to do; empty where nothing is to be done
    is_base  whether the base install needs it: a problem with it makes the exit code 1
    """

    group: str
    name: str
    state: Literal["ok", "missing", "problem"]
    text: str
    remedy: str = ""
    is_base: bool = False

    @property
    def breaks_base(self) -> bool:
        return self.is_base and self.state == "problem"


def finding(
    group: str,
    name: str,
    text: str,
    bad: Literal["missing", "problem", ""] = "",
    remedy: str = "",
    *,
    is_base: bool = False,
) -> Finding:
    """A finding; where nothing is bad it is ok and has no remedy."""
    return Finding(
        group=group,
        name=name,
        state=bad or "ok",
        text=text,
        remedy=remedy if bad else "",
        is_base=is_base,
    )


def within(timeout_s: float, ask: Callable[[], Found]) -> Found | None:
    """What `ask` gives, or None where it takes longer; its errors are raised here.

    A thread that hangs (a name server that never answers) is left behind and dies with the process.
    """
    answer: concurrent.futures.Future[Found] = concurrent.futures.Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # raised again by the thread that waits
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    concurrent.futures.wait([answer], timeout_s)
    return answer.result() if answer.done() else None
