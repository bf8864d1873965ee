"""The cases: the installed daemon on this kernel's own /sys and /dev, and what the kubelet sees of each cause.

Run by the guest's init. Prints a line for each case, with the milliseconds from the cause to the kubelet's seeing it,
and `N passed, N failed` at the end. The kubelet is the tests' own, played by grpcio; daemon, causes and kubelet share
one clock.

The same cases run on kernels with and without VFIO cdevs. What differs is the ID of a device and the node it stands
for, and both come from `kernel`; an ID is taken before an unbind, because a cdev's is gone with it.
"""

from __future__ import annotations

import faulthandler
import os
import stat
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

import vfio_cases
from judge import NO_ANSWER, DeviceKey, Judge, VfioUser, vm
from kernel import (
    CDEVS,
    announce,
    bind,
    bind_by_new_id,
    bind_directly,
    bound_functions,
    bound_id,
    cut_power,
    device_id,
    driver,
    events,
    expect,
    group,
    hot_add,
    hot_remove,
    inject_aer,
    insert_modules,
    members,
    new_id,
    node,
    remove_vfio,
    unbind,
    wait_until,
)
from kubelet import GrpcKubelet
from pods import PodResources

GPU, TWIN, SIBLING, FAR, HOT = "0000:01:00.0", "0000:02:00.0", "0000:02:00.1", "0000:81:00.0", "0000:03:00.0"
CARD, SOUND, NIC, DISK = "0000:04:00.0", "0000:04:00.1", "0000:05:00.0", "0000:06:00.0"
GPU_PORT = "0000:00:04.0"
EDU_ID = "1234 11e8"
"""QEMU's edu device, as new_id takes it."""
GPUS, EDUS, CARDS = "example.com/gpu", "example.com/edu", "example.com/card"
OFFERED = {GPU: GPUS, TWIN: GPUS, FAR: GPUS, HOT: EDUS, CARD: CARDS, SOUND: CARDS, NIC: CARDS, DISK: CARDS}
"""What rules.toml offers, and under which name. SIBLING rides along in TWIN's group."""
PATIENCE = 240.0
"""Seconds; the machine is emulated, and where other work shares its cores a daemon takes 30 to 130 s to start."""
HEALTH_INTERVAL = 2.0
"""Seconds. With it the power cut, which no event tells of, is seen."""
ROUNDS = 20
PAUSE = 0.3
"""Seconds before each measured cause: what is measured is one event, and not the end of the one before it too."""
STUCK = 300.0
"""Seconds after which every thread's stack is printed: nothing here takes so long."""
_UNCORRECTABLE_FATAL = 0x40000
"""Malformed TLP, in the Uncorrectable Error Status Register (PCIe 6.0, 7.8.4.2)."""


