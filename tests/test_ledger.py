"""Who holds what, story by story, through a registry with a clock of the test's own.

The random search over the same is test_one_holder.py; the real process meets some of it in test_holders.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from facts import gpu, host
from names import NVSWITCH, PGPU

from sandbox_plugin.config.settings import Consumer, ResourceRule, Settings
from sandbox_plugin.inventory.ledger import ADMISSION, GRANT_UNUSED, DeviceKey, Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Health, HostFacts, Reason
from sandbox_plugin.registry import Registry

A, B, C, D = (f"0000:0{n}:00.0" for n in range(1, 5))
SWITCH: dict[str, Any] = {"device": 0x22A3, "class_code": 0x068000}
AUDIO: dict[str, Any] = {"device": 0x22BA, "class_code": 0x040300}
MATES = (gpu(A, vfio=0, group=9), gpu(B, vfio=1, group=9))


@dataclass
class Plugin:
    """One run of the plugin, without the process around it."""

    settings: Settings = field(default_factory=Settings)
    now: float = 100.0

    def __post_init__(self) -> None:
        is_kata = self.settings.consumer is Consumer.KATA
        self.registry = Registry(Rules(self.settings), requires_cdi=is_kata, clock=lambda: self.now)
        numbers = frozenset(map(str, range(10)))
        names = ("nvidia.com/pgpu", "nvidia.com/nvswitch", "nvidia.com/other", "example.com/grace")
        if is_kata:
            self.registry.learn(in_cdi=dict.fromkeys(names, numbers))

    def sees(self, *functions: Any, after: float = 1.0, **changes: Any) -> Plugin:
        """A scan."""
        self.now += after
        self.registry.observe(replace(host(*functions, **changes), began_at=self.now))
        return self

    def hears(
        self, pods: Mapping[DeviceKey, str] | None = None, *, after: float = 1.0, complete: bool = True
    ) -> Plugin:
        """PodResources answers."""
        self.now += after
        holdings = Holdings(asked_at=self.now, pods=pods or {}, complete=complete)
        self.registry.learn(holdings=holdings, pod_resources=True)
        return self

    def gives(self, *ids: str, resource: str = PGPU, after: float = 1.0) -> Plugin:
        """One Allocate, of devices that are Healthy."""
        self.now += after
        for number in ids:
            assert self.reason(number, resource) is None, self.health(number, resource)
        self.registry.allocate([(resource, number) for number in ids])
        return self

    def health(self, number: str, resource: str = PGPU) -> Health:
        device = self.registry.current.device(resource, number)
        assert device is not None, f"{resource}={number} is not listed"
        return device.health

    def reason(self, number: str, resource: str = PGPU) -> Reason | None:
        return self.health(number, resource).reason

    def is_free(self, number: str, resource: str = PGPU) -> bool:
        """Whether nothing but the damping of what was withheld for a while is against giving it."""
        return self.reason(number, resource) in (None, Reason.SETTLING)


def held(**pods: str) -> dict[DeviceKey, str]:
    """`held(P="0 1")`: pod P holds the GPUs 0 and 1."""
    return {(PGPU, number): f"default/{pod}" for pod, numbers in pods.items() for number in numbers.split()}


def test_which_pod_holds_a_node_is_told_as_far_as_it_is_known() -> None:
    plugin = Plugin().sees(gpu(A, vfio=0)).hears().gives("0")
    assert plugin.registry.holders == {"/dev/vfio/devices/vfio0": None}
    assert plugin.hears(held(P="0")).registry.holders == {"/dev/vfio/devices/vfio0": "default/P"}
    assert plugin.hears().registry.holders == {}


def test_a_new_pod_with_one_device_of_an_old_pod_keeps_its_group_mate_from_the_next() -> None:
    plugin = Plugin().sees(*MATES).gives("0", "1").hears(held(P="0 1")).gives("0")
    assert plugin.reason("0") is None
    assert plugin.reason("1") is Reason.GROUP_TAKEN
    assert plugin.hears(held(Q="0")).reason("1") is Reason.GROUP_TAKEN
    assert plugin.reason("0") is None


def test_an_init_containers_devices_go_to_the_containers_of_its_pod_in_the_end() -> None:
    """The kubelet allocates them again (devicesToReuse), and PodResources then names one pod for both."""
    plugin = Plugin().sees(*MATES).gives("0", "1").hears(held(P="0 1")).gives("0")
    assert plugin.reason("1") is Reason.GROUP_TAKEN, "it may be another pod's"
    plugin.hears(held(P="0 1"))
    assert plugin.reason("0") is None
    assert plugin.is_free("1")


def test_a_pod_that_was_made_again_under_its_name_is_another_pod() -> None:
    plugin = Plugin().sees(*MATES).gives("0", "1").hears(held(db="0 1")).gives("0")
    plugin.hears(held(db="0"), complete=False)  # the new one; what the old one had is not known yet
    assert plugin.reason("1") is Reason.GROUP_TAKEN


def test_devices_that_one_answer_names_for_one_pod_are_together_after_a_restart() -> None:
    plugin = Plugin().hears(held(P="0 1")).sees(*MATES)
    assert (plugin.reason("0"), plugin.reason("1")) == (None, None)


def test_a_number_that_went_to_another_gpu_does_not_bring_its_holder_along() -> None:
    """A promise for ID 0 is left over, and the number goes to a GPU whose mate is held."""
    plugin = Plugin().sees(gpu(A, vfio=0, group=1), gpu(C, vfio=2, group=9)).gives("0").gives("2")
    plugin.sees(gpu(A, vfio=None, group=1), gpu(B, vfio=0, group=9), gpu(C, vfio=2, group=9))
    assert plugin.reason("0") is Reason.GROUP_TAKEN
    assert plugin.reason("2") is Reason.GROUP_TAKEN, "whoever holds ID 0 can open its node, and so has the group"


def test_a_number_that_went_to_a_function_that_rides_along_gives_its_holder_the_group() -> None:
    plugin = Plugin().sees(gpu(A, vfio=0, group=1), gpu(B, vfio=1, group=9)).gives("0")
    plugin.sees(gpu(A, vfio=None, group=1), gpu(B, vfio=1, group=9), gpu(C, vfio=0, group=9, **AUDIO))
    assert plugin.reason("1") is Reason.GROUP_TAKEN


@pytest.mark.parametrize("moved", [{"driver": "nvgrace_gpu_vfio_pci"}, SWITCH], ids=["by a rule", "another function"])
def test_a_node_is_not_given_under_two_names(moved: dict[str, Any]) -> None:
    grace = frozenset({"nvgrace_gpu_vfio_pci"})
    rule = ResourceRule(label="resources[0]", name="example.com/grace", drivers=grace)
    plugin = Plugin(Settings(resources=(rule,))).sees(gpu(A, vfio=3)).gives("3").hears(held(P="3"))
    plugin.sees(gpu(A if "driver" in moved else B, vfio=3, **moved))
    resource = "example.com/grace" if "driver" in moved else NVSWITCH
    health = plugin.health("3", resource)
    assert health.reason is Reason.HELD_AS_ANOTHER
    assert health.detail.startswith(f"pod default/P holds /dev/vfio/devices/vfio3 as {PGPU}=3")
    assert plugin.hears().is_free("3", resource)


@pytest.mark.parametrize("consumer", list(Consumer))
def test_a_gpu_that_was_bound_again_under_another_number_is_its_old_holders(consumer: Consumer) -> None:
    plugin = Plugin(Settings(consumer=consumer)).sees(gpu(A, vfio=0)).gives("0").hears(held(launcher="0"))
    plugin.sees(gpu(A, vfio=5))
    assert plugin.reason("5") is Reason.HELD_AS_ANOTHER
    plugin.hears()
    assert plugin.is_free("5")


def test_after_a_change_of_alias_the_node_of_an_old_name_is_held_and_its_group_with_it() -> None:
    plugin = Plugin(Settings(gpu_alias="other")).hears(held(P="0")).sees(*MATES)
    assert plugin.health("0", "nvidia.com/other").detail.startswith("pod default/P holds /dev/vfio/devices/vfio0 as")
    assert plugin.reason("1", "nvidia.com/other") is Reason.GROUP_TAKEN
    assert plugin.registry.current.resources.keys() == {"nvidia.com/other"}, "no endpoint for a name of the past"


def test_a_cdi_spec_of_an_old_name_tells_its_node_and_what_is_in_one_waits_for_the_answer() -> None:
    plugin = Plugin(Settings(gpu_alias="other"))
    plugin.registry.learn(pod_resources=True, former={("acme.com/gpu", "first"): "/dev/vfio/devices/vfio0"})
    plugin.sees(gpu(A, vfio=0, group=1), gpu(B, vfio=1, group=2))
    other = "nvidia.com/other"
    assert plugin.reason("0", other) is plugin.reason("1", other) is Reason.HOLDERS_UNKNOWN
    plugin.hears(complete=False)
    assert (plugin.reason("0", other), plugin.reason("1", other)) == (Reason.HOLDERS_UNKNOWN, None)
    plugin.hears({("acme.com/gpu", "first"): "default/P"})
    assert (plugin.reason("0", other), plugin.reason("1", other)) == (Reason.HELD_AS_ANOTHER, None)


def test_resources_of_other_plugins_hold_nothing_of_ours() -> None:
    others = {("nvidia.com/gpu", "0"): "a/b", ("nvidia.com/mig-1g.10gb", "0"): "a/b", ("acme.com/nic", "0"): "a/b"}
    assert Plugin().hears(others).sees(gpu(A, vfio=0)).reason("0") is None


def test_an_answer_that_is_older_than_the_turn_frees_nothing() -> None:
    standby = Plugin().hears().sees(*MATES)
    assert standby.reason("1") is None
    standby.now += 1
    standby.registry.serve()
    assert (standby.reason("0"), standby.reason("1")) == (Reason.HOLDERS_UNKNOWN, Reason.HOLDERS_UNKNOWN)
    standby.registry.learn(holdings=Holdings(asked_at=standby.now - 0.5))
    assert standby.reason("1") is Reason.HOLDERS_UNKNOWN
    standby.hears(held(P="0"), complete=False)
    assert standby.reason("0") is Reason.HOLDERS_UNKNOWN, "its mate may have another holder"
    standby.hears(held(P="0"))
    assert (standby.reason("0"), standby.reason("1")) == (None, Reason.GROUP_TAKEN)


def test_after_a_restart_the_group_of_a_held_device_that_is_not_bound_is_not_known_and_so_not_given() -> None:
    unbound = gpu(A, vfio=None, group=9)
    plugin = Plugin().hears(held(P="0")).sees(unbound, gpu(B, vfio=1, group=9), gpu(C, vfio=2, group=7))
    assert plugin.health("1").detail == "pod default/P holds device 0, which may be of its IOMMU group 9"
    assert plugin.reason("2") is None, "all of its group is bound: none of it can be what is held"
    assert plugin.hears().is_free("1")


def test_after_a_restart_a_function_that_is_unbound_under_a_vm_is_seen_in_use() -> None:
    pending = gpu(A, vfio=None, group=9, enable=1)
    plugin = Plugin().hears().sees(pending, gpu(B, vfio=1, group=9))
    assert plugin.reason("1") is Reason.IN_USE_ELSEWHERE
    assert plugin.sees(replace(pending, enable=None), gpu(B, vfio=1, group=9)).is_free("1")


def test_without_cdevs_the_id_is_the_group_whatever_the_resource() -> None:
    switch = gpu(B, vfio=1, group=7, cdev=False, **SWITCH)
    plugin = Plugin().hears(held(P="7")).sees(gpu(A, vfio=None, group=7), switch)
    assert plugin.reason("7", NVSWITCH) is Reason.HELD_AS_ANOTHER
    assert plugin.reason("7") is Reason.GONE


def test_a_held_id_of_which_the_kind_of_kernel_tells_the_node_is_placed_when_that_is_known() -> None:
    plugin = Plugin(Settings(gpu_alias="other")).hears(held(P="1")).sees()
    plugin.sees(*MATES)
    assert plugin.reason("1", "nvidia.com/other") is Reason.HELD_AS_ANOTHER
    assert plugin.reason("0", "nvidia.com/other") is Reason.GROUP_TAKEN


def test_a_held_function_that_hangs_after_a_restart_is_found_by_its_vfio_device_and_stays_in_the_spec() -> None:
    facts = host(gpu(B, vfio=1, group=9))
    group = facts.groups[9]._replace(members=(A, B))
    plugin = Plugin().hears(held(P="0"))
    plugin.now += 1
    plugin.registry.observe(
        replace(facts, groups={9: group}, unreadable={A: "sysfs does not answer"}, vfio_devs={"vfio0": A, "vfio1": B})
    )
    assert plugin.reason("1") is not None
    device = plugin.registry.current.device(PGPU, "0")
    assert device is not None
    assert (device.health.reason, device.node_exists) == (Reason.UNREADABLE, True)


def test_a_held_function_that_hangs_leaves_the_spec_when_its_number_is_another_functions() -> None:
    plugin = Plugin().sees(gpu(A, vfio=0, group=1)).gives("0")
    plugin.sees(gpu(B, vfio=0, group=2, **SWITCH), unreadable={A: "sysfs does not answer"}, kernel_has_cdevs=True)
    device = plugin.registry.current.device(PGPU, "0")
    assert device is not None
    assert (device.health.reason, device.node_exists) == (Reason.UNREADABLE, False)
    assert plugin.reason("0", NVSWITCH) is Reason.HELD_AS_ANOTHER


def test_a_held_id_whose_number_is_another_functions_leaves_the_spec() -> None:
    plugin = Plugin().hears({(NVSWITCH, "0"): "default/P"}).sees(gpu(A, vfio=0), vfio_devs={"vfio0": A})
    device = plugin.registry.current.device(NVSWITCH, "0")
    assert device is not None
    assert (device.health.reason, device.node_exists) == (Reason.GONE, False)


def test_while_pod_resources_has_not_answered_nothing_is_given_and_what_shares_a_group_waits_for_all_pods() -> None:
    plugin = Plugin()
    plugin.registry.learn(pod_resources=True)
    plugin.sees(*MATES, gpu(C, vfio=2, group=7))
    assert {plugin.reason(number) for number in "012"} == {Reason.HOLDERS_UNKNOWN}
    plugin.hears(held(P="0"), complete=False)
    assert [plugin.reason(number) for number in "012"] == [Reason.HOLDERS_UNKNOWN, Reason.GROUP_TAKEN, None]
    plugin.hears(held(P="0"))
    assert [plugin.reason(number) for number in "012"] == [None, Reason.GROUP_TAKEN, None]


def test_without_cdi_specs_every_device_waits_for_an_answer_that_names_all_pods() -> None:
    """Nothing else could tell that a pod holds it under a name of the past."""
    plugin = Plugin(Settings(consumer=Consumer.KUBEVIRT)).hears(complete=False).sees(gpu(A, vfio=0))
    assert plugin.reason("0") is Reason.HOLDERS_UNKNOWN
    assert plugin.hears().reason("0") is None


def test_an_answer_that_may_lack_pods_ends_no_grant() -> None:
    plugin = Plugin().sees(*MATES).gives("0").hears(held(P="0")).hears(complete=False, after=10 * GRANT_UNUSED)
    assert plugin.reason("1") is Reason.GROUP_TAKEN


def test_a_use_that_the_look_before_allocate_saw_ended_is_not_held_against_the_new_pod() -> None:
    """The last scan may be seconds old, and of the end of a VM no event tells."""
    used = gpu(A, vfio=0, enable=1)
    plugin = Plugin().sees(gpu(A, vfio=0)).gives("0").hears(held(P="0")).sees(used)
    assert plugin.reason("0") is None, "by its pod"
    plugin.gives("0").hears(held(Q="0"))
    assert plugin.reason("0") is None, "the old pod's VM has ended, as the look saw"
    assert plugin.sees(used).reason("0") is None, "and the new pod's has begun"


def test_a_gpu_in_use_that_an_old_pod_had_by_the_number_is_not_offered_when_the_number_is_given_again() -> None:
    """The number went to another GPU, and the old pod's VM outlives it: nobody holds that GPU any more."""
    plugin = Plugin().sees(gpu(A, vfio=0)).hears().gives("0").hears(held(P="0"))
    now = (gpu(A, vfio=7, enable=1), gpu(B, vfio=0, group=51))
    plugin.sees(*now).hears(held(P="0")).sees(*now, after=2)
    assert plugin.reason("7") is Reason.HELD_AS_ANOTHER
    assert plugin.gives("0").reason("7") is Reason.IN_USE_ELSEWHERE


