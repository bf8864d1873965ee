"""From a ResourceClaim to its devices, to a refusal in words, and to the files by which containers get the devices."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dra_manager import DRIVER, NODE, claim_object
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU

from sandbox_plugin.cdi.lint import read_spec
from sandbox_plugin.config.settings import Consumer, ResourceRule, Settings
from sandbox_plugin.dra.claim_specs import Terms, cdi_ids, nodes_for, render_files
from sandbox_plugin.dra.claims import (
    Asked,
    ClaimId,
    Prepared,
    Refused,
    Wanted,
    choose,
    give,
    read_claim,
    usable,
)
from sandbox_plugin.dra.config import API_VERSION, InvalidConfig, NodeKind, parse_config
from sandbox_plugin.dra.names import device_name, devices_by_name
from sandbox_plugin.inventory.ledger import GRANT_UNUSED, Holdings
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import HostFacts, Reason
from sandbox_plugin.names import address_of_claimed
from sandbox_plugin.registry import Registry

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
NAMES = ("pci-0000-01-00-0", "pci-0000-02-00-0", "pci-0000-03-00-0")
UUID = "c9a8b7d6-0000-4000-8000-000000000001"
GPUS = ClaimId(namespace="default", name="gpus", uid="uid-of-gpus")
CONFIG = {"apiVersion": API_VERSION, "kind": "VfioDeviceConfig"}


def registry_of(facts: HostFacts | None, settings: Settings | None = None) -> Registry:
    """One that serves claims, and knows from PodResources that no pod holds anything."""
    registry = Registry(Rules(settings or Settings(), ModelNames.load()), requires_cdi=False, clock=lambda: 1000.0)
    registry.learn(claims={}, holdings=Holdings(asked_at=0.0))
    if facts is not None:
        registry.observe(facts)
    return registry


def three_gpus() -> HostFacts:
    """A and B in one group, C alone."""
    return host(gpu(A, vfio=1, group=50), gpu(B, vfio=2, group=50), gpu(C, vfio=3, group=51))


def read(claim: Mapping[str, Any] | None) -> Asked:
    return read_claim(GPUS, claim, driver=DRIVER, pool=NODE)


def wants(*names: str, node: NodeKind = NodeKind.DEFAULT) -> tuple[Wanted, ...]:
    return tuple(Wanted(request="gpu", pool=NODE, device=name, node=node) for name in names)


def prepare(registry: Registry, claim: ClaimId, *names: str) -> Prepared:
    """The claim has these devices from now on."""
    asked = Asked(pod_claim=None, devices=wants(*names))
    prepared = give(claim, asked, choose(claim.uid, asked.devices, registry.current))
    known = registry._signals.claims or {}
    registry.learn(claims={**known, claim.uid: prepared.for_ledger(at=registry.now(), looked_at=registry.now())})
    return prepared


# What a claim says


def test_a_claim_has_devices_of_several_requests_and_alternatives_and_those_of_other_drivers_are_not_ours() -> None:
    nic = {"driver": "nic.example.com", "pool": "nics", "request": "nic", "device": "eth0"}
    asked = read(claim_object("gpus", {"request": "one", "device": "a"}, nic, {"request": "two/small", "device": "b"}))
    assert [(each.request, each.base_request, each.device) for each in asked.devices] == [
        ("one", "one", "a"),
        ("two/small", "two", "b"),
    ]
    assert asked.pod_claim is None
    assert read(claim_object("gpus", "a", template="vm-gpus")).pod_claim == "vm-gpus"


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    claim = claim_object("gpus", "a")
    change(claim)
    return claim


def result(**more: object) -> dict[str, Any]:
    return claim_object("gpus", {"device": "a", **more})


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (None, "the API server has no such claim"),
        ({}, "the API server's object is no ResourceClaim of resource.k8s.io/v1: KeyError('metadata')"),
        ({"metadata": None}, "is no ResourceClaim"),
        (claim_object("gpus", "a", uid="new"), "it was deleted and made again: its UID is new now"),
        (changed(lambda claim: claim.pop("status")), "it is not allocated"),
        (claim_object("gpus"), f"none of its devices is of driver {DRIVER}"),
        (claim_object("gpus", "a", pods=("x", "y")), "it is reserved for pods/x, pods/y: a VFIO device has one holder"),
        (claim_object("gpus", "a", "a"), "it has one device twice"),
        (claim_object("gpus", "a", template="../x"), "pod-claim-name is '../x', which is no name"),
        (result(pool="node-2"), "device a is of pool node-2, and this node's is node-1"),
        (result(adminAccess=True), "adminAccess is refused: a VFIO device has one holder"),
        (result(shareID="s"), "a share of device a is refused"),
        (result(request="../../etc"), "not such names"),
        (result(device="../../etc"), "not such names"),
        (result(device=7), "is no ResourceClaim"),
    ],
)
def test_a_claim_that_cannot_be_prepared_is_refused_in_words(claim: Mapping[str, Any] | None, why: str) -> None:
    with pytest.raises(Refused) as refused:
        read(claim)
    assert why in str(refused.value)


def test_names_that_kubernetes_would_not_take_never_become_those_of_files() -> None:
    for bad in ({"namespace": "a/b"}, {"name": ".."}, {"uid": "../x"}, {"uid": ""}):
        with pytest.raises(Refused, match="not a claim's names and UID"):
            replace(GPUS, **bad).check()


# Opaque configuration


def opaque(*requests: str, source: str = "FromClaim", driver: str = DRIVER, **parameters: object) -> dict[str, Any]:
    body = {"driver": driver, "parameters": {**CONFIG, **parameters}}
    return {"source": source, "requests": list(requests), "opaque": body}


def test_the_last_configuration_for_a_request_counts_so_a_claim_has_its_way_over_its_class() -> None:
    config = [
        opaque(source="FromClass", node="cdev"),
        opaque("one", node="group"),
        opaque("two/small", node="group"),
        opaque("one", "two", driver="nic.example.com", kind="Other"),
    ]
    requests = [{"request": name, "device": name[:3]} for name in ("one", "two/small", "six")]
    asked = read(claim_object("gpus", *requests, config=config))
    assert [each.node for each in asked.devices] == [NodeKind.GROUP, NodeKind.GROUP, NodeKind.CDEV]
    assert read(claim_object("gpus", "a")).devices[0].node is NodeKind.DEFAULT


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        (None, "not an object"),
        ({}, "apiVersion is None"),
        ({**CONFIG, "apiVersion": "vfio.sandbox-plugin/v2"}, "this driver knows 'vfio.sandbox-plugin/v1alpha1'"),
        ({**CONFIG, "kind": "GpuConfig"}, "kind is 'GpuConfig'"),
        ({**CONFIG, "noed": "cdev"}, "unknown field 'noed'; VfioDeviceConfig has the field 'node'"),
        ({**CONFIG, "node": "both"}, "node is 'both'; allowed are default, cdev, group"),
        ({**CONFIG, "node": ["cdev"]}, "node is ['cdev']"),
    ],
)
def test_a_configuration_that_is_not_understood_refuses_the_claim_and_says_whose_it_is(
    parameters: Any, why: str
) -> None:
    with pytest.raises(InvalidConfig) as invalid:
        parse_config(parameters)
    assert why in str(invalid.value)
    for source, whose in (("FromClass", "its DeviceClass"), ("FromClaim", "the claim")):
        config = {"source": source, "opaque": {"driver": DRIVER, "parameters": parameters}}
        with pytest.raises(Refused, match=f"request gpu: the configuration of {whose}: "):
            read(claim_object("gpus", "a", config=[config]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["node", "kind", "x"]), inner),
        max_leaves=6,
    )
)
def test_any_parameters_are_a_configuration_or_are_refused(parameters: Any) -> None:
    with contextlib.suppress(InvalidConfig):
        assert parse_config(parameters) in NodeKind


# The devices


def test_the_devices_are_found_by_their_names_in_the_order_of_the_claim() -> None:
    registry = registry_of(three_gpus())
    assert [d.id for d in choose("x", wants(NAMES[2], NAMES[0]), registry.current)] == ["3", "1"]


@pytest.mark.parametrize("facts", [host(gpu(A), gpu(B, vfio=None, group=51), gpu(UUID, mdev_type="T4-1Q", group=52))])
def test_a_name_of_a_device_tells_its_address_again(facts: HostFacts) -> None:
    for device in registry_of(facts).current.by_key.values():
        assert address_of_claimed(device_name(device)) == device.address
    assert address_of_claimed("pci-10000-01-00-0") == "10000:01:00.0"
    for other in ("eth0", "pci-0000-01-00-0-x", "mdev-1", ""):
        assert address_of_claimed(other) is None


def test_before_the_first_scan_nothing_is_known() -> None:
    with pytest.raises(Refused, match="not known yet"):
        choose("x", wants(NAMES[0]), registry_of(None).current)


def test_what_is_not_there_or_not_bound_or_not_well_is_refused_with_the_reason() -> None:
    facts = host(gpu(A, driver="nvidia", vfio=None), gpu(B, vfio=2, group=51, link_speed="Unknown", link_width=63))
    current = registry_of(facts).current
    for name, why in [
        (NAMES[0], "bound to nvidia, not to vfio-pci"),
        (NAMES[1], r"\(nvidia\.com/pgpu=2\) cannot be given: off-the-bus: "),
        (NAMES[2], "this node has no such device any more"),
        ("other", "this node has no such device any more"),
    ]:
        with pytest.raises(Refused, match=f"request gpu: device {name}.*{why}"):
            choose("x", wants(name), current)


def test_a_claim_keeps_others_from_its_devices_and_from_their_group_and_has_them_itself_again() -> None:
    registry = registry_of(three_gpus())
    prepare(registry, GPUS, NAMES[0])
    assert choose(GPUS.uid, wants(NAMES[0]), registry.current)
    with pytest.raises(Refused, match="claim default/gpus holds it"):
        choose("other", wants(NAMES[0]), registry.current)
    with pytest.raises(Refused, match="group-taken: IOMMU group 50 is held by claim default/gpus through 0000:01:00"):
        choose("other", wants(NAMES[1]), registry.current)
    assert choose("other", wants(NAMES[2]), registry.current)


def test_a_claim_may_have_all_of_a_group() -> None:
    registry = registry_of(three_gpus())
    prepare(registry, GPUS, NAMES[0], NAMES[1])
    assert all(device.for_claims.healthy for device in registry.current.by_key.values())
    assert len(choose(GPUS.uid, wants(NAMES[0], NAMES[1]), registry.current)) == 2


def test_what_a_pod_has_by_the_device_plugin_api_no_claim_gets_and_the_other_way_round() -> None:
    registry = registry_of(three_gpus())
    registry.allocate([(PGPU, "1")])
    assert registry.current.by_key[(PGPU, "1")].health.healthy
    for name, reason in ((NAMES[0], "held-by-other-api: a pod that was"), (NAMES[1], "group-taken: ")):
        with pytest.raises(Refused, match=reason):
            choose("x", wants(name), registry.current)
    prepare(registry, GPUS, NAMES[2])
    by_key = registry.current.by_key
    assert "held-by-other-api: claim default/gpus holds /dev/vfio/" in str(by_key[(PGPU, "3")].health)
    assert by_key[(PGPU, "3")].for_claims.healthy
    registry.learn(claims={})
    assert registry.current.by_key[(PGPU, "3")].health.healthy, "it need not settle: it was never ill"


def test_a_claim_holds_the_group_of_a_device_that_is_gone_although_another_of_its_devices_has_that_node_now() -> None:
    registry = registry_of(three_gpus())
    prepared = prepare(registry, GPUS, NAMES[1], NAMES[2])
    bound_again = gpu(C, vfio=2, group=51)
    registry.observe(host(gpu(A, vfio=1, group=50), bound_again))
    named = devices_by_name(registry.current)
    gone, there = prepared.devices
    moved = replace(prepared, devices=(gone, there.moved(named[NAMES[2]])))
    assert {given.places.node for given in moved.devices} == {"/dev/vfio/devices/vfio2"}
    registry.learn(claims={GPUS.uid: moved.for_ledger()})
    assert "IOMMU group 50 is held by claim default/gpus" in str(registry.current.by_key[(PGPU, "1")].health)
    with pytest.raises(Refused, match="IOMMU group 50 is held by claim default/gpus"):
        choose("x", wants(NAMES[0]), registry.current)


def test_with_whole_node_a_claim_gets_one_or_all() -> None:
    facts = host(*(gpu(f"0000:0{n}:00.0", vfio=n, group=50 + n) for n in (1, 2, 3)))
    current = registry_of(facts).current
    for count in (1, 3):
        assert len(choose("x", wants(*NAMES[:count]), current, whole_node=(PGPU, None))) == count
    with pytest.raises(Refused, match=r"it has 2 devices of nvidia\.com/pgpu; with --whole-node it gets 1 or all 3"):
        choose("x", wants(*NAMES[:2]), current, whole_node=(PGPU, None))
    assert choose("x", wants(*NAMES[:2]), current, whole_node=("nvidia.com/other", None))


def test_a_claim_that_only_pod_resources_tells_of_holds_its_device_until_it_does_not() -> None:
    registry = registry_of(three_gpus())
    registry.learn(holdings=Holdings(asked_at=1.0, claims=frozenset({("a/lost", C), ("a/odd", "0000:77:00.0")})))
    assert registry.current.waits_for_holdings
    assert "claim a/lost holds" in registry.current.by_key[(PGPU, "3")].health.detail
    assert registry.holders["/dev/vfio/devices/vfio3"] == "claim a/lost"
    with pytest.raises(Refused, match="claim a/lost holds it"):
        choose("x", wants(NAMES[2]), registry.current)
    registry.learn(holdings=Holdings(asked_at=2.0, complete=False))
    assert not registry.current.by_key[(PGPU, "3")].health.healthy, "a young kubelet does not name all"
    registry.learn(holdings=Holdings(asked_at=3.0))
    assert registry.current.by_key[(PGPU, "3")].health.healthy


def test_a_claim_that_pod_resources_told_of_before_it_went_away_ends_after_ten_minutes_without_use() -> None:
    now = 1000.0
    registry = Registry(Rules(), requires_cdi=False, clock=lambda: now)
    registry.learn(claims={})

    def can_be_had(enable: int = 0) -> bool:
        registry.observe(replace(host(gpu(C, vfio=3, group=51, enable=enable)), began_at=now))
        return registry.current.by_key[(PGPU, "3")].health.healthy

    assert can_be_had()
    registry.learn(holdings=Holdings(asked_at=now, claims=frozenset({("a/lost", C)})))
    registry.learn(pod_resources=False)
    now += GRANT_UNUSED - 1
    assert not can_be_had()
    now += 2
    assert can_be_had()
    registry.learn(holdings=Holdings(asked_at=now, claims=frozenset({("a/lost", C)})))
    registry.learn(pod_resources=False)
    now += GRANT_UNUSED + 1
    assert not can_be_had(enable=1), "a VM has it"
    now += GRANT_UNUSED - 1
    assert not can_be_had(), "its pod may be about to start another VM"
    now += 2
    assert can_be_had()
    registry.learn(holdings=Holdings(asked_at=now, claims=frozenset({("a/lost", C)})))
    now += 2 * GRANT_UNUSED
    assert not can_be_had(), "PodResources is there, and has not said anything else"


@pytest.mark.parametrize(
    ("seen", "may_be_in_use"),
    [
        (host(replace(gpu(C, vfio=3, group=51), mdev_type="GRID T4-1Q", enable=None)), True),
        (host(gpu(C, vfio=3, group=51, driver="nvidia", physical_function=A, vgpu_type="1155")), True),
        (host(unreadable={C: "it hangs"}), True),
        (HostFacts(unreachable="no PCI bus"), True),
        (host(gpu(C, vfio=3, group=51), gpu(B, vfio=2, group=51, enable=1)), True),
        (host(), False),
    ],
    ids=["a mediated device", "a vGPU", "it hangs", "nothing can be read", "a VM has the group", "gone"],
)
def test_while_a_vm_may_have_the_device_of_a_claim_that_only_pod_resources_told_of_that_alone_ends_it(
    seen: HostFacts, may_be_in_use: bool
) -> None:
    now = 1000.0
    registry = Registry(Rules(), requires_cdi=False, clock=lambda: now)
    registry.observe(host())
    registry.observe(replace(seen, began_at=now))
    registry.learn(claims={}, holdings=Holdings(asked_at=now, claims=frozenset({("a/lost", C)})), pod_resources=True)
    registry.learn(pod_resources=False)
    now += 2 * GRANT_UNUSED
    registry.observe(replace(seen, began_at=now))
    assert ("claim a/lost" in registry.holders.values()) is may_be_in_use
    registry.observe(replace(host(gpu(C, vfio=3, group=51)), began_at=now))
    assert ("claim a/lost" in registry.holders.values()) is may_be_in_use, "it was not seen for long enough"
    registry.learn(holdings=Holdings(asked_at=now), pod_resources=True)
    assert registry.holders == {}


@pytest.mark.parametrize("driver", ["nvidia", "vfio-pci"])
def test_a_vgpu_that_a_pod_has_goes_to_no_claim_while_pod_resources_is_away(driver: str) -> None:
    """Its `enable` does not tell whether a VM has it; that of a function on vfio-pci does."""
    now = 1000.0
    card = gpu(A, vfio=None, group=50, driver="nvidia")
    facts = host(card, gpu(C, vfio=3, group=51, driver=driver, physical_function=A, vgpu_type="1155"))
    registry = Registry(Rules(), requires_cdi=False, clock=lambda: now)
    registry.observe(facts)
    registry.learn(claims={}, holdings=Holdings(asked_at=now), pod_resources=True)
    (key,) = registry.current.by_key
    registry.allocate([key])
    registry.learn(pod_resources=False)
    now += 2 * GRANT_UNUSED
    device = registry.observe(facts).by_key[key]
    assert device.for_claims is not None
    assert device.for_claims.reason is (Reason.HELD_BY_OTHER_API if driver == "nvidia" else None)


def test_an_answer_from_before_unprepare_does_not_hold_the_device_after_it() -> None:
    registry = registry_of(three_gpus())
    prepare(registry, GPUS, NAMES[2])
    registry.learn(holdings=Holdings(asked_at=1.0, claims=frozenset({("default/gpus", C)})))
    registry.learn(claims={})
    assert registry.current.by_key[(PGPU, "3")].health.healthy


@pytest.mark.parametrize("is_there", [True, False])
def test_claims_get_nothing_new_before_pod_resources_has_told_all_and_keep_what_they_have(is_there: bool) -> None:
    """Also where there is none: pods may hold what the plugin gave in an earlier run."""
    registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False)
    registry.learn(pod_resources=is_there)
    first = registry_of(three_gpus())
    registry.learn(claims={GPUS.uid: prepare(first, GPUS, NAMES[2]).for_ledger()})
    registry.observe(three_gpus())
    for _ in range(2):
        assert choose(GPUS.uid, wants(NAMES[2]), registry.current)
        with pytest.raises(Refused, match="holders-unknown"):
            choose("x", wants(NAMES[0]), registry.current)
        registry.learn(holdings=Holdings(asked_at=1.0, complete=False))
    registry.learn(holdings=Holdings(asked_at=2.0))
    assert choose("x", wants(NAMES[0]), registry.current)


def test_while_a_young_kubelet_names_some_pods_the_device_plugin_goes_on_and_claims_wait() -> None:
    """The kubelet keeps an ID that it has given from other pods, but not from claims."""
    registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=True)
    registry.learn(claims={}, pod_resources=True, in_cdi={PGPU: frozenset({"3"})})
    registry.observe(host(gpu(C, vfio=3, group=51)))
    current = registry.learn(holdings=Holdings(asked_at=1.0, complete=False))
    assert current.by_key[(PGPU, "3")].health.healthy
    with pytest.raises(Refused, match="holders-unknown"):
        choose("x", wants(NAMES[2]), current)


def test_what_a_scan_saw_in_use_before_the_look_is_not_held_against_a_claim() -> None:
    now = [1000.0]
    registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False, clock=lambda: now[0])
    registry.learn(claims={}, holdings=Holdings(asked_at=0.0))
    registry.observe(host(gpu(C, vfio=3, group=51), began_at=998.0))
    registry.observe(host(gpu(C, vfio=3, group=51, enable=1), began_at=999.0))
    now[0] += 1  # the VM has ended, which no scan has seen yet, and the look sees
    prepare(registry, GPUS, NAMES[2])
    assert registry.current.by_key[(PGPU, "3")].for_claims.healthy
    now[0] += 1
    registry.observe(host(gpu(C, vfio=3, group=51, enable=1), began_at=1002.0))
    assert registry.current.by_key[(PGPU, "3")].for_claims.healthy, "this is the claim's own VM"


def test_what_a_claims_vm_had_in_use_is_held_against_nobody_before_it_was_looked_for_after_unprepare() -> None:
    """The VM has ended by then, and the latest scan is older than that."""
    now = [1000.0]
    registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False, clock=lambda: now[0])
    registry.learn(claims={}, holdings=Holdings(asked_at=now[0]))

    def scan(enable: int) -> None:
        now[0] += 1
        registry.observe(host(gpu(C, vfio=3, group=51, enable=enable), began_at=now[0]))

    def ask(*claims: tuple[str, str]) -> None:
        now[0] += 1
        registry.learn(holdings=Holdings(asked_at=now[0], claims=frozenset(claims)))

    def states() -> tuple[str, str]:
        device = registry.current.by_key[(PGPU, "3")]
        return device.health.reason or "", device.for_claims.reason or ""

    def let_a_vm_run_and_end() -> None:
        prepare(registry, GPUS, NAMES[2])
        scan(1)
        ask(("default/gpus", C))
        scan(1)
        assert states() == ("held-by-other-api", "")
        now[0] += 1
        registry.learn(claims={})
        assert states() == ("holders-unknown", ""), "and what was well for claims stays so"

    async def is_due() -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await registry.look_is_due()
                return True
        return False

    scan(0)
    let_a_vm_run_and_end()
    assert asyncio.run(is_due())
    scan(0)
    assert states() == ("", "")
    let_a_vm_run_and_end()
    scan(1)
    assert not asyncio.run(is_due()), "another scan leads no further before PodResources has been asked again"
    assert states() == ("holders-unknown", "")
    ask()
    scan(1)
    assert states() == ("in-use-elsewhere", "in-use-elsewhere"), "the VM runs on without its pod"


# Bound again


def test_a_device_that_was_bound_again_keeps_its_former_node_from_others_and_is_found_by_its_name() -> None:
    registry = registry_of(three_gpus())
    before = prepare(registry, GPUS, NAMES[2])
    current = registry.observe(host(gpu(A, vfio=1, group=50), gpu(B, vfio=3, group=50), gpu(C, vfio=4, group=51)))
    moved = replace(before, devices=(before.devices[0].moved(devices_by_name(current)[NAMES[2]]),))
    assert moved.devices[0].places.node == "/dev/vfio/devices/vfio4"
    assert moved.devices[0].former_nodes == ("/dev/vfio/devices/vfio3",)
    current = registry.learn(claims={GPUS.uid: moved.for_ledger()})
    assert "claim default/gpus holds /dev/vfio/devices/vfio3 as 0000:03:00.0" in str(current.by_key[(PGPU, "3")].health)
    back = moved.devices[0].moved(registry_of(three_gpus()).current.by_key[(PGPU, "3")])
    assert back.former_nodes == ("/dev/vfio/devices/vfio4",)
    assert back.after_boot().held == [back.after_boot().places], "after a boot no container has any node"


def test_a_node_that_another_holds_or_that_is_gone_is_not_usable() -> None:
    registry = registry_of(three_gpus())
    prepared = prepare(registry, GPUS, NAMES[2])
    (mine,) = prepared.devices

    def find(inventory: Inventory) -> object:
        return usable(prepared, mine, devices_by_name(inventory), inventory)

    assert find(registry.current) is registry.current.by_key[(PGPU, "3")]
    assert find(registry_of(host(gpu(A, vfio=1))).current) is None
    other = registry_of(three_gpus())
    other.allocate([(PGPU, "3")])
    assert find(other.current) is None
    assert find(registry.observe(host(gpu(C, vfio=None, group=51)))) is None


# Files


def terms(consumer: Consumer) -> Terms:
    return Terms(driver=DRIVER, consumer=consumer, cdi_dir=Path("/cdi"), folder=Path("/plugins/x"))


def files(
    facts: HostFacts, consumer: Consumer, wanted: tuple[Wanted, ...], egm: Mapping[str, frozenset[str]] | None = None
) -> dict[str, Any]:
    """Path -> what it says, of a claim that has these devices."""
    current = registry_of(facts, Settings(consumer=consumer)).current
    devices = choose("x", wanted, current)
    prepared = give(GPUS, Asked(pod_claim=None, devices=wanted), devices)
    rendered = render_files(prepared, devices, terms(consumer), egm or {})
    for path, content in rendered.items():
        if path.parent == Path("/cdi"):
            assert read_spec(content).wrong is None
            assert read_spec(content).unread is None
    return {str(path): json.loads(content) for path, content in rendered.items()}


def nodes(found: Mapping[str, Any]) -> list[list[str]]:
    """Of each device of the claim's spec."""
    spec = found[f"/cdi/{DRIVER}_claim_uid-of-gpus.json"]
    return [[node["path"] for node in d["containerEdits"]["deviceNodes"]] for d in spec["devices"]]