class Bench:
    """The daemon, its kubelet, and the results."""

    def __init__(self, *, name: str, prefix: tuple[str, ...] = (), user: int = 0, flags: tuple[str, ...] = ()) -> None:
        self.results: list[tuple[str, float | None, str]] = []
        top = Path("/tmp", name)
        top.mkdir()
        self.cdi = top / "cdi"
        self.kubelet = GrpcKubelet(top / "kubelet")
        self.pods = PodResources(top / "pod-resources/kubelet.sock")
        self.log_path = top / "log"
        for folder in (self.cdi, self.kubelet.folder):
            folder.mkdir()
            os.chown(folder, user, user)
        self.kubelet.start()
        os.chown(self.kubelet.socket, user, user)
        command = [*prefix, sys.executable, "-m", "sandbox_plugin", "run", "--config", "/guest/rules.toml"]
        command += ["--kubelet-dir", str(self.kubelet.folder), "--cdi-dir", str(self.cdi), "--log-format", "json"]
        command += ["--pod-resources-socket", str(self.pods.socket)]
        with self.log_path.open("wb") as log:
            self.daemon = subprocess.Popen(
                [*command, *flags, "--health-interval", str(HEALTH_INTERVAL)], stderr=log, stdin=subprocess.DEVNULL
            )
        self.judge = Judge(self.kubelet, self.log_path, OFFERED)

    def wait_until_started(self) -> None:
        """Raises AssertionError."""
        try:
            self.wait_for_log("device")
        except AssertionError:
            print(f"the daemon did not start:\n{self.log_path.read_text()}", flush=True)
            raise

    def close(self) -> None:
        self.judge.close()
        self.daemon.terminate()
        status = self.daemon.wait(PATIENCE)
        self.kubelet.stop()
        expect(status == 0, f"the daemon ended with status {status}")

    def is_healthy(self, resource: str, number: str) -> bool:
        return number in self.kubelet.healthy(resource)

    def offers(self, resource: str, address: str) -> bool:
        """Whether the function is healthy by the ID that it has now."""
        number = device_id(address)
        return number is not None and self.is_healthy(resource, number)

    def wait_for_log(self, text: str) -> None:
        """The kubelet is told before the log is written."""
        wait_until(lambda: text in self.log_path.read_text(), f"a line with {text} in the daemon's log", PATIENCE)

    def latency(self, cause: Callable[[], object], seen: Callable[[], bool], resource: str = GPUS) -> float:
        """Milliseconds from the cause to the message after which `seen` holds. Raises AssertionError."""
        time.sleep(PAUSE)
        expect(not seen(), "it was so before")
        began = time.monotonic()
        cause()
        self.kubelet.wait_for(seen, PATIENCE)
        return (self.kubelet.history(resource)[-1].at - began) * 1000

    def expect_kernel_agrees(self, step: str, *in_use: DeviceKey) -> None:
        """Every device is Healthy if and only if the kernel gives it to a VM. `in_use`: those that pods' VMs have."""
        self.judge.expect_agreement(step, PATIENCE, in_use)

    def disagreement(self, step: str, patience: float) -> str | None:
        """What kernel and daemon still disagree about after `patience` seconds, for a fault that is known."""
        try:
            self.judge.expect_agreement(step, patience)
        except AssertionError as error:
            return str(error)
        return None

    def case(self, name: str, work: Callable[[], float | None]) -> None:
        """Runs one case, and asks the kernel whether it agrees with the outcome. A failure is a result too."""
        faulthandler.dump_traceback_later(STUCK, repeat=True)
        try:
            milliseconds, outcome = work(), "ok"
            if self.daemon.poll() is None:
                self.expect_kernel_agrees(name)
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
    bench.wait_until_started()
    try:
        _bind_and_unbind(bench)
        if CDEVS:
            _renumbering(bench)
        _medians(bench)
        _hot_plug(bench)
        _shared_group(bench)
        _in_use(bench)
        _aer(bench)
        _modules(bench)
        _stand_ins(bench)
        _off_the_bus(bench)
        _pods(bench)
        _mates(bench)
        _vfio_command(bench)
    finally:
        bench.pods.stop()
        bench.case("SIGTERM: a graceful end", lambda: bench.close())
    # A daemon takes seconds to start, so the others do it at the same time; none of them is measured then.
    nobody = Bench(name="nobody", user=65534, prefix=_unprivileged())
    others = [Bench(name="kubevirt", flags=("--consumer", "kubevirt"))]
    _kubevirt_cases(others[0])
    if CDEVS:
        others.append(Bench(name="strict", flags=("--require-iommufd",)))
        _strict_cases(others[1])
    try:
        _unprivileged_cases(nobody)
    finally:
        nobody.case("unprivileged: a graceful end", lambda: nobody.close())
    return _summary([result for each in (bench, *others, nobody) for result in each.results])


