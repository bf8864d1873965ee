"""The step from one inventory to the next: what is remembered, held back, promised and retired."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.inventory.advance import ARRIVAL, SETTLE, advance, allocate
from sandbox_plugin.inventory.ledger import ADMISSION, GRANT_UNUSED, DeviceKey, Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.inventory.tracking import DEAD, FATAL_QUIET, RETIRE
from sandbox_plugin.model import Device, HostFacts, PciFunction, Reason, VfioDev

A, B = "0000:01:00.0", "0000:02:00.0"
OFF: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}


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
        signals = replace(self.signals, **news)
        self.inventory, self.wake_at = advance(self.inventory, self.facts, signals, self.now, Rules(self.settings))
        if allocated:
            devices = [self.inventory.by_key[key] for key in allocated if key in self.inventory.by_key]
            self.inventory = allocate(self.inventory, devices, self.signals, self.now, self.now)
            return self.look()
        return self

    def pods(self, *held: str, after: float = 0.0, asked: float | None = None, complete: bool = True) -> Node:
        """PodResources answers: these IDs are held by pods."""
        self.now += after
        pods: dict[DeviceKey, str] = {(PGPU, number): f"default/pod-{number}" for number in held}
        self.signals = replace(
            self.signals,
            holdings=Holdings(asked_at=self.now if asked is None else asked, pods=pods, complete=complete),
        )
        return self.look()

    def look_again(self, *, after: float = 0.1) -> Node:
        """A scan that finds everything as it was."""
        return self.look(self.facts, after=after)

    def device(self, number: str, resource: str = PGPU) -> Device:
        found = self.inventory.device(resource, number)
        assert found is not None, f"{number} is not listed"
        return found

    def reason(self, number: str) -> Reason | None:
        return self.device(number).health.reason

    @property
    def listed(self) -> list[str]:
        return [d.id for d in self.inventory.resources.get(PGPU, ())]


def test_a_device_that_is_seen_for_the_first_time_is_healthy_at_once() -> None:
    assert Node().look(host(gpu(A, vfio=3))).reason("3") is None


def test_a_loss_counts_at_once_and_a_recovery_after_it_has_held() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **OFF)), after=10)
    assert node.reason("0") is Reason.OFF_THE_BUS
    assert node.look(host(gpu(A)), after=10).reason("0") is Reason.SETTLING
    assert node.wake_at == node.now + SETTLE
    assert node.look(after=SETTLE - 0.1).reason("0") is Reason.SETTLING
    assert node.look(after=0.2).reason("0") is None


def test_flapping_starts_the_wait_anew() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **OFF)), after=10).look(host(gpu(A)), after=1)
    node.look(host(gpu(A, **OFF)), after=1.5).look(host(gpu(A)), after=0.1)
    assert node.look(after=SETTLE - 0.2).reason("0") is Reason.SETTLING


def test_a_device_that_was_bound_anew_is_not_held_back() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, vfio=None)), after=10)
    assert node.reason("0") is Reason.NOT_BOUND
    assert node.look(host(gpu(A)), after=0.1).reason("0") is None


def test_a_look_in_the_middle_of_a_bind_holds_nothing_back() -> None:
    arriving = host(gpu(A), dev_nodes=frozenset())
    node = Node().look(arriving)
    assert node.reason("0") is Reason.NO_NODE
    assert node.look(host(gpu(A)), after=ARRIVAL / 2).reason("0") is None


def test_a_device_that_came_ill_and_stayed_so_is_held_back() -> None:
    node = Node().look(host(gpu(A, **OFF))).look(after=ARRIVAL).look(host(gpu(A)), after=1)
    assert node.reason("0") is Reason.SETTLING


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


def test_the_times_are_those_that_were_promised() -> None:
    assert (SETTLE, RETIRE, GRANT_UNUSED) == (2.0, 60.0, 600.0)


def test_an_answer_that_was_asked_for_before_the_loss_says_nothing() -> None:
    node = Node().look(host(gpu(A))).look(host(), after=10)
    node.pods(asked=node.now - 5).pods(after=RETIRE - 1)
    assert node.pods(after=2).look().listed == ["0"]


def test_without_pod_resources_nothing_is_ever_dropped() -> None:
    assert Node().look(host(gpu(A))).look(host(), after=1).look(after=1e6).listed == ["0"]


def test_an_id_that_only_pod_resources_knows_is_listed_unhealthy() -> None:
    node = Node().look(host(gpu(A))).pods("7", after=1)
    assert node.reason("7") is Reason.GONE
    assert node.look(host(gpu(A), gpu(B, vfio=7, group=51)), after=1).reason("7") is None


def test_ids_of_others_are_not_ours() -> None:
    node = Node().look(host(gpu(A)))
    node.look(holdings=Holdings(asked_at=200, pods={("nvidia.com/gpu", "7"): "a/b", (PGPU, "GPU-1"): "a/b"}))
    assert list(node.inventory.resources) == [PGPU]
    assert node.listed == ["0"]


def test_enabled_although_no_pod_holds_it_is_in_use_elsewhere() -> None:
    node = Node().look(host(gpu(A))).pods(after=1).look(host(gpu(A, enable=1)), after=1)
    assert node.reason("0") is None
    assert node.inventory.waits_for_holdings
    assert node.pods(after=5).reason("0") is None
    assert node.wake_at == node.now
    assert node.look_again().reason("0") is Reason.IN_USE_ELSEWHERE


def test_a_pod_that_ended_with_its_vm_between_two_looks_leaves_nothing_in_use() -> None:
    node = Node().look(host(gpu(A))).look(allocated=((PGPU, "0"),)).look(host(gpu(A, enable=1)), after=1)
    node.pods("0", after=4)
    assert node.pods(after=5).reason("0") is None
    assert node.look(host(gpu(A)), after=0.1).reason("0") is None


def test_enabled_by_the_pod_that_holds_it_is_fine() -> None:
    node = Node().look(host(gpu(A))).look(allocated=((PGPU, "0"),)).look(host(gpu(A, enable=1)), after=1)
    assert node.pods("0", after=5).reason("0") is None


def test_a_vm_that_outlives_its_pod_is_in_use_elsewhere() -> None:
    node = Node().look(host(gpu(A))).look(allocated=((PGPU, "0"),)).look(host(gpu(A, enable=1)), after=1)
    assert node.pods("0", after=5).pods(after=5).look_again().reason("0") is Reason.IN_USE_ELSEWHERE


def mates(**changes: Any) -> HostFacts:
    return host(gpu(A, vfio=1, group=9, **changes), gpu(B, vfio=2, group=9))


def test_an_allocation_takes_the_whole_group() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),))
    assert (node.reason("1"), node.reason("2")) == (None, Reason.GROUP_TAKEN)


def test_the_group_is_free_when_the_holder_is_gone() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),)).pods("1", after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.pods(after=5).reason("2") is Reason.SETTLING
    assert node.look(after=SETTLE).reason("2") is None


def test_a_promise_is_not_kept_by_the_use_of_the_vm_before() -> None:
    node = Node().look(mates(enable=1)).look(allocated=((PGPU, "1"),), after=1)
    late = replace(mates(enable=1), began_at=node.now - 0.5)  # a scan that began before, and took its time
    node.inventory, _ = advance(node.inventory, late, node.signals, node.now, Rules(node.settings))
    node.look(mates(), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    node.look(mates(enable=1), after=20).look(mates(), after=100)
    assert node.reason("2") is Reason.SETTLING


def test_an_allocation_that_never_shows_ends_after_the_admission() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),)).pods(after=ADMISSION - 1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.pods(after=2).reason("2") is Reason.SETTLING


def test_without_pod_resources_the_group_is_free_after_it_was_used() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),)).look(mates(enable=1), after=20)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.look(mates(), after=100).reason("2") is Reason.SETTLING


def test_without_pod_resources_an_unused_promise_ends() -> None:
    node = Node().look(mates()).look(allocated=((PGPU, "1"),))
    assert node.wake_at == node.now + GRANT_UNUSED
    assert node.look(after=GRANT_UNUSED).reason("2") is Reason.SETTLING


def test_a_group_mate_that_somebody_uses_is_enough() -> None:
    node = Node().look(mates()).look(mates(enable=1), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.pods(after=5).reason("2") is Reason.GROUP_TAKEN
    assert node.look_again().reason("2") is Reason.IN_USE_ELSEWHERE


def test_an_id_never_changes_its_node_while_it_may_be_held() -> None:
    as_group = host(gpu(A, vfio=4, group=5, cdev=False))
    node = Node().look(as_group).pods("5", after=1)
    assert node.device("5").node == "/dev/vfio/5"
    as_cdev = host(gpu(B, vfio=5, group=60))
    assert node.look(as_cdev, after=1).reason("5") is Reason.ID_HELD
    node.pods(after=1)
    node.pods(after=RETIRE).look()
    assert (node.device("5").node, node.reason("5")) == ("/dev/vfio/devices/vfio5", None)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (["BEGIN_RECOVERY"], Reason.FATAL_ERROR),
        (["BEGIN_RECOVERY", "FAILED_RECOVERY"], Reason.FATAL_ERROR),
        (["BEGIN_RECOVERY", "SUCCESSFUL_RECOVERY"], None),
    ],
)
def test_the_outcome_of_a_recovery_decides(events: list[str], reason: Reason | None) -> None:
    node = Node().look(host(gpu(A))).look(aer=tuple((A, event) for event in events), after=1)
    assert node.reason("0") is reason


def test_a_failed_recovery_lasts_until_the_device_is_bound_anew() -> None:
    node = Node().look(host(gpu(A))).look(aer=((A, "FAILED_RECOVERY"),)).look(after=10 * FATAL_QUIET)
    assert node.reason("0") is Reason.FATAL_ERROR
    assert node.look(host(gpu(A, vfio=None))).look(host(gpu(A))).reason("0") is None


@pytest.mark.parametrize("later", ["a rise", "BEGIN_RECOVERY"])
def test_a_recovery_that_failed_is_not_forgotten_for_a_later_error(later: str) -> None:
    node = Node().look(host(gpu(A, fatal_errors=1))).look(aer=((A, "FAILED_RECOVERY"),), after=1)
    if later == "a rise":
        node.look(host(gpu(A, fatal_errors=2)), after=3600)
    else:
        node.look(aer=((A, later),), after=3600)
    assert node.look(after=10 * FATAL_QUIET).reason("0") is Reason.FATAL_ERROR
    assert node.look(aer=((A, "SUCCESSFUL_RECOVERY"),)).reason("0") is Reason.SETTLING


def bound(vfio: VfioDev | None, **changes: Any) -> HostFacts:
    return host(replace(gpu(A), vfio=vfio, driver="vfio-pci" if vfio else None, **changes))


def test_a_device_that_was_unbound_and_bound_between_two_looks_is_known_to_be_bound_again() -> None:
    before, after = (VfioDev(number=0, cdev="511:0", binding=inode) for inode in (77, 78))
    node = Node().look(bound(before)).look(aer=((A, "FAILED_RECOVERY"),), after=1)
    assert node.look(bound(before), after=1).reason("0") is Reason.FATAL_ERROR
    assert node.look(bound(after), after=1).reason("0") is None


def group_of_two(*, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, **changes: Any) -> HostFacts:
    """Two GPUs of one IOMMU group on a kernel without cdevs: one device, 9."""
    first = gpu(A, group=9, cdev=False, **(a or {}))
    second = gpu(B, group=9, cdev=False, **({"vfio": 1} | (b or {})))
    return host(first, second, **changes)


def test_what_is_remembered_of_a_function_outlives_changes_of_its_group_mates() -> None:
    node = Node().look(group_of_two()).look(aer=((A, "FAILED_RECOVERY"),), after=1)
    assert node.look(group_of_two(b={"vfio": None}), after=1).reason("9") is Reason.FATAL_ERROR
    assert node.look(group_of_two(), after=1).reason("9") is Reason.FATAL_ERROR
    node = Node().look(group_of_two()).look(group_of_two(a=OFF), after=1).look_again(after=DEAD)
    assert node.look(group_of_two(a={"link_speed": None}, b={"vfio": None}), after=1).reason("9") is Reason.OFF_THE_BUS


def test_a_group_mate_that_did_not_answer_once_does_not_undo_the_damping() -> None:
    silent = replace(group_of_two(), functions={B: gpu(B, vfio=1, group=9, cdev=False)}, unreadable={A: "no answer"})
    node = Node().look(group_of_two()).look(aer=((A, "FAILED_RECOVERY"),), after=10)
    assert node.look(silent, after=10).reason("9") is Reason.NOT_VIABLE
    assert node.look(group_of_two(), after=0.2).reason("9") is Reason.FATAL_ERROR
    node = Node().look(group_of_two()).look(silent, after=10)
    assert node.look(group_of_two(), after=0.2).reason("9") is Reason.SETTLING


def group_of_bindings(*bindings: int) -> HostFacts:
    functions = [gpu(address, group=9, cdev=False, fatal_errors=4) for address in (A, B)]
    devs = [VfioDev(number=n, cdev=None, binding=binding) for n, binding in enumerate(bindings)]
    return host(*(replace(f, vfio=dev) for f, dev in zip(functions, devs, strict=True)))


def test_a_device_of_several_functions_is_bound_again_when_all_of_them_are() -> None:
    facts = group_of_bindings
    node = Node().look(facts(1, 2)).look(aer=((A, "FAILED_RECOVERY"),), after=1)
    assert node.look(facts(1, 3), after=1).reason("9") is Reason.FATAL_ERROR
    assert node.look(facts(4, 3), after=1).reason("9") is Reason.SETTLING
    assert node.look(facts(5, 6), after=1).reason("9") is None


def test_of_a_function_that_is_bound_again_and_again_no_more_is_remembered_than_of_one_that_stays() -> None:
    node = Node()
    for binding in range(2, 20):
        node.look(group_of_bindings(1, binding), after=1)
    (track,) = node.inventory.memory.tracks.values()
    assert set(track.fatal_counts) == {(A, 1), (B, 19)}


def test_only_a_rise_of_the_counter_is_news() -> None:
    node = Node().look(host(gpu(A, fatal_errors=4))).look(after=1)
    assert node.reason("0") is None
    assert node.look(host(gpu(A, fatal_errors=5)), after=1).reason("0") is Reason.FATAL_ERROR
    assert node.look(after=FATAL_QUIET).reason("0") is Reason.SETTLING


def test_a_device_is_healthy_only_when_it_stands_in_a_spec() -> None:
    node = Node(signals=Signals(in_cdi={})).look(host(gpu(A)))
    assert node.reason("0") is Reason.NOT_IN_CDI
    node.signals = Signals(in_cdi={PGPU: frozenset({"0"})})
    assert node.look().reason("0") is None


def test_silence_of_sysfs_is_no_proof_of_absence() -> None:
    node = Node().look(host(gpu(A))).look(host(unreadable={A: "sysfs has not answered"}), after=1)
    assert node.reason("0") is Reason.UNREADABLE
    assert node.device("0").node_exists
    assert node.look(host(gpu(A)), after=1).reason("0") is Reason.SETTLING


def test_the_node_of_a_device_that_does_not_answer_counts_only_while_nothing_says_that_it_is_gone() -> None:
    as_group = host(gpu(A, group=5, cdev=False))
    silent = replace(as_group, functions={}, unreadable={A: "no answer"})
    assert Node().look(as_group).look(silent, after=1).device("5").node_exists
    assert Node().look(as_group).look(HostFacts(unreachable="no answer"), after=1).device("5").node_exists
    for gone in (replace(silent, group_nodes=frozenset()), replace(silent, dev_nodes=frozenset())):
        assert not Node().look(as_group).look(gone, after=1).device("5").node_exists


def test_confidential_nodes_refuse_group_nodes() -> None:
    settings = Settings(require_iommufd=True)
    assert Node(settings=settings).look(host(gpu(A, group=5, cdev=False))).reason("5") is Reason.NO_CDEV
    assert Node(settings=settings).look(host(gpu(A))).reason("0") is None


def test_a_function_without_a_cdev_is_not_ready_where_others_have_one() -> None:
    node = Node().look(host(gpu(A, vfio=1), gpu(B, vfio=2, group=51, cdev=False)))
    assert node.listed == ["1"]
    assert "cdev" in node.inventory.unoffered[B]


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


ASLEEP: dict[str, Any] = {"link_speed": None, "link_width": None}


def test_a_dead_device_that_falls_asleep_is_still_dead() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **OFF)), after=10).look_again(after=DEAD)
    node.look(host(gpu(A, **ASLEEP)), after=10)
    assert node.look(after=10 * SETTLE).reason("0") is Reason.OFF_THE_BUS


def test_a_device_that_did_not_answer_while_it_was_reset_and_then_falls_asleep_is_well_again() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **OFF)), after=10).look_again(after=DEAD / 2)
    assert node.look(after=10 * DEAD).reason("0") is Reason.OFF_THE_BUS  # the same scan, however old
    assert node.look(host(gpu(A, **ASLEEP)), after=1).reason("0") is Reason.SETTLING
    assert node.look_again(after=SETTLE).reason("0") is None
    node.look(host(gpu(A, **OFF)), after=10).look(host(gpu(A, **ASLEEP)), after=1)
    assert node.look_again(after=SETTLE).reason("0") is None, "two resets are not one death"


def test_a_dead_device_that_sleeps_is_dead_whatever_else_befalls_it_meanwhile() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **OFF)), after=10).look_again(after=DEAD)
    node.look(host(gpu(A, **ASLEEP)), after=10).look(host(unreadable={A: "no answer"}), after=10)
    assert node.reason("0") is Reason.UNREADABLE
    assert node.look(host(gpu(A, **ASLEEP)), after=10).look_again(after=10 * SETTLE).reason("0") is Reason.OFF_THE_BUS
    assert node.look(host(gpu(A)), after=10).reason("0") is Reason.SETTLING


COLD: dict[str, Any] = {**ASLEEP, "power_state": "D3cold", "runtime_status": "suspended", "has_power": True}
"""In D3cold although nothing can have cut its power."""
UNPOWERED = COLD | {"has_power": False}
"""In D3cold below a bridge that sleeps too, or by ACPI."""


def test_a_device_that_is_in_d3cold_with_power_is_dead_after_a_while_and_says_so_in_its_own_words() -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **COLD)), after=10)
    assert node.reason("0") is None, "the bridge above may just have been woken"
    assert node.wake_at == node.now + DEAD
    assert node.look_again(after=DEAD - 0.1).reason("0") is None
    assert node.look_again(after=0.1).reason("0") is Reason.OFF_THE_BUS
    assert f"{A} does not answer on the PCI bus: it is in D3cold although" in node.device("0").health.detail
    assert node.look_again(after=10 * DEAD).reason("0") is Reason.OFF_THE_BUS
    assert node.wake_at is None


def test_a_device_that_sleeps_without_power_is_well_however_long() -> None:
    node = Node().look(host(gpu(A, **UNPOWERED)))
    assert node.reason("0") is None
    assert node.wake_at is None
    assert node.look_again(after=10 * DEAD).look_again(after=10 * DEAD).reason("0") is None


def test_a_device_whose_bridge_was_woken_shortly_before_it_is_well() -> None:
    node = Node().look(host(gpu(A, **UNPOWERED))).look(host(gpu(A, **COLD)), after=10)
    for _ in range(3):
        assert node.look(host(gpu(A)), after=DEAD - 0.1).reason("0") is None
        assert node.look(host(gpu(A, **COLD)), after=0.2).reason("0") is None


def test_a_device_that_is_in_d3cold_with_power_when_it_is_first_seen_is_not_given_away_meanwhile() -> None:
    node = Node().look(host(gpu(A, **COLD)))
    assert node.reason("0") is Reason.OFF_THE_BUS
    assert node.look(host(gpu(A)), after=ARRIVAL / 2).reason("0") is None


@pytest.mark.parametrize("sign", [OFF, COLD | {"runtime_status": "active"}])
def test_a_device_that_was_seen_dead_and_is_suspended_in_d3cold_is_never_healthy_in_between(
    sign: dict[str, Any],
) -> None:
    node = Node().look(host(gpu(A))).look(host(gpu(A, **sign)), after=10)
    assert node.reason("0") is Reason.OFF_THE_BUS
    node.look(host(gpu(A, **COLD)), after=0.1)
    for _ in range(10):
        assert node.reason("0") is Reason.OFF_THE_BUS
        node.look_again(after=DEAD / 5)


def test_a_device_that_was_dead_in_d3cold_is_dead_until_its_link_is_read_or_it_is_bound_again() -> None:
    first, second = (VfioDev(number=0, cdev="511:0", binding=inode) for inode in (77, 78))
    node = Node().look(bound(first)).look(bound(first, **COLD), after=10).look_again(after=DEAD)
    assert node.look(bound(first, **UNPOWERED), after=1).look_again(after=10 * SETTLE).reason("0") is Reason.OFF_THE_BUS
    assert "has been asleep since" in node.device("0").health.detail
    assert node.look(bound(second, **COLD), after=1).reason("0") is Reason.OFF_THE_BUS, "still dead"
    assert node.look(bound(second, **UNPOWERED), after=0.1).reason("0") is None
    node.look(bound(second, **COLD), after=1).look_again(after=DEAD)
    assert node.look(bound(second), after=1).look_again(after=SETTLE).reason("0") is None


def test_a_recovery_that_failed_at_the_bridge_above_failed() -> None:
    node = Node().look(host(gpu(A))).look(aer=((A, "BEGIN_RECOVERY"), ("0000:00:01.0", "FAILED_RECOVERY")))
    assert node.look(after=10 * FATAL_QUIET).reason("0") is Reason.FATAL_ERROR


def test_a_mate_that_was_used_after_the_last_answer_is_enough_too() -> None:
    node = Node().look(mates()).pods(after=1).look(mates(enable=1), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN


def test_what_is_in_use_when_it_is_first_seen_was_so_when_pod_resources_was_asked() -> None:
    node = Node().pods(asked=90).look(host(gpu(A, enable=1)))
    assert node.reason("0") is Reason.IN_USE_ELSEWHERE
    assert Node().pods("0", asked=90).look(host(gpu(A, enable=1))).reason("0") is None


def test_an_answer_that_may_lack_anything_says_who_holds_what_and_no_more() -> None:
    node = Node().pods("1", complete=False).look(mates(enable=1))
    assert (node.reason("1"), node.reason("2")) == (None, Reason.GROUP_TAKEN)
    assert Node().pods(complete=False).look(host(gpu(A, enable=1))).reason("0") is None
    gone = Node().look(host(gpu(A))).look(HostFacts(), after=1).pods(complete=False)
    assert gone.look(after=10 * RETIRE).pods(complete=False).listed == ["0"]


def test_a_node_that_was_only_guessed_promises_nothing() -> None:
    node = Node().pods("3").look(HostFacts())
    assert node.reason("3") is Reason.GONE
    assert node.look(host(gpu(A, vfio=3)), after=1).reason("3") is None


def test_a_promise_ends_although_pod_resources_has_fallen_silent() -> None:
    node = Node().look(mates()).pods(after=1).look(allocated=((PGPU, "1"),), after=1)
    assert node.reason("2") is Reason.GROUP_TAKEN
    assert node.look(after=GRANT_UNUSED + 1).reason("2") is Reason.SETTLING


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
    assert node.look(unbound_under_its_vm(enable=0), after=1).reason("2") is Reason.SETTLING


def test_a_function_that_a_host_driver_has_enabled_is_no_vms() -> None:
    node = Node().look(mates()).pods(after=1).look(mates(enable=1), after=1)
    node.look(unbound_under_its_vm(driver="nvidia"), after=1)
    assert node.reason("2") is Reason.NOT_VIABLE
    assert node.look(unbound_under_its_vm(), after=1).reason("2") is Reason.SETTLING


def test_an_old_promise_of_a_device_that_is_in_use_asks_for_no_look_by_itself() -> None:
    node = Node().look(mates(enable=1)).look(allocated=((PGPU, "1"),), after=1)
    assert node.look_again(after=GRANT_UNUSED + 1).wake_at is None


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


def test_an_allocate_costs_the_same_on_a_node_with_8_devices_and_with_1024() -> None:
    costs = []
    for count in (8, 1024):
        node = Node().look(many(count)).pods(*map(str, range(count // 2)))
        devices = [node.device("3")]
        costs.append(calls_of(lambda n=node, d=devices: allocate(n.inventory, d, n.signals, n.now, n.now)))  # type: ignore[misc]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("held", [0, 1], ids=["nothing held", "all held"])
def test_what_a_scan_costs_grows_no_faster_than_the_node(held: int) -> None:
    costs = []
    for count in (128, 1024):
        facts = many(count)
        node = Node().look(facts).pods(*map(str, range(count * held)))
        costs.append(calls_of(lambda n=node, f=facts: n.look(f, after=1)))  # type: ignore[misc]
    assert costs[1] <= 9 * costs[0]
