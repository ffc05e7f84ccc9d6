"""The last results of costly readings; each is made once, whichever thread asks first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """At most `count` values by name; the least recently asked for goes first."""

    def __init__(self, count: int) -> None:
        self.count, self.lock = count, threading.Lock()
        self.futures: OrderedDict[str, Future[Value]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.count,)  # elsewhere they are made anew

    def get(self, name: str, make: Callable[[], Value]) -> Value:
        """The value of that name; made now, or waited for where another thread makes it.

        An error is kept like a value: what could not be read is not tried for every patch of it.
        """
        with self.lock:
            future = self.futures.pop(name, None)
            is_mine = future is None
            self.futures[name] = future = future or Future()
            while len(self.futures) > self.count:
                self.futures.popitem(last=False)
        if is_mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()
