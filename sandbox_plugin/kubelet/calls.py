"""What became of the kubelet's calls: how long they took, and why pods were turned away."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from grpclib import GRPCError, Status

from sandbox_plugin.durations import Durations
from sandbox_plugin.model import Reason


class Refused(StrEnum):
    """Why a call got an error, where that is no `Reason` of a device."""

    MALFORMED = "malformed-request"
    UNKNOWN_DEVICE = "unknown-device"
    LAST_LOOK = "last-look"
    """The look at the device that every Allocate takes found something against it."""
    CHANGED = "changed"
    """The device became another one during that look."""
    PART_OF_NODE = "part-of-node"
    """`--whole-node` allows one device or all."""


class Refusal(GRPCError):
    """The error that a call is answered with. `reason` is one of few: a `Refused`, or the device's `Reason`."""

    def __init__(self, status: Status, reason: str, message: str) -> None:
        super().__init__(status, message)
        self.reason = reason


@dataclass(kw_only=True, eq=False, repr=False)
class Calls:
    """The calls about one resource.

    Usage:

        with calls.timed("Allocate"):
            ...                        # may raise Refusal
    """

    took: dict[tuple[str, str], Durations] = field(default_factory=dict)
    """By method and by the name of the gRPC status."""
    refusals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys([*Refused, *Reason], 0)))
    """By reason: each that there is."""

    @contextmanager
    def timed(self, method: str) -> Iterator[None]:
        """Around one call."""
        began_at = time.perf_counter()
        code = Status.UNKNOWN  # what grpclib makes of any other exception
        try:
            yield
            code = Status.OK
        except Refusal as refusal:
            code = refusal.status
            self.refusals[refusal.reason] += 1
            raise
        except asyncio.CancelledError:  # the kubelet hung up
            code = Status.CANCELLED
            raise
        finally:
            self.took.setdefault((method, code.name), Durations()).add(time.perf_counter() - began_at)
