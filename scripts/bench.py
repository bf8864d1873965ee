#!/usr/bin/env python3
"""How fast the daemon is where somebody waits, and what it costs when nobody does.

    scripts/bench.py [--quick] [--python PYTHON] [--json FILE] [SECTION ...]

Sections: start, allocate, kubelet, bind, idle, memory, commands, floors; without any, all of them. `--python` is an
interpreter that has the program installed; without it an environment is made for that below .cache, as users have it:
this one also has what only developers need, and structlog loads rich where that is installed.

Prints a Markdown table, each figure with its ratio to a yardstick of the same run: a start to `python -c "import
asyncio"`, a call to an empty call (GetDevicePluginOptions) of the same server. Times are from a kubelet played by
grpcio in this process, the daemon is a process of its own. Medians, unless it says otherwise.

Uses the kubelet and the harness of tests/helpers, so it needs what the tests need: `python3 scripts/dev.py setup`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

import psutil  # noqa: E402
from daemon import Daemon, Places, places  # noqa: E402
from kubelet import GrpcKubelet, Plugin  # noqa: E402
from machines import machine  # noqa: E402
from names import PGPU  # noqa: E402

from sandbox_plugin.fake.node import FakeNode  # noqa: E402

PAUSE = 0.3
"""Seconds of quiet before a change: one event is measured, not the end of the one before it too."""

SETTLE = 2.0
"""Seconds after a start in which it is still at work: it begins to watch, and looks at what others wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table."""

    what: str
    value: float
    unit: str
    ratio: float | None = None
    """To the yardstick of the same run."""


@dataclass
class Bench:
    """All figures of one run."""

    python: str
    quick: bool
    figures: list[Figure] = field(default_factory=list)

    def note(self, what: str, value: float, unit: str, yardstick: float | None = None) -> None:
        figure = Figure(what=what, value=round(value, 3), unit=unit, ratio=yardstick and round(value / yardstick, 2))
        self.figures.append(figure)
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        print(f"| {what} | {value:.{2 if value < 10 else 0}f} {unit} | {ratio} |", flush=True)

    def times(self, many: int) -> int:
        """How often to repeat what is done `many` times in a whole run."""
        return max(3, many // 5) if self.quick else many

    # What is started

    @contextmanager
    def node(self, gpus: int) -> Iterator[tuple[Places, FakeNode]]:
        with places() as place:
            yield place, FakeNode.create(place.top / "node", machine(gpus))

    @contextmanager
    def daemon(self, gpus: int, *flags: str) -> Iterator[tuple[GrpcKubelet, Daemon, FakeNode]]:
        """A daemon on a node with so many GPUs, all of them Healthy at the kubelet."""
        with self.node(gpus) as (place, node), GrpcKubelet(place.kubelet) as kubelet:
            kubelet.start()
            with self.started(place, node, *flags) as daemon:
                _wait_until_healthy(kubelet, gpus)
                time.sleep(SETTLE)
                yield kubelet, daemon, node

    def started(self, place: Places, node: FakeNode, *flags: str) -> Daemon:
        python = self.python

        class Measured(Daemon):
            def _command(self) -> list[str]:
                return [python, "-m", "sandbox_plugin"]

        return Measured(place, node, *flags)

    def run(self, *command: str) -> float:
        """Seconds that a command of this interpreter takes: median of several."""

        def once() -> float:
            began = time.monotonic()
            subprocess.run([self.python, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            return time.monotonic() - began

        return median(once() for _ in range(self.times(15)))

    # What is measured

    def start(self) -> None:
        """From exec until the kubelet has every GPU as Healthy."""
        yardstick = self.run("-c", "import asyncio")
        self.note("python -c 'import asyncio'", yardstick * 1000, "ms")
        for gpus, repeat in ((4, 15), (16, 15), (256, 5), (1024, 3), *(() if self.quick else ((4096, 3),))):
            seconds = []
            with self.node(gpus) as (place, node), GrpcKubelet(place.kubelet) as kubelet:
                kubelet.start()
                for _ in range(self.times(repeat)):
                    began = time.monotonic()
                    with self.started(place, node):
                        _wait_until_healthy(kubelet, gpus)
                        seconds.append(kubelet.history(PGPU)[-1].at - began)
                    kubelet.wait_for(lambda: not kubelet.resources())
            self.note(f"start to all Healthy, {gpus} GPUs", median(seconds) * 1000, "ms", yardstick * 1000)

    def allocate(self) -> None:
        """Answers to one caller, on nodes of several sizes, and while a big node is scanned again and again."""
        for gpus in (8, 256, 1024):
            with self.daemon(gpus) as (kubelet, daemon, _):
                plugin = kubelet.plugin(PGPU)
                ids = sorted(kubelet.healthy(PGPU), key=int)
                repeat = self.times(300)
                spent = _cpu(daemon.pid)
                empty = median(_ms([plugin.options] * repeat))
                self.note(f"empty call, {gpus} GPUs", empty, "ms")
                self.note(f"its CPU time, {gpus} GPUs", (_cpu(daemon.pid) - spent) / repeat * 1000, "ms", empty)
                for size in (1, 8):
                    self.note(
                        f"Allocate of {size}, {gpus} GPUs", median(_allocates(plugin, ids, size, repeat)), "ms", empty
                    )
        with self.daemon(1024) as (kubelet, _, node), _scanning(node):
            ids = sorted(kubelet.healthy(PGPU), key=int)
            calls = _allocates(kubelet.plugin(PGPU), ids, 1, self.times(1000))
            self.note("Allocate of 1, 1024 GPUs, always a scan under way, 99th percentile", _p99(calls), "ms")

    def kubelet(self) -> None:
        """From kubelet.sock being there until Register comes in."""
        with self.daemon(8) as (kubelet, _, _):
            times = []
            for _ in range(self.times(50)):
                kubelet.stop()
                time.sleep(PAUSE)
                kubelet.start()
                began = time.monotonic()
                _wait_until_healthy(kubelet, 8)
                times.append((kubelet.registrations[-1].at - began) * 1000)
        self.note("kubelet.sock to Register", median(times), "ms")
        self.note("kubelet.sock to Register, slowest", max(times), "ms")

    def bind(self) -> None:
        """From the moment before a bind or an unbind until ListAndWatch brings it."""
        binds, unbinds = [], []
        with self.daemon(8) as (kubelet, _, node):
            address = next(f.address for f in node.functions() if f.driver == "vfio-pci")
            for _ in range(self.times(50)):
                unbinds.append(_until(kubelet, lambda: node.unbind(address), 7))
                binds.append(_until(kubelet, lambda: node.bind(address), 8))
        self.note("bind to ListAndWatch", median(binds), "ms")
        self.note("unbind to ListAndWatch", median(unbinds), "ms")

    def idle(self) -> None:
        """Context switches that the daemon asks for, and CPU time, of all its threads while nothing happens."""
        seconds = 10 if self.quick else 60
        with places() as place, GrpcKubelet(place.kubelet) as kubelet:
            kubelet.start()
            with self.started(place, FakeNode.create(place.top / "node", machine(16))) as daemon:
                _wait_until_healthy(kubelet, 16)
                self._idle("fake node, 16 GPUs", daemon.pid, seconds)
            folders = [
                f"--kubelet-dir={place.kubelet}",
                f"--cdi-dir={place.cdi}",
                f"--pod-resources-socket={place.top}/p",
                f"--status-socket={place.top}/status.sock",
            ]
            with subprocess.Popen(
                [self.python, "-m", "sandbox_plugin", "run", *folders], stderr=subprocess.DEVNULL, cwd=ROOT
            ) as process:
                self._idle("this host", process.pid, seconds)
                process.terminate()

    def _idle(self, title: str, pid: int, seconds: float) -> None:
        time.sleep(SETTLE)
        before = _switches(pid), _cpu(pid)
        time.sleep(seconds)
        self.note(f"idle, {title}: wake-ups a second", (_switches(pid) - before[0]) / seconds, "")
        self.note(f"idle, {title}: CPU", 100 * (_cpu(pid) - before[1]) / seconds, "%")
        self.note(f"idle, {title}: threads", psutil.Process(pid).num_threads(), "")

    def memory(self) -> None:
        for gpus in (16, 1024):
            with self.daemon(gpus) as (kubelet, daemon, node):
                plugin = kubelet.plugin(PGPU)
                for _ in range(100):
                    plugin.options()
                memory = psutil.Process(daemon.pid).memory_full_info()
                self.note(f"resident memory, {gpus} GPUs", memory.rss / 2**20, "MiB")
                self.note(f"its share (PSS), {gpus} GPUs", memory.pss / 2**20, "MiB")
                self.note(f"the most it ever was, {gpus} GPUs", _peak(daemon.pid), "MiB")
                self.note(f"CPU time until here, {gpus} GPUs", _cpu(daemon.pid), "s")
                peak, cpu = _used_by(self.python, "-m", "sandbox_plugin", "status", "--probe", _socket_of(node))
                self.note(f"a probe's process, {gpus} GPUs: most memory", peak, "MiB")
                self.note(f"a probe's process, {gpus} GPUs: CPU time", cpu * 1000, "ms")

    def scrape(self) -> None:
        """The page of metrics, of a node whose devices are all held."""
        with self.daemon(64, "--metrics-address=127.0.0.1:0") as (kubelet, daemon, _):
            before = psutil.Process(daemon.pid).memory_info().rss
            page = f"http://{daemon.wait_for('metrics served')['address'][0]}/metrics"
            kubelet.plugin(PGPU).allocate(sorted(kubelet.healthy(PGPU), key=int))

            def get() -> None:
                with urlopen(page, timeout=30) as answer:
                    answer.read()

            get()  # the first one loads the client's library
            self.note("memory of the metrics", (psutil.Process(daemon.pid).memory_info().rss - before) / 2**20, "MiB")
            repeat = self.times(300)
            spent = _cpu(daemon.pid)
            self.note("scrape, 64 GPUs", median(_ms([get] * repeat)), "ms")
            self.note("scrape, 64 GPUs: CPU", (_cpu(daemon.pid) - spent) * 1000 / repeat, "ms")

    def commands(self) -> None:
        self.note("sandbox-plugin --version", self.run("-m", "sandbox_plugin", "--version") * 1000, "ms")
        with self.node(8) as (_, node):
            command = ("-m", "sandbox_plugin", "list", f"--fake-sysfs={node.root}")
            self.note("sandbox-plugin list", self.run(*command) * 1000, "ms")

    def floors(self) -> None:
        """What the same work takes without any of the program's code: no change here goes below it."""
        yardstick = self.run("-c", "import asyncio")
        libraries = self.run("-c", f"import {LIBRARIES}")
        self.note("python -c 'import' of the libraries alone", libraries * 1000, "ms", yardstick * 1000)
        with self.node(1024) as (_, node):
            bound = [f"{node.root}/sys/bus/pci/devices/{f.address}" for f in node.functions() if f.driver == "vfio-pci"]
            ran = subprocess.run(
                [self.python, "-c", BARE, *bound], check=True, capture_output=True, text=True, cwd=ROOT
            )
        look, scan, memory = (float(figure) for figure in ran.stdout.split())
        self.note("what Allocate reads of a GPU, alone", look, "ms")
        self.note("what a first scan reads of a GPU and its port, alone", scan, "ms")
        self.note("resident memory of Python with the libraries", memory, "MiB")


