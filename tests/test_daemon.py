"""The daemon as a real process, on fake nodes, with a kubelet that is played by grpcio: what leaves the process.

No test waits by sleeping: each waits for what the kubelet has seen or for what the log says, and gives up after
`TIMEOUT` seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import yaml
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places, run_command, sockets
from daemon import places as make_places
from grpc import StatusCode
from kubelet import GrpcKubelet, Listed, Manners, Plugin, refusal
from names import GEFORCE, NVSWITCH, PGPU, T4
from outputs import GPU_NODES, SWITCH_NODES, assert_allocates, cdi_of, nodes_in, read_cdi
from trials import QUICK, figures

from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import FunctionSpec
from sandbox_plugin.fake.node import FakeNode

NEW_GPU = FunctionSpec(address="0000:42:00.0", model=models.H100_SXM5, parent="0000:40:03.1", numa_node=0)
"""For the free slot of the preset `empty`."""
MARK = b"# Written by sandbox-plugin"
AT_ONCE = 8.0
"""Seconds, where the daemon's own patience would last longer."""


# A server with eight GPUs and four NVSwitches, by the very command that a person would use. Tests only ask.


@dataclass(frozen=True, kw_only=True)
class Hgx:
    places: Places
    kubelet: GrpcKubelet
    daemon: Daemon
    specs_at_register: Mapping[str, bytes]
    """Resource -> what its CDI spec held when Register came in; no entry if there was none."""

    @property
    def gpus(self) -> Plugin:
        return self.kubelet.plugin(PGPU)


@pytest.fixture(scope="module")
def hgx() -> Iterator[Hgx]:
    specs: dict[str, bytes] = {}
    with make_places() as places, GrpcKubelet(places.kubelet) as kubelet:

        def read_spec_of(resource: str) -> None:
            path = places.cdi / f"{resource.replace('/', '-')}.yaml"
            if path.exists():
                specs.setdefault(resource, path.read_bytes())

        kubelet.on_register = read_spec_of
        kubelet.start()
        with Daemon(places, "hgx-h100") as daemon:
            kubelet.wait_for(lambda: kubelet.healthy(PGPU) and kubelet.healthy(NVSWITCH))
            yield Hgx(places=places, kubelet=kubelet, daemon=daemon, specs_at_register=specs)


def test_gpus_and_nvswitches_are_registered_with_their_numa_nodes(hgx: Hgx) -> None:
    assert hgx.kubelet.resources() == {PGPU, NVSWITCH}
    (gpus,) = hgx.kubelet.history(PGPU)
    assert gpus.devices == tuple(Listed(id=str(n), health="Healthy", numa=(0 if n < 8 else 1,)) for n in range(4, 12))
    (switches,) = hgx.kubelet.history(NVSWITCH)
    assert switches.devices == tuple(Listed(id=str(n), health="Healthy", numa=(0,)) for n in range(4))


def test_each_resource_is_registered_once_with_a_socket_of_its_own(hgx: Hgx) -> None:
    made = {(r.resource, r.endpoint, r.version) for r in hgx.kubelet.registrations}
    assert made == {(PGPU, "sandbox-pgpu.sock", "v1beta1"), (NVSWITCH, "sandbox-nvswitch.sock", "v1beta1")}
    assert hgx.kubelet.calls == 2
    assert sockets(hgx.places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}


def test_sockets_are_for_their_owner_alone(hgx: Hgx) -> None:
    for name in sockets(hgx.places.kubelet):
        assert stat.S_IMODE((hgx.places.kubelet / name).stat().st_mode) == 0o600


def test_the_kubelet_is_told_to_ask_for_preferred_devices_and_not_before_a_container_starts(hgx: Hgx) -> None:
    for registration in hgx.kubelet.registrations:
        assert registration.options.get_preferred_allocation_available
        assert not registration.options.pre_start_required


def test_the_cdi_spec_of_every_device_is_on_disk_before_register_is_called(hgx: Hgx) -> None:
    assert nodes_in(hgx.specs_at_register[PGPU]) == cdi_of(PGPU, GPU_NODES)
    assert nodes_in(hgx.specs_at_register[NVSWITCH]) == cdi_of(NVSWITCH, SWITCH_NODES)
    assert read_cdi(hgx.places.cdi) == cdi_of(PGPU, GPU_NODES) | cdi_of(NVSWITCH, SWITCH_NODES)