def _bind_and_unbind(bench: Bench) -> None:
    bench.case(
        "bind by driver_override and drivers_probe; the first device of its resource",
        lambda: bench.latency(lambda: bind(GPU), lambda: bench.offers(GPUS, GPU)),
    )
    number = bound_id(GPU)
    bench.case("the CDI spec names the node", lambda: _expect_spec(bench, GPUS, number))
    bench.case("Allocate answers with the node", lambda: _allocate(bench, number))
    bench.case("unbind", lambda: bench.latency(lambda: unbind(GPU), lambda: number in bench.kubelet.unhealthy(GPUS)))
    bench.case(
        "bind by the driver's own bind file",
        lambda: bench.latency(lambda: bind_directly(GPU), lambda: bench.offers(GPUS, GPU)),
    )
    number = bound_id(GPU)
    unbind(GPU)
    bench.kubelet.wait_for(lambda: not bench.is_healthy(GPUS, number), PATIENCE)
    bench.case("bind by new_id", lambda: bench.latency(lambda: bind_by_new_id(GPU), lambda: bench.offers(GPUS, GPU)))
    bench.case(
        "a device on the other NUMA node",
        lambda: bench.latency(lambda: bind(FAR), lambda: bench.offers(GPUS, FAR)),
    )
    bench.case("its NUMA node is listed", lambda: _expect_numa(bench, bound_id(FAR), 1))


def _renumbering(bench: Bench) -> None:
    """Two devices are unbound, and bound in the other order: each gets the other's cdev number, and so its ID."""
    numbers = {address: bound_id(address) for address in (GPU, FAR)}
    for address in (GPU, FAR):
        unbind(address)
    bench.kubelet.wait_for(lambda: bench.kubelet.unhealthy(GPUS) >= set(numbers.values()), PATIENCE)

    def first() -> float:
        """One of the two IDs has a new meaning; the other means nothing, and must not be offered."""
        milliseconds = bench.latency(lambda: bind(FAR), lambda: bench.offers(GPUS, FAR))
        expect(bound_id(FAR) == numbers[GPU], f"the kernel gave {bound_id(FAR)}, not the {numbers[GPU]} that was free")
        expect(numbers[FAR] in bench.kubelet.unhealthy(GPUS), "its old ID is still offered")
        _expect_meaning(bench, FAR)
        return milliseconds

    def second() -> float:
        milliseconds = bench.latency(lambda: bind(GPU), lambda: bench.offers(GPUS, GPU))
        expect(bound_id(GPU) == numbers[FAR], f"the kernel gave {bound_id(GPU)}, not {numbers[FAR]}")
        for address in (GPU, FAR):
            _expect_meaning(bench, address)
        return milliseconds

    bench.case("cdevs bound in the other order: the old ID is Unhealthy, the new one listed", first)
    bench.case("and the other device has the ID that became free", second)


def _expect_meaning(bench: Bench, address: str) -> None:
    """The ID that a function has now stands for its NUMA node and its node, wherever one asks."""
    number = bound_id(address)
    shown = int(Path("/sys/bus/pci/devices", address, "numa_node").read_text())
    listed = bench.kubelet.devices(GPUS)[number].numa
    expect(listed == ((shown,) if shown >= 0 else None), f"{address} is on NUMA node {shown}, and {listed} is listed")
    _expect_spec(bench, GPUS, number)
    _allocate(bench, number)


def _medians(bench: Bench) -> None:
    """Many binds and unbinds of one device; the medians are the figures that count."""
    binds: list[tuple[float, float]] = []
    unbinds: list[tuple[float, float]] = []
    with events() as moments:
        for _ in range(ROUNDS):
            number = bound_id(GPU)
            for cause, times, seen in (
                (unbind, unbinds, partial(_is_not_healthy, bench, number)),
                (bind, binds, partial(bench.offers, GPUS, GPU)),
            ):
                whole = bench.latency(partial(cause, GPU), seen)
                seen_at = bench.kubelet.history(GPUS)[-1].at
                began = seen_at - whole / 1000
                wait_until(partial(_has_later, moments, began), "the kernel's event")  # its listener may come late
                first = next(m for m in moments if m > began)
                times.append((whole, (seen_at - first) * 1000))
    for what, times in (("bind", binds), ("unbind", unbinds)):
        wholes, shares = zip(*times, strict=True)
        print(f"{what}: " + " ".join(f"{t:.0f}" for t in sorted(wholes)), flush=True)
        bench.case(f"{what}, median of {ROUNDS} (aim: 50 ms)", partial(statistics.median, wholes))
        bench.case("    of these from the kernel's first event on", partial(statistics.median, shares))


def _has_later(moments: list[float], began: float) -> bool:
    return any(moment > began for moment in moments)


def _is_not_healthy(bench: Bench, number: str) -> bool:
    return not bench.is_healthy(GPUS, number)


