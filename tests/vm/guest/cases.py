"""The cases: the installed daemon on this kernel's own /sys and /dev, and what the kubelet sees of each cause.

Run by the guest's init. Prints a line for each case, with the milliseconds from the cause to the kubelet's seeing it,
and `N passed, N failed` at the end. The kubelet is the tests' own, played by grpcio; daemon, causes and kubelet share
one clock.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kernel import (
    announce,
    bind,
    bind_by_new_id,
    bind_directly,
    cut_power,
    driver,
    events,
    expect,
    group,
    hot_add,
    hot_remove,
    inject_aer,
    insert_modules,
    new_id,
    remove_vfio,
    unbind,
    wait_until,
)
from kubelet import GrpcKubelet

GPU, TWIN, SIBLING, FAR, HOT = "0000:01:00.0", "0000:02:00.0", "0000:02:00.1", "0000:81:00.0", "0000:03:00.0"
GPU_PORT = "0000:00:04.0"
EDU_ID = "1234 11e8"
"""QEMU's edu device, as new_id takes it."""
GPUS, EDUS = "example.com/gpu", "example.com/edu"
PATIENCE = 30.0
"""Seconds; the machine is emulated."""
HEALTH_INTERVAL = 2.0
"""Seconds. With it the power cut, which no event tells of, is seen."""
ROUNDS = 20
PAUSE = 0.3
"""Seconds before each measured cause: what is measured is one event, and not the end of the one before it too."""
STUCK = 240.0
"""Seconds after which every thread's stack is printed: nothing here takes so long."""
_UNCORRECTABLE_FATAL = 0x40000
"""Malformed TLP, in the Uncorrectable Error Status Register (PCIe 6.0, 7.8.4.2)."""


class Bench:
    """The daemon, its kubelet, and the results."""

    def __init__(self, *, name: str, prefix: tuple[str, ...] = (), user: int = 0) -> None:
        self.results: list[tuple[str, float | None, str]] = []
        top = Path("/tmp", name)
        top.mkdir()
        self.cdi = top / "cdi"
        self.kubelet = GrpcKubelet(top / "kubelet")
        self.log_path = top / "log"
        for folder in (self.cdi, self.kubelet.folder):
            folder.mkdir()
            os.chown(folder, user, user)
        self.kubelet.start()
        os.chown(self.kubelet.socket, user, user)
        command = [*prefix, sys.executable, "-m", "sandbox_plugin", "run", "--config", "/guest/rules.toml"]
        flags = ["--kubelet-dir", str(self.kubelet.folder), "--cdi-dir", str(self.cdi), "--log-format", "json"]
        with self.log_path.open("wb") as log:
            self.daemon = subprocess.Popen(
                [*command, *flags, "--health-interval", str(HEALTH_INTERVAL)], stderr=log, stdin=subprocess.DEVNULL
            )
        wait_until(lambda: "device" in self.log_path.read_text(), "the daemon's first look", PATIENCE)

    def close(self) -> None:
        self.daemon.terminate()
        status = self.daemon.wait(PATIENCE)
        self.kubelet.stop()
        expect(status == 0, f"the daemon ended with status {status}")

    def is_healthy(self, resource: str, number: str) -> bool:
        return number in self.kubelet.healthy(resource)

    def latency(self, cause: Callable[[], object], seen: Callable[[], bool], resource: str = GPUS) -> float:
        """Milliseconds from the cause to the message after which `seen` holds. Raises AssertionError."""
        time.sleep(PAUSE)
        expect(not seen(), "it was so before")
        began = time.monotonic()
        cause()
        self.kubelet.wait_for(seen, PATIENCE)
        return (self.kubelet.history(resource)[-1].at - began) * 1000

    def case(self, name: str, work: Callable[[], float | None]) -> None:
        """Runs one case; its failure is a result too."""
        try:
            milliseconds, outcome = work(), "ok"
        except Skip as why:
            milliseconds, outcome = None, f"skipped: {why}"
        except Exception as error:
            milliseconds, outcome = None, f"FAILED: {error}"
            traceback.print_exc(limit=3, file=sys.stdout)
            print(f"daemon's log: {self.log_path.read_text()[-1500:]}")
        self.results.append((name, milliseconds, outcome))
        shown = "" if milliseconds is None else f"{milliseconds:8.1f} ms"
        print(f"{outcome.partition(':')[0]:8} {shown:>12}  {name}{outcome.partition(':')[2]}", flush=True)


class Skip(Exception):
    """This kernel or machine cannot do it. Says why."""


def main() -> int:
    faulthandler.dump_traceback_later(STUCK, repeat=True)
    insert_modules()
    bench = Bench(name="root")
    try:
        _bind_and_unbind(bench)
        _medians(bench)
        _hot_plug(bench)
        _shared_group(bench)
        _in_use(bench)
        _aer(bench)
        _modules(bench)
        _off_the_bus(bench)
    finally:
        bench.case("SIGTERM: a graceful end", lambda: bench.close())
    nobody = Bench(name="nobody", user=65534, prefix=_unprivileged())
    try:
        _unprivileged_cases(nobody)
    finally:
        nobody.case("unprivileged: a graceful end", lambda: nobody.close())
    return _summary(bench.results + nobody.results)


