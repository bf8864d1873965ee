"""The step from one inventory to the next: what is remembered, held back, promised and retired."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.inventory.advance import advance, allocate
from sandbox_plugin.inventory.health import ARRIVAL, SETTLE
from sandbox_plugin.inventory.ledger import ADMISSION, GRANT_UNUSED, Allocation, DeviceKey, Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.inventory.symptoms import DEAD, FATAL_QUIET
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.model import Device, HostFacts, PciFunction, Reason, VfioDev

A, B = "0000:01:00.0", "0000:02:00.0"


@dataclass
class Node:
    """A node that is looked at again and again, at times of the test's choosing."""

    now: float = 100.0
    settings: Settings = field(default_factory=Settings)
    inventory: Inventory = field(default_factory=Inventory)
    signals: Signals = field(default_factory=Signals)
    wake_at: float | None = None
    facts: HostFacts = field(default_factory=HostFacts)

    def look(
        self, facts: HostFacts | None = None, *, after: float = 0.0, allocated: Sequence[DeviceKey] = (), **news: Any
    ) -> Node:
        """One step `after` seconds later; `news` are signals of this step alone.

        With facts it is a scan; without, something was learnt, and what was scanned last still counts. Then an Allocate
        is answered with what is `allocated`.
        """
        self.now += after
        if facts is not None:
            self.facts = replace(facts, began_at=self.now)
        signals = self.signals._replace(**news)
        self.inventory, self.wake_at = advance(self.inventory, self.facts, signals, self.now, Rules(self.settings))
        if allocated:
            devices = [self.inventory.by_key[key] for key in allocated if key in self.inventory.by_key]
            given = allocate(self.inventory, Allocation(devices=devices, looked_at=self.now), self.signals, self.now)
            self.inventory = given
            self.look()
            if all(device.health.healthy for device in devices):  # no other is ever given
                assert self.inventory.by_key == given.by_key, "a step finds nothing else than the Allocate did"
        return self

    def pods(self, *held: str, after: float = 0.0, asked: float | None = None, complete: bool = True) -> Node:
        """PodResources answers: these IDs are held by pods."""
        self.now += after
        pods: dict[DeviceKey, str] = {(PGPU, number): f"default/pod-{number}" for number in held}
        self.signals = self.signals._replace(
            holdings=Holdings(asked_at=self.now if asked is None else asked, pods=pods, complete=complete),
        )
        return self.look()

    def look_again(self, *, after: float = 0.1) -> Node:
        """A scan that finds everything as it was."""
        return self.look(self.facts, after=after)

    def follow(self, story: str) -> Node:
        """Steps through a story of the only device of this node: see `STORIES`."""
        for number, step in enumerate(story.split("; "), 1):
            after, happening, reason = re.fullmatch(r"\+(\S+) (.+) = (\S+)", step).groups()  # type: ignore[union-attr]
            if happening in EVENTS:
                self.look(after=float(after), aer=EVENTS[happening])
            else:
                self.look(self.facts if happening == "scan" else SCANS[happening], after=float(after))
            (device,) = self.inventory.by_key.values()
            assert (device.health.reason or "healthy") == reason, f"step {number}: {device.health}"
        return self

    def device(self, number: str, resource: str = PGPU) -> Device:
        found = self.inventory.device(resource, number)
        assert found is not None, f"{number} is not listed"
        return found

    def reason(self, number: str) -> Reason | None:
        return self.device(number).health.reason

    @property
    def listed(self) -> list[str]:
        return [d.id for d in self.inventory.resources.get(PGPU, ())]


# Stories of one device: what is remembered of it from scan to scan

OFF: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}
ASLEEP: dict[str, Any] = {"link_speed": None, "link_width": None}
COLD: dict[str, Any] = {**ASLEEP, "power_state": "D3cold", "runtime_status": "suspended", "has_power": True}
"""In D3cold although nothing can have cut its power."""
UNPOWERED = COLD | {"has_power": False}
"""In D3cold below a bridge that sleeps too, or by ACPI."""


