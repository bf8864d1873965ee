"""What the daemon makes of PodResources: who holds what, what is in use by nobody's pod, and when a device may leave.

The rules are tried out in test_advance.py, with times of its own choosing; here they meet the real process.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from conftest import MakeNode, Serve, StartDaemon
from daemon import Places
from kubelet import GrpcKubelet
from names import GEFORCE, NVSWITCH, PGPU, T4
from pods import PodResources
from trials import QUICK, pairs, socket_of, wait_until

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.kubelet.podresources import INTERVAL

HOUR = 3600.0


def group_of(node: FakeNode, address: str) -> str:
    """The ID of a device on a node without cdevs."""
    return str(node.function(address).iommu_group)


def test_what_pods_hold_and_the_node_does_not_show_is_listed_unhealthy_from_the_start(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    pods.start(age=HOUR)
    pods.hold("old", PGPU, "99")
    pods.hold("somebody-elses", "example.com/nic", "1")
    pods.hold("unknown-alias", "nvidia.com/other", "2")
    node = fake_node("workstation")
    plugin = daemon(node)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"99"})
    assert kubelet.healthy(PGPU) == {group_of(node, GEFORCE), group_of(node, T4)}
    assert kubelet.resources() == {PGPU}
    (found,) = plugin.events("device found", resource=PGPU, device="99")
    assert found["reason"] == "gone: pod default/old holds it, but this node shows no such device"


def test_who_holds_what_is_known_before_anything_is_offered(serve: Serve, pods: PodResources) -> None:
    pods.start(age=HOUR)
    _, plugin, _ = serve("workstation")
    assert not plugin.events("device found", reason="holders-unknown")


def test_what_is_in_use_although_no_pod_holds_it_is_unhealthy_until_a_pod_does_or_it_is_let_go(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    node = fake_node("workstation")
    held, taken = group_of(node, GEFORCE), group_of(node, T4)
    for address in (GEFORCE, T4):
        node.set_enable(address, 1)
    pods.start(age=HOUR)
    pods.hold("vm", PGPU, held)
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {held} and kubelet.unhealthy(PGPU) == {taken})
    reason = f"in-use-elsewhere: {T4} is in use (enable is 1) although no pod holds it"
    wait_until(lambda: plugin.events(resource=PGPU, device=taken, reason=reason), "the log says why")
    pods.hold("another", PGPU, taken)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {held, taken})
    pods.release("another")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {taken})
    node.set_enable(T4, 0)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {held, taken})


@pytest.mark.slow
def test_a_pod_that_ends_with_its_vm_leaves_nothing_in_use_and_its_group_is_free_two_seconds_later(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    """With an interval of an hour: only what PodResources answers, and what follows from it, makes the daemon look."""
    node = pairs(fake_node, 2)
    pods.start(age=HOUR)
    pods.hold("vm", PGPU, "0")
    plugin = daemon(node, "--health-interval=3600")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"1"})
    node.set_enable("0000:42:00.0", 1)
    node.unbind("0000:42:02.0")  # an event: it looks, and sees the use
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"1", "2"})
    node.set_enable("0000:42:00.0", 0)
    pods.release("vm")
    plugin.wait_for("device changed", device="1", health="Healthy", timeout=3 * INTERVAL)
    assert not plugin.events("device changed", device="0")
    events = plugin.events("device found", device="1") + plugin.events("device changed", device="1")
    *_, taken, settling, healthy = events
    assert [event["reason"].partition(":")[0] for event in (taken, settling)] == ["group-taken", "settling"]
    settled_for = datetime.fromisoformat(healthy["timestamp"]) - datetime.fromisoformat(settling["timestamp"])
    assert settled_for < timedelta(seconds=INTERVAL)


@pytest.mark.slow
def test_a_kubelet_that_has_just_started_and_names_no_pod_is_not_taken_at_its_word(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources, places: Places
) -> None:
    """It serves PodResources before it has heard of its pods; whoever uses a device then is most likely one of them."""
    node = fake_node("workstation")
    both = {group_of(node, GEFORCE), group_of(node, T4)}
    for address in (GEFORCE, T4):
        node.set_enable(address, 1)
    pods.start(age=HOUR)
    pods.hold("vm", PGPU, *both)
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == both)
    pods.stop()
    with PodResources(places.top / "pod-resources/kubelet.sock") as young:
        young.start(age=0)
        kubelet.restart()
        young.wait_until_asked()
        young.wait_until_asked()  # the first answer has been taken in
        kubelet.wait_for(lambda: kubelet.healthy(PGPU) == both)
    assert not plugin.events("device changed")


def test_nor_by_a_daemon_that_has_just_started_too(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    node = fake_node("workstation")
    node.set_enable(T4, 1)
    pods.start(age=0)
    pods.hold("vm", PGPU, "99")
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"99"})  # it has been asked, and what it does name counts
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {group_of(node, GEFORCE), group_of(node, T4)})
    assert not plugin.events(reason="in-use-elsewhere")


@pytest.mark.slow
@pytest.mark.timeout(3 * RETIRE)
def test_the_last_device_of_a_resource_takes_its_stream_socket_and_spec_along_a_minute_after_its_pod(
    serve: Serve, kubelet: GrpcKubelet, pods: PodResources, places: Places
) -> None:
    pods.start(age=HOUR)
    node, plugin, _ = serve("hgx-h100", QUICK)
    switches = [f.address for f in node.functions() if f.class_code == 0x068000]
    one = min(kubelet.healthy(NVSWITCH))
    pods.hold("vm", NVSWITCH, one)
    for address in switches:
        node.unbind(address)
    kubelet.wait_for(lambda: len(kubelet.unhealthy(NVSWITCH)) == len(switches))
    kubelet.wait_for(lambda: kubelet.unhealthy(NVSWITCH) == {one}, timeout=RETIRE + 20)
    pods.release("vm")
    plugin.wait_for("no longer advertised", resource=NVSWITCH, timeout=RETIRE + 20)
    kubelet.wait_for(lambda: NVSWITCH not in kubelet.resources())
    wait_until(lambda: not socket_of(places, NVSWITCH).exists(), "its socket is gone")
    wait_until(lambda: [f.name for f in places.cdi.glob("*.yaml")] == ["nvidia.com-pgpu.yaml"], "its spec is gone")
    assert len(kubelet.healthy(PGPU)) == 8
