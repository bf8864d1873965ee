#!/usr/bin/env python3
"""The long run: the real daemon, a kubelet that restarts, devices that come and go, and Allocates, all at random,
while its metrics are scraped and it is probed every second.

    scripts/soak.py [--seconds 600] [--seed N]

After the first minute (a fifth of shorter runs) and at the end the process is left alone for a moment and measured:
memory, file descriptors, threads, connections, asyncio's tasks, series of metrics. Prints a table; exit status 1 if it
has grown, or if the kubelet's view was ever not the node's in the end.

Uses the kubelet and the harness of tests/helpers, so it needs what the tests need: `python3 scripts/dev.py setup`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.error import HTTPError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

import grpc  # noqa: E402
import psutil  # noqa: E402
from daemon import Daemon, places  # noqa: E402
from kubelet import GrpcKubelet  # noqa: E402
from names import PGPU  # noqa: E402
from trials import wait_until_it_sees  # noqa: E402
from truth import Truth  # noqa: E402

from sandbox_plugin.fake.node import FakeNode, FakeNodeError  # noqa: E402

GPUS = [f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")]
HELD = GPUS[:4]
"""What pods may get. These stay bound: one that comes back under another number is its pod's, until that ends."""
ALLOWED_GROWTH = 0.15
"""Of the memory after the first minute: the allocator's arenas go up and down by that much."""
LATE_SERIES = ("kubelet_request", "device_allocated_timestamp")
"""One for each gRPC status that was answered, and for each device that was given: bounded, and complete in a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What the process holds at rest."""

    memory: int
    """Resident bytes."""
    descriptors: int
    threads: int
    sockets: int
    series: int
    """Lines of the page of metrics, but for `LATE_SERIES`."""
    tasks: int
    """Of asyncio, as the daemon counts them when it gets a SIGUSR1."""

    @classmethod
    def of(cls, daemon: Daemon, page: str) -> Measure:
        process = psutil.Process(daemon.pid)
        asked = daemon.mark()
        process.send_signal(signal.SIGUSR1)
        return cls(
            tasks=daemon.wait_for("tasks", since=asked)["count"],
            memory=process.memory_info().rss,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            sockets=len([each for each in process.net_connections("all") if each.status != "TIME_WAIT"]),
            series=sum(not any(name in line for name in LATE_SERIES) for line in page.splitlines()),
        )


