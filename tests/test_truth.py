"""The daemon against the truth: random hardware and kubelet events on a fake node, by a state machine.

After each event the kubelet's view must become what `tests.truth` reads from the tree: losses and newcomers at once,
and devices that were ill once they have been well for long enough. The real process, real sockets, a kubelet by grpcio.

`TRUTH_EXAMPLES` and `TRUTH_STEPS` make it longer; `just truth` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from daemon import Daemon, Places, places
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kubelet import GrpcKubelet
from outputs import read_cdi
from trials import wait_until
from truth import HEALTHY, UNHEALTHY, Truth, View

from sandbox_plugin.fake.node import FakeNode, FakeNodeError

EXAMPLES = int(os.environ.get("TRUTH_EXAMPLES", "4"))
STEPS = int(os.environ.get("TRUTH_STEPS", "30"))

_KINDS = {0x030000, 0x030200, 0x068000}
_BRIDGE = 0x060400
_SETTLE = 10.0
"""Seconds that one event may take to show on a busy machine; measured latencies are elsewhere."""

some = st.integers(min_value=0, max_value=63)
"""Picks one of whatever there is to pick from."""


class NodeMachine(RuleBasedStateMachine):
    """One node, one daemon, one kubelet, and things that happen to them."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._places: Places = self._stack.enter_context(places())
        self._kubelet = self._stack.enter_context(GrpcKubelet(self._places.kubelet))
        self._cdi_broken = False
        self._recovering: set[tuple[str, str]] = set()
        self._advertised: set[str] = set()
        self._changed = True

    @initialize(preset=st.sampled_from(["workstation", "hgx-h100", "hgx-h100-group", "gh200", "empty"]))
    def begin(self, preset: str) -> None:
        self._node: FakeNode = self._places.node(preset)
        self._truth = Truth(self._node.root)
        (self._places.top / "specs").mkdir()
        (self._places.top / "in-the-way").write_text("a file")
        self._lead_cdi_to("specs")
        self._kubelet.start()
        self._daemon = self._stack.enter_context(Daemon(self._places, self._node, "--health-interval=0.1"))
        self._daemon.wait_for("starting")

    # What happens to the hardware

    @rule(pick=some, driver=st.sampled_from(["vfio-pci", "vfio-pci", "nvgrace_gpu_vfio_pci", "nvidia"]))
    def bind(self, pick: int, driver: str) -> None:
        self._try(lambda address: self._node.bind(address, driver), self._devices(), pick)

    @rule(pick=some)
    def unbind(self, pick: int) -> None:
        self._try(self._node.unbind, self._devices(), pick)

    @rule(pick=some)
    def remove(self, pick: int) -> None:
        self._try(self._node.remove, self._devices(), pick)

    @rule(pick=some, group=st.one_of(st.none(), st.integers(min_value=200, max_value=210)))
    def add(self, pick: int, group: int | None) -> None:
        self._try(lambda address: self._node.add(address, iommu_group=group), self._node.removed(), pick)

    @rule(pick=some, driver=st.sampled_from(["snd_hda_intel", "vfio-pci", "pci-stub"]))
    def bind_sibling(self, pick: int, driver: str) -> None:
        self._try(lambda address: self._node.bind(address, driver), self._siblings(), pick)

    @rule(pick=some)
    def sicken(self, pick: int) -> None:
        self._try(self._node.sicken, self._devices(), pick)

    @rule(pick=some)
    def heal(self, pick: int) -> None:
        self._try(self._node.heal, self._devices(), pick)

    @rule(pick=some)
    def lose_node(self, pick: int) -> None:
        nodes = sorted(p for p in (self._node.root / "dev/vfio").rglob("*") if p.is_file() and p.name != "vfio")
        if nodes:
            nodes[pick % len(nodes)].unlink()
            self._changed = True

    @rule()
    def nodes_come_back(self) -> None:
        for node in self._nodes():
            node.parent.mkdir(exist_ok=True)
            node.touch()
        self._changed = True

    # What happens to the folders and to the kubelet

    @precondition(lambda self: not self._cdi_broken)
    @rule()
    def break_cdi_folder(self) -> None:
        """A plain file in the folder's place: root, too, cannot write there."""
        self._lead_cdi_to("in-the-way")
        self._cdi_broken = self._changed = True

    @precondition(lambda self: self._cdi_broken)
    @rule()
    def mend_cdi_folder(self) -> None:
        self._lead_cdi_to("specs")
        self._cdi_broken, self._changed = False, True

    def _lead_cdi_to(self, name: str) -> None:
        """In one step: the daemon may look at any moment."""
        link = self._places.top / "cdi.new"
        link.symlink_to(name)
        link.replace(self._places.cdi)

    @rule(leave_socket=st.booleans())
    def restart_kubelet(self, leave_socket: bool) -> None:
        self._kubelet.restart(leave_socket=leave_socket)
        self._changed = True

    # What must be so

    @invariant()
    def kubelet_sees_the_truth(self) -> None:
        if not self._changed or not hasattr(self, "_daemon"):
            return
        type(self).steps += 1
        self._changed = False
        expected = self._expected()
        note(f"expected {expected}")
        self._wait_until_seen(expected, settled=False)
        self._recovering -= {
            (r, n) for r in expected for n, d in self._kubelet.devices(r).items() if d.health == HEALTHY
        }
        self._advertised |= self._kubelet.resources()
        if not self._cdi_broken:
            self._specs_name_what_is_there()

    def teardown(self) -> None:
        try:
            if hasattr(self, "_daemon"):
                if self._cdi_broken:
                    self.mend_cdi_folder()
                self._wait_until_seen(self._expected(), settled=True)
                self._specs_name_what_is_there()
                self._nobody_was_held_back_without_having_been_ill()
        finally:
            self._stack.close()

    # How

    def _expected(self) -> View:
        view = self._truth.read()
        present = self._truth.present()
        if self._cdi_broken:
            return {resource: dict.fromkeys(devices, UNHEALTHY) for resource, devices in view.items()}
        for resource, devices in view.items():
            for number, health in devices.items():
                was_ill = self._ill_before.get(resource, {}).get(number) == UNHEALTHY
                if health == HEALTHY and was_ill:
                    self._recovering.add((resource, number))
        self._ill_before = present
        return view

    _ill_before: View = {}  # noqa: RUF012  (replaced, never changed)

    def _wait_until_seen(self, expected: View, *, settled: bool) -> None:
        try:
            self._kubelet.wait_for(lambda: self._is_seen(expected, settled=settled), _SETTLE)
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe daemon's log ends with\n{self._daemon.log()[-4000:]}") from None

    def _is_seen(self, expected: View, *, settled: bool) -> bool:
        for resource, devices in expected.items():
            seen = self._kubelet.devices(resource)
            if not seen and self._cdi_broken and resource not in self._advertised:
                continue  # not advertised before its spec could be written once
            if seen.keys() != devices.keys():
                return False
            for number, health in devices.items():
                if seen[number].health == health:
                    continue
                if settled or health != HEALTHY or (resource, number) not in self._recovering:
                    return False
        return True

    def _specs_name_what_is_there(self) -> None:
        def they_do() -> bool:
            with suppress(AssertionError, FileNotFoundError):  # one comes or goes at this moment
                return not _named_but_missing(self._places.cdi, self._node.root)
            return False

        wait_until(they_do, "the specs should name nodes that are there", _SETTLE)

    def _nobody_was_held_back_without_having_been_ill(self) -> None:
        """A device that is new, or was bound again, is Healthy at once. The daemon's log tells the reasons."""
        before: dict[tuple[str, str], str] = {}
        for entry in self._daemon.events():
            if entry["event"] not in ("device found", "device changed"):
                continue
            key, reason = (entry["resource"], entry["device"]), entry.get("reason", "healthy").partition(":")[0]
            was = before.get(key, "not-bound")
            assert reason != "settling" or was not in ("not-bound", "gone", "healthy"), (was, entry)
            before[key] = reason

    def _try(self, change: Callable[[str], None], addresses: list[str], pick: int) -> None:
        """Does it to one of the addresses; what a kernel would refuse just does not happen."""
        if addresses:
            with suppress(FakeNodeError):
                change(addresses[pick % len(addresses)])
            self._changed = True

    def _devices(self) -> list[str]:
        return [f.address for f in self._node.functions() if f.vendor == 0x10DE and f.class_code in _KINDS]

    def _siblings(self) -> list[str]:
        return [
            f.address for f in self._node.functions() if f.vendor == 0x10DE and f.class_code not in {*_KINDS, _BRIDGE}
        ]

    def _nodes(self) -> list[Path]:
        """The nodes that the kernel would show now."""
        vfio = self._node.root / "dev/vfio"
        groups = self._node.root / "sys/class/vfio"
        nodes = [vfio / entry.name for entry in groups.iterdir()] if groups.is_dir() else []
        cdevs = [f.vfio.number for f in self._node.functions() if f.vfio is not None and f.vfio.cdev]
        return nodes + [vfio / f"devices/vfio{number}" for number in cdevs]


def _named_but_missing(cdi: Path, root: Path) -> list[str]:
    """Nodes that a spec names and sysfs does not show."""
    missing = []
    for path in read_cdi(cdi).values():
        number = path.rpartition("/")[2]
        kind = "class/vfio" if number.isdecimal() else "class/vfio-dev"
        if not (root / "sys" / kind / number).exists():
            missing.append(path)
    return missing


@pytest.mark.timeout(max(120, EXAMPLES * (10 + STEPS // 5)))
def test_whatever_happens_the_kubelet_sees_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    NodeMachine.steps = 0
    run_state_machine_as_test(
        NodeMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            phases=[Phase.generate],  # to shrink means to do all of it again, many times over
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f" [{NodeMachine.steps} events settled] ", end="")