def bound(binding: int | None, **changes: Any) -> HostFacts:
    """GPU A, in the binding of this number, or not bound."""
    vfio = None if binding is None else VfioDev(number=0, cdev="511:0", binding=binding)
    return host(replace(gpu(A, **changes), vfio=vfio, driver="vfio-pci" if vfio else None))


def two(*bindings: int | None, a: dict[str, Any] | None = None) -> HostFacts:
    """GPUs A and B, of one IOMMU group on a kernel without cdevs, so one device; each in the binding of this number."""
    functions = [gpu(A, group=9, cdev=False, fatal_errors=4, **(a or {})), gpu(B, group=9, cdev=False, fatal_errors=4)]
    devs = [None if b is None else VfioDev(number=n, cdev=None, binding=b) for n, b in enumerate(bindings)]
    return host(*(replace(f, vfio=d, driver="vfio-pci" if d else None) for f, d in zip(functions, devs, strict=True)))


SCANS = {
    "well": bound(1),
    "well, bound again": bound(2),
    "off": bound(1, **OFF),
    "asleep": bound(1, **ASLEEP),
    "cold": bound(1, **COLD),
    "cold, bound again": bound(2, **COLD),
    "cold and awake": bound(1, **COLD | {"runtime_status": "active"}),
    "unpowered": bound(1, **UNPOWERED),
    "unpowered, bound again": bound(2, **UNPOWERED),
    "4 errors": bound(1, fatal_errors=4),
    "5 errors": bound(1, fatal_errors=5),
    "carrying": bound(1, virtual_functions=2),
    "no node": replace(bound(1), dev_nodes=frozenset()),
    "unbound": bound(None),
    "silent": host(unreadable={A: "sysfs has not answered"}),
    "1 and 1": two(1, 1),
    "1 and 2": two(1, 2),
    "3 and 2": two(3, 2),
    "4 and 5": two(4, 5),
    "1 and none": two(1, None),
    "off and 1": two(1, 1, a=OFF),
    "asleep and none": two(1, None, a={"link_speed": None}),
    "silent and 1": replace(two(1, 1), functions={B: two(1, 1).functions[B]}, unreadable={A: "no answer"}),
}
EVENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "nothing": (),
    "begun": ((A, "BEGIN_RECOVERY"),),
    "failed": ((A, "FAILED_RECOVERY"),),
    "recovered": ((A, "SUCCESSFUL_RECOVERY"),),
    "begun, recovered": ((A, "BEGIN_RECOVERY"), (A, "SUCCESSFUL_RECOVERY")),
    "begun, failed above": ((A, "BEGIN_RECOVERY"), ("0000:00:01.0", "FAILED_RECOVERY")),
}
STORIES = {
    # Each step: seconds later, a scan shows this ("scan": the same as before) or AER uevents come, and the reason then.
    "a device that is seen for the first time is Healthy at once": "+0 well = healthy",
    "a loss counts at once, and a recovery after it has held": (
        "+0 well = healthy; +10 off = off-the-bus; +10 well = settling; +1.9 nothing = settling; +0.2 nothing = healthy"
    ),
    "flapping starts the wait anew": (
        "+0 well = healthy; +10 off = off-the-bus; +1 well = settling; +1.5 off = off-the-bus; +0.1 well = settling; "
        "+1.9 nothing = settling"
    ),
    "one that was bound again is not held back": "+0 well = healthy; +10 unbound = not-bound; +0.1 well = healthy",
    "a scan in the middle of a bind holds nothing back": "+0 no node = no-node; +0.5 well = healthy",
    "one that came ill and stays so is held back": "+0 off = off-the-bus; +1 nothing = off-the-bus; +1 well = settling",
    "silence of sysfs is no proof that it left": "+0 well = healthy; +1 silent = unreadable; +1 well = settling",
    "a group mate that did not answer once does not undo the damping": (
        "+0 1 and 1 = healthy; +10 silent and 1 = not-viable; +0.2 1 and 1 = settling"
    ),
    # Fatal errors
    "a recovery that has begun is an error": "+0 well = healthy; +1 begun = fatal-error",
    "a recovery that succeeded is none": "+0 well = healthy; +1 begun, recovered = healthy",
    "a recovery that failed lasts until the device is bound again": (
        "+0 well = healthy; +1 failed = fatal-error; +600 nothing = fatal-error; +0 unbound = not-bound; "
        "+0 well = healthy"
    ),
    "a recovery that failed lasts until the device is bound again between two scans": (
        "+0 well = healthy; +1 failed = fatal-error; +1 scan = fatal-error; +1 well, bound again = healthy"
    ),
    "a recovery that failed at the bridge above failed": (
        "+0 well = healthy; +0 begun, failed above = fatal-error; +600 nothing = fatal-error"
    ),
    "a recovery that failed is not forgotten for a later error that is counted": (
        "+0 4 errors = healthy; +1 failed = fatal-error; +3600 5 errors = fatal-error; +600 nothing = fatal-error; "
        "+0 recovered = settling"
    ),
    "a recovery that failed is not forgotten for a later one that begins": (
        "+0 well = healthy; +1 failed = fatal-error; +3600 begun = fatal-error; +600 nothing = fatal-error; "
        "+0 recovered = settling"
    ),
    "only a rise of the counter is news, and it passes": (
        "+0 4 errors = healthy; +1 nothing = healthy; +1 5 errors = fatal-error; +60 nothing = settling"
    ),
    "an error that is counted while sysfs is silent is news afterwards": (
        "+0 4 errors = healthy; +1 silent = unreadable; +1 5 errors = fatal-error"
    ),
    "an error of one function outlives changes of its group mates": (
        "+0 1 and 1 = healthy; +1 failed = fatal-error; +1 1 and none = fatal-error; +1 1 and 1 = fatal-error; "
        "+1 silent and 1 = not-viable; +0.2 1 and 1 = fatal-error"
    ),
    "a device of several functions is bound again when all of them are": (
        "+0 1 and 1 = healthy; +1 failed = fatal-error; +1 1 and 2 = fatal-error; +1 3 and 2 = settling; "
        "+1 4 and 5 = healthy"
    ),
    # Dead or asleep
    "a dead device that falls asleep is still dead, also when sysfs is silent for a while": (
        "+0 well = healthy; +10 off = off-the-bus; +3 scan = off-the-bus; +10 asleep = off-the-bus; "
        "+20 nothing = off-the-bus; +10 silent = unreadable; +10 asleep = off-the-bus; +20 scan = off-the-bus; "
        "+10 well = settling"
    ),
    "a dead function that sleeps is dead whatever its group mates do": (
        "+0 1 and 1 = healthy; +1 off and 1 = off-the-bus; +3 scan = off-the-bus; +1 asleep and none = off-the-bus"
    ),
    "two resets, after each of which the device falls asleep, are not one death": (
        "+0 well = healthy; +10 off = off-the-bus; +1.5 scan = off-the-bus; +30 nothing = off-the-bus; "
        "+1 asleep = settling; +2 scan = healthy; +10 off = off-the-bus; +1 asleep = settling; +2 scan = healthy"
    ),
    "one that sleeps without power is well however long": "+0 unpowered = healthy; +30 scan = healthy",
    "one whose bridge was woken shortly before it is well": (
        "+0 unpowered = healthy; +10 cold = healthy; +2.9 well = healthy; +0.2 cold = healthy; +2.9 well = healthy"
    ),
    "one that is in D3cold with power is dead after a while": (
        "+0 well = healthy; +10 cold = healthy; +2.9 scan = healthy; +0.1 scan = off-the-bus; +30 scan = off-the-bus"
    ),
    "one that is in D3cold with power when it is first seen is not given away meanwhile": (
        "+0 cold = off-the-bus; +0.5 well = healthy"
    ),
    "one that was seen dead by its link and is suspended in D3cold is not Healthy in between": (
        "+0 well = healthy; +10 off = off-the-bus; +0.1 cold = off-the-bus; +0.6 scan = off-the-bus; "
        "+2 scan = off-the-bus; +2 scan = off-the-bus"
    ),
    "one that was seen dead in D3cold and is suspended there is not Healthy in between": (
        "+0 well = healthy; +10 cold and awake = off-the-bus; +0.1 cold = off-the-bus; +0.6 scan = off-the-bus; "
        "+2 scan = off-the-bus; +2 scan = off-the-bus"
    ),
    "one that was dead in D3cold is dead until its link is read or it is bound again": (
        "+0 well = healthy; +10 cold = healthy; +3 scan = off-the-bus; +1 unpowered = off-the-bus; "
        "+20 scan = off-the-bus; +1 cold, bound again = off-the-bus; +0.1 unpowered, bound again = healthy; "
        "+1 cold, bound again = healthy; +3 scan = off-the-bus; +1 well, bound again = settling; +2 scan = healthy"
    ),
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_in_the_story_of_one_device_each_step_has_its_reason(story: str) -> None:
    Node().follow(story)


def test_a_device_that_is_in_d3cold_with_power_is_dead_after_a_while_and_says_so_in_its_own_words() -> None:
    node = Node().follow("+0 well = healthy; +10 cold = healthy")
    assert node.wake_at == node.now + DEAD
    node.follow("+3 scan = off-the-bus")
    assert f"{A} does not answer on the PCI bus: it is in D3cold although" in node.device("0").health.detail
    assert node.look_again(after=10 * DEAD).wake_at is None
    node.follow("+1 unpowered = off-the-bus")
    assert "has been asleep since" in node.device("0").health.detail


def test_of_a_device_that_is_offered_again_it_is_not_remembered_that_it_was_not() -> None:
    node = Node().follow("+0 well = healthy; +1 carrying = not-bound")
    assert node.inventory.waits_for_holdings
    assert not node.follow("+1 well = healthy").inventory.waits_for_holdings


def test_a_scan_is_due_when_a_device_has_settled() -> None:
    node = Node().follow("+0 well = healthy; +10 off = off-the-bus; +10 well = settling")
    assert node.wake_at == node.now + SETTLE


def test_of_a_function_that_is_bound_again_and_again_no_more_is_remembered_than_of_one_that_stays() -> None:
    node = Node()
    for binding in range(2, 20):
        node.look(two(1, binding), after=1)
    (track,) = node.inventory.memory.tracks.values()
    assert set(track.fatal_counts) == {(A, 1), (B, 19)}


def test_the_node_of_a_device_that_does_not_answer_counts_only_while_nothing_says_that_it_is_gone() -> None:
    as_group = host(gpu(A, group=5, cdev=False))
    silent = replace(as_group, functions={}, unreadable={A: "no answer"})
    for kept in (silent, HostFacts(unreachable="no answer")):
        assert Node().look(as_group).look(kept, after=1).device("5").node_exists
    for gone in (replace(silent, group_nodes=frozenset()), replace(silent, dev_nodes=frozenset())):
        assert not Node().look(as_group).look(gone, after=1).device("5").node_exists
    assert Node().look(SCANS["well"]).look(SCANS["silent"], after=1).device("0").node_exists


def test_confidential_nodes_refuse_group_nodes() -> None:
    node = Node(settings=Settings(require_iommufd=True)).look(host(gpu(A, group=5, cdev=False)))
    assert node.reason("5") is Reason.NO_CDEV


# What leaves


def test_an_unbound_device_stays_listed_until_no_pod_has_held_it_for_a_minute() -> None:
    node = Node().look(host(gpu(A))).pods("0", after=1).look(host(gpu(A, vfio=None)), after=1)
    assert node.pods("0", after=1).listed == ["0"]
    node.pods(after=1)
    assert node.pods(after=RETIRE - 1).listed == ["0"]
    assert node.pods(after=2).look().listed == []


def test_a_pod_that_holds_it_again_starts_the_minute_anew() -> None:
    node = Node().look(host(gpu(A))).look(host(), after=1).pods(after=1).pods("0", after=30).pods(after=30)
    assert node.pods(after=RETIRE - 1).listed == ["0"]


def test_a_pod_that_the_newest_answer_names_keeps_it_however_old_the_one_before_is() -> None:
    node = Node().look(host(gpu(A))).look(host(), after=1).pods(after=1)
    assert node.pods("0", after=10 * RETIRE).listed == ["0"]
    assert node.device("0").placements


def test_an_answer_that_was_asked_for_before_the_loss_says_nothing() -> None:
    node = Node().look(host(gpu(A))).look(host(), after=10)
    node.pods(asked=node.now - 5).pods(after=RETIRE - 1)
    assert node.pods(after=2).look().listed == ["0"]


def test_without_pod_resources_nothing_is_ever_dropped() -> None:
    assert Node().look(host(gpu(A))).look(host(), after=1).look(after=1e6).listed == ["0"]


def test_an_id_never_changes_its_node_while_it_may_be_held() -> None:
    as_group = host(gpu(A, vfio=4, group=5, cdev=False))
    node = Node().look(as_group).pods("5", after=1)
    assert node.device("5").node == "/dev/vfio/5"
    as_cdev = host(gpu(B, vfio=5, group=60))
    assert node.look(as_cdev, after=1).reason("5") is Reason.ID_HELD
    node.pods(after=1)
    node.pods(after=RETIRE).look()
    assert (node.device("5").node, node.reason("5")) == ("/dev/vfio/devices/vfio5", None)


def test_an_id_that_only_pod_resources_knows_is_listed_unhealthy() -> None:
    node = Node().look(host(gpu(A))).pods("7", after=1)
    assert node.reason("7") is Reason.GONE
    assert node.look(host(gpu(A), gpu(B, vfio=7, group=51)), after=1).reason("7") is None


def test_ids_of_others_are_not_ours() -> None:
    node = Node().look(host(gpu(A)))
    node.look(holdings=Holdings(asked_at=200, pods={("nvidia.com/gpu", "7"): "a/b", (PGPU, "GPU-1"): "a/b"}))
    assert list(node.inventory.resources) == [PGPU]
    assert node.listed == ["0"]


def test_a_node_that_was_only_guessed_promises_nothing() -> None:
    node = Node().pods("3").look(HostFacts())
    assert node.reason("3") is Reason.GONE
    assert node.look(host(gpu(A, vfio=3)), after=1).reason("3") is None


def test_the_times_are_those_that_were_promised() -> None:
    assert (SETTLE, ARRIVAL, DEAD, FATAL_QUIET, RETIRE, ADMISSION, GRANT_UNUSED) == (2, 1, 3, 60, 60, 10, 600)


# Who holds what, and who uses it


def test_enabled_although_no_pod_holds_it_is_in_use_elsewhere() -> None:
    node = Node().look(host(gpu(A))).pods(after=1).look(host(gpu(A, enable=1)), after=1)
    assert node.reason("0") is None
    assert node.inventory.waits_for_holdings
    assert node.pods(after=5).reason("0") is None
    assert node.wake_at == node.now
    assert node.look_again().reason("0") is Reason.IN_USE_ELSEWHERE


def mates(**changes: Any) -> HostFacts:
    return host(gpu(A, vfio=1, group=9, **changes), gpu(B, vfio=2, group=9))


def test_a_grant_is_not_kept_by_the_use_of_the_vm_before() -> None:
    node = Node().look(mates(enable=1)).look(allocated=((PGPU, "1"),), after=1)
    late = replace(mates(enable=1), began_at=node.now - 0.5)  # a scan that began before, and took its time
    node.inventory, _ = advance(node.inventory, late, node.signals, node.now, Rules(node.settings))
    node.look(mates(), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    node.look(mates(enable=1), after=20).look(mates(), after=100)
    assert node.reason("2") is Reason.SETTLING


def test_without_pod_resources_the_group_is_free_after_it_was_used() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),)).look(mates(enable=1), after=20)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.look(mates(), after=100).reason("2") is Reason.SETTLING