def test_a_use_that_began_after_the_look_before_allocate_is_not_the_new_pods() -> None:
    plugin = Plugin().hears().sees(gpu(A, vfio=0))
    looked_at = plugin.now
    plugin.sees(gpu(A, vfio=0, enable=1))
    plugin.now += 1
    plugin.registry.allocate([(PGPU, "0")], looked_at=looked_at)
    assert plugin.reason("0") is Reason.IN_USE_ELSEWHERE


def test_a_scan_that_began_before_a_look_found_a_gpu_in_use_does_not_end_that_use() -> None:
    plugin = Plugin().sees(*MATES)
    began_at = plugin.now + 0.1
    plugin.now += 1
    plugin.registry.learn(busy={(PGPU, "0"): frozenset({A})})
    plugin.registry.observe(replace(host(*MATES), began_at=began_at))
    assert plugin.reason("0") is Reason.IN_USE_ELSEWHERE


def test_while_pod_resources_will_tell_the_end_of_a_vm_frees_nothing() -> None:
    plugin = Plugin().hears().sees(*MATES).gives("0").sees(replace(MATES[0], enable=1), MATES[1]).sees(*MATES)
    assert plugin.reason("1") is Reason.GROUP_TAKEN, "the pod may start its VM again"


def test_a_use_that_a_look_saw_goes_on_whatever_pod_holds_the_device_later() -> None:
    used = replace(MATES[0], enable=1)
    plugin = Plugin().sees(*MATES).gives("0").hears(held(P="0"))
    plugin.registry.learn(busy={(PGPU, "0"): frozenset({A})})
    plugin.sees(used, MATES[1]).hears(held(Q="0"))
    assert plugin.is_free("0"), "PodResources names who has it"
    assert plugin.reason("1") is Reason.GROUP_TAKEN


