"""What became of the kubelet's calls about claims: how long each claim took, and why some were refused."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

from sandbox_plugin.dra.claims import Refused, Why
from sandbox_plugin.durations import Durations
from sandbox_plugin.model import Reason

PREPARE, UNPREPARE = "NodePrepareResources", "NodeUnprepareResources"


@dataclass(kw_only=True)
class ClaimCalls:
    """Usage:

    with calls.timed(PREPARE):
        ...                        # one claim; may raise Refused
    """

    took: dict[tuple[str, str], Durations] = field(
        default_factory=lambda: {pair: Durations() for pair in product((PREPARE, UNPREPARE), ("ok", "refused"))}
    )
    """By method and outcome: ok, refused, cancelled (the kubelet hung up) or failed."""
    refusals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys([*Why, *Reason], 0)))
    """By reason: each that there is. A claim that the kubelet asks for again counts again."""

    @contextmanager
    def timed(self, method: str) -> Iterator[None]:
        """Around one claim of a call."""
        began_at, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "ok"
        except Refused as refused:
            outcome = "refused"
            self.refusals[refused.why] += 1
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.took.setdefault((method, outcome), Durations()).add(time.perf_counter() - began_at)
