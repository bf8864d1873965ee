"""The daemon's slices on an API server: published, followed, kept, and never in the way of the device plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import MakeNode, StartDaemon
from daemon import Places, run_command
from dra_manager import DraManager, api_server
from kubelet import GrpcKubelet
from names import PGPU
from pods import PodResources
from slices import NODE, seen_by_scheduler
from trials import wait_until

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import BROKEN, Settings, UsageError
from sandbox_plugin.fake.api_server import SLICES, FakeApiServer
from sandbox_plugin.model import Reason

GPU = "0000:1b:00.0"
NAME = "pci-0000-1b-00-0"


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture(autouse=True)
def told_by_pod_resources(pods: PodResources) -> None:
    """Before that no device is well for claims."""
    pods.start(age=3600)


def flags(api: FakeApiServer) -> list[str]:
    return ["--dra", f"--node-name={NODE}", f"--api-server={api.url}", "--health-interval=0.2"]


def shown(api: FakeApiServer) -> dict[str, Any]:
    """The devices by name."""
    return {device["name"]: device for one in api.slices() for device in one["spec"]["devices"]}


def is_published(api: FakeApiServer, count: int) -> bool:
    seen = seen_by_scheduler(api.slices())
    return seen is not None and len(seen) == count and not any("taints" in each for each in shown(api).values())


def test_devices_are_published_with_the_reason_when_they_are_unhealthy_and_stay_when_the_daemon_ends(
    api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon, kubelet: GrpcKubelet
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node, *flags(api), "--dra-evict=off-the-bus,gone")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    wait_until(lambda: is_published(api, 12), "all are published")
    node.sicken(GPU)
    wait_until(lambda: "taints" in shown(api)[NAME], "it is tainted")
    (taint,) = shown(api)[NAME]["taints"]
    assert (taint["value"], taint["effect"]) == ("off-the-bus", "NoExecute")
    node.heal(GPU)
    wait_until(lambda: is_published(api, 12), "it is well again")
    before = api.slices()
    plugin.kill()
    assert api.slices() == before
    writes = api.requests[f"update {SLICES}"]
    again = daemon(node, *flags(api), "--dra-evict=off-the-bus,gone")
    again.wait_for("registered", resource=PGPU)
    wait_until(lambda: api.requests[f"list {SLICES}"] == 2 and is_published(api, 12), "they are taken over")
    node.unbind(GPU)
    wait_until(lambda: "taints" in shown(api)[NAME], "it follows the node")
    assert api.requests[f"update {SLICES}"] <= writes + 4


def test_slices_that_the_kubelet_deletes_come_back(
    api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon, kubelet: GrpcKubelet
) -> None:
    plugin = daemon(fake_node("workstation"), *flags(api))
    plugin.wait_for("ResourceSlices published")
    devices = shown(api).keys()
    api.remove(SLICES, api.slices()[0]["metadata"]["name"])
    plugin.wait_for("ResourceSlices restored")
    assert shown(api).keys() == devices


def test_without_an_api_server_the_device_plugin_works_and_the_reason_is_said_once(
    api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon, kubelet: GrpcKubelet
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node, "--dra", f"--node-name={NODE}", "--api-server=http://127.0.0.1:1", "--health-interval=0.2")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    plugin.wait_for("ResourceSlice trouble", reason="cannot be asked")
    node.sicken(GPU)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 7)
    assert len(plugin.events("ResourceSlice trouble")) == 1


def test_with_the_device_plugin_off_nothing_is_registered_and_the_daemon_is_ready_all_the_same(
    api: FakeApiServer, places: Places, fake_node: MakeNode, daemon: StartDaemon, kubelet: GrpcKubelet
) -> None:
    node = fake_node("hgx-h100")
    daemon(node, *flags(api), "--device-plugin=off")
    wait_until(lambda: is_published(api, 12), "all are published")
    assert not any(device["attributes"]["devicePlugin"]["bool"] for device in shown(api).values())
    socket = node.root / "run/sandbox-plugin/status.sock"
    with DraManager(places.top, api):
        probe = ["status", f"--status-socket={socket}", "--probe"]
        wait_until(lambda: run_command(*probe).returncode == 0, "the probe is content")
    assert kubelet.resources() == set()
    told = run_command("status", f"--status-socket={socket}").stdout
    assert PGPU in told


def test_of_two_plugins_on_a_node_one_publishes(
    api: FakeApiServer, fake_node: MakeNode, daemon: StartDaemon, kubelet: GrpcKubelet
) -> None:
    node = fake_node("workstation")
    first = daemon(node, *flags(api))
    first.wait_for("ResourceSlices published")
    second = daemon(node, *flags(api))
    second.wait_for("standing by")
    assert api.requests[f"list {SLICES}"] == 1
    first.terminate()
    wait_until(lambda: api.requests[f"list {SLICES}"] == 2, "the other one goes on")
    second.wait_for("registered")


# Settings


def refused(given: dict[str, str], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as error:
        load_settings(given, environment or {})
    return str(error.value)


POD = {"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}


def test_what_dra_needs_is_asked_for_by_name() -> None:
    assert refused({"dra": "true"}, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}) == (
        "--dra: needs the name of this node, as NODE_NAME or --node-name"
    )
    why = "SANDBOX_PLUGIN_DRA: this is no pod, so --api-server must say where the API server is"
    assert refused({}, {"SANDBOX_PLUGIN_DRA": "true", "NODE_NAME": "node-1"}) == why
    assert refused({"device_plugin": "off"}) == "--device-plugin: without --dra nothing would be offered"
    settings = load_settings({"dra": "true", "device_plugin": "off"}, POD)
    assert (settings.node_name, settings.api_server) == ("node-1", None)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dra_driver_name": "gpu.nvidia.com"}, "--dra-driver-name: 'gpu.nvidia.com' is the name of NVIDIA's own"),
        ({"dra_driver_name": "Vfio"}, "--dra-driver-name: 'Vfio' is not a DNS name in lower case with 2 to 63"),
        ({"dra_driver_name": "1.example"}, "--dra-driver-name: '1.example' is not a DNS name"),
        ({"dra_driver_name": "a" * 64}, "--dra-driver-name: 'aaaa"),
        ({"node_name": "node_1"}, "--node-name: 'node_1' is not the name of a node"),
        ({"api_server": "10.96.0.1"}, "--api-server: '10.96.0.1' is not a URL such as 'https://10.96.0.1:443'"),
        ({"api_server": "https://a/path"}, "--api-server: 'https://a/path' is not a URL"),
        ({"device_plugin": "no"}, "--device-plugin: 'no' is not one of on, off"),
        ({"dra_evict": "off-the-bus,group-taken"}, "--dra-evict: 'group-taken' is not one of gone, not-bound"),
    ],
)
def test_what_is_wrong_is_refused_by_its_flag(given: dict[str, str], why: str) -> None:
    assert refused(given).startswith(why)


def test_what_is_right_is_taken_and_off_undoes_it() -> None:
    assert load_settings({"api_server": "https://[fd00::1]:6443/"}, {}).api_server == "https://[fd00::1]:6443"
    evict = load_settings({"dra_evict": "gone, no-node"}, {}).dra_evict
    assert evict == frozenset({Reason.GONE, Reason.NO_NODE})
    variables = {**POD, "SANDBOX_PLUGIN_API_SERVER": "http://a", "SANDBOX_PLUGIN_DRA_EVICT": "gone"}
    names = ("api_server", "dra_evict", "node_name")
    assert load_settings(dict.fromkeys(names, "off"), variables) == Settings()


def test_nobody_is_evicted_for_what_somebody_else_holds() -> None:
    withheld = {Reason.GROUP_TAKEN, Reason.HELD_AS_ANOTHER, Reason.ID_HELD, Reason.HOLDERS_UNKNOWN, Reason.SETTLING}
    assert not withheld & set(BROKEN)
    assert Settings().dra_evict is None


def test_where_aiohttp_is_not_installed_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sandbox_plugin.cli import options
    from sandbox_plugin.cli.main import main

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert main(["run", "--dra", "--node-name=n", "--api-server=http://127.0.0.1:1", "--fake-sysfs=gh200"]) == 2
    assert "sandbox-plugin[dra]" in capsys.readouterr().err