@pytest.mark.parametrize("pod_resources", ["was never there", "has fallen silent"])
def test_a_grant_that_nobody_uses_ends_where_pod_resources_tells_nothing(pod_resources: str) -> None:
    node = Node().look(mates())
    if pod_resources == "has fallen silent":
        node.pods(after=1)
    node.look(allocated=((PGPU, "1"),), after=1)
    assert (node.reason("1"), node.reason("2")) == (None, Reason.GROUP_TAKEN)
    assert node.wake_at == node.now + GRANT_UNUSED
    assert node.look(after=GRANT_UNUSED).reason("2") is Reason.SETTLING
    assert node.look(after=SETTLE).reason("2") is None


def test_what_a_pod_held_when_it_arrived_settles_also_where_a_fault_of_its_bind_came_in_between() -> None:
    node = Node().pods("1").look(mates())
    assert node.reason("2") is Reason.GROUP_TAKEN
    unbound = replace(mates(), dev_nodes=frozenset({"/dev/vfio/devices/vfio1"}))
    assert node.look(unbound, after=0.3).reason("2") is Reason.NO_NODE
    node.pods(after=0.3)
    assert node.look(mates(), after=0.1).reason("2") is Reason.SETTLING


def test_an_answer_that_may_lack_pods_retires_nothing() -> None:
    gone = Node().look(host(gpu(A))).look(HostFacts(), after=1).pods(complete=False)
    assert gone.look(after=10 * RETIRE).pods(complete=False).listed == ["0"]