def _bind_and_unbind(bench: Bench) -> None:
    number = group(GPU)
    bench.case(
        "bind by driver_override and drivers_probe; the first device of its resource",
        lambda: bench.latency(lambda: bind(GPU), lambda: bench.is_healthy(GPUS, number)),
    )
    bench.case("the CDI spec names the node", lambda: _expect_spec(bench, GPUS, number))
    bench.case("Allocate answers with the node", lambda: _allocate(bench, number))
    bench.case("unbind", lambda: bench.latency(lambda: unbind(GPU), lambda: number in bench.kubelet.unhealthy(GPUS)))
    bench.case(
        "bind by the driver's own bind file",
        lambda: bench.latency(lambda: bind_directly(GPU), lambda: bench.is_healthy(GPUS, number)),
    )
    unbind(GPU)
    bench.kubelet.wait_for(lambda: not bench.is_healthy(GPUS, number), PATIENCE)
    bench.case(
        "bind by new_id", lambda: bench.latency(lambda: bind_by_new_id(GPU), lambda: bench.is_healthy(GPUS, number))
    )
    far = group(FAR)
    bench.case(
        "a device on the other NUMA node",
        lambda: bench.latency(lambda: bind(FAR), lambda: bench.is_healthy(GPUS, far)),
    )
    bench.case("its NUMA node is listed", lambda: _expect_numa(bench, far, 1))


def _medians(bench: Bench) -> None:
    """Many binds and unbinds of one device; the medians are the figures that count."""
    number = group(GPU)
    binds: list[tuple[float, float]] = []
    unbinds: list[tuple[float, float]] = []
    with events() as moments:
        for _ in range(ROUNDS):
            for cause, times, seen in (
                (unbind, unbinds, lambda: not bench.is_healthy(GPUS, number)),
                (bind, binds, lambda: bench.is_healthy(GPUS, number)),
            ):
                whole = bench.latency(partial(cause, GPU), seen)
                seen_at = bench.kubelet.history(GPUS)[-1].at
                first = next(m for m in moments if m > seen_at - whole / 1000)
                times.append((whole, (seen_at - first) * 1000))
    for what, times in (("bind", binds), ("unbind", unbinds)):
        wholes, shares = zip(*times, strict=True)
        print(f"{what}: " + " ".join(f"{t:.0f}" for t in sorted(wholes)), flush=True)
        bench.case(f"{what}, median of {ROUNDS} (aim: 50 ms)", partial(statistics.median, wholes))
        bench.case("    of these from the kernel's first event on", partial(statistics.median, shares))


def _hot_plug(bench: Bench) -> None:
    def added() -> float:
        """From the moment in which the kernel has bound it, by an ID that vfio-pci was told before."""
        began = _moment_of(lambda: hot_add("hot0"), lambda: driver(HOT) == "vfio-pci", "the hot-add")
        bench.kubelet.wait_for(lambda: bench.is_healthy(EDUS, group(HOT)), PATIENCE)
        return (bench.kubelet.history(EDUS)[-1].at - began) * 1000

    with new_id(EDU_ID):
        bench.case("hot-add of a device that vfio-pci knows, the first of its resource", added)
    number = group(HOT)

    def removed() -> float:
        """From the moment in which the kernel takes it away: the slot's button has a delay of 5 s."""
        began = _moment_of(lambda: hot_remove("hot0"), lambda: driver(HOT) is None, "the hot-remove")
        bench.kubelet.wait_for(lambda: number in bench.kubelet.unhealthy(EDUS), PATIENCE)
        return (bench.kubelet.history(EDUS)[-1].at - began) * 1000

    bench.case("hot-remove", removed)


def _moment_of(cause: Callable[[], object], happened: Callable[[], bool], what: str) -> float:
    """When, by the monotonic clock, the kernel did what was asked for. Raises AssertionError."""
    moments: list[float] = []

    def watch() -> None:
        wait_until(happened, what, PATIENCE)
        moments.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    cause()
    watcher.join()
    expect(bool(moments), f"{what} did not happen")
    return moments[0]


def _off_the_bus(bench: Bench) -> None:
    number = group(GPU)
    give_back: list[Callable[[], None]] = []
    bench.case(
        f"power cut behind the driver's back (no event; every {HEALTH_INTERVAL:g} s)",
        lambda: bench.latency(
            lambda: give_back.append(cut_power(GPU_PORT)), lambda: not bench.is_healthy(GPUS, number)
        ),
    )
    bench.case(
        "power is back (held back for 2 s)",
        lambda: bench.latency(lambda: give_back[0](), lambda: bench.is_healthy(GPUS, number)),
    )