class Scrapes:
    """Asks for all pages every second, as Prometheus and a kubelet would."""

    def __init__(self, daemon: Daemon) -> None:
        self._at = f"http://{daemon.wait_for('metrics served')['address'][0]}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrapes", daemon=True)
        self.times: list[float] = []
        """Seconds that each page of metrics took."""

    def __enter__(self) -> Scrapes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def page(self) -> str:
        """The metrics. Raises OSError."""
        with urlopen(f"{self._at}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def _run(self) -> None:
        while not self._ended.wait(1):
            started = time.monotonic()
            self.page()
            self.times.append(time.monotonic() - started)
            urlopen(f"{self._at}/healthz", timeout=30).close()
            with suppress(HTTPError):  # not ready, while a kubelet restarts
                urlopen(f"{self._at}/readyz", timeout=30).close()


class Soak:
    """One run: what happens to the daemon, and how often it did."""

    def __init__(self, node: FakeNode, kubelet: GrpcKubelet, daemon: Daemon, scrapes: Scrapes, seed: int) -> None:
        self.node, self.kubelet, self.daemon, self.scrapes = node, kubelet, daemon, scrapes
        self.truth = Truth(node.root)
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.longest = 0.0

    def run_until(self, end: float) -> None:
        """Something happens, again and again, until then; now and then the view is held against the node."""
        acts = [self.restart, self.flap, self.flap, self.allocate, self.allocate, self.allocate, self.cut]
        while time.monotonic() < end:
            self.chance.choice(acts)()
            if self.chance.random() < 0.1:
                self.compare()

    def restart(self) -> None:
        self.kubelet.restart(leave_socket=self.chance.random() < 0.5)
        self.done["kubelet restarts"] += 1

    def cut(self) -> None:
        registration = self.kubelet.registration(PGPU)
        if registration is not None:
            registration.plugin.close()
            self.done["connections cut"] += 1

    def flap(self) -> None:
        gpu = self.chance.choice(GPUS)
        changes = [self.node.sicken, self.node.heal]
        changes += [] if gpu in HELD else [self.node.bind, self.node.unbind]
        with suppress(FakeNodeError):  # it is so already
            self.chance.choice(changes)(gpu)
            self.done["device changes"] += 1

    def allocate(self) -> None:
        held = [self.node.function(gpu).vfio for gpu in HELD]
        ids = sorted(self.kubelet.healthy(PGPU) & {str(vfio.number) for vfio in held if vfio is not None})
        registration = self.kubelet.registration(PGPU)
        if not ids or registration is None:
            return
        try:
            registration.plugin.allocate(self.chance.sample(ids, self.chance.randint(1, len(ids))))
        except (grpc.RpcError, ValueError):  # ValueError: on a channel that was cut in this moment
            self.done["Allocates refused"] += 1
        else:
            self.done["Allocates"] += 1

    def compare(self) -> None:
        started = time.monotonic()
        try:
            wait_until_it_sees(self.kubelet, self.truth, timeout=30)
        except AssertionError as error:
            raise SystemExit(f"{self.daemon.log()}\n30 s after the last change {error}") from None
        self.longest = max(self.longest, time.monotonic() - started)
        self.done["views compared"] += 1

    def measure(self) -> Measure:
        """At rest: every device bound and well, the kubelet with the whole view."""
        for gpu in GPUS:
            self.node.heal(gpu)
            if self.node.function(gpu).driver != "vfio-pci":
                self.node.bind(gpu)
        self.compare()
        self.kubelet.wait_for(lambda: len(self.kubelet.healthy(PGPU)) == len(GPUS), timeout=30)
        seen = []  # for three seconds: threads and connections end a little later than their reason
        end = time.monotonic() + 3
        while time.monotonic() < end:
            seen.append(Measure.of(self.daemon, self.scrapes.page()))
            time.sleep(0.1)
        return min(seen, key=lambda m: (m.descriptors, m.threads, m.tasks, m.memory))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with places() as place, GrpcKubelet(place.kubelet) as kubelet:
        kubelet.start()
        node = place.node("hgx-h100")
        flags = ("--health-interval=0.5", "--metrics-address=127.0.0.1:0")
        with Daemon(place, node, *flags) as daemon, Scrapes(daemon) as scrapes:
            soak = Soak(node, kubelet, daemon, scrapes, arguments.seed)
            soak.compare()
            started = time.monotonic()
            soak.run_until(started + min(60, arguments.seconds / 5))
            first = soak.measure()
            soak.run_until(started + arguments.seconds)
            last = soak.measure()
    return report(soak, first, last)


def report(soak: Soak, first: Measure, last: Measure) -> int:
    """Prints the tables. Returns the exit status."""
    for what, times in sorted(soak.done.items()):
        print(f"{what:24}{times:>10}")
    print(f"{'longest until the view':24}{soak.longest:>10.2f} s")
    took = [seconds * 1000 for seconds in soak.scrapes.times]
    print(f"{'scrapes':24}{len(took):>10}, median {median(took):.1f} ms, worst {max(took):.0f} ms")
    print(f"\n{'':24}{'early':>10}{'at the end':>12}")
    grown = False
    for name, before in asdict(first).items():
        after = getattr(last, name)
        is_memory = name == "memory"
        is_more = after > before * (1 + ALLOWED_GROWTH if is_memory else 1)
        shown = [f"{n / 1e6:.1f} MB" if is_memory else str(n) for n in (before, after)]
        print(f"{name:24}{shown[0]:>10}{shown[1]:>12}{'   grown' if is_more else ''}")
        grown = grown or is_more
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