def test_what_a_look_before_allocate_saw_in_use_is_unhealthy_at_once_and_well_when_it_is_not_used_any_more() -> None:
    plugin = Plugin().sees(*MATES).gives("0").hears(held(P="0"))
    plugin.registry.learn(busy={(PGPU, "0"): frozenset({A})})
    assert plugin.reason("0") is plugin.reason("1") is Reason.IN_USE_ELSEWHERE
    assert plugin.sees(replace(MATES[0], enable=1), MATES[1]).reason("0") is Reason.IN_USE_ELSEWHERE
    assert plugin.sees(*MATES).is_free("0")


def test_a_rider_in_use_takes_a_group_with_one_gpu_and_one_with_two() -> None:
    rider = gpu(C, vfio=2, group=9, enable=1, **AUDIO)
    assert Plugin().hears().sees(MATES[0], rider).reason("0") is Reason.IN_USE_ELSEWHERE
    assert Plugin().sees(MATES[0], rider).reason("0") is None, "nobody says that it is not its own pod's VM"
    plugin = Plugin().hears().sees(*MATES, rider)
    assert plugin.reason("0") is plugin.reason("1") is Reason.IN_USE_ELSEWHERE


def test_while_another_vm_uses_a_gpu_the_verdict_stays_whenever_pod_resources_is_asked() -> None:
    used = gpu(A, vfio=0, enable=1)
    plugin = Plugin().hears().sees(used)
    versions = set()
    for _ in range(10):
        assert plugin.hears().reason("0") is Reason.IN_USE_ELSEWHERE
        versions.add(plugin.sees(used).registry.current.version)
    assert len(versions) == 1


