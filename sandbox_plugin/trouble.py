"""What is wrong, and what was said of it: a trouble is logged once, and not again before it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

_K = TypeVar("_K")


class Troubles(Generic[_K]):
    """What is wrong now, by what it is about.

    Usage:

        for about, why in troubles.update(found).items():
            log.error(..., reason=why)
    """

    def __init__(self) -> None:
        self.now: Mapping[_K, str] = {}

    def update(self, now: Mapping[_K, str]) -> dict[_K, str]:
        """Takes in all that is wrong now. Returns what is to be said: what is new, or wrong for another reason."""
        news = {about: why for about, why in now.items() if self.now.get(about) != why}
        self.now = dict(now)
        return news


class Trouble:
    """The same for one part that has one trouble at a time, or none.

    Usage:

        if trouble.update(why):
            log.error(..., reason=why)
    """

    def __init__(self) -> None:
        self.now: str | None = None

    def update(self, now: str | None) -> bool:
        """Takes in what is wrong now; None: nothing. Returns whether it is to be said."""
        is_news = now is not None and now != self.now
        self.now = now
        return is_news


def first_failure(error: BaseException) -> BaseException:
    """What made a group of tasks fail, or groups within groups; an error that is not a group is itself."""
    return first_failure(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
