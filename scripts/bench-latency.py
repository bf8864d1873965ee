#!/usr/bin/env python3
"""How long a bind and an unbind take to reach the kubelet: the real daemon on a fake node, a kubelet played by grpcio.

    scripts/bench-latency.py [--rounds 50]

Prints a Markdown table: median and slowest, in milliseconds from the moment before the change until the message is
there. `just test-vm` measures the same on a real kernel.

Uses the kubelet and the harness of tests/helpers, so it needs what the tests need: `python3 scripts/dev.py setup`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from daemon import Daemon, places  # noqa: E402
from kubelet import GrpcKubelet  # noqa: E402
from names import PGPU  # noqa: E402
from trials import wait_until_it_sees  # noqa: E402
from truth import Truth  # noqa: E402

PRESET, GPU = "hgx-h100", "0000:1b:00.0"
PAUSE = 0.3
"""Seconds of quiet before each change: one event is measured, not the end of the one before it too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="binds, and as many unbinds; default: 50")
    rounds: int = parser.parse_args().rounds
    binds: list[float] = []
    unbinds: list[float] = []
    with places() as place, GrpcKubelet(place.kubelet) as kubelet:
        kubelet.start()
        node = place.node(PRESET)
        with Daemon(place, node):
            wait_until_it_sees(kubelet, Truth(node.root))
            count = len(kubelet.healthy(PGPU))
            for _ in range(rounds):
                unbinds.append(timed(kubelet, lambda: node.unbind(GPU), count - 1))
                binds.append(timed(kubelet, lambda: node.bind(GPU), count))
    print(f"| {rounds} times on the preset {PRESET} | median ms | slowest ms |")
    print("|---|---|---|")
    for name, times in (("bind", binds), ("unbind", unbinds)):
        print(f"| {name} | {median(times):.0f} | {max(times):.0f} |")


def timed(kubelet: GrpcKubelet, change: Callable[[], None], healthy: int) -> float:
    """Milliseconds from before the change until the message with so many healthy devices."""
    time.sleep(PAUSE)
    began = time.monotonic()
    change()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == healthy)
    return (kubelet.history(PGPU)[-1].at - began) * 1000


if __name__ == "__main__":
    main()