def _hot_plug(bench: Bench) -> None:
    def added() -> float:
        """From the moment in which the kernel has bound it, by an ID that vfio-pci was told before."""
        began = _moment_of(lambda: hot_add("hot0"), lambda: driver(HOT) == "vfio-pci", "the hot-add")
        bench.kubelet.wait_for(lambda: bench.offers(EDUS, HOT), PATIENCE)
        return (bench.kubelet.history(EDUS)[-1].at - began) * 1000

    with new_id(EDU_ID):
        bench.case("hot-add of a device that vfio-pci knows, the first of its resource", added)
    number = bound_id(HOT)

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
    number = bound_id(GPU)
    give_back: list[Callable[[], None]] = []

    def cut() -> float:
        took = bench.latency(lambda: give_back.append(cut_power(GPU_PORT)), lambda: not bench.is_healthy(GPUS, number))
        expect(took < 2 * HEALTH_INTERVAL * 1000, f"it took {took:.0f} ms, and the emulator is slow, but not so slow")
        return took

    bench.case(f"power cut behind the driver's back (no event; every {HEALTH_INTERVAL:g} s)", cut)
    bench.case(
        "power is back (held back for 2 s)",
        lambda: bench.latency(lambda: give_back[0](), lambda: bench.is_healthy(GPUS, number)),
    )

    bench.case("a VM opens a device without power: not let in, and it stays Unhealthy", lambda: _opened_dead(bench))


def _opened_dead(bench: Bench) -> None:
    """The kernel finds that nothing answers, and notes D3cold, as if the device were asleep."""
    number = bound_id(GPU)
    user = VfioUser()
    give_back = cut_power(GPU_PORT)
    try:
        bench.kubelet.wait_for(lambda: not bench.is_healthy(GPUS, number), PATIENCE)
        user.begin("try", node(number), GPU)
        refused = user.answer(NO_ANSWER)
        expect(refused is not None, "the kernel lets it in")
        was_offered = _becomes_healthy(bench, GPUS, number, seconds=3 * HEALTH_INTERVAL)
    finally:
        give_back()
        user.close()
    _wait_offered(bench, GPU)
    expect(not was_offered, f"a dead device in D3cold is offered, and the kernel: {refused}")


def _becomes_healthy(bench: Bench, resource: str, number: str, seconds: float) -> bool:
    try:
        return bench.kubelet.wait_for(lambda: bench.is_healthy(resource, number), seconds)
    except AssertionError:
        return False


def _shared_group(bench: Bench) -> None:
    unbind(SIBLING)
    bench.case(
        "a device whose group mate has no driver",
        lambda: bench.latency(lambda: bind(TWIN), lambda: bench.offers(GPUS, TWIN)),
    )
    number = bound_id(TWIN)
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
            with vm(GPU) as user:
                for _ in range(20):
                    expect(Path("/sys/bus/pci/devices", GPU, "enable").read_text().strip() == "1", "it is not enabled")
                    user.let_go()
                    refused = user.hold(node(bound_id(GPU)), [GPU])
                    expect(refused is None, f"the kernel refuses {GPU}: {refused}")
        finally:
            stop.set()
            disturber.join()

    bench.case("a VM opens the node while everything is rescanned: never EBUSY", never_busy)
    bench.case("a node that is in use is not touched by a look", lambda: _still_there(bench))


def _still_there(bench: Bench) -> None:
    with vm(GPU):
        expect(bench.offers(GPUS, GPU), "without PodResources nobody can say that no pod holds it")
        bench.expect_kernel_agrees("a VM opens the node", (GPUS, bound_id(GPU)))