ALL = ["/dev/vfio/devices/vfio3", "/dev/iommu", "/dev/vfio/51", "/dev/vfio/vfio"]


@pytest.mark.parametrize(
    ("consumer", "node", "cdevs", "expected"),
    [
        (Consumer.KATA, "default", True, ["/dev/vfio/devices/vfio3"]),
        (Consumer.KATA, "cdev", True, ["/dev/vfio/devices/vfio3"]),
        (Consumer.KATA, "group", True, ["/dev/vfio/51"]),
        (Consumer.KATA, "default", False, ["/dev/vfio/51"]),
        (Consumer.KATA, "group", False, ["/dev/vfio/51"]),
        (Consumer.KUBEVIRT, "default", True, ALL),
        (Consumer.KUBEVIRT, "cdev", True, ["/dev/vfio/devices/vfio3", "/dev/iommu"]),
        (Consumer.KUBEVIRT, "group", True, ["/dev/vfio/51", "/dev/vfio/vfio"]),
        (Consumer.KUBEVIRT, "default", False, ["/dev/vfio/51", "/dev/vfio/vfio"]),
    ],
)
def test_what_a_container_gets_of_a_device_depends_on_the_consumer_and_on_what_was_asked_for(
    consumer: Consumer, node: str, cdevs: bool, expected: list[str]
) -> None:
    facts = host(gpu(C, vfio=3, group=51, cdev=cdevs))
    assert nodes(files(facts, consumer, wants(NAMES[2], node=NodeKind(node)))) == [expected]


