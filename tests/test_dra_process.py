"""Claims on the real daemon: a kubelet that speaks grpcio, a fake API server, a fake node."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places, run_command
from dra_manager import DRIVER, NODE, ClaimInfo, DraManager, NotPrepared, NotRegistered, api_server, claim_object
from kubelet import GrpcKubelet
from names import PGPU
from pods import PodResources
from trials import pairs, wait_until

from sandbox_plugin.cdi.lint import lint, read_spec
from sandbox_plugin.fake.api_server import FakeApiServer
from sandbox_plugin.fake.node import FakeNode

FIRST, SECOND = "0000:1b:00.0", "0000:43:00.0"
"""GPUs of an hgx-h100."""
HOUR = 3600.0


def name_of(address: str) -> str:
    return f"pci-{address.replace(':', '-').replace('.', '-')}"


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with api_server() as server:
        server.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        yield server


@pytest.fixture
def manager(places: Places, api: FakeApiServer, pods: PodResources) -> Iterator[DraManager]:
    places.kubelet.mkdir()
    pods.start(age=HOUR)
    with DraManager(places.top, api) as made:
        yield made


Serve = Callable[..., tuple[FakeNode, Daemon]]


@pytest.fixture
def serve(manager: DraManager, fake_node: MakeNode, daemon: StartDaemon) -> Serve:
    """Starts the daemon, with claims, and waits until the driver is registered and its devices are healthy."""

    def begin(node: FakeNode | str = "hgx-h100", *flags: str) -> tuple[FakeNode, Daemon]:
        made = fake_node(node) if isinstance(node, str) else node
        before = manager.driver
        started = daemon(made, *manager.flags, *flags)
        manager.wait_for(lambda: manager.driver is not before and manager.driver)
        manager.wait_for(lambda: "HEALTHY" in [health for health, _ in manager.driver.health.values()])  # type: ignore[union-attr]
        return made, started

    return begin


def specs(places: Places) -> dict[str, Any]:
    """The CDI specs of claims, as they lie there; Kata takes all of them."""
    found = {}
    for path in sorted(places.cdi.glob(f"{DRIVER}_*")):
        with suppress(FileNotFoundError):  # it went between the listing and the look, as it may while a plugin works
            found[path] = path.read_bytes()
    assert lint({path: read_spec(content) for path, content in found.items()}) == {}
    return {path.name: json.loads(content) for path, content in found.items()}


def devices_in_spec(places: Places) -> int:
    return sum(len(spec["devices"]) for spec in specs(places).values())


def nodes_of(places: Places, cdi_name: str) -> list[str]:
    """What a container gets by this CDI name."""
    kind, _, name = cdi_name.partition("=")
    listed = [device for spec in specs(places).values() if spec["kind"] == kind for device in spec["devices"]]
    (device,) = [device for device in listed if device["name"] == name]
    return [node["path"] for node in device["containerEdits"].get("deviceNodes", ())]


def prepared(manager: DraManager, pod: str, claim: str) -> bool:
    """Whether the claim can be prepared now: the kubelet asks again and again."""
    try:
        return bool(manager.prepare(pod, claim))
    except NotPrepared:
        return False


def node_of(node: FakeNode, address: str) -> str:
    """Its VFIO node now."""
    vfio = node.function(address).vfio
    assert vfio is not None
    return f"/dev/vfio/devices/vfio{vfio.number}"


def checkpoints(places: Places) -> list[Path]:
    return sorted((places.top / "plugins" / DRIVER / "claims").glob("*"))


def taints(api: FakeApiServer, address: str) -> list[str] | None:
    """What the scheduler reads of a device; None: it knows no such device."""
    devices = {device["name"]: device for one in api.slices() for device in one["spec"]["devices"]}
    device = devices.get(name_of(address))
    return None if device is None else [taint["value"] for taint in device.get("taints", ())]


# One claim


def test_a_claim_goes_its_whole_way_and_leaves_nothing_behind(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    node, plugin = serve()
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST), name_of(SECOND)))
    first, second = manager.prepare("pod", "gpus")
    assert first == f"{DRIVER}/claim=uid-of-gpus_{name_of(FIRST)}"
    assert nodes_of(places, first) == [node_of(node, FIRST)]
    assert nodes_of(places, second) == [node_of(node, SECOND)]
    assert [device.request_names[0] for device in manager.claims["gpus"].devices] == ["gpu", "gpu"]
    assert [path.name for path in checkpoints(places)] == ["uid-of-gpus.json"]
    node.set_enable(FIRST, 1)  # its VM runs
    node.set_enable(FIRST, 0)
    manager.unprepare("pod")
    assert specs(places) == {}
    assert checkpoints(places) == []
    plugin.wait_for("claim given back", claim="default/gpus")


def test_older_kubelets_are_served_by_the_older_names_of_the_services(
    places: Places, api: FakeApiServer, pods: PodResources, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    places.kubelet.mkdir()
    pods.start(age=HOUR)
    with DraManager(places.top, api, services=("v1beta1.DRAPlugin", "v1alpha1.DRAResourceHealth")) as manager:
        daemon(fake_node("hgx-h100"), *manager.flags)
        manager.wait_for(lambda: manager.health(name_of(FIRST)) == ("HEALTHY", ""))
        api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
        assert len(manager.prepare("pod", "gpus")) == 1
        manager.unprepare("pod")


def test_a_claim_that_cannot_be_had_has_its_reason_and_the_others_of_the_call_are_prepared(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    serve()
    api.put("resourceclaims", claim_object("good", name_of(FIRST)))
    api.put("resourceclaims", claim_object("bad", "pci-0000-99-00-0"))
    with pytest.raises(NotPrepared, match=r"ResourceClaim bad: .*pci-0000-99-00-0: this node has no such device"):
        manager.prepare("pod", "good", "bad")
    assert len(specs(places)) == 1
    manager.unprepare("pod")
    assert specs(places) == {}


def test_a_claim_that_nobody_prepared_is_given_back_without_a_word(
    serve: Serve, manager: DraManager, api: FakeApiServer
) -> None:
    serve()
    manager.claims["unknown"] = ClaimInfo(uid="unknown", pods={"pod"})
    manager.unprepare("pod")
    assert manager.claims == {}


def test_what_the_api_server_does_not_tell_is_an_error_and_a_prepared_claim_needs_no_api_server(
    serve: Serve, manager: DraManager, api: FakeApiServer
) -> None:
    serve()
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    api.fail(403, times=1000, verb="get")
    with pytest.raises(NotPrepared, match="the API server does not tell what it was allocated"):
        manager.prepare("pod", "gpus")
    api.stop_failing()
    names = manager.prepare("pod", "gpus")
    manager.restart()
    manager.wait_for(lambda: manager.driver)
    api.fail(503, times=1000, verb="get")
    assert manager.prepare("pod", "gpus") == names


# What happens meanwhile


def test_after_kill_and_restart_the_claim_is_still_held_and_is_prepared_the_same(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    node, plugin = serve()
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    names = manager.prepare("pod", "gpus")
    before = specs(places)
    plugin.kill()
    stray = places.cdi / f"{DRIVER}_claim_another-uid.json"
    stray.write_text("{}")
    manager.claims["gpus"].prepared = False
    with pytest.raises(NotPrepared):
        manager.prepare("pod", "gpus")
    _, again = serve(node)
    again.wait_for("file of no claim removed")
    assert not stray.exists()
    api.put("resourceclaims", claim_object("other", name_of(FIRST)))
    with pytest.raises(NotPrepared, match="claim default/gpus holds it"):
        manager.prepare("other", "other")
    assert manager.prepare("pod", "gpus") == names
    assert specs(places) == before
    manager.unprepare("pod")
    assert manager.prepare("other", "other")
    assert len([path for path in (places.top / "plugins_registry").iterdir() if path.is_socket()]) == 1


def test_in_a_rolling_update_the_newcomer_serves_when_the_old_one_has_ended(
    serve: Serve, manager: DraManager, api: FakeApiServer, daemon: StartDaemon, places: Places
) -> None:
    node, old = serve()
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    names = manager.prepare("pod", "gpus")
    new = daemon(node, *manager.flags)
    new.wait_for("standing by")
    assert len(manager.registrations) == 1, "one of the two serves"
    old.terminate(signal.SIGTERM)
    manager.wait_for(lambda: len(manager.registrations) == 2)
    assert len(set(manager.registrations)) == 2, "with sockets of its own"
    manager.wait_for(lambda: manager.driver)
    manager.restart()
    manager.wait_for(lambda: manager.driver)
    assert manager.prepare("pod", "gpus") == names
    manager.unprepare("pod")
    assert specs(places) == {}


def test_a_kubelet_that_knows_none_of_our_services_is_heard(
    places: Places, api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    places.kubelet.mkdir()
    with DraManager(places.top, api, services=("v2.DRAPlugin",)) as manager:
        plugin = daemon(fake_node("hgx-h100"), *manager.flags)
        plugin.wait_for("driver not registered", reason="is supported")


def test_without_the_kubelets_folder_it_waits_for_that_and_says_so_once(
    places: Places, api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    places.kubelet.mkdir()
    manager = DraManager(places.top, api)
    plugin = daemon(fake_node("hgx-h100"), *manager.flags)
    plugin.wait_for("driver cannot listen", reason="No such file or directory")
    with manager:
        manager.wait_for(lambda: manager.driver)
        plugin.wait_for("driver registered")
        assert len(plugin.events("driver cannot listen")) == 1


def test_a_driver_whose_sockets_somebody_removes_makes_them_again(
    serve: Serve, manager: DraManager, places: Places
) -> None:
    _, plugin = serve()
    for path in (places.top / "plugins_registry").iterdir():
        path.unlink()
    plugin.wait_for("driver's socket is gone")
    manager.wait_for(lambda: len(manager.registrations) == 2)


def test_a_device_that_dies_is_told_in_words_to_kubelet_and_scheduler_and_to_the_next_claim(
    serve: Serve, manager: DraManager, api: FakeApiServer
) -> None:
    node, _ = serve("hgx-h100", "--health-interval=0.2")
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    manager.prepare("pod", "gpus")
    node.sicken(FIRST)
    manager.wait_for(lambda: manager.health(name_of(FIRST))[0] == "UNHEALTHY")
    assert "does not answer on the PCI bus" in manager.health(name_of(FIRST))[1]
    assert manager.health(name_of(SECOND)) == ("HEALTHY", "")
    wait_until(lambda: taints(api, FIRST) == ["off-the-bus"], "the scheduler hears of it")
    manager.unprepare("pod")
    api.put("resourceclaims", claim_object("next", name_of(FIRST)))
    with pytest.raises(NotPrepared, match=r"cannot be given: off-the-bus: .*does not answer"):
        manager.prepare("next", "next")
    node.remove(FIRST)
    manager.wait_for(lambda: manager.health(name_of(FIRST))[1].startswith("gone: "))
    with pytest.raises(NotPrepared, match=r"gone: 0000:1b:00\.0 is not on the PCI bus any more"):
        manager.prepare("next", "next")


def test_what_was_bound_again_is_given_by_its_new_node_and_what_went_to_a_host_driver_is_refused(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    node, plugin = serve("hgx-h100", "--health-interval=0.2")
    old = node.function(FIRST).vfio
    node.unbind(SECOND)
    node.unbind(FIRST)
    node.bind(SECOND)
    node.bind(FIRST)
    new = node.function(FIRST).vfio
    assert old != new
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    wait_until(lambda: manager.health(name_of(FIRST)) == ("HEALTHY", ""), "it is seen")

    wait_until(lambda: prepared(manager, "pod", "gpus"), "the new node is seen")
    assert nodes_of(places, manager.prepare("pod", "gpus")[0]) == [node_of(node, FIRST)]
    node.bind(SECOND, "nvidia")
    plugin.wait_for("not offered", pci_address=SECOND, reason="bound to nvidia")
    api.put("resourceclaims", claim_object("host", name_of(SECOND)))
    with pytest.raises(NotPrepared, match="bound to nvidia, not to"):
        manager.prepare("host", "host")


def test_no_spec_names_the_node_of_a_claims_device_that_is_gone_and_it_comes_back_with_the_device(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    node, _ = serve("hgx-h100", "--health-interval=0.2")
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST), name_of(SECOND)))
    first, second = manager.prepare("pod", "gpus")
    kept = nodes_of(places, second)
    node.unbind(FIRST)
    wait_until(
        lambda: len(specs(places)["vfio.sandbox-plugin_claim_uid-of-gpus.json"]["devices"]) == 1, "it is left out"
    )
    assert nodes_of(places, second) == kept
    node.unbind(SECOND)
    wait_until(lambda: specs(places) == {}, "a spec without devices would fail every Kata pod")
    node.bind(SECOND)
    node.bind(FIRST)
    wait_until(lambda: devices_in_spec(places) == 2, "both are back")
    assert nodes_of(places, first) == [node_of(node, FIRST)]


def test_group_mates_go_to_one_claim_and_no_other(
    places: Places, fake_node: MakeNode, serve: Serve, manager: DraManager, api: FakeApiServer
) -> None:
    serve(pairs(fake_node, 2))
    a, mate, other = ("pci-0000-42-00-0", "pci-0000-42-01-0", "pci-0000-42-02-0")
    api.put("resourceclaims", claim_object("half", a))
    api.put("resourceclaims", claim_object("mate", mate))
    api.put("resourceclaims", claim_object("other", other))
    manager.prepare("half", "half")
    manager.wait_for(lambda: manager.health(mate)[0] == "UNHEALTHY")
    with pytest.raises(NotPrepared, match="group-taken: IOMMU group 90 is held by claim default/half through"):
        manager.prepare("mate", "mate")
    manager.prepare("other", "other")
    manager.unprepare("half")

    wait_until(lambda: prepared(manager, "mate", "mate"), "the group is free again")


# Both APIs


def test_what_one_api_has_given_the_other_does_not_give_and_both_see_it_at_once(
    serve: Serve, kubelet_of_both: GrpcKubelet, manager: DraManager, api: FakeApiServer, pods: PodResources
) -> None:
    node, _ = serve("hgx-h100", "--health-interval=0.2")
    kubelet = kubelet_of_both
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    first, second = (node_of(node, address).partition("vfio/devices/vfio")[2] for address in (FIRST, SECOND))
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    manager.prepare("pod", "gpus")
    kubelet.wait_for(lambda: first in kubelet.unhealthy(PGPU))
    with pytest.raises(grpc.RpcError, match="held-by-other-api: claim default/gpus holds"):
        kubelet.plugin(PGPU).allocate([first])
    kubelet.plugin(PGPU).allocate([second])
    pods.hold("vm", PGPU, second)
    wait_until(lambda: taints(api, SECOND) == ["allocated"], "the scheduler hears of it")
    assert taints(api, FIRST) == [], "what a claim has the scheduler knows"
    shown = run_command("status", f"--fake-sysfs={node.root}").stdout
    assert "claim default/gpus" in next(line for line in shown.splitlines() if FIRST in line)
    api.put("resourceclaims", claim_object("late", name_of(SECOND)))
    with pytest.raises(NotPrepared, match=r"held-by-other-api: .* holds /dev/vfio"):
        manager.prepare("late", "late")
    manager.unprepare("pod")
    kubelet.wait_for(lambda: first in kubelet.healthy(PGPU))
    pods.release("vm")

    wait_until(lambda: prepared(manager, "late", "late"), "the pod is gone")


@pytest.fixture
def kubelet_of_both(absent_kubelet: GrpcKubelet, manager: DraManager) -> GrpcKubelet:
    absent_kubelet.start()
    return absent_kubelet


def test_a_claim_whose_checkpoint_is_lost_is_known_from_pod_resources(
    serve: Serve,
    kubelet_of_both: GrpcKubelet,
    manager: DraManager,
    api: FakeApiServer,
    pods: PodResources,
    places: Places,
) -> None:
    node, plugin = serve()
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    manager.prepare("pod", "gpus")
    pods.hold_by_claim("pod", "gpus", DRIVER, name_of(FIRST))
    plugin.kill()
    for path in checkpoints(places):
        path.write_text("rubbish")
    _, again = serve(node)
    again.wait_for("claim checkpoint not understood")
    number = node_of(node, FIRST).partition("vfio/devices/vfio")[2]
    kubelet_of_both.wait_for(lambda: number in kubelet_of_both.unhealthy(PGPU))
    manager.unprepare("pod")
    pods.release("pod")
    kubelet_of_both.wait_for(lambda: number in kubelet_of_both.healthy(PGPU))


def test_a_node_for_claims_only_registers_no_resource(
    serve: Serve, kubelet_of_both: GrpcKubelet, manager: DraManager, api: FakeApiServer
) -> None:
    serve("hgx-h100", "--device-plugin=off")
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    assert manager.prepare("pod", "gpus")
    assert kubelet_of_both.calls == 0


def test_a_driver_is_not_registered_before_it_serves_and_not_after(
    serve: Serve, manager: DraManager, api: FakeApiServer
) -> None:
    api.put("resourceclaims", claim_object("gpus", name_of(FIRST)))
    with pytest.raises(NotRegistered):
        manager.prepare("pod", "gpus")
    _, plugin = serve()
    plugin.terminate()
    manager.wait_for(lambda: manager.driver is None)


# KubeVirt


def test_kubevirt_gets_all_nodes_and_the_metadata_by_which_it_finds_the_gpu(
    serve: Serve, manager: DraManager, api: FakeApiServer, places: Places
) -> None:
    node, _ = serve("hgx-h100", "--consumer=kubevirt")
    one, two = {"request": "one", "device": name_of(FIRST)}, {"request": "two/b", "device": name_of(SECOND)}
    api.put("resourceclaims", claim_object("gpus", one, two))
    nodes, metadata, _, other = manager.prepare("pod", "gpus")
    function = node.function(FIRST)
    assert function.vfio is not None
    wanted = [f"/dev/vfio/devices/vfio{function.vfio.number}", "/dev/iommu", f"/dev/vfio/{function.iommu_group}"]
    assert nodes_of(places, nodes) == [*wanted, "/dev/vfio/vfio"]
    assert metadata == f"{DRIVER}/metadata=uid-of-gpus_one"
    assert other == f"{DRIVER}/metadata=uid-of-gpus_two"
    (device,) = specs(places)[f"{DRIVER}_metadata_uid-of-gpus_two.json"]["devices"]
    (mount,) = device["containerEdits"]["mounts"]
    said = json.loads(Path(mount["hostPath"]).read_text())
    assert said["requests"][0]["name"] == "two/b"
    (shown,) = said["requests"][0]["devices"]
    assert shown["attributes"] == {"resource.kubernetes.io/pciBusID": {"string": SECOND}}
    manager.unprepare("pod")
    assert specs(places) == {}
    assert not list((places.top / "plugins" / DRIVER / "dra-device-metadata").iterdir())
