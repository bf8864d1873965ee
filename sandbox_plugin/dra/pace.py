"""How often ResourceSlices are written, whatever happens: many nodes share one API server (pure)."""

from __future__ import annotations

from dataclasses import dataclass

BURST = 10
"""Changes of this node that are written at once."""
EVERY = 6.0
"""Seconds in which one more may be written: a device that flaps for hours costs ten writes a minute."""
GATHER = 0.5
"""Seconds before the first restore: who deletes, deletes more than one."""
LONGEST = 60.0
"""Seconds between restores, if somebody goes on undoing them: the first two are `GATHER` apart, and each time twice
as long."""
PEACE = 300.0
"""Seconds without a restore after which the next is the first again."""


@dataclass(kw_only=True)
class Pace:
    """Usage, with monotonic seconds:

    if (wait := pace.until_change(now)) == 0:    # or pace.until_restore(now)
        ...                                       # write
        pace.changed(now)                         # or pace.restored(now)
    """

    _tokens: float = BURST
    _counted_at: float = float("-inf")
    _restored_at: float = float("-inf")
    _pause: float = GATHER
    _missed_at: float | None = None

    def until_change(self, now: float) -> float:
        """Seconds until something that has changed on this node may be written."""
        self._count(now)
        return max(0.0, 1 - self._tokens) * EVERY

    def changed(self, now: float) -> None:
        """It was written."""
        self._count(now)
        self._tokens -= 1
        self._missed_at = None

    def until_restore(self, now: float) -> float:
        """Seconds until what others have changed or deleted may be written again. Counts from the first question."""
        if self._missed_at is None:
            self._missed_at = now
            if now - self._restored_at >= PEACE:
                self._pause = GATHER
        return max(0.0, self._missed_at + self._pause - now)

    def restored(self, now: float) -> None:
        """It was written again."""
        self._restored_at, self._missed_at = now, None
        self._pause = min(LONGEST, self._pause * 2)

    def _count(self, now: float) -> None:
        if self._counted_at != float("-inf"):
            self._tokens = min(float(BURST), self._tokens + (now - self._counted_at) / EVERY)
        self._counted_at = now