def test_what_is_in_use_at_the_start_is_not_healthy_for_a_moment_while_it_is_found_out() -> None:
    plugin = Plugin()
    plugin.registry.learn(pod_resources=True)
    plugin.sees(gpu(A, vfio=0, enable=1))
    assert plugin.reason("0") is Reason.HOLDERS_UNKNOWN
    assert plugin.hears().reason("0") is Reason.HOLDERS_UNKNOWN, "its VM may have ended before PodResources was asked"
    assert plugin.registry._wake_at == plugin.now, "another look tells"
    assert plugin.sees(gpu(A, vfio=0, enable=1)).reason("0") is Reason.IN_USE_ELSEWHERE


def test_a_pod_that_was_dropped_after_its_allocate_is_waited_for_no_longer_than_an_admission_takes() -> None:
    plugin = Plugin().sees(*MATES).gives("0").hears(after=ADMISSION - 1)
    assert plugin.reason("1") is Reason.GROUP_TAKEN
    assert plugin.hears(after=2).is_free("1")


def test_a_bridge_that_is_enabled_without_a_driver_is_no_vms() -> None:
    bridge = gpu(C, vfio=None, group=9, enable=1, class_code=0x060400)
    assert Plugin().hears().sees(MATES[0], bridge).reason("0") is None