@pytest.mark.parametrize(
    "containers",
    [[["4"]], [["9", "4", "11", "6"]], [["4"], ["5", "6"]], [[str(n) for n in range(4, 12)]]],
    ids=["one", "several, in the order asked", "two containers", "all"],
)
def test_allocate_gives_the_vfio_nodes_and_nothing_else(hgx: Hgx, containers: list[list[str]]) -> None:
    assert_allocates(hgx.gpus, containers, GPU_NODES)


def test_allocated_devices_are_logged_with_their_pci_addresses(hgx: Hgx) -> None:
    since = hgx.daemon.mark()
    hgx.gpus.allocate(["7", "10"])
    hgx.daemon.wait_for("allocated", since=since, resource=PGPU, device="7", pci_address="0000:61:00.0")
    hgx.daemon.wait_for("allocated", since=since, resource=PGPU, device="10", pci_address="0000:d1:00.0")


@pytest.mark.parametrize(
    ("containers", "status", "words"),
    [
        ([], StatusCode.INVALID_ARGUMENT, "a container requests no devices"),
        ([[]], StatusCode.INVALID_ARGUMENT, "a container requests no devices"),
        ([["4"], []], StatusCode.INVALID_ARGUMENT, "a container requests no devices"),
        ([["4", "5", "4"]], StatusCode.INVALID_ARGUMENT, "device '4' is requested twice"),
        ([["4"], ["4"]], StatusCode.INVALID_ARGUMENT, "device '4' is requested twice"),
        ([["99"]], StatusCode.NOT_FOUND, "unknown device '99'"),
        ([["4", "99"]], StatusCode.NOT_FOUND, "unknown device '99'"),
        ([["0"]], StatusCode.NOT_FOUND, "unknown device '0'"),
        ([["04"]], StatusCode.NOT_FOUND, "unknown device '04'"),
        ([[""]], StatusCode.NOT_FOUND, "unknown device ''"),
        ([["x" * 60_000]], StatusCode.NOT_FOUND, "unknown device 'xxx"),
        ([[str(n) for n in range(4, 10_000)]], StatusCode.NOT_FOUND, "unknown device '12'"),
    ],
    ids=[
        "no container",
        "no device",
        "one container without a device",
        "twice in a container",
        "twice in two containers",
        "unknown",
        "one of two unknown",
        "of another resource",
        "another spelling",
        "empty ID",
        "very long ID",
        "thousands of IDs",
    ],
)
def test_a_wrong_allocate_is_refused_in_words(
    hgx: Hgx, containers: list[list[str]], status: StatusCode, words: str
) -> None:
    refused = refusal(lambda: hgx.gpus.allocate(*containers))
    assert refused.status is status
    assert refused.message.startswith(f"{PGPU}: ")
    assert words in refused.message
    assert len(refused.message) < 300


def test_a_request_whose_fields_have_other_types_than_the_protocol_says_is_refused(hgx: Hgx) -> None:
    number_for_a_message = b"\x08\x01"
    refused = refusal(lambda: hgx.gpus.raw("Allocate", number_for_a_message))
    assert refused.status is StatusCode.INVALID_ARGUMENT
    assert "container_requests" in refused.message


def test_preferred_devices_are_near_each_other_and_the_same_whenever_asked(hgx: Hgx) -> None:
    ids = list(GPU_NODES)
    for _ in range(5):
        random.shuffle(ids)
        assert hgx.gpus.prefer(ids, 4) == ["4", "5", "6", "7"]


def test_preferred_devices_begin_with_those_that_must_be_included(hgx: Hgx) -> None:
    chosen = hgx.gpus.prefer(list(GPU_NODES), 4, must_include=["10", "9"])
    assert chosen == ["9", "10", "8", "11"]


@pytest.mark.parametrize(
    ("available", "size", "must_include"),
    [(["4", "5"], 3, []), (["4", "5"], 1, ["4", "5"])],
    ids=["too many", "too few"],
)
def test_a_preference_that_cannot_be_answered_is_refused(
    hgx: Hgx, available: list[str], size: int, must_include: list[str]
) -> None:
    refused = refusal(lambda: hgx.gpus.prefer(available, size, must_include))
    assert refused.status is StatusCode.INVALID_ARGUMENT


def test_pre_start_container_is_answered_although_nobody_asks_for_it(hgx: Hgx) -> None:
    assert hgx.gpus.pre_start("4").SerializeToString() == b""


