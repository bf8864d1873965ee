"""How long something took, again and again: counted in buckets, so that it never grows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets, in seconds. An Allocate or a scan takes milliseconds, and seconds where sysfs hangs."""


@dataclass(kw_only=True, eq=False, repr=False)
class Durations:
    """All durations of one thing since the start."""

    total: float = 0.0
    """Seconds."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """For each bucket, and above the last bound, how many were in it."""

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def cumulative(self) -> list[int]:
        """For each of `BOUNDS` how many took no longer, and last how many there were."""
        return list(accumulate(self._counts))