def test_a_kind_of_node_that_is_not_there_or_must_not_be_passed_is_refused() -> None:
    excluded = ResourceRule(label="resources[0]", name=None, addresses=(B,))
    alone = registry_of(host(gpu(A, vfio=1, group=50, cdev=False))).current
    shared = registry_of(host(gpu(A, vfio=1), gpu(B, vfio=2)), Settings(resources=(excluded,))).current
    for current, kind in ((alone, NodeKind.CDEV), (shared, NodeKind.GROUP)):
        (wanted,) = wants(NAMES[0], node=kind)
        (device,) = choose("x", [wanted], current)
        with pytest.raises(Refused, match=f"device {NAMES[0]} has no {kind} node"):
            nodes_for(wanted, device, Consumer.KATA)


def test_extended_gpu_memory_goes_along_with_all_of_its_gpus_for_kubevirt_alone() -> None:
    egm = {"/dev/egm0": frozenset({A, C})}
    facts = host(gpu(A, vfio=1, group=50), gpu(C, vfio=3, group=51))
    both = nodes(files(facts, Consumer.KUBEVIRT, wants(NAMES[0], NAMES[2]), egm))
    assert [("/dev/egm0" in each) for each in both] == [True, False]
    assert nodes(files(facts, Consumer.KATA, wants(NAMES[0], NAMES[2]), egm)) == [
        ["/dev/vfio/devices/vfio1"],
        ["/dev/vfio/devices/vfio3"],
    ]
    assert "/dev/egm0" not in nodes(files(facts, Consumer.KUBEVIRT, wants(NAMES[0]), egm))[0]