def test_a_mate_is_taken_while_the_holder_is_unbound_under_its_vm() -> None:
    node = Node().look(mates()).pods("1", after=1)
    node.look(host(gpu(A, vfio=None, group=9), gpu(B, vfio=2, group=9)), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN


def unbound_under_its_vm(enable: int = 1, driver: str | None = None) -> HostFacts:
    return host(gpu(A, vfio=None, group=9, enable=enable, driver=driver), gpu(B, vfio=2, group=9))


def test_a_group_stays_a_vms_although_its_device_was_unbound_and_its_pod_is_gone() -> None:
    node = Node().look(mates()).pods("1", after=1).look(mates(enable=1), after=1)
    node.look(unbound_under_its_vm(), after=1)
    assert node.pods(after=1).reason("2") is Reason.GROUP_TAKEN
    assert node.look_again().reason("2") is Reason.IN_USE_ELSEWHERE
    assert node.look(unbound_under_its_vm(enable=0), after=1).reason("2") is Reason.SETTLING


def test_without_pod_resources_a_group_is_a_vms_while_its_device_is_unbound_under_it() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),), after=1).look(mates(enable=1), after=1)
    assert node.look(unbound_under_its_vm(), after=1).reason("2") is Reason.GROUP_TAKEN
    assert node.look_again(after=10 * GRANT_UNUSED).reason("2") is Reason.GROUP_TAKEN
    assert node.device("2").health.detail.startswith("IOMMU group 9 is held by a pod"), "and not only in use"
    assert node.look(unbound_under_its_vm(enable=0), after=1).reason("2") is Reason.SETTLING