def _pods(bench: Bench) -> None:
    """From here on PodResources is there: who uses a device may be no pod, and the daemon asks every 5 s."""
    bench.pods.start(age=3600)
    number = bound_id(GPU)

    def taken() -> None:
        with vm(GPU):
            _wait_withheld(bench, GPUS, number, "in-use-elsewhere")
            bench.expect_kernel_agrees("a VM outside any pod")
        _wait_offered(bench, GPU)

    def killed() -> None:
        with vm(GPU) as user:
            _wait_withheld(bench, GPUS, number, "in-use-elsewhere")
            user.kill()
            _wait_offered(bench, GPU)

    def outlived() -> None:
        bench.pods.hold("vm", GPUS, number)
        with vm(GPU):
            bench.pods.wait_until_asked(2, PATIENCE)
            expect(bench.offers(GPUS, GPU), "a pod holds it, so whoever uses it is that pod")
            bench.expect_kernel_agrees("a pod's VM", (GPUS, number))
            bench.pods.release("vm")
            _wait_withheld(bench, GPUS, number, "in-use-elsewhere")
            bench.expect_kernel_agrees("the pod is gone, its VM not")
        _wait_offered(bench, GPU)

    def kept() -> float:
        """The kernel takes the driver's link away, and waits for the VM with everything else; no event tells of it."""
        with vm(GPU) as user:
            began = time.monotonic()
            with _waiting_unbind(GPU, user.let_go):
                bench.kubelet.wait_for(lambda: number in bench.kubelet.unhealthy(GPUS), PATIENCE)
                milliseconds = (bench.kubelet.history(GPUS)[-1].at - began) * 1000
                expect(bench.offers(GPUS, FAR), "another device is affected too")
                bench.expect_kernel_agrees("an unbind that waits for a VM")
        return milliseconds

    bench.case("a VM outside any pod: in use elsewhere, and Healthy again after it", taken)
    bench.case("the same when it is killed", killed)
    bench.case("a pod's VM is not reported, until it outlives its pod", outlived)
    bench.case(f"an unbind that waits for a VM (no event on Linux 6.1; every {HEALTH_INTERVAL:g} s)", kept)
    bench.case(
        "the VM is gone, the device is bound again",
        lambda: bench.latency(lambda: bind(GPU), lambda: bench.offers(GPUS, GPU)),
    )


def _wait_withheld(bench: Bench, resource: str, number: str, *reasons: str) -> None:
    """Until the kubelet has it as Unhealthy, and the log says why, in one of these words."""
    bench.kubelet.wait_for(lambda: number in bench.kubelet.unhealthy(resource), PATIENCE)
    wait_until(
        lambda: bench.judge.reasons().get((resource, number)) in reasons, f"{number}: one of {reasons}", PATIENCE
    )


@contextmanager
def _waiting_unbind(address: str, let_go: Callable[[], None]) -> Iterator[None]:
    """An unbind that must wait for the VM that has the function, until `let_go` at the end. Raises AssertionError."""
    waiting = threading.Thread(target=unbind, args=(address,))
    waiting.start()
    try:
        wait_until(lambda: driver(address) is None, f"the unbind of {address}", PATIENCE)
        yield
        expect(waiting.is_alive(), "the unbind did not wait for the VM")
    finally:
        let_go()
        waiting.join(PATIENCE)
    expect(not waiting.is_alive(), "the unbind goes on waiting")