def test_a_host_that_cannot_be_read_changes_nothing_in_what_is_known_of_uses() -> None:
    plugin = Plugin().hears().sees(replace(MATES[0], enable=1), MATES[1])
    plugin.now += 1
    plugin.registry.observe(HostFacts(unreachable="the bus hangs", began_at=plugin.now))
    assert plugin.sees(replace(MATES[0], enable=1), MATES[1]).reason("1") is Reason.IN_USE_ELSEWHERE


def test_a_use_that_began_while_the_scan_that_first_saw_it_went_on_may_be_the_new_pods() -> None:
    plugin = Plugin().sees(gpu(A, vfio=0))
    began_at = plugin.now + 0.1
    plugin.gives("0")
    plugin.now += 1
    plugin.registry.observe(replace(host(gpu(A, vfio=0, enable=1)), began_at=began_at))
    assert plugin.reason("0") is None


def test_a_gpu_that_hangs_in_use_asks_for_no_look_after_look() -> None:
    used = gpu(A, vfio=0, enable=1)
    plugin = Plugin().sees(used).hears(held(P="0"))
    plugin.sees(unreadable={A: "sysfs does not answer"}, kernel_has_cdevs=True).hears()
    assert plugin.registry._wake_at != plugin.now, "it would go on for as long as it hangs"
    assert plugin.sees(used).reason("0") is Reason.IN_USE_ELSEWHERE


