"""A rollout over several nodes: the rendered pod's very command, variables and probe, with the real process.

The part of the DaemonSet controller is played in a few lines: a node's pod is replaced only while fewer pods than
`maxUnavailable` are not available, and those that are not come first.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess, run
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from daemon import PYTHON, Daemon, Places, clean_environment, places
from deployed import KATA, KUBEVIRT, Installed, Manifest, installed
from kubelet import TIMEOUT, GrpcKubelet

from sandbox_plugin.config.settings import STATUS_SOCKET
from sandbox_plugin.fake.node import FakeNode

NODES = 2


@dataclass(frozen=True)
class Version:
    """What a DaemonSet says of its pod: the rendered one, or one that somebody has spoilt."""

    overlay: Installed
    arguments: Sequence[str] = ()
    """After the rendered ones."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Beside the rendered ones."""


class Pod(Daemon):
    """The daemon's container of a rendered pod, started on a node as its kubelet would; folders are the node's own."""

    def __init__(self, where: Places, node: FakeNode | str, version: Version) -> None:
        self._version = version
        self._own = {
            "SANDBOX_PLUGIN_KUBELET_DIR": str(where.kubelet),
            "SANDBOX_PLUGIN_CDI_DIR": str(where.cdi),
            "SANDBOX_PLUGIN_POD_RESOURCES_SOCKET": f"{where.top}/pod-resources/kubelet.sock",
            "SANDBOX_PLUGIN_STATUS_SOCKET": f"{where.top}/status.sock",
        }
        if isinstance(node, FakeNode):
            self._own["SANDBOX_PLUGIN_FAKE_SYSFS"] = str(node.root)
        super().__init__(where, node)

    def _command(self) -> list[str]:
        assert "command" not in self._version.overlay.container, "the image's entry point"
        return [*PYTHON, "-m", "sandbox_plugin"]

    def _arguments(self, node: FakeNode | str, flags: Sequence[str]) -> list[str]:
        return [*self._version.overlay.container["args"], *self._version.arguments]

    def _environment(self, node: FakeNode | str) -> dict[str, str]:
        return {**self._version.overlay.variables, **self._own, **self._version.variables}

    def probe(self, name: str = "startupProbe") -> CompletedProcess[str]:
        """Its very command, with the pod's variables."""
        probe: Manifest = self._version.overlay.container[name]
        own = clean_environment(self._environment(""))
        own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
        command = probe["exec"]["command"]
        return run(command, env=own, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    def has_ended(self) -> bool:
        return self._process.poll() is not None


@dataclass
class ClusterNode:
    """A node with its kubelet, and the plugin's pod, if there is one."""

    where: Places
    node: FakeNode
    kubelet: GrpcKubelet
    pod: Pod | None = None
    version: Version | None = None
    available: bool = False

    def replace(self, version: Version) -> None:
        """The old pod ends before the new one starts, as a DaemonSet's does."""
        if self.pod is not None:
            (self.pod.kill if self.pod.has_ended() else self.pod.close)()
        self.pod, self.version = Pod(self.where, self.node, version), version

    def serves(self) -> bool:
        return {name: len(self.kubelet.healthy(name)) for name in self.kubelet.resources()} == {"nvidia.com/pgpu": 2}


@pytest.fixture
def nodes() -> Iterator[list[ClusterNode]]:
    with ExitStack() as stack:
        made = []
        for _ in range(NODES):
            where = stack.enter_context(places())
            kubelet = stack.enter_context(GrpcKubelet(where.kubelet))
            kubelet.start()
            made.append(ClusterNode(where, where.node("workstation"), kubelet))
        yield made
        for each in made:
            if each.pod is not None:
                (each.pod.kill if each.pod.has_ended() else each.pod.close)()


Hopeless = Callable[[Pod], bool]
"""Whether a pod that is not ready will never be."""


def becomes_ready(pod: Pod, hopeless: Hopeless) -> bool:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        if pod.probe().returncode == 0:
            return True
        if hopeless(pod):
            return False
    raise AssertionError(f"neither ready nor hopeless:\n{pod.log()}")


def install(nodes: list[ClusterNode], version: Version) -> None:
    """On every node at once, as a new DaemonSet is."""
    for node in nodes:
        node.replace(version)
    for node in nodes:
        assert node.pod is not None
        node.available = becomes_ready(node.pod, lambda pod: False)
        node.kubelet.wait_for(node.serves)


def roll_out(nodes: list[ClusterNode], version: Version, hopeless: Hopeless = lambda pod: False) -> None:
    """Until every node has it, or too many pods are not available."""
    most = version.overlay.by_kind["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"]
    assert isinstance(most, int)
    for node in sorted((node for node in nodes if node.version is not version), key=lambda node: node.available):
        if node.available and sum(not each.available for each in nodes) >= most:
            return
        node.replace(version)
        assert node.pod is not None
        node.available = becomes_ready(node.pod, hopeless)


def ended_with(status: int) -> Hopeless:
    return lambda pod: pod.has_ended() and pod.wait() == status


def says(reason: str) -> Hopeless:
    return lambda pod: reason in pod.probe().stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "hopeless"),
    [
        pytest.param(["--gpu-alias=no.dots"], {}, ended_with(2), id="a wrong setting"),
        pytest.param([], {"SANDBOX_PLUGIN_CDI_DIR": "/dev/null/cdi"}, says("CDI spec cannot be written"), id="no CDI"),
        pytest.param(
            [], {"SANDBOX_PLUGIN_KUBELET_DIR": "/nowhere"}, says("waiting for the kubelet's folder"), id="no kubelet"
        ),
    ],
)
def test_a_broken_version_stops_at_the_first_node_and_the_next_good_one_begins_there(
    nodes: list[ClusterNode], arguments: list[str], variables: dict[str, str], hopeless: Hopeless
) -> None:
    overlay = installed(KATA)
    old = Version(overlay)
    install(nodes, old)

    broken = Version(overlay, arguments, variables)
    roll_out(nodes, broken, hopeless)
    first, *others = nodes
    assert [node.version for node in nodes] == [broken, *[old] * (NODES - 1)]
    assert not first.available
    assert first.pod is not None
    assert first.pod.probe("readinessProbe").returncode == 1
    assert [node.serves() for node in others] == [True] * (NODES - 1)

    good = Version(overlay)
    roll_out(nodes, good)
    for node in nodes:
        assert node.version is good
        node.kubelet.wait_for(node.serves)