def _mates(bench: Bench) -> None:
    """Two devices of one group, which the kernel gives to one VM. Without cdevs they are one device, with one ID."""
    mate = bound_id(SOUND)

    def in_one_vm() -> None:
        with vm(CARD):
            _expect_refused(SOUND)
            _wait_withheld(bench, CARDS, mate, "group-taken", "in-use-elsewhere")
            bench.expect_kernel_agrees("a VM has one of a group")
        bench.kubelet.wait_for(lambda: bench.offers(CARDS, CARD) and bench.offers(CARDS, SOUND), PATIENCE)

    def in_a_pods_vm() -> None:
        number = bound_id(CARD)
        bench.pods.hold("vm", CARDS, number)
        with vm(CARD):
            if CDEVS:
                _wait_withheld(bench, CARDS, mate, "group-taken")
            bench.pods.wait_until_asked(2, PATIENCE)
            expect(bench.offers(CARDS, CARD), "a pod holds it, so whoever uses it is that pod")
            bench.expect_kernel_agrees("a pod's VM has one of a group", (CARDS, number))
        bench.pods.release("vm")
        bench.kubelet.wait_for(lambda: bench.offers(CARDS, CARD) and bench.offers(CARDS, SOUND), PATIENCE)

    def unbound(*, is_seen: bool) -> None:
        """`is_seen`: the daemon has seen that it is in use. Else nothing made it look since the VM opened it."""
        with vm(CARD) as user:
            if is_seen:
                _wait_withheld(bench, CARDS, mate, "group-taken", "in-use-elsewhere")
            with _waiting_unbind(CARD, user.let_go):
                wrong = bench.disagreement("an unbind that waits for a VM", patience=3 * HEALTH_INTERVAL)
                if not wrong and _becomes_healthy(bench, CARDS, mate, seconds=3 * HEALTH_INTERVAL):
                    wrong = bench.disagreement("an unbind that has waited for a VM for a while", patience=0)
                _expect_refused(SOUND)
        bench.kubelet.wait_for(lambda: bench.offers(CARDS, SOUND), PATIENCE)
        expect(not wrong, str(wrong))

    def bound_again() -> None:
        bind(CARD)
        bench.kubelet.wait_for(lambda: bench.offers(CARDS, CARD), PATIENCE)

    bench.case("a VM has one device of a group: the kernel refuses the other, and both are withheld", in_one_vm)
    bench.case("the same, and a pod holds it: only the other is withheld", in_a_pods_vm)
    bench.case("and it is unbound meanwhile: its mate is withheld until the VM lets go", partial(unbound, is_seen=True))
    bench.case("and bound again", bound_again)
    bench.case("unbound right after a VM opened it: the same", partial(unbound, is_seen=False))
    bench.case("and bound again", bound_again)


def _vfio_command(bench: Bench) -> None:
    """`sandbox-plugin vfio`, beside the daemon."""

    def offered(*addresses: str) -> None:
        bench.kubelet.wait_for(lambda: all(bench.offers(GPUS, address) for address in addresses), PATIENCE)

    def sibling() -> None:
        vfio_cases.takes_the_sibling_back_and_forth(TWIN, SIBLING)

    def put_back() -> None:
        vfio_cases.is_put_back_when_a_probe_fails(TWIN, SIBLING)
        offered(TWIN)

    def in_use() -> None:
        vfio_cases.is_not_taken_from_a_vm(GPU)
        offered(GPU, TWIN)

    bench.case("vfio bind and unbind take the sibling along, and so do the lines of --dry-run in a shell", sibling)
    bench.case("vfio bind puts the group back when a probe fails", put_back)
    bench.case("vfio unbind refuses what a VM has; with --force it ends although its write waits", in_use)


def _expect_refused(address: str) -> None:
    user = VfioUser()
    try:
        expect(user.hold(node(bound_id(address)), [address]) is not None, f"the kernel gives {address} to a second VM")
    finally:
        user.close()


def _stand_ins(bench: Bench) -> None:
    """What else QEMU has, with and without a reset: the kernel gives all of it to VMs."""
    for address, name in ((CARD, "ati-vga"), (SOUND, "intel-hda, in its group"), (NIC, "e1000e"), (DISK, "nvme")):
        bench.case(f"another device: {name}", partial(_bind_and_wait, bench, address))


def _bind_and_wait(bench: Bench, address: str) -> None:
    bind(address)
    bench.kubelet.wait_for(lambda: bench.offers(OFFERED[address], address), PATIENCE)
    method = Path("/sys/bus/pci/devices", address, "reset_method")
    print(f"{address} can be reset by: {method.read_text().strip() if method.exists() else 'nothing'}", flush=True)
    with vm(address):
        pass


def _aer(bench: Bench) -> None:
    number = bound_id(GPU)

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
    bench.case("and it recovers", lambda: _wait_offered(bench, GPU))


def _wait_offered(bench: Bench, address: str) -> None:
    bench.kubelet.wait_for(lambda: bench.offers(GPUS, address), PATIENCE)


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
        _wait_offered(bench, GPU)
        return (bench.kubelet.history(GPUS)[-1].at - began) * 1000

    bench.case("vfio is removed (rmmod) with its devices", removed)
    bench.case("vfio is back (modprobe) and binds what driver_override names", back)