def test_a_function_that_a_host_driver_has_enabled_is_no_vms() -> None:
    node = Node().look(mates()).pods(after=1).look(mates(enable=1), after=1)
    node.look(unbound_under_its_vm(driver="nvidia"), after=1)
    assert node.reason("2") is Reason.NOT_VIABLE
    assert node.look(unbound_under_its_vm(), after=1).reason("2") is Reason.SETTLING


def test_an_old_grant_of_a_device_that_is_in_use_asks_for_no_look_by_itself() -> None:
    node = Node().look(mates(enable=1)).look(allocated=((PGPU, "1"),), after=1)
    assert node.look_again(after=GRANT_UNUSED + 1).wake_at is None


# Whatever happens


@st.composite
def functions(draw: st.DrawFn) -> PciFunction:
    """A GPU in any state, on vfio, on a host driver or on none."""
    changes = dict(OFF) if draw(st.booleans()) else {}
    vfio = draw(st.one_of(st.none(), st.integers(0, 3)))
    if vfio is None:
        changes["driver"] = draw(st.sampled_from([None, "nvidia"]))
    address, group = draw(st.sampled_from([A, B, "0000:03:00.0"])), draw(st.integers(8, 10))
    return gpu(address, vfio=vfio, group=group, enable=draw(st.integers(0, 1)), **changes)


