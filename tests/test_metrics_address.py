"""`--metrics-address`: the real daemon, scraped and probed over HTTP."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from conftest import MakeNode, Serve, StartDaemon
from daemon import Daemon, Places, run_command
from kubelet import TIMEOUT, GrpcKubelet, refusal
from names import FIRST_GPU, PGPU, T4
from pods import PodResources
from prometheus_client.parser import text_string_to_metric_families

from sandbox_plugin.fake.node import FakeNode

ADDRESS = "--metrics-address=127.0.0.1:0"


class Scraped:
    """A daemon's pages."""

    def __init__(self, daemon: Daemon) -> None:
        self._at = f"http://{daemon.wait_for('metrics served')['address'][0]}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urlopen(self._at + path, timeout=TIMEOUT) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def value(self, name: str, **labels: str) -> float:
        """The sum over all series of that name that have these labels; 0 where there are none."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [s for family in families for s in family.samples if s.name == f"sandbox_plugin_{name}"]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Raises AssertionError, with the page."""
        end = time.monotonic() + TIMEOUT
        while not holds():
            assert time.monotonic() < end, self.get("/metrics")[1]
            time.sleep(0.05)


def test_the_daemon_is_alive_while_it_waits_for_a_kubelet_and_ready_when_all_is_registered(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    pages = Scraped(daemon(fake_node("workstation"), ADDRESS))
    pages.wait_for(lambda: "waiting for the kubelet's folder" in pages.get("/readyz")[1])
    assert pages.get("/readyz")[0] == 503
    assert pages.get("/healthz") == (200, "ok\n")
    assert pages.value("turn", state="waiting") == 1
    assert pages.value("device_healthy") == 0
    absent_kubelet.start()
    pages.wait_for(lambda: pages.get("/readyz") == (200, "ready\n"))
    assert pages.value("ready") == pages.value("registered") == 1


def test_a_plugin_that_stands_by_is_ready_and_leaves_the_devices_to_the_other_one(
    serve: Serve, daemon: StartDaemon, places: Places
) -> None:
    node, first, _ = serve("workstation")
    pages = Scraped(daemon(node, ADDRESS, f"--status-socket={places.top}/second.sock"))
    pages.wait_for(lambda: pages.get("/readyz") == (200, "standing by\n"))
    assert pages.value("turn", state="standing-by") == 1
    assert pages.value("device_info") == 0
    first.kill()
    pages.wait_for(lambda: pages.value("turn", state="serving") == 1)
    pages.wait_for(lambda: pages.value("device_info") == 2 and pages.get("/readyz") == (200, "ready\n"))


def test_what_happens_to_devices_and_pods_is_counted(serve: Serve, kubelet: GrpcKubelet, pods: PodResources) -> None:
    pods.start(age=3600)
    node, plugin, agree = serve("workstation", ADDRESS, "--health-interval=0.2")
    pages = Scraped(plugin)
    kubelet.plugin(PGPU).allocate(["11"])
    pods.hold("vm", PGPU, "11")
    refusal(lambda: kubelet.plugin(PGPU).allocate(["99"]))
    refusal(lambda: kubelet.plugin(PGPU).allocate(["13", "13"]))
    refusal(lambda: kubelet.plugin(PGPU).prefer(["11"], 2))
    node.sicken(T4)
    agree()
    refusal(lambda: kubelet.plugin(PGPU).allocate(["13"]))
    requests = "kubelet_request_duration_seconds_count"
    assert pages.value(requests, method="Allocate", code="OK") == 1
    assert pages.value(requests, method="Allocate", code="FAILED_PRECONDITION") == 1
    assert pages.value(requests, method="GetPreferredAllocation", code="INVALID_ARGUMENT") == 1
    reasons = {"unknown-device": 1, "malformed-request": 2, "off-the-bus": 1, "last-look": 0}
    assert {reason: pages.value("refusals_total", reason=reason) for reason in reasons} == reasons
    pages.wait_for(lambda: pages.value("device_holder_info", device="11", pod="vm", namespace="default") == 1)
    assert pages.value("device_unhealthy_info", pci_address=T4, reason="off-the-bus") == 1
    pages.wait_for(lambda: pages.value("scan_triggers_total", trigger="timer") >= 1)
    assert pages.value("event_source_up", source="pod-resources") == 1
    assert pages.value("cdi_writes_total") == 1


def test_what_a_last_look_finds_is_counted_as_its_refusal(serve: Serve, kubelet: GrpcKubelet) -> None:
    node, plugin, _ = serve("workstation", ADDRESS, "--health-interval=3600")
    pages = Scraped(plugin)
    node.sicken(T4)
    refusal(lambda: kubelet.plugin(PGPU).allocate(["13"]))
    assert pages.value("refusals_total", reason="last-look") == 1


def test_a_part_of_a_node_is_counted_as_its_refusal(serve: Serve, kubelet: GrpcKubelet) -> None:
    _, plugin, _ = serve("hgx-h100", ADDRESS, f"--whole-node={PGPU}")
    refusal(lambda: kubelet.plugin(PGPU).allocate(["4", "5"]))
    assert Scraped(plugin).value("refusals_total", reason="part-of-node") == 1


def test_kubelets_are_counted_once_however_many_resources_they_accept(serve: Serve, kubelet: GrpcKubelet) -> None:
    _, plugin, agree = serve("hgx-h100", ADDRESS)
    pages = Scraped(plugin)
    assert pages.value("kubelet_restarts_total") == 0
    for restarts in (1, 2):
        kubelet.restart()
        agree()
        pages.wait_for(lambda: pages.value("registered") == 2)
        assert pages.value("kubelet_restarts_total") == restarts
        assert pages.value("registrations_total") == 2 + 2 * restarts
        assert pages.value("registration_losses_total") == 2 * restarts


def test_a_connection_that_was_cut_is_a_loss_and_no_restart(serve: Serve, kubelet: GrpcKubelet) -> None:
    _, plugin, agree = serve("workstation", ADDRESS)
    pages = Scraped(plugin)
    kubelet.plugin(PGPU).close()
    pages.wait_for(lambda: pages.value("registrations_total") == 2)
    agree()
    assert pages.value("registration_losses_total") == 1
    assert pages.value("kubelet_restarts_total") == 0


def test_bad_specs_and_specs_that_cannot_be_written_are_counted(
    places: Places, fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    places.cdi.mkdir()
    (places.cdi / "nvidia.com-pgpu.yaml").write_text("cdiVersion: 0.5.0\nkind: example.com/other\n")
    (places.cdi / "other.yaml").write_text("not: [a spec")
    plugin = daemon(fake_node("workstation"), ADDRESS)
    pages = Scraped(plugin)
    plugin.wait_for("cdi trouble")
    pages.wait_for(lambda: pages.value("cdi_write_failures_total", resource=PGPU) >= 1)
    pages.wait_for(lambda: pages.value("foreign_cdi_specs", problem="bad") >= 1)
    assert pages.value("cdi_writes_total") == 0


def test_errors_and_a_narrow_link_are_seen_with_the_next_scan(serve: Serve) -> None:
    node, plugin, _ = serve("hgx-h100", ADDRESS, "--health-interval=0.2")
    pages = Scraped(plugin)
    node.set_attribute(FIRST_GPU, "aer_dev_correctable", "RxErr 7\nTOTAL_ERR_COR 7")
    node.set_attribute(FIRST_GPU, "current_link_width", "8")
    about = {"pci_address": FIRST_GPU}
    pages.wait_for(lambda: pages.value("pcie_errors_total", severity="correctable", **about) == 7)
    pages.wait_for(lambda: pages.value("pcie_link_width_lanes", **about) == 8)
    assert pages.value("pcie_link_max_width_lanes", **about) == 16


def test_a_taken_port_keeps_no_pod_from_its_devices(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        plugin = daemon(fake_node("workstation"), f"--metrics-address={address}")
        said = plugin.wait_for("metrics not served", reason="Address already in use")
        assert said["address"] == address
        kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
        kubelet.plugin(PGPU).allocate(["11"])


def test_without_an_address_nothing_listens(serve: Serve) -> None:
    _, plugin, _ = serve("workstation")
    tables = "".join(Path(f"/proc/{plugin.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
    inodes = {line.split()[9] for line in tables.splitlines() if line.split()[3] == "0A"}
    own = {link.readlink().name for link in Path(f"/proc/{plugin.pid}/fd").iterdir()}
    assert not {f"socket:[{inode}]" for inode in inodes} & own
    assert not plugin.events("metrics served")


def test_a_wrong_address_is_refused_in_one_line() -> None:
    done = run_command("run", "--metrics-address", "9400")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--metrics-address: '9400' is not HOST:PORT" in done.stderr


def test_pods_are_not_named_where_that_is_off(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    pods.hold("secret", PGPU, "11")
    pods.start(age=3600)
    node: FakeNode = fake_node("workstation")
    pages = Scraped(daemon(node, ADDRESS, "--metrics-pod-labels=false"))
    pages.wait_for(lambda: pages.value("device_allocated", device="11") == 1)
    assert "secret" not in pages.get("/metrics")[1]