def _unprivileged_cases(bench: Bench) -> None:
    bench.case("uid 65534, no capability, own network namespace: registers", lambda: _wait_offered(bench, GPU))
    number = bound_id(GPU)
    bench.case(
        "the same: unbind", lambda: bench.latency(lambda: unbind(GPU), lambda: not bench.is_healthy(GPUS, number))
    )
    bench.case("the same: bind", lambda: bench.latency(lambda: bind(GPU), lambda: bench.offers(GPUS, GPU)))


def _strict_cases(bench: Bench) -> None:
    """A daemon that takes nothing without a cdev, as confidential guests need it, offers what it finds here."""
    try:
        bench.case("--require-iommufd is satisfied", lambda: _wait_offered(bench, GPU))
    finally:
        bench.case("--require-iommufd: a graceful end", lambda: bench.close())


def _kubevirt_cases(bench: Bench) -> None:
    """What a container of KubeVirt can reach with the nodes that Allocate gave, and with no other."""
    try:
        bench.case(
            "--consumer kubevirt: a container reaches what it was given, and nothing else", lambda: _reach(bench)
        )
    finally:
        bench.case("--consumer kubevirt: a graceful end", lambda: bench.close())


def _reach(bench: Bench) -> None:
    given = (TWIN, FAR)
    bench.kubelet.wait_for(lambda: all(bench.offers(GPUS, address) for address in (GPU, *given)), PATIENCE)
    (answer,) = bench.kubelet.plugin(GPUS).allocate([bound_id(address) for address in given]).container_responses
    addresses = answer.envs["PCI_RESOURCE_EXAMPLE_COM_GPU"].split(",")
    expect(sorted(addresses) == sorted(given), f"the variable names {addresses}")
    nodes = [device.host_path for device in answer.devices]
    by_group = {(f"/dev/vfio/{group(a)}", function) for a in given for function in members(group(a))}
    by_cdev = {(node(bound_id(address)), address) for address in given} if CDEVS else set()
    groups = [path for path in nodes if path in {path for path, _ in by_group}]
    everywhere = {(path, function) for function in bound_functions() for path in (*groups, *_nodes_of(function))}
    container = VfioUser(_root_with(nodes))
    try:
        reached = {(path, function) for path, function in everywhere if container.attempt(path, [function]) is None}
        expect(reached == by_group | by_cdev, f"with {nodes} it reaches {sorted(reached)}")
        for path in sorted({path for path, _ in by_group}):
            refused = container.hold(path, sorted(function for p, function in by_group if p == path))
            expect(refused is None, f"all at once: {refused}")
    finally:
        container.close()


def _nodes_of(address: str) -> list[str]:
    """Every VFIO node that leads to a function."""
    return list(dict.fromkeys((f"/dev/vfio/{group(address)}", node(bound_id(address)))))


def _root_with(nodes: list[str]) -> Path:
    """A file system with these device nodes and nothing else, as a runtime makes it for a container."""
    root = Path("/tmp/container")
    for path in nodes:
        place = Path(f"{root}{path}")
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mknod(place, stat.S_IFCHR | 0o600, os.stat(path).st_rdev)
    return root


def _unprivileged() -> tuple[str, ...]:
    return (sys.executable, "/guest/unprivileged.py")


def _expect_spec(bench: Bench, resource: str, number: str) -> None:
    text = (bench.cdi / f"{resource.replace('/', '-')}.yaml").read_text()
    expect(f'"{node(number)}"' in text, text)


def _allocate(bench: Bench, number: str) -> None:
    (answer,) = bench.kubelet.plugin(GPUS).allocate([number]).container_responses
    found = [(device.host_path, device.permissions) for device in answer.devices]
    expect(found == [(node(number), "mrw")], str(found))


def _expect_numa(bench: Bench, number: str, numa_node: int) -> None:
    expect(bench.kubelet.devices(GPUS)[number].numa == (numa_node,), str(bench.kubelet.devices(GPUS)[number]))


def _summary(results: list[tuple[str, float | None, str]]) -> int:
    failed = sum(outcome.startswith("FAILED") for _, _, outcome in results)
    skipped = sum(outcome.startswith("skipped") for _, _, outcome in results)
    print(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