def test_an_older_answer_that_comes_late_changes_nothing() -> None:
    plugin = Plugin().sees(*MATES).hears()
    plugin.registry.serve()
    asked_before = plugin.now - 0.5
    plugin.hears(held(P="0"))
    plugin.registry.learn(holdings=Holdings(asked_at=asked_before))
    assert (plugin.reason("0"), plugin.reason("1")) == (None, Reason.GROUP_TAKEN)


def test_what_was_given_together_before_another_plugin_served_may_be_in_two_hands_by_now() -> None:
    plugin = Plugin().sees(*MATES).gives("0", "1")
    plugin.now += 5
    plugin.registry.serve()  # again: meanwhile the pod was dropped, and another plugin gave 0 to R
    plugin.hears(held(R="0"))
    assert plugin.reason("1") is Reason.GROUP_TAKEN


def test_after_a_takeover_pod_resources_is_asked_until_it_names_all_pods() -> None:
    plugin = Plugin(Settings(consumer=Consumer.KUBEVIRT)).hears().sees(gpu(A, vfio=0))
    plugin.now += 1
    plugin.registry.serve()
    plugin.hears(complete=False)
    assert plugin.reason("0") is Reason.HOLDERS_UNKNOWN
    assert plugin.registry.current.waits_for_holdings


def test_what_arrived_ill_and_stayed_so_is_held_back_although_nothing_else_changed() -> None:
    plugin = Plugin().hears()
    for _ in range(3):
        plugin.sees(MATES[0], gpu(B, vfio=None, group=9, driver="nvidia"), after=1)
    assert plugin.sees(MATES[0], gpu(B, vfio=None, group=9)).reason("0") is Reason.SETTLING


def test_a_gpu_whose_number_was_given_again_is_free_at_once_under_its_new_one() -> None:
    plugin = Plugin().sees(gpu(A, vfio=0, group=1)).gives("0")
    plugin.sees(gpu(A, vfio=5, group=1), gpu(B, vfio=0, group=2))
    assert plugin.reason("5") is Reason.HELD_AS_ANOTHER
    plugin.gives("0")
    assert plugin.is_free("5")


def test_an_answer_from_before_a_device_was_found_in_use_does_not_bring_its_old_holder_back() -> None:
    used = gpu(A, vfio=0, enable=1)
    plugin = Plugin().sees(gpu(A, vfio=0)).gives("0").sees(used)
    asked_before = plugin.now
    plugin.now += 1
    plugin.registry.learn(busy={(PGPU, "0"): frozenset({A})})
    plugin.registry.learn(holdings=Holdings(asked_at=asked_before, pods=held(P="0")))
    assert plugin.sees(used).reason("0") is Reason.IN_USE_ELSEWHERE
