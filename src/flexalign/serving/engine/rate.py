"""How many tokens an engine writes."""

import threading
import time
from collections import deque

__all__ = ["TokenRate"]

_SECONDS = 10.0


class TokenRate:
    """Counts tokens: one thread adds, any thread reads.

    Attributes:
        total: Tokens so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        """Count tokens that have just been written."""
        with self._lock:
            self.total += tokens
            self._recent.append((time.monotonic(), tokens))
            self._forget()

    @property
    def per_second(self) -> float:
        """Tokens of the last 10 s, per second."""
        with self._lock:
            self._forget()
            return sum(tokens for _, tokens in self._recent) / _SECONDS

    def _forget(self) -> None:
        since = time.monotonic() - _SECONDS
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
