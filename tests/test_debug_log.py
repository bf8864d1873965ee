"""What `--log-level=debug` adds to the log, for whoever wonders why a pod does not start."""

from __future__ import annotations

import pytest
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from kubelet import GrpcKubelet, refusal
from names import NVSWITCH, PGPU, T4
from pods import PodResources

DEBUG = "--log-level=debug"


@pytest.fixture
def debugged(fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon) -> Daemon:
    """A daemon with two GPUs, 11 and 13, that the kubelet knows."""
    plugin = daemon(fake_node("workstation"), DEBUG)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    return plugin


def test_a_scan_tells_what_asked_for_it_and_what_it_cost(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, DEBUG, "--health-interval=0.2")
    assert plugin.wait_for("scanned")["trigger"] == "start"
    told = plugin.wait_for("scanned", trigger="timer")
    assert (told["level"], told["functions"]) == ("debug", 12)
    assert told["ms"] > 0
    plugin.wait_for("device found", resource=PGPU, device="13")
    since = plugin.mark()
    node.unbind(T4)
    plugin.wait_for("device changed", since=since)
    assert any("folder" in told["trigger"] for told in plugin.events("scanned", since=since))


def test_a_stream_tells_that_it_opens_what_it_sends_and_that_it_ends(debugged: Daemon, kubelet: GrpcKubelet) -> None:
    debugged.wait_for("stream opened", resource=PGPU, client="the kubelet")
    assert debugged.wait_for("list sent", resource=PGPU).items() >= {"devices": 2, "healthy": 2}.items()
    with kubelet.watching(PGPU):
        debugged.wait_for("stream opened", resource=PGPU, client="another client")
    debugged.wait_for("stream ended", resource=PGPU, client="another client")
    kubelet.stop()
    debugged.wait_for("stream ended", resource=PGPU, client="the kubelet")


def test_a_preference_is_told_with_the_question(debugged: Daemon, kubelet: GrpcKubelet) -> None:
    assert kubelet.plugin(PGPU).prefer(["11", "13"], 1, ["13"]) == ["13"]
    asked = debugged.wait_for("preference asked", resource=PGPU)
    assert (asked["available"], asked["must_include"], asked["size"]) == (["11", "13"], ["13"], 1)
    assert debugged.wait_for("preference answered", resource=PGPU)["devices"] == ["13"]


def test_an_allocate_is_told_with_its_answer_or_its_refusal(debugged: Daemon, kubelet: GrpcKubelet) -> None:
    kubelet.plugin(PGPU).allocate(["11"], ["13"])
    assert debugged.wait_for("allocate asked", resource=PGPU)["devices"] == [["11"], ["13"]]
    answer = debugged.wait_for("allocate answered", resource=PGPU)["answer"]
    assert answer == [{"variables": {}, "nodes": [f"/dev/vfio/{device}"]} for device in ("11", "13")]
    since = debugged.mark()
    refusal(lambda: kubelet.plugin(PGPU).allocate(["99"]))
    assert debugged.wait_for("allocate asked", since=since)["devices"] == [["99"]]
    debugged.wait_for("call refused", since=since, status="NOT_FOUND", reason=f"{PGPU}: unknown device '99'")


def test_what_pod_resources_answers_is_told_of_our_devices(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
        pods.hold("vm", PGPU, "11", "13")
        pods.hold("other", "example.com/nic", "1")
        pods.start(age=3600)
        plugin = daemon(fake_node("workstation"), DEBUG)
        kubelet.wait_for(lambda: kubelet.devices(PGPU))
        kubelet.plugin(PGPU).allocate(["11"])
        plugin.wait_for("PodResources asked", path=str(pods.socket))
        told = plugin.wait_for("PodResources answered", since=plugin.mark())
        assert (told["pods"], told["young"]) == (1, False)
        assert told["holders"] == {f"{PGPU}=11": "default/vm", f"{PGPU}=13": "default/vm"}


def test_what_becomes_of_a_grant_is_told_from_the_promise_to_the_pod_s_end(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
        pods.hold("earlier", PGPU, "13")
        pods.start(age=3600)
        plugin = daemon(fake_node("workstation"), DEBUG)
        kubelet.wait_for(lambda: kubelet.devices(PGPU))
        told = plugin.wait_for("grant named", device="13")
        assert (told["pod"], told["ms"], told["pci_address"]) == ("default/earlier", None, T4)
        plugin.wait_for("device found", device="11")
        kubelet.plugin(PGPU).allocate(["11"])
        told = plugin.wait_for("grant begins", device="11")
        assert (told["node"], told["iommu_group"], told["mates"]) == ("/dev/vfio/11", 11, [])
        pods.hold("vm", PGPU, "11")
        told = plugin.wait_for("grant named", device="11")
        assert (told["pod"], told["container"]) == ("default/vm", "vm")
        assert told["ms"] > 0
        pods.release("vm")
        assert plugin.wait_for("grant ends", device="11")["pod"] == "default/vm"
        assert not plugin.events("grant ends", device="13")


def test_at_the_usual_level_nothing_of_this_is_said(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    plugin = daemon(fake_node("hgx-h100"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8 and len(kubelet.healthy(NVSWITCH)) == 4)
    kubelet.plugin(PGPU).prefer(["4", "5"], 1)
    kubelet.plugin(PGPU).allocate(["4"])
    plugin.wait_for("allocated")
    assert {event["level"] for event in plugin.events()} == {"info"}
