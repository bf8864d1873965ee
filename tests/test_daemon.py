"""The daemon as a real process, on fake nodes, with a kubelet that is played by grpcio: what leaves the process.

No test waits by sleeping: each waits for what the kubelet has seen or for what the log says, and gives up after
`TIMEOUT` seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
from conftest import MakeNode, Serve, StartDaemon
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
AT_ONCE = 6.0
"""Seconds, where the daemon's own patience would last longer."""


def group_of(node: FakeNode, address: str) -> str:
    """The ID of a device on a node without cdevs."""
    return str(node.function(address).iommu_group)


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


def test_each_resource_is_registered_once_with_a_socket_of_its_own_for_its_owner_alone(hgx: Hgx) -> None:
    made = {(r.resource, r.endpoint, r.version) for r in hgx.kubelet.registrations}
    assert made == {(PGPU, "sandbox-pgpu.sock", "v1beta1"), (NVSWITCH, "sandbox-nvswitch.sock", "v1beta1")}
    assert hgx.kubelet.calls == 2
    assert sockets(hgx.places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}
    for name in sockets(hgx.places.kubelet):
        assert stat.S_IMODE((hgx.places.kubelet / name).stat().st_mode) == 0o600
    for registration in hgx.kubelet.registrations:
        assert registration.options.get_preferred_allocation_available
        assert not registration.options.pre_start_required
    assert hgx.gpus.pre_start("4").SerializeToString() == b"", "answered all the same"


def test_the_cdi_spec_of_every_device_is_on_disk_before_register_is_called(hgx: Hgx) -> None:
    assert nodes_in(hgx.specs_at_register[PGPU]) == cdi_of(PGPU, GPU_NODES)
    assert nodes_in(hgx.specs_at_register[NVSWITCH]) == cdi_of(NVSWITCH, SWITCH_NODES)
    assert read_cdi(hgx.places.cdi) == cdi_of(PGPU, GPU_NODES) | cdi_of(NVSWITCH, SWITCH_NODES)


@pytest.mark.parametrize(
    ("containers", "devices", "addresses"),
    [
        ([["9", "4"]], "9,4", "0000:c3:00.0,0000:1b:00.0"),
        ([["4"], ["5", "6"]], "4,5,6", "0000:1b:00.0,0000:43:00.0,0000:52:00.0"),
    ],
    ids=["several, in the order asked", "two containers"],
)
def test_allocate_gives_the_vfio_nodes_and_nothing_else_and_is_logged_with_the_pci_addresses(
    hgx: Hgx, containers: list[list[str]], devices: str, addresses: str
) -> None:
    since = hgx.daemon.mark()
    assert_allocates(hgx.gpus, containers, GPU_NODES)
    hgx.daemon.wait_for("allocated", since=since, resource=PGPU, device=devices, pci_address=addresses)


