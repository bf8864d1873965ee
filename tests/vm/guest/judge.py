"""The kernel is the judge of what the daemon says: a device is Healthy if and only if the kernel gives it to a VM.

The judge asks the kernel by `vfio_user.py`, a process of its own for each device, so that all are asked at once: each
attempt resets the device twice, and a reset takes 0.1 s. It asks between the steps of a case, and lets go at once.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kernel import device_id, driver, functions_of, group, node
from kubelet import GrpcKubelet

DeviceKey = tuple[str, str]
"""Resource and ID."""

IN_USE = "in use"
"""A pod's VM has the device, so the kernel refuses it to others; for the kubelet it is Healthy all the same. Without
PodResources any VM may be a pod's."""
EXCUSED = (IN_USE, "settling", "not-in-cdi")
"""Besides, reasons for which a device is Unhealthy although the kernel would give it away: it was ill a moment ago, or
Kata would not find it yet."""
_NOT_ASKED = ("fatal-error", "off-the-bus")
"""Whoever opens a device in these states changes what the daemon sees: he is in the way of a recovery, or makes the
kernel wait for a dead device and note that it sleeps. Cases that want to know ask for themselves."""
NO_ANSWER = 5.0
"""Seconds after which a VM that waits for the kernel counts as not let in: the kernel waits for a device that has lost
its power to come back from its reset, for a minute or two (pci_dev_wait in drivers/pci/pci.c)."""
_AGAIN = 0.5
"""Seconds until the judge looks again where the daemon has not seen yet what the kernel knows."""