def test_a_device_without_a_node_is_left_out_and_without_any_device_there_is_no_spec() -> None:
    registry = registry_of(three_gpus())
    prepared = prepare(registry, GPUS, NAMES[0], NAMES[1])
    device = registry.current.by_key[(PGPU, "2")]
    (content,) = render_files(prepared, [None, device], terms(Consumer.KATA), {}).values()
    assert [each["name"] for each in json.loads(content)["devices"]] == [f"uid-of-gpus_{NAMES[1]}"]
    assert render_files(prepared, [None, None], terms(Consumer.KATA), {}) == {}


def test_each_request_has_one_cdi_name_for_its_metadata_and_none_comes_twice() -> None:
    registry = registry_of(three_gpus())
    wanted = (*wants(NAMES[0], NAMES[1]), Wanted(request="big/h100", pool=NODE, device=NAMES[2]))
    prepared = give(GPUS, Asked(pod_claim=None, devices=wanted), choose("x", wanted, registry.current))
    uid, kubevirt = GPUS.uid, cdi_ids(prepared, terms(Consumer.KUBEVIRT))
    assert kubevirt == [
        [f"{DRIVER}/claim={uid}_{NAMES[0]}", f"{DRIVER}/metadata={uid}_gpu"],
        [f"{DRIVER}/claim={uid}_{NAMES[1]}"],
        [f"{DRIVER}/claim={uid}_{NAMES[2]}", f"{DRIVER}/metadata={uid}_big"],
    ]
    assert [len(names) for names in cdi_ids(prepared, terms(Consumer.KATA))] == [1, 1, 1]