@pytest.mark.parametrize(
    ("containers", "status", "words"),
    [
        ([], StatusCode.INVALID_ARGUMENT, "a container requests no devices"),
        ([["4"], []], StatusCode.INVALID_ARGUMENT, "a container requests no devices"),
        ([["4"], ["4"]], StatusCode.INVALID_ARGUMENT, "device '4' is requested twice"),
        ([["4", "0"]], StatusCode.NOT_FOUND, "unknown device '0'"),
        ([["x" * 60_000]], StatusCode.NOT_FOUND, "unknown device 'xxx"),
    ],
    ids=["no container", "one container without a device", "twice", "of another resource", "very long ID"],
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
    refused = refusal(lambda: hgx.gpus.raw("Allocate", b"\x08\x01"))  # a number for a container
    assert refused.status is StatusCode.INVALID_ARGUMENT
    assert "container_requests" in refused.message


def test_preferred_devices_are_near_each_other_and_include_those_that_must_be(hgx: Hgx) -> None:
    ids = random.sample(list(GPU_NODES), 8)
    assert hgx.gpus.prefer(ids, 4) == ["4", "5", "6", "7"]
    assert hgx.gpus.prefer(ids, 4, must_include=["10", "9"]) == ["9", "10", "8", "11"]


def test_a_preference_that_cannot_be_answered_is_refused(hgx: Hgx) -> None:
    refused = refusal(lambda: hgx.gpus.prefer(["4", "5"], 3))
    assert refused.status is StatusCode.INVALID_ARGUMENT


def test_devices_are_found_in_the_order_of_their_numbers_each_with_its_pci_address(hgx: Hgx) -> None:
    found = [(event["device"], event["pci_address"]) for event in hgx.daemon.events("device found")]
    assert [device for device, _ in found] == [str(number) for number in range(12)]
    assert found[11] == ("11", "0000:df:00.0")


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
    assert "nodes" in hgx.daemon.wait_for("held", since=asked)
    assert hgx.daemon.wait_for("scans", since=asked)["triggers"]["start"] == 1
    assert hgx.kubelet.healthy(PGPU)


# What other nodes look like


def test_on_a_kernel_without_cdevs_a_device_is_a_group_and_one_without_a_numa_node_says_nothing_of_it(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    node, _, _ = serve("workstation")
    ids = [group_of(node, address) for address in (GEFORCE, T4)]
    nodes = {device_id: f"/dev/vfio/{device_id}" for device_id in ids}
    (listed,) = kubelet.history(PGPU)
    assert listed.devices == tuple(Listed(id=device_id, health="Healthy", numa=None) for device_id in ids)
    assert_allocates(kubelet.plugin(PGPU), [ids], nodes)
    assert read_cdi(places.cdi) == cdi_of(PGPU, nodes)


def test_names_that_are_too_long_for_a_socket_are_shortened_and_stay_apart(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    long = "a" * 62
    daemon(fake_node("hgx-h100"), f"--gpu-alias={long}g", f"--nvswitch-alias={long}n")
    kubelet.wait_for(lambda: kubelet.healthy(f"nvidia.com/{long}g") and kubelet.healthy(f"nvidia.com/{long}n"))
    names = sockets(places.kubelet)
    assert len(names) == 2
    assert all(len(os.fsencode(places.kubelet / name)) <= 107 for name in names)


def test_a_node_without_devices_registers_nothing_until_events_tell_of_the_first_gpu(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("empty")  # vfio is not even loaded: the folders in which a bind shows do not exist yet
    plugin = daemon(node, "--health-interval=3600")
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


# Changes


def test_a_stream_is_silent_while_nothing_in_its_list_changes(serve: Serve, kubelet: GrpcKubelet) -> None:
    node, plugin, _ = serve("hgx-h100", QUICK)
    for nonsense in ("first", "second", "third"):  # a NIC: each is news for the log, and none for the kubelet
        node.set_attribute("0000:18:00.0", "vendor", nonsense)
        plugin.wait_for("not offered", pci_address="0000:18:00.0", reason=nonsense)
    node.sicken("0000:1b:00.0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU))
    assert [message.unhealthy for message in kubelet.history(PGPU)] == [[], ["4"]]
    assert [message.unhealthy for message in kubelet.history(NVSWITCH)] == [[]]


def test_a_gpu_that_is_bound_to_another_driver_is_unhealthy_and_leaves_the_cdi_spec(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    node, plugin, _ = serve("hgx-h100")
    since = plugin.mark()
    node.bind("0000:1b:00.0", "nvidia")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4"})
    plugin.wait_for("device changed", since=since, device="4", reason="bound to nvidia")  # first it has no driver
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


@pytest.mark.parametrize(
    ("cold", "reason"),
    [(False, "off-the-bus"), (True, "D3cold although its runtime_status is active")],
    ids=["off the bus", "in D3cold while its VM still has it"],
)
def test_a_gpu_that_is_dead_is_unhealthy_says_why_and_cannot_be_allocated(
    serve: Serve, kubelet: GrpcKubelet, cold: bool, reason: str
) -> None:
    node, plugin, _ = serve("workstation", QUICK)
    t4 = group_of(node, T4)
    if cold:
        node.set_enable(T4, 1)
    node.sicken(T4, cold=cold)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("device changed", device=t4, pci_address=T4, reason=reason)
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([t4]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert f"device {t4} ({T4}) is unhealthy: " in refused.message


def test_allocate_looks_at_the_device_again_before_it_gives_it(serve: Serve, kubelet: GrpcKubelet) -> None:
    node, plugin, _ = serve("workstation", "--health-interval=3600")
    (node.folder(T4) / "driver").unlink()  # no event tells of this
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([group_of(node, T4)]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert f"{T4} is bound to no driver" in refused.message
    assert not plugin.events("allocated")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {group_of(node, T4)})


def test_what_an_entry_of_sysfs_says_amiss_costs_its_own_device_alone(serve: Serve, kubelet: GrpcKubelet) -> None:
    node, plugin, _ = serve("workstation", QUICK)
    t4, geforce = (group_of(node, address) for address in (T4, GEFORCE))
    node.set_attribute(GEFORCE, "numa_node", str(10**20))  # does not fit into what the protocol has for it
    node.set_attribute(T4, "class", "utter nonsense")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("not offered", pci_address=T4, reason="utter nonsense")
    assert kubelet.devices(PGPU)[geforce] == Listed(id=geforce, health="Healthy", numa=None)


# The CDI folder


def test_a_spec_that_somebody_deletes_comes_back_without_waiting_for_a_timer(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    _, plugin, _ = serve("workstation", "--health-interval=3600")
    before = read_cdi(places.cdi)
    took = []
    for _ in range(4):
        started = time.monotonic()
        since = plugin.mark()
        (places.cdi / "nvidia.com-pgpu.yaml").unlink()
        plugin.wait_for("cdi spec written", since=since, resource=PGPU)
        assert read_cdi(places.cdi) == before
        took.append(time.monotonic() - started)
    figures("a CDI spec that was deleted is back", took)
    assert sum(took) < 12, "each waited for the timer, which takes 5 s"
    assert all(not received.unhealthy for received in kubelet.history(PGPU))


def test_what_cannot_stand_in_a_spec_is_not_advertised_and_what_cannot_stay_there_is_unhealthy_until_it_can(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    specs_at_register: list[bool] = []
    kubelet.on_register = lambda _: specs_at_register.append((places.cdi / "nvidia.com-pgpu.yaml").exists())
    places.cdi.write_text("in the way")
    plugin = daemon(fake_node("workstation"), QUICK)
    plugin.wait_for("cdi trouble", resource=PGPU, reason="Not a directory")
    assert kubelet.calls == 0
    assert sockets(places.kubelet) == set()
    places.cdi.unlink()
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert specs_at_register == [True]
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


def test_a_register_that_is_refused_is_tried_again_and_told_once(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    kubelet.manners = Manners.REFUSES
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="UNKNOWN: it will not")
    kubelet.wait_for(lambda: kubelet.calls == 4)
    kubelet.manners = Manners.POLITE
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert len(plugin.events("endpoint trouble")) == 1


@pytest.mark.parametrize("manners", [Manners.HANGS, Manners.FORGETS])
def test_a_register_without_an_answer_or_a_stream_is_given_up_when_the_kubelet_restarts(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, manners: Manners
) -> None:
    kubelet.manners = manners
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: kubelet.calls)
    if manners is Manners.FORGETS:
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_end_it_closes_its_streams_and_removes_its_sockets_and_keeps_its_specs(
    serve: Serve, kubelet: GrpcKubelet, places: Places, number: signal.Signals
) -> None:
    _, plugin, _ = serve("workstation")
    specs = read_cdi(places.cdi)
    figures(f"{number.name} ends it", [plugin.terminate(number)])
    assert sockets(places.kubelet) == set()
    assert read_cdi(places.cdi) == specs
    kubelet.wait_for(lambda: not kubelet.resources())
    plugin.wait_for("stopped", reason=number.name)


def test_after_sigkill_it_starts_over_what_was_left_behind(serve: Serve, kubelet: GrpcKubelet, places: Places) -> None:
    node, killed, _ = serve("workstation")
    killed.kill()
    assert len(read_cdi(places.cdi)) == 2
    assert sockets(places.kubelet) == {"sandbox-pgpu.sock"}
    (places.cdi / ".nvidia.com-pgpu.yaml.sandbox-plugin.tmp").write_text("half a sp")
    node.unbind(T4)
    serve(node)
    assert kubelet.healthy(PGPU) == {group_of(node, GEFORCE)}
    assert len(read_cdi(places.cdi)) == 1


# What a person gives


def test_what_the_environment_says_in_vain_is_named(daemon: Callable[..., Daemon]) -> None:
    plugin = daemon("empty", SANDBOX_PLUGIN_HEALTH_INTERVALL="9")
    unknown = plugin.wait_for("unknown variable", name="SANDBOX_PLUGIN_HEALTH_INTERVALL")
    assert "did you mean 'SANDBOX_PLUGIN_HEALTH_INTERVAL'?" in unknown["reason"]


def test_who_wants_no_labels_is_told_nothing_of_them(daemon: Callable[..., Daemon]) -> None:
    plugin = daemon("empty", ENABLE_GFD="false")
    plugin.wait_for("no device to offer yet")
    assert not plugin.events("labels of GPU Feature Discovery")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"P_GPU_ALIAS": "NVIDIA GPU"}, ["P_GPU_ALIAS", "'NVIDIA GPU'", "letters, digits"]),
        (["--nvswitch-alias=pgpu"], {}, ["--gpu-alias", "--nvswitch-alias"]),
        (["--kubelet-dir=/" + "k" * 88], {}, ["--kubelet-dir", "89 bytes", "at most 88 are allowed"]),
        (["--kubelet-dir=/dev/null"], {}, ["--kubelet-dir", "/dev/null is not a folder"]),
        (["--no-such-flag"], {}, ["--no-such-flag", "sandbox-plugin run --help"]),
    ],
)
def test_what_is_given_wrong_is_named_in_one_line_and_nothing_is_done(
    places: Places, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    places.kubelet.mkdir()
    folders = [f"--kubelet-dir={places.kubelet}", f"--cdi-dir={places.cdi}"]
    done = run_command("run", *folders, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not places.cdi.exists()
    assert not list(places.kubelet.iterdir())
