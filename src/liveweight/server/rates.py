"""How often somebody may ask.

Owns one bucket of requests for each caller (a token bucket). Knows nothing of who a caller is.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from liveweight.errors import RateLimited

_CALLERS = 10_000  # that are remembered


class Rates:
    """So many requests a minute for each caller, in bursts of at most a minute's worth. Safe from several threads."""

    def __init__(self, per_minute: int) -> None:
        """Nobody has called yet."""
        self._most = float(per_minute)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> requests left, when
        self._lock = threading.Lock()

    def take(self, caller: str) -> None:
        """Count one request. Raises RateLimited, which says when the next one is welcome."""
        with self._lock:
            now = time.monotonic()
            left, when = self._left.pop(caller, (self._most, now))
            left = min(self._most, left + (now - when) * self._most / 60)
            allowed = left >= 1
            self._left[caller] = (left - 1 if allowed else left, now)
            if len(self._left) > _CALLERS:
                self._left.popitem(last=False)
        if not allowed:
            wait = max(1, round((1 - left) * 60 / self._most))
            raise RateLimited(
                f"More than {self._most:.0f} requests a minute.", hint=f"Ask again in {wait} s.", retry_after=wait
            )