SECTIONS = ("start", "allocate", "kubelet", "bind", "idle", "memory", "scrape", "commands", "floors")

LIBRARIES = "asyncio, betterproto, grpclib.client, grpclib.server, structlog, aiofiles.os"

BARE = f"""
import {LIBRARIES}
import os, resource, statistics, sys, time
memory = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
def read(path):
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    os.read(fd, 4096)
    os.close(fd)
def look(folder):
    os.readlink(folder + "/driver")
    (cdev,) = os.listdir(folder + "/vfio-dev")
    read(folder + "/vfio-dev/" + cdev + "/dev")
    for name in ("enable", "power_state", "power/runtime_status", "current_link_speed", "current_link_width"):
        read(folder + "/" + name)
def scan(folder):
    look(folder)
    os.readlink(folder + "/iommu_group")
    for name in SCANNED:
        read(folder + "/" + name)
def once(what):
    began = time.perf_counter()
    for folder in sys.argv[1:]:
        what(folder)
    return (time.perf_counter() - began) * 1000 / len(sys.argv[1:])
SCANNED = ("vendor", "device", "class", "subsystem_vendor", "subsystem_device", "numa_node", "max_link_speed",
    "max_link_width", "d3cold_allowed", "resource", "aer_dev_fatal", "aer_dev_nonfatal", "aer_dev_correctable",
    "boot_vga", "reset_method", "../max_link_speed", "../max_link_width", "../vendor", "../device", "../class",
    "../subsystem_vendor")
print(*(statistics.median(once(what) for _ in range(20)) for what in (look, scan)), memory)
"""
"""The reads of `read_again` and of a first scan, with system calls alone. Folders of GPUs are its arguments."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions, and no 4,096 GPUs")
    parser.add_argument("--python", help="interpreter of an environment with the program; default: one is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its byte code
    bench = Bench(args.python or program_alone(), args.quick)
    print("| what | median | ratio |\n|---|---|---|")
    for section in args.sections or SECTIONS:
        getattr(bench, section)()
    if args.json:
        args.json.write_text(json.dumps([asdict(figure) for figure in bench.figures], indent=2) + "\n")


def program_alone() -> str:
    """Makes an environment that has what the program needs and nothing else. Returns its interpreter."""
    folder = ROOT / ".cache/bench"
    python = folder / "bin/python"
    venv.EnvBuilder(with_pip=False, symlinks=True, clear=True).create(folder)
    pip = [f"{sys.base_prefix}/bin/python3", "-m", "pip", "--python", str(python), "install", "-qq", "--compile"]
    lock = ["--require-hashes", "--only-binary=:all:", "-r", str(ROOT / "requirements/runtime.txt")]
    subprocess.run([*pip, *lock], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "sandbox-plugin.pth").write_text(f"{ROOT}\n")
    return str(python)


def _ms(calls: Iterable[Callable[[], object]]) -> list[float]:
    """What each call takes, in milliseconds."""
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1000)
    return times


def _allocates(plugin: Plugin, ids: Sequence[str], size: int, repeat: int) -> list[float]:
    """What Allocates of so many devices take, of others each time."""
    asked = cycle(ids[at : at + size] for at in range(0, len(ids) - size + 1, size))
    return _ms(partial(plugin.allocate, next(asked)) for _ in range(repeat))


def _wait_until_healthy(kubelet: GrpcKubelet, gpus: int) -> None:
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == gpus, timeout=120)


def _peak(pid: int) -> float:
    """The most memory that a process ever had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _used_by(*command: str) -> tuple[float, float]:
    """The most memory of a command of Python, in MiB, and its CPU time, in seconds.

    A small process starts it, because what its parent has counts until the exec.
    """
    starter = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    run = [command[0], "-S", "-c", starter, *command]
    said = subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, cpu = map(float, said.stdout.split())
    return peak, cpu


def _socket_of(node: FakeNode) -> str:
    return f"--status-socket={node.root}/run/sandbox-plugin/status.sock"


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100)[-1]


def _until(kubelet: GrpcKubelet, change: Callable[[], None], healthy: int) -> float:
    """Milliseconds from before the change until the message with so many healthy devices."""
    time.sleep(PAUSE)
    began = time.monotonic()
    change()
    _wait_until_healthy(kubelet, healthy)
    return (kubelet.history(PGPU)[-1].at - began) * 1000


@contextmanager
def _scanning(node: FakeNode) -> Iterator[None]:
    """Something in a watched folder changes all the time, so that a scan follows the other."""
    entry = node.root / "dev/vfio/entry"
    ended = threading.Event()

    def change() -> None:
        while not ended.wait(0.05):
            entry.touch()
            entry.unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _switches(pid: int) -> int:
    """How often its threads have gone to sleep by themselves; those of threads that have ended are lost."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for line in (thread / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
