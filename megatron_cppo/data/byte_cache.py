"""A least-recently-used cache bounded by bytes, for several threads. Owns eviction; must not know what it holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Keeps the values used last, up to `capacity_bytes` together; the newest stays even if it alone is larger."""

    def __init__(self, capacity_bytes: int, size_bytes: Callable[[Value], int]) -> None:
        self._capacity_bytes = capacity_bytes
        self._size_bytes = size_bytes
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()
        self.used_bytes = 0

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made now if it is not held; an error of `make` leaves the cache as it was.

        Threads that ask for the same at once may each make it; all get the one that was there first.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            if key in self._values:
                return self._values[key]
            self._values[key] = made
            self.used_bytes += self._size_bytes(made)
            while self.used_bytes > self._capacity_bytes and len(self._values) > 1:
                _, oldest = self._values.popitem(last=False)
                self.used_bytes -= self._size_bytes(oldest)
        return made