def number_of(function: PciFunction) -> object:
    """What no two functions of a host have in common, beside the address."""
    return function.vfio.number if function.vfio else function.address


steps = st.lists(
    st.tuples(
        st.lists(functions(), max_size=3, unique_by=(lambda f: f.address, number_of)),
        st.floats(0, 40),
        st.one_of(st.none(), st.frozensets(st.sampled_from("0123"))),
        st.frozensets(st.sampled_from("0123"), max_size=1),
    ),
    max_size=12,
)


@given(steps)
def test_whatever_happens_the_inventory_keeps_its_promises(history: list[Any]) -> None:
    node = Node()
    for found, after, held, allocated in history:
        before, known = node.inventory, set(node.listed)
        if held is not None:
            node.pods(*held)
        answered = node.signals.holdings is not None
        node.look(host(*found), after=after, allocated=tuple((PGPU, i) for i in allocated))
        assert len(set(node.listed)) == len(node.listed)
        assert answered or known <= set(node.listed)
        for device in node.inventory.resources.get(PGPU, ()):
            if device.health.healthy:
                functions_of_it = [node.facts.functions[p.address] for p in device.placements]
                assert functions_of_it
                assert all(f.driver == "vfio-pci" and f.link_speed != "Unknown" for f in functions_of_it)
        assert node.inventory.version >= before.version
        again, _ = advance(node.inventory, node.facts, node.signals, node.now, Rules(node.settings))
        assert again.resources == node.inventory.resources
        assert again.version == node.inventory.version