class VfioUser:
    """A process that plays a VM. With `root` it sees only that folder."""

    def __init__(self, root: Path | None = None) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("vfio_user.py"))]
        if root is not None:
            command.append(str(root))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._is_waiting = False
        """Whether an answer is still to come."""

    def hold(self, path: str, addresses: Collection[str]) -> str | None:
        """Why the kernel does not let it in, or None when it has the device."""
        self.begin("hold", path, *addresses)
        return self.answer()

    def attempt(self, path: str, addresses: Collection[str]) -> str | None:
        """The same, and lets go of it at once."""
        self.begin("try", path, *addresses)
        return self.answer()

    def let_go(self) -> None:
        self.begin("let-go")
        self.answer()

    def begin(self, *words: str) -> None:
        """Gives it a command, unless it still waits for the kernel."""
        assert self._process.stdin is not None
        if self._is_waiting:
            self.answer(0)
        if not self._is_waiting:
            self._process.stdin.write(" ".join(words) + "\n")
            self._process.stdin.flush()
            self._is_waiting = True

    def answer(self, seconds: float | None = None) -> str | None:
        """What it answered if it was not let in; None: it was."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return f"no answer in {seconds:g} s"
        self._is_waiting = False
        line = self._process.stdout.readline().strip()
        return None if line in ("in", "free") else line or "the VM's process is gone"

    def close(self) -> None:
        """Ends it in good order."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        """Ends it as the kernel does when there is no memory left."""
        self._process.kill()
        self._process.wait()


@contextmanager
def vm(address: str) -> Iterator[VfioUser]:
    """A VM that holds a function by its device's node, in a process of its own, and of its group no other function.

    Raises AssertionError if it is not let in.
    """
    number = device_id(address)
    assert number is not None, f"{address} has no cdev"
    user = VfioUser()
    try:
        refused = user.hold(node(number), [address])
        assert refused is None, f"the VM cannot have {address}: {refused}"
        yield user
    finally:
        user.close()


@dataclass
class Judge:
    """Compares what the kubelet believes with what the kernel does.

    Usage:

        judge = Judge(kubelet, log_path, {"0000:01:00.0": "example.com/gpu"})
        judge.expect_agreement("unbind", patience=120)
    """

    kubelet: GrpcKubelet
    log_path: Path
    offered: dict[str, str]
    """Address of each function that a rule offers -> its resource: bound, it must be listed."""
    answers: int = 0
    steps: int = 0
    excused: Counter[str] = field(default_factory=Counter)
    """What was excused -> how often."""
    _users: dict[DeviceKey, VfioUser] = field(default_factory=dict)

    def close(self) -> None:
        for user in self._users.values():
            user.close()
        excused = ", ".join(f"{name} {count}" for name, count in sorted(self.excused.items())) or "none"
        print(f"judge: {self.answers} answers of the kernel after {self.steps} steps; excused: {excused}", flush=True)

    def expect_agreement(self, step: str, patience: float, in_use: Collection[DeviceKey] = ()) -> None:
        """`in_use`: devices that pods' VMs have. Raises AssertionError when daemon and kernel go on disagreeing."""
        self.steps += 1
        deadline = time.monotonic() + patience
        left = self._disagreeing(self._keys(), in_use)
        while left:
            if time.monotonic() > deadline:
                said = "; ".join(f"{resource} {number}: {words}" for (resource, number), words in left.items())
                raise AssertionError(f"after `{step}` kernel and daemon disagree: {said}")
            with self.kubelet.changed:
                self.kubelet.changed.wait(_AGAIN)
            left = self._disagreeing(left, in_use)

    def _keys(self) -> list[DeviceKey]:
        """Everything that the kubelet was shown, and what is bound and should have been shown."""
        shown = {
            (resource, number) for resource in self.kubelet.resources() for number in self.kubelet.devices(resource)
        }
        bound = {(resource, device_id(a)) for a, resource in self.offered.items() if driver(a) == "vfio-pci"}
        return sorted(shown | {(resource, number) for resource, number in bound if number is not None})

    def _disagreeing(self, keys: Collection[DeviceKey], in_use: Collection[DeviceKey]) -> dict[DeviceKey, str]:
        """Those about which kernel and daemon disagree, with what each of them says."""
        reasons = self.reasons()
        left = {}
        asked = []
        for key in keys:
            is_unhealthy, reason = key[1] in self.kubelet.unhealthy(key[0]), reasons.get(key)
            if is_unhealthy and reason is None:
                left[key] = "the daemon says Unhealthy, and its log does not say why"  # the kubelet is told first
            elif is_unhealthy and reason in _NOT_ASKED:
                self.excused[reason] += 1
            else:
                asked.append(key)
        for key, refused in zip(asked, self._ask(asked), strict=True):
            self.answers += 1
            resource, number = key
            healthy = number in self.kubelet.healthy(resource)
            if healthy == (refused is None):
                continue
            excuse = (IN_USE if key in in_use else "Healthy") if healthy else reasons.get(key) or "not listed"
            if excuse in EXCUSED:
                self.excused[excuse] += 1
            else:
                left[key] = f"the daemon says {excuse}, and the kernel {refused or 'lets it in'}"
        return left

    def _ask(self, keys: list[DeviceKey]) -> list[str | None]:
        """For each device why the kernel does not let a VM in, or None. Those of one group are asked in turn."""
        answers: dict[DeviceKey, str | None] = {}
        while left := [key for key in keys if key not in answers]:
            at_once = {}
            for resource, number in left:
                functions = functions_of(number)
                if functions and resource not in map(self.offered.get, functions):
                    # A cdev's number is used again: what was known by it may be listed for a while.
                    answers[resource, number] = f"{node(number)} leads to {functions[0]}"
                else:
                    at_once[group(functions[0]) if functions else node(number)] = (resource, number)
            for key in at_once.values():
                if key not in self._users:
                    self._users[key] = VfioUser()
                self._users[key].begin("try", node(key[1]), *functions_of(key[1]))
            answers |= {key: self._users[key].answer(NO_ANSWER) for key in at_once.values()}
        return [answers[key] for key in keys]

    def reasons(self) -> dict[DeviceKey, str | None]:
        """The first word of the reason for which each device is Unhealthy, by the daemon's log; None: it is Healthy."""
        reasons: dict[DeviceKey, str | None] = {}
        whole_lines = self.log_path.read_text().rpartition("\n")[0]
        for line in whole_lines.splitlines():
            said = json.loads(line) if line.startswith("{") else {}
            if said.get("event") in ("device found", "device changed"):
                reason = said.get("reason")
                reasons[said["resource"], said["device"]] = reason and reason.partition(":")[0]
        return reasons
