"""How much one key may ask: requests and tokens a minute, by token bucket.

A bucket holds one minute's worth and fills steadily, so a key may burst to its whole minute once and then goes on at
the mean rate. A request's tokens are known only afterwards: on arrival an estimate is taken, at the end the difference
is settled, and a bucket may go below zero; what comes next then waits until the debt has flowed back, so the mean rate
holds however wrong estimates are.

Limits: counted in each gateway process by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from serving.gateway.refusal import Refusal

#: Tokens taken on arrival for the answer where a request asks for more: most answers are shorter than what was allowed.
ANSWER_ESTIMATE = 256


class Bucket:
    """Level of one allowance; a minute's worth at most, below zero when more was used than was there."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size = per_minute
        self._rate = per_minute / 60
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.size, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = min(self.size, self.level(now) - amount)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there (or the bucket is full, where it asks for more than that); 0: now."""
        return max(0.0, (min(amount, self.size) - self.level(now)) / self._rate)


class Limits:
    """The buckets of all keys.

    Args:
        requests_per_minute, tokens_per_minute: of each key; None: no limit.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute = (("requests", requests_per_minute), ("tokens", tokens_per_minute))
        self._clock = clock
        self._buckets: dict[str, dict[str, Bucket]] = {}
        self.any = requests_per_minute is not None or tokens_per_minute is not None

    def _of(self, key: str) -> dict[str, Bucket]:
        found = self._buckets.get(key)
        if found is None:
            now = self._clock()
            found = self._buckets[key] = {what: Bucket(n, now) for what, n in self._per_minute if n is not None}
        return found

    def admit(self, key: str, tokens: int) -> None:
        """Take one request and an estimate of its tokens, or refuse it and take nothing.

        Raises:
            Refusal: 429, with the seconds to wait in ``Retry-After``.
        """
        if not self.any:
            return
        amounts = {"requests": 1, "tokens": tokens}
        buckets = self._of(key)  # before the clock is read: a new bucket is full from its own beginning on
        now = self._clock()
        for what, bucket in buckets.items():
            wait = bucket.wait(amounts[what], now)
            if wait > 0:
                raise Refusal(
                    429,
                    f"this key may use {bucket.size:,} {what} a minute; try again in {math.ceil(wait)} s",
                    "rate_limit_exceeded",
                    headers=[(b"retry-after", b"%d" % math.ceil(wait)), *self.headers(key)],
                )
        for what, bucket in buckets.items():
            bucket.take(amounts[what], now)

    def settle(self, key: str, estimated: int, used: int) -> None:
        """Put the estimate of an admitted request right, once its tokens are known."""
        bucket = self._of(key).get("tokens") if self.any else None
        if bucket is not None:
            bucket.take(used - estimated, self._clock())

    def headers(self, key: str) -> list[tuple[bytes, bytes]]:
        """What is left, in the headers that OpenAI uses."""
        if not self.any:
            return []
        now = self._clock()
        headers = []
        for what, bucket in self._of(key).items():
            name, level = what.encode(), bucket.level(now)
            headers += [
                (b"x-ratelimit-limit-" + name, b"%d" % bucket.size),
                (b"x-ratelimit-remaining-" + name, b"%d" % max(0, math.floor(level))),
                (b"x-ratelimit-reset-" + name, b"%.1fs" % bucket.wait(bucket.size, now)),
            ]
        return headers