def test_the_metadata_of_a_mediated_device_names_its_uuid_and_a_templates_claim_the_pods_name_for_it() -> None:
    facts = host(gpu(UUID, vfio=3, mdev_type="GRID T4-1Q", driver="nvidia-vgpu-vfio", class_code=0))
    registry = registry_of(facts, Settings(consumer=Consumer.KUBEVIRT))
    wanted = wants(f"mdev-{UUID}")
    devices = choose("x", wanted, registry.current)
    prepared = give(GPUS, Asked(pod_claim="vm-gpu", devices=wanted), devices)
    found = render_files(prepared, devices, terms(Consumer.KUBEVIRT), {})
    host_path = Path("/plugins/x/dra-device-metadata/default_gpus/gpu/metadata.json")
    assert json.loads(found[host_path]) == {
        "apiVersion": "metadata.resource.k8s.io/v1alpha1",
        "kind": "DeviceMetadata",
        "metadata": {"name": "gpus", "namespace": "default", "uid": "uid-of-gpus", "generation": 1},
        "podClaimName": "vm-gpu",
        "requests": [
            {
                "name": "gpu",
                "devices": [
                    {
                        "driver": DRIVER,
                        "pool": NODE,
                        "name": f"mdev-{UUID}",
                        "attributes": {"mdevUUID": {"string": UUID}},
                    }
                ],
            }
        ],
    }
    (device,) = json.loads(found[Path(f"/cdi/{DRIVER}_metadata_uid-of-gpus_gpu.json")])["devices"]
    (mount,) = device["containerEdits"]["mounts"]
    place = "/var/run/kubernetes.io/dra-device-attributes/resourceclaimtemplates/vm-gpu/gpu"
    assert mount == {
        "hostPath": str(host_path),
        "containerPath": f"{place}/{DRIVER}-metadata.json",
        "options": ["ro", "bind"],
    }