def _shared_group(bench: Bench) -> None:
    number = group(TWIN)
    unbind(SIBLING)
    bench.case(
        "a device whose group mate has no driver",
        lambda: bench.latency(lambda: bind(TWIN), lambda: bench.is_healthy(GPUS, number)),
    )
    bench.case(
        "its group mate is bound to a host driver",
        lambda: bench.latency(lambda: bind(SIBLING, "virtio-pci"), lambda: not bench.is_healthy(GPUS, number)),
    )
    bench.case(
        "the mate is bound to vfio-pci (held back for 2 s)",
        lambda: bench.latency(lambda: bind(SIBLING), lambda: bench.is_healthy(GPUS, number)),
    )


def _in_use(bench: Bench) -> None:
    """A VM's process opens the node again and again while the daemon is made to look as often as it can."""

    def never_busy() -> None:
        stop = threading.Event()

        def disturb() -> None:
            while not stop.is_set():
                announce(FAR)
                time.sleep(0.01)  # the daemon's own debounce: each of these is a look of its own

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            for _ in range(5):
                with _pretend_vm(GPU):
                    expect(Path("/sys/bus/pci/devices", GPU, "enable").read_text().strip() == "1", "it is not enabled")
        finally:
            stop.set()
            disturber.join()

    bench.case("a VM opens the node while everything is rescanned: never EBUSY", never_busy)
    bench.case("a node that is in use is not touched by a look", lambda: _still_there(bench))


def _still_there(bench: Bench) -> None:
    with _pretend_vm(GPU):
        expect(bench.is_healthy(GPUS, group(GPU)), "without PodResources nobody can say that no pod holds it")


def _aer(bench: Bench) -> None:
    number = group(GPU)

    def injected() -> float:
        if not Path("/dev/aer_inject").exists():
            raise Skip("no /dev/aer_inject")
        if not Path("/sys/bus/pci/devices", GPU, "aer_dev_fatal").exists():
            raise Skip("the device has no AER")
        try:
            return bench.latency(
                lambda: inject_aer(GPU, _UNCORRECTABLE_FATAL), lambda: not bench.is_healthy(GPUS, number)
            )
        except OSError as error:
            raise Skip(f"the kernel refuses: {error.strerror}") from None

    bench.case("a fatal AER error is injected", injected)
    bench.case("and it recovers", lambda: _wait_healthy(bench, number))


def _wait_healthy(bench: Bench, number: str) -> None:
    bench.kubelet.wait_for(lambda: bench.is_healthy(GPUS, number), PATIENCE)


def _modules(bench: Bench) -> None:
    def removed() -> float:
        def cause() -> None:
            for address in (GPU, TWIN, SIBLING, FAR):
                unbind(address)
            remove_vfio()

        return bench.latency(cause, lambda: not bench.kubelet.healthy(GPUS))

    def back() -> float:
        """From the moment in which the kernel has bound it: driver_override still asks for vfio-pci."""
        began = _moment_of(insert_modules, lambda: driver(GPU) == "vfio-pci", "the bind")
        bench.kubelet.wait_for(lambda: bench.is_healthy(GPUS, group(GPU)), PATIENCE)
        return (bench.kubelet.history(GPUS)[-1].at - began) * 1000

    bench.case("vfio is removed (rmmod) with its devices", removed)
    bench.case("vfio is back (modprobe) and binds what driver_override names", back)


def _unprivileged_cases(bench: Bench) -> None:
    number = group(GPU)
    bench.case("uid 65534, no capability, own network namespace: registers", lambda: _wait_healthy(bench, number))
    bench.case(
        "the same: unbind", lambda: bench.latency(lambda: unbind(GPU), lambda: not bench.is_healthy(GPUS, number))
    )
    bench.case("the same: bind", lambda: bench.latency(lambda: bind(GPU), lambda: bench.is_healthy(GPUS, number)))


def _unprivileged() -> tuple[str, ...]:
    return (sys.executable, "/guest/unprivileged.py")


@contextmanager
def _pretend_vm(address: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "/guest/guest_vm.py", group(address), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    if process.stdout.readline().strip() != "holds":
        raise AssertionError(f"the VM cannot open {address}: {process.stderr.read().strip()}")
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(PATIENCE)


def _expect_spec(bench: Bench, resource: str, number: str) -> None:
    text = (bench.cdi / f"{resource.replace('/', '-')}.yaml").read_text()
    expect(f'"/dev/vfio/{number}"' in text, text)


def _allocate(bench: Bench, number: str) -> None:
    (answer,) = bench.kubelet.plugin(GPUS).allocate([number]).container_responses
    found = [(device.host_path, device.permissions) for device in answer.devices]
    expect(found == [(f"/dev/vfio/{number}", "mrw")], str(found))


def _expect_numa(bench: Bench, number: str, node: int) -> None:
    expect(bench.kubelet.devices(GPUS)[number].numa == (node,), str(bench.kubelet.devices(GPUS)[number]))


def _summary(results: list[tuple[str, float | None, str]]) -> int:
    failed = sum(outcome.startswith("FAILED") for _, _, outcome in results)
    skipped = sum(outcome.startswith("skipped") for _, _, outcome in results)
    print(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