# What a step costs, in calls of functions: that does not depend on the machine


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, in Python and below."""
    number = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return number


def many(count: int) -> HostFacts:
    return host(*(gpu(f"{n >> 8:04x}:{n & 255:02x}:00.0", vfio=n, group=n) for n in range(count)))


@pytest.mark.parametrize("held", [0, 1], ids=["nothing held", "all held"])
def test_what_a_scan_costs_grows_no_faster_than_the_node(held: int) -> None:
    costs = []
    for count in (128, 1024):
        node = Node().look(many(count)).pods(*map(str, range(count * held)))
        costs.append(calls_of(partial(node.look, many(count), after=1)))
    assert costs[1] <= 9 * costs[0]


@pytest.mark.parametrize("held", [0, 0.5], ids=["nothing held", "half of all held"])
def test_an_allocate_costs_the_same_on_a_node_with_8_devices_and_with_1024(held: float) -> None:
    costs = []
    for count in (8, 1024):
        node = Node().look(many(count)).pods(*map(str, range(int(count * held))))
        allocate(node.inventory, Allocation(devices=[node.device("0")], looked_at=node.now), node.signals, node.now)
        allocation = Allocation(devices=[node.device(str(count - 1))], looked_at=node.now)
        costs.append(calls_of(partial(allocate, node.inventory, allocation, node.signals, node.now)))
    assert costs[0] == costs[1]


def test_a_scan_judges_anew_only_the_groups_of_which_something_has_changed() -> None:
    node = Node().look(many(64))
    before = {device.id: device for device in node.inventory.memory.found.devices}  # type: ignore[union-attr]
    changed = replace(node.facts.functions["0000:07:00.0"], enable=1)
    node.look(replace(node.facts, functions={**node.facts.functions, changed.address: changed}), after=1)
    found = node.inventory.memory.found
    assert found is not None
    assert [device.id for device in found.devices if device is not before[device.id]] == ["7"]