def test_a_good_version_goes_through_all_nodes_though_one_of_them_has_a_broken_gpu(nodes: list[ClusterNode]) -> None:
    overlay = installed(KUBEVIRT)
    install(nodes, Version(overlay))
    nodes[1].node.sicken("0000:02:00.0")
    nodes[1].kubelet.wait_for(lambda: len(nodes[1].kubelet.unhealthy("nvidia.com/pgpu")) == 1)
    new = Version(overlay)
    roll_out(nodes, new)
    assert [(node.version is new, node.available) for node in nodes] == [(True, True)] * NODES


def test_one_pod_at_a_time_is_replaced_and_one_that_ends_at_once_does_not_count_as_available() -> None:
    spec = installed(KATA).by_kind["DaemonSet"]["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}
    assert spec["minReadySeconds"] >= 10


def test_the_overlay_for_any_cluster_serves_fake_gpus_under_names_of_their_own(
    places: Places, kubelet: GrpcKubelet
) -> None:
    overlay = installed("manifests/overlays/dev")
    socket = Path(overlay.variables["SANDBOX_PLUGIN_STATUS_SOCKET"])
    assert socket.parent == STATUS_SOCKET.parent
    assert socket != STATUS_SOCKET, "the default means: below the fake host's folder"
    pod = Pod(places, "", Version(overlay))
    with pod:
        kubelet.wait_for(lambda: kubelet.resources() == {"nvidia.com/fake-gpu", "nvidia.com/fake-nvswitch"})
        kubelet.wait_for(lambda: len(kubelet.healthy("nvidia.com/fake-gpu")) == 8)
        while pod.probe().returncode:
            assert not pod.has_ended()
    hosts = {
        path for path, mount in overlay.mounts().items() if "hostPath" in mount["volume"] and not mount.get("readOnly")
    }
    assert hosts == {"/var/lib/kubelet/device-plugins"}
    assert "emptyDir" in overlay.mounts()["/tmp"]["volume"], "a preset is made there, and the image is read-only"
    for label in ("katacontainers.io/kata-runtime", "kubevirt.io/schedulable", "nvidia.com/gpu.present"):
        assert (label, "DoesNotExist", ()) in overlay.unwanted_nodes(), "the real plugin would wait for its lock"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        number: int = one.getsockname()[1]
        return number


def test_for_monitoring_the_probes_over_http_say_what_the_command_says(
    places: Places, absent_kubelet: GrpcKubelet
) -> None:
    overlay = installed("manifests/overlays/monitoring")
    port = free_port()
    address = overlay.variables["SANDBOX_PLUGIN_METRICS_ADDRESS"].replace(
        str(overlay.container["ports"][0]["containerPort"]), str(port)
    )

    def get(probe: str) -> int:
        path = overlay.container[f"{probe}Probe"]["httpGet"]["path"]
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except URLError:
            return 0

    def until(probe: str, status: int) -> None:
        end = time.monotonic() + TIMEOUT
        while get(probe) != status:
            assert time.monotonic() < end, pod.log()

    node = places.node("workstation")
    with Pod(places, node, Version(overlay, variables={"SANDBOX_PLUGIN_METRICS_ADDRESS": address})) as pod:
        until("liveness", 200)
        until("startup", 503)
        absent_kubelet.start()
        until("readiness", 200)
        assert get("liveness") == 200
        absent_kubelet.stop()
        until("readiness", 503)
        assert get("liveness") == 200, "a restart of the plugin brings no kubelet back"