def test_an_id_in_the_log_always_has_its_pci_address_beside_it(hgx: Hgx) -> None:
    found = hgx.daemon.events("device found")
    assert len(found) == 12
    assert {event["device"]: event["pci_address"] for event in found}["11"] == "0000:df:00.0"


def test_devices_are_found_in_the_order_of_their_numbers(hgx: Hgx) -> None:
    found = hgx.daemon.events("device found")
    assert [int(event["device"]) for event in found] == list(range(12))


def test_list_says_beforehand_what_is_advertised(hgx: Hgx) -> None:
    done = run_command("list", "--fake-sysfs=hgx-h100", "--output=json")
    listed = {
        resource["name"]: [
            Listed(id=device["id"], health=device["health"], numa=tuple(device["numa_nodes"]))
            for device in resource["devices"]
        ]
        for resource in json.loads(done.stdout)["resources"]
    }
    assert listed == {name: list(hgx.kubelet.devices(name).values()) for name in (PGPU, NVSWITCH)}


# What other nodes look like


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How the kubelet must see one device."""

    address: str
    numa: tuple[int, ...] | None


@pytest.mark.parametrize(
    ("preset", "by_group", "expected"),
    [
        (
            "hgx-h100-group",
            True,
            {
                PGPU: [
                    Seen(address=f"0000:{bus}:00.0", numa=(index // 4,))
                    for index, bus in enumerate(("1b", "43", "52", "61", "9d", "c3", "d1", "df"))
                ],
                NVSWITCH: [Seen(address=f"0000:{bus}:00.0", numa=(0,)) for bus in ("07", "08", "09", "0a")],
            },
        ),
        ("workstation", True, {PGPU: [Seen(address=GEFORCE, numa=None), Seen(address=T4, numa=None)]}),
        ("gh200", False, {PGPU: [Seen(address="0009:01:00.0", numa=(0,))]}),
    ],
    ids=["hgx-h100-group", "workstation", "gh200"],
)
def test_a_device_is_a_cdev_or_a_group_as_the_kernel_has_them(
    fake_node: MakeNode,
    kubelet: GrpcKubelet,
    daemon: StartDaemon,
    places: Places,
    preset: str,
    by_group: bool,
    expected: dict[str, list[Seen]],
) -> None:
    node = fake_node(preset)
    daemon(node)
    kubelet.wait_for(lambda: kubelet.resources() == expected.keys() and all(map(kubelet.history, expected)))
    everything: dict[str, str] = {}
    for resource, seen in expected.items():
        ids = [_expected_id(node, one.address, by_group) for one in seen]
        nodes = {i: f"/dev/vfio/{i}" if by_group else f"/dev/vfio/devices/vfio{i}" for i in ids}
        assert all((node.root / path[1:]).exists() for path in nodes.values())
        (listed,) = kubelet.history(resource)
        assert listed.devices == tuple(
            Listed(id=i, health="Healthy", numa=one.numa) for i, one in zip(ids, seen, strict=True)
        )
        assert_allocates(kubelet.plugin(resource), [ids], nodes)
        everything |= cdi_of(resource, nodes)
    assert read_cdi(places.cdi) == everything


def _expected_id(node: FakeNode, address: str, by_group: bool) -> str:
    function = node.function(address)
    assert function.vfio is not None
    return str(function.iommu_group if by_group else function.vfio.number)


def test_two_models_under_one_alias_are_one_resource(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    daemon(node, "--gpu-alias=gpus")
    kubelet.wait_for(lambda: kubelet.healthy("nvidia.com/gpus"))
    assert len(kubelet.healthy("nvidia.com/gpus")) == 2
    assert [registration.endpoint for registration in kubelet.registrations] == ["sandbox-gpus.sock"]


def test_with_an_empty_alias_each_model_is_a_resource_named_after_pci_ids(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    daemon(node, P_GPU_ALIAS="")
    geforce, t4 = "nvidia.com/TU116_GEFORCE_GTX_1660_SUPER", "nvidia.com/TU104GL_TESLA_T4"
    kubelet.wait_for(lambda: kubelet.healthy(geforce) and kubelet.healthy(t4))
    assert kubelet.resources() == {geforce, t4}
    assert sockets(places.kubelet) == {"sandbox-TU116_GEFORCE_GTX_1660_SUPER.sock", "sandbox-TU104GL_TESLA_T4.sock"}
    nodes = {_expected_id(node, address, by_group=True) for address in (GEFORCE, T4)}
    assert read_cdi(places.cdi).keys() == {
        f"{geforce}={min(nodes, key=int)}",
        f"{t4}={max(nodes, key=int)}",
    }


def test_names_that_are_too_long_for_a_socket_are_shortened_and_stay_apart(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    long = "a" * 62
    daemon(fake_node("hgx-h100"), f"--gpu-alias={long}g", f"--nvswitch-alias={long}n")
    kubelet.wait_for(lambda: kubelet.healthy(f"nvidia.com/{long}g") and kubelet.healthy(f"nvidia.com/{long}n"))
    names = sockets(places.kubelet)
    assert len(names) == 2
    assert all(len(os.fsencode(places.kubelet / name)) <= 107 for name in names)


def test_a_node_without_devices_registers_nothing_until_the_first_is_bound(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("empty")
    plugin = daemon(node, QUICK)
    plugin.wait_for("no device to offer yet")
    node.add(NEW_GPU)
    plugin.wait_for("not offered", pci_address=NEW_GPU.address, reason="no driver")
    assert kubelet.calls == 0
    assert sockets(places.kubelet) == set()
    assert not list(places.cdi.glob("*"))
    node.bind(NEW_GPU.address)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"0"})
    assert kubelet.resources() == {PGPU}
    assert read_cdi(places.cdi) == {f"{PGPU}=0": "/dev/vfio/devices/vfio0"}


def test_the_first_gpu_ever_bound_is_seen_by_its_events_alone(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("empty")  # vfio is not even loaded: the folders in which a bind shows do not exist yet
    daemon(node, "--health-interval=3600").wait_for("no device to offer yet")
    node.add(NEW_GPU)
    node.bind(NEW_GPU.address)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"0"})


def test_with_cdevs_two_gpus_of_one_group_are_two_devices_and_an_allocate_promises_both(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("empty")
    for slot in ("0", "1"):
        node.add(replace(NEW_GPU, address=f"0000:42:0{slot}.0", driver="vfio-pci", iommu_group=90))
    plugin = daemon(node)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"0", "1"})
    assert_allocates(kubelet.plugin(PGPU), [["0"]], {"0": "/dev/vfio/devices/vfio0"})
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"1"})
    plugin.wait_for("device changed", device="1", pci_address="0000:42:01.0")
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["1"]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "group-taken" in refused.message


def test_without_cdevs_two_gpus_of_one_group_are_one_device(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    group = node.function(T4).iommu_group
    node.add(FunctionSpec(address="0000:02:01.0", model=models.T4, parent="0000:00:1b.0", iommu_group=group))
    node.bind("0000:02:01.0")
    daemon(node)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU))
    assert kubelet.healthy(PGPU) == {str(group), str(node.function(GEFORCE).iommu_group)}
    assert_allocates(kubelet.plugin(PGPU), [[str(group)]], {str(group): f"/dev/vfio/{group}"})
    assert len(read_cdi(places.cdi)) == 2


# Changes


def test_every_stream_is_kept_up_to_date_whatever_becomes_of_the_others(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == GPU_NODES.keys())
    with ExitStack() as stack:
        older = stack.enter_context(kubelet.watching(PGPU))
        kubelet.wait_for(lambda: older.received)
        newer = stack.enter_context(kubelet.watching(PGPU))
        kubelet.wait_for(lambda: newer.received)
        node.unbind("0000:1b:00.0")
        kubelet.wait_for(lambda: all(len(w.received) == 2 for w in (older, newer)) and kubelet.unhealthy(PGPU) == {"4"})
        assert older.received[1].unhealthy == newer.received[1].unhealthy == ["4"]
        older.cancel()
        node.unbind("0000:43:00.0")
        kubelet.wait_for(lambda: len(newer.received) == 3 and kubelet.unhealthy(PGPU) == {"4", "5"})
        assert newer.received[2].unhealthy == ["4", "5"]
        plugin.wait_for("device changed", device="5")
        assert not plugin.events("registration lost"), "an old stream that ends is no reason to register again"


def test_a_stream_is_silent_while_nothing_in_its_list_changes(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) and kubelet.healthy(NVSWITCH))
    for nonsense in ("first", "second", "third"):  # a NIC: each is news for the log, and none for the kubelet
        node.set_attribute("0000:18:00.0", "vendor", nonsense)
        plugin.wait_for("not offered", pci_address="0000:18:00.0", reason=nonsense)
    node.sicken("0000:1b:00.0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU))
    assert [message.unhealthy for message in kubelet.history(PGPU)] == [[], ["4"]]
    assert [message.unhealthy for message in kubelet.history(NVSWITCH)] == [[]]


def test_a_gpu_that_is_bound_to_another_driver_is_unhealthy_and_leaves_the_cdi_spec(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == GPU_NODES.keys())
    since = plugin.mark()
    node.bind("0000:1b:00.0", "nvidia")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4"})
    plugin.wait_for("cdi spec written", since=since, resource=PGPU)
    rest = {device_id: path for device_id, path in GPU_NODES.items() if device_id != "4"}
    assert read_cdi(places.cdi) == cdi_of(PGPU, rest) | cdi_of(NVSWITCH, SWITCH_NODES)

    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["5"], ["4"]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "device 4 (0000:1b:00.0)" in refused.message
    assert "bound to nvidia" in refused.message
    assert "4" not in kubelet.plugin(PGPU).prefer(list(GPU_NODES), 4)

    node.bind("0000:1b:00.0", "vfio-pci")
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == GPU_NODES.keys())
    assert read_cdi(places.cdi) == cdi_of(PGPU, GPU_NODES) | cdi_of(NVSWITCH, SWITCH_NODES)


def test_a_gpu_that_falls_off_the_bus_is_unhealthy_and_cannot_be_allocated(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    t4 = str(node.function(T4).iommu_group)
    node.sicken(T4)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("device changed", device=t4, pci_address=T4)
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([t4]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert f"device {t4} ({T4}) is unhealthy: off-the-bus" in refused.message


def test_a_gpu_that_is_dead_in_d3cold_is_unhealthy_and_says_so(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    t4 = str(node.function(T4).iommu_group)
    node.set_enable(T4, 1)
    node.sicken(T4, cold=True)  # awake, as it is until its VM has let go of it
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("device changed", device=t4, reason="D3cold although its runtime_status is active")


def test_allocate_looks_at_the_device_again_before_it_promises_it(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, "--health-interval=3600")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    t4 = str(node.function(T4).iommu_group)
    (node.folder(T4) / "driver").unlink()  # no event tells of this
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([t4]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert T4 in refused.message
    assert "bound to no driver now" in refused.message, "found by the look, and not by a scan"
    assert not plugin.events("allocated")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})


def test_an_entry_that_becomes_unreadable_costs_that_device_alone(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    t4, geforce = (str(node.function(address).iommu_group) for address in (T4, GEFORCE))
    node.set_attribute(T4, "class", "utter nonsense")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("not offered", pci_address=T4, reason="utter nonsense")
    assert kubelet.healthy(PGPU) == {geforce}


def test_a_numa_node_beyond_all_measure_costs_that_device_its_topology_and_no_more(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    node.set_attribute(T4, "numa_node", str(10**20))  # does not fit into what the protocol has for it
    daemon(node)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert kubelet.devices(PGPU)[str(node.function(T4).iommu_group)].numa is None


def test_a_read_that_hangs_in_sysfs_holds_up_nothing_but_its_own_device(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    t4, geforce = (str(node.function(address).iommu_group) for address in (T4, GEFORCE))
    vendor = node.folder(T4) / "vendor"
    vendor.unlink()
    os.mkfifo(vendor)  # whoever opens it to read hangs
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    assert_allocates(kubelet.plugin(PGPU), [[geforce]], {geforce: f"/dev/vfio/{geforce}"})
    node.unbind(GEFORCE)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4, geforce})
    plugin.terminate()


# The CDI folder


def spec(kind: str, device: str = "0") -> bytes:
    """A spec as another program would write it."""
    document = {
        "cdiVersion": "0.5.0",
        "kind": kind,
        "devices": [{"name": device, "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}}],
    }
    return yaml.safe_dump(document, sort_keys=False).encode()


def test_stale_specs_of_ours_are_removed_and_those_of_others_never_touched(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    places.cdi.mkdir()
    stale = {
        "nvidia.com-old-alias.yaml": MARK + b" long ago\n" + spec("nvidia.com/old-alias"),
        "nvidia.com-nvswitch.yaml": spec(NVSWITCH),  # left by the reference plugin; there is no NVSwitch here
    }
    foreign = {
        "nvidia.com-gpu.yaml": spec("nvidia.com/gpu"),
        "nvidia.yaml": spec(NVSWITCH, "someone-elses"),
        "nvidia.com-pgpu.json": b'{"cdiVersion": "0.5.0", "kind": "other.com/gpu", "devices": []}',
        "amd.com-gpu.yaml": b"not even: [YAML\n",
        "empty.yaml": b"",
        "notes.txt": MARK + b" but this is no spec\n",
    }
    for name, content in {**stale, **foreign}.items():
        (places.cdi / name).write_bytes(content)
    (places.cdi / "link.yaml").symlink_to("nowhere")
    (places.cdi / "folder.yaml").mkdir()
    before = {name: (places.cdi / name).stat() for name in foreign}
    plugin = daemon(fake_node("workstation"), QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    for name in stale:
        plugin.wait_for("stale cdi spec removed", path=str(places.cdi / name))
    assert {path.name for path in places.cdi.iterdir()} == {
        *foreign,
        "nvidia.com-pgpu.yaml",
        "link.yaml",
        "folder.yaml",
    }
    for name, content in foreign.items():
        assert (places.cdi / name).read_bytes() == content
        assert (places.cdi / name).stat().st_mtime_ns == before[name].st_mtime_ns
        assert (places.cdi / name).stat().st_ino == before[name].st_ino
    since = plugin.mark()
    (places.cdi / "nvidia.com-pgpu.yaml").unlink()
    plugin.wait_for("cdi spec written", since=since)  # it has been through the folder once more
    assert not plugin.events("cdi trouble")


def test_a_spec_that_the_reference_plugin_left_under_our_name_is_replaced_and_the_log_says_so(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    places.cdi.mkdir()
    ours = places.cdi / "nvidia.com-pgpu.yaml"
    ours.write_bytes(spec(PGPU, "17"))
    plugin = daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    plugin.wait_for("cdi spec of another writer replaced", resource=PGPU, path=str(ours))
    assert read_cdi(places.cdi).keys() == {f"{PGPU}={device_id}" for device_id in kubelet.healthy(PGPU)}


def test_a_spec_of_another_kind_under_our_name_is_left_alone_and_the_resource_is_not_advertised(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    places.cdi.mkdir()
    taken = places.cdi / "nvidia.com-pgpu.yaml"
    taken.write_bytes(spec("example.com/pgpu"))
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("cdi trouble", resource=PGPU, reason="belongs to another program (kind example.com/pgpu)")
    assert taken.read_bytes() == spec("example.com/pgpu")
    assert kubelet.calls == 0
    taken.unlink()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert len(read_cdi(places.cdi)) == 2


def test_a_spec_that_somebody_deletes_comes_back_without_waiting_for_a_timer(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"), "--health-interval=3600")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    before = read_cdi(places.cdi)
    took = []
    for _ in range(6):
        started = time.monotonic()
        since = plugin.mark()
        (places.cdi / "nvidia.com-pgpu.yaml").unlink()
        plugin.wait_for("cdi spec written", since=since, resource=PGPU)
        assert read_cdi(places.cdi) == before
        took.append(time.monotonic() - started)
    figures("a CDI spec that was deleted is back", took)
    assert sum(took) < 15, "each waited for the timer, which takes 5 s"
    assert all(not received.unhealthy for received in kubelet.history(PGPU))


def test_nothing_is_advertised_while_the_cdi_folder_cannot_be_written(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    specs_at_register: list[bool] = []
    kubelet.on_register = lambda _: specs_at_register.append((places.cdi / "nvidia.com-pgpu.yaml").exists())
    places.cdi.write_text("in the way")
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("cdi trouble", resource=PGPU, reason="Not a directory")
    assert kubelet.calls == 0
    assert sockets(places.kubelet) == set()
    places.cdi.unlink()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert specs_at_register == [True]


def test_devices_whose_spec_cannot_be_kept_turn_unhealthy_until_it_can(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    daemon(fake_node("workstation"), QUICK)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    away = places.top / "away"
    places.cdi.rename(away)
    places.cdi.write_text("in the way")
    kubelet.wait_for(lambda: len(kubelet.unhealthy(PGPU)) == 2)
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(sorted(kubelet.unhealthy(PGPU))))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "not-in-cdi" in refused.message
    places.cdi.unlink()
    away.rename(places.cdi)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)


# The kubelet's comings and goings


def test_a_kubelet_folder_that_does_not_exist_is_waited_for_and_not_made(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("waiting for the kubelet directory", reason="No such file")
    assert not places.kubelet.exists()
    assert not places.cdi.exists()
    absent_kubelet.start()
    absent_kubelet.wait_for(lambda: len(absent_kubelet.healthy(PGPU)) == 2)
    assert not plugin.events("taking over"), "from nobody"


@pytest.mark.parametrize("stale", [False, True], ids=["no kubelet.sock", "a stale kubelet.sock"])
def test_a_kubelet_that_is_not_there_yet_is_waited_for(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, stale: bool
) -> None:
    places.kubelet.mkdir()
    if stale:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(absent_kubelet.socket))
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="does not answer" if stale else "no socket")
    absent_kubelet.start()  # and deletes our socket, as kubelets do
    absent_kubelet.wait_for(lambda: len(absent_kubelet.healthy(PGPU)) == 2)


@pytest.mark.parametrize("leave_socket", [True, False], ids=["killed", "ended in order"])
def test_after_a_kubelet_restart_every_resource_is_registered_again_with_all_devices(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, leave_socket: bool
) -> None:
    plugin = daemon(fake_node("hgx-h100"))
    for resource in (PGPU, NVSWITCH):
        kubelet.wait_for(lambda resource=resource: kubelet.healthy(resource))  # type: ignore[misc]
        plugin.wait_for("registered", resource=resource)
    kubelet.restart(leave_socket=leave_socket)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == GPU_NODES.keys())
    kubelet.wait_for(lambda: kubelet.healthy(NVSWITCH) == SWITCH_NODES.keys())
    plugin.wait_for("registration lost", resource=PGPU)
    assert_allocates(kubelet.plugin(PGPU), [["4"]], GPU_NODES)


def test_when_the_kubelet_ends_the_stream_the_resource_is_registered_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("registered", resource=PGPU)
    registration = kubelet.registration(PGPU)
    assert registration is not None
    assert registration.watch is not None
    registration.watch.cancel()
    plugin.wait_for("registration lost", resource=PGPU, reason="stream ended")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert len(kubelet.registrations) == 2


def test_a_register_that_is_refused_is_tried_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    kubelet.manners = Manners.REFUSES
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="UNKNOWN: it will not")
    kubelet.manners = Manners.POLITE
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)


def test_a_register_that_hangs_is_given_up_when_the_kubelet_restarts(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    kubelet.manners = Manners.HANGS
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: kubelet.calls)
    kubelet.manners = Manners.POLITE
    kubelet.restart()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2, AT_ONCE)


def test_a_kubelet_that_restarts_before_it_asks_for_the_devices_is_not_waited_for(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    kubelet.manners = Manners.FORGETS
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: kubelet.registrations and kubelet.registrations[0].answered)
    kubelet.registrations[0].plugin.options()  # after this round trip the answer has been taken in
    kubelet.manners = Manners.POLITE
    kubelet.restart()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2, AT_ONCE)


def test_a_kubelet_that_ends_every_stream_at_once_is_not_flooded_with_registrations(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    kubelet.manners = Manners.CUTS
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.registrations) == 5)
    first, *_, last = kubelet.registrations
    assert last.at - first.at > 0.7  # four pauses, each longer than the one before
    kubelet.manners = Manners.POLITE
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)


# Its end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_closes_its_streams_and_removes_its_sockets_and_keeps_its_specs(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, number: signal.Signals
) -> None:
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("registered", resource=PGPU)
    specs = read_cdi(places.cdi)
    figures(f"{number.name} ends it", [plugin.terminate(number)])
    assert sockets(places.kubelet) == set()
    assert read_cdi(places.cdi) == specs
    kubelet.wait_for(lambda: not kubelet.resources())
    plugin.wait_for("stopped", reason=number.name)


def test_asked_by_sigusr1_it_logs_what_it_is_doing_and_goes_on(hgx: Hgx) -> None:
    hgx.daemon.wait_for("registered", resource=PGPU)
    asked = hgx.daemon.mark()
    os.kill(hgx.daemon.pid, signal.SIGUSR1)
    tasks = hgx.daemon.wait_for("tasks", since=asked)
    assert tasks["running"]["Endpoint.run"] == 2
    assert sum(tasks["running"].values()) == tasks["count"]
    endpoint = hgx.daemon.wait_for("endpoint", resource=PGPU, since=asked)
    assert (endpoint["state"], endpoint["registrations"], endpoint["losses"]) == ("registered", 1, 0)
    assert hgx.daemon.wait_for("lock", since=asked)["held"]
    assert hgx.daemon.wait_for("scans", since=asked)["triggers"]["start"] == 1
    assert hgx.kubelet.healthy(PGPU)


def test_after_sigkill_it_starts_over_what_was_left_behind(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    killed = daemon(node)
    killed.wait_for("registered", resource=PGPU)
    killed.kill()
    specs = read_cdi(places.cdi)
    assert sockets(places.kubelet) == {"sandbox-pgpu.sock"}
    (places.cdi / ".nvidia.com-pgpu.yaml.sandbox-plugin.tmp").write_text("half a sp")
    node.unbind(T4)
    daemon(node)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {str(node.function(GEFORCE).iommu_group)})
    assert len(specs) == 2
    assert len(read_cdi(places.cdi)) == 1


# What a person gives


def test_a_variable_that_is_no_setting_is_named_and_ignored(daemon: Callable[..., Daemon]) -> None:
    told = daemon("empty", SANDBOX_PLUGIN_HEALTH_INTERVALL="9").wait_for("unknown variable")
    assert told["name"] == "SANDBOX_PLUGIN_HEALTH_INTERVALL"


def test_that_nothing_labels_the_node_is_said_where_the_reference_plugin_would(daemon: Callable[..., Daemon]) -> None:
    plugin = daemon("empty", ENABLE_GFD="true")
    (told,) = [plugin.wait_for("variable ignored")]
    assert (told["name"], told["level"]) == ("ENABLE_GFD", "warning")
    assert "does not label the node" in told["reason"]


@pytest.mark.parametrize("value", ["false", ""])
def test_who_wants_no_labels_is_told_nothing_of_them(daemon: Callable[..., Daemon], value: str) -> None:
    plugin = daemon("empty", ENABLE_GFD=value)
    plugin.wait_for("no device to offer yet")
    assert not plugin.events("variable ignored")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--fake-sysfs={top}"], {}, ["--fake-sysfs", "hgx-h100"]),
        (["--fake-sysfs=no-such-preset"], {}, ["--fake-sysfs", "hgx-h100"]),
        ([], {"SANDBOX_PLUGIN_FAKE_SYSFS": "/nowhere"}, ["SANDBOX_PLUGIN_FAKE_SYSFS", "/nowhere"]),
        (["--gpu-alias=NVIDIA GPU"], {}, ["--gpu-alias", "'NVIDIA GPU'", "letters, digits"]),
        ([], {"P_GPU_ALIAS": "NVIDIA GPU"}, ["P_GPU_ALIAS", "'NVIDIA GPU'", "letters, digits"]),
        (["--nvswitch-alias=" + "n" * 70], {}, ["--nvswitch-alias", "63"]),
        (["--gpu-alias=..."], {}, ["--gpu-alias", "letters, digits"]),
        (["--nvswitch-alias=pgpu"], {}, ["--gpu-alias", "--nvswitch-alias"]),
        (["--health-interval=soon"], {}, ["--health-interval", "'soon'"]),
        (["--allocation-policy=best"], {}, ["--allocation-policy", "packed, spread"]),
        (["--config={top}/none.toml"], {}, ["none.toml", "No such file"]),
        (["--kubelet-dir=/" + "k" * 88], {}, ["--kubelet-dir", "89 bytes", "at most 88 are allowed"]),
        (["--kubelet-dir=/tmp/\udcff"], {}, ["--kubelet-dir", "UTF-8"]),
        (["--kubelet-dir=/dev/null"], {}, ["--kubelet-dir", "/dev/null is not a folder"]),
        (["--no-such-flag"], {}, ["--no-such-flag", "sandbox-plugin run --help"]),
    ],
)
def test_what_is_given_wrong_is_named_in_one_line_and_nothing_is_done(
    places: Places, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    places.kubelet.mkdir()
    folders = [f"--kubelet-dir={places.kubelet}", f"--cdi-dir={places.cdi}"]
    done = run_command("run", *folders, *(a.format(top=places.top) for a in arguments), **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not places.cdi.exists()
    assert not list(places.kubelet.iterdir())
