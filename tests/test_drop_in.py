"""In the place of NVIDIA's reference plugin: what it was given, what it gave, and what it left behind.

What the reference does is written down here a second time, by itself: its IDs (`reference_devices`), the specs that it
leaves (`reference_spec`), and the container in which the GPU Operator starts it (`Slot`).
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
from cdi_reader import nodes_of, read_folder, reading
from conftest import MakeNode, StartDaemon
from daemon import PYTHON, Daemon, Places, sockets
from kubelet import GrpcKubelet
from names import FIRST_GPU, NVSWITCH, PGPU
from outputs import assert_allocates, read_cdi
from pods import PodResources
from trials import QUICK, wait_until

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules

Devices = dict[str, dict[str, str]]
"""Resource name -> device ID -> its node."""

SECOND_GPU = "0000:43:00.0"
"""Of the presets `hgx-h100` and `hgx-h100-group`."""
MODELS = {
    "0x2330": "GH100_H100_SXM5_80GB",
    "0x22a3": "GH100_H100_NVSWITCH",
    "0x1eb8": "TU104GL_TESLA_T4",
    "0x21c4": "TU116_GEFORCE_GTX_1660_SUPER",
    "0x26b9": "AD102GL_L40S",
}
"""What the reference calls the models of the presets, by device ID."""
# What the reference does


def reference_devices(root: Path, *, by_model: bool = False) -> Devices:
    """What the reference offers on this tree."""
    found: Devices = {}
    for link in sorted((root / "sys/bus/pci/devices").iterdir()):
        kind = {"0x030000": "pgpu", "0x030200": "pgpu", "0x068000": "nvswitch"}.get(
            (link / "class").read_text().strip()
        )
        if (link / "vendor").read_text().strip() != "0x10de" or kind is None:
            continue
        if not (link / "driver").is_symlink() or (link / "driver").resolve().name != "vfio-pci":
            continue
        number = (link / "iommu_group").resolve().name
        node = f"/dev/vfio/{number}"
        cdevs = [entry.name for entry in (link / "vfio-dev").iterdir() if (entry / "dev").exists()]
        if (root / "dev/iommu").exists() and cdevs:
            number, node = cdevs[0].removeprefix("vfio"), f"/dev/vfio/devices/{cdevs[0]}"
        name = MODELS[(link / "device").read_text().strip()] if by_model else kind
        found.setdefault(f"nvidia.com/{name}", {})[number] = node
    return found


def reference_spec(resource: str, nodes: Mapping[str, str]) -> str:
    """The spec as the reference writes it, by CDI's Go library: keys in order of the alphabet, no mark, `vfio` beside
    a group's node."""
    lines = ["---", "cdiVersion: 0.5.0", "containerEdits: {}", "devices:"]
    for name, node in nodes.items():
        lines += ["- containerEdits:", "    deviceNodes:"]
        if not node.startswith("/dev/vfio/devices/"):
            lines.append("    - path: /dev/vfio/vfio")
        lines += [f"    - path: {node}", f'  name: "{name}"']
    return "\n".join([*lines, f"kind: {resource}"]) + "\n"


def leave_specs(places: Places, devices: Devices) -> None:
    """The reference removes none of its specs."""
    places.cdi.mkdir(exist_ok=True)
    for resource, nodes in devices.items():
        (places.cdi / f"{resource.replace('/', '-')}.yaml").write_text(reference_spec(resource, nodes))


def leave_sockets(places: Places, devices: Devices) -> None:
    """Nor its sockets, when it is killed."""
    for resource in devices:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(places.kubelet / f"sandbox-{resource.partition('/')[2]}.sock"))


# IDs, by the inventory alone


@pytest.mark.parametrize(
    ("preset", "by_model"),
    # Under one alias the two GPUs of `workstation` fight over one socket of the reference's.
    [*product(["hgx-h100", "hgx-h100-group", "uneven"], [False, True]), ("rtx-pro-6000", False), ("workstation", True)],
)
def test_names_ids_and_nodes_are_those_of_the_reference(fake_node: MakeNode, preset: str, by_model: bool) -> None:
    node = fake_node(preset)
    aliases = {"gpu_alias": "", "nvswitch_alias": ""} if by_model else {}
    settings = Settings(**aliases)  # type: ignore[arg-type]
    ours: Devices = {}
    for device in find_devices(scan_now(HostPaths(node.root)), Rules(settings, ModelNames.load())).devices:
        ours.setdefault(device.resource, {})[device.id] = device.node
    wanted = reference_devices(node.root, by_model=by_model)
    assert sum(map(len, wanted.values())) >= 2
    assert ours == wanted


# In the reference's container


OPERATOR = {
    "NODE_NAME": "node-1",
    "POD_NAMESPACE": "gpu-operator",
    "POD_SERVICE_ACCOUNT": "nvidia-kata-sandbox-device-plugin",
}
"""What the GPU Operator sets: nothing that changes anything."""


class Slot(Daemon):
    """In mounts of its own, where the host's root is: the tree's /sys, a /dev, and the two folders.

    Nothing is said to it: no flag, no variable of ours. Needs to be allowed to mount.
    """

    dev = ""
    """How the /dev at /mnt is filled; /dev/null is in it."""
    start = 'exec "$@"'

    def _command(self) -> list[str]:
        self._places.cdi.mkdir(exist_ok=True)
        script = f"""
            set -e
            node=$1 kubelet=$2 cdi=$3; shift 3
            mount -t tmpfs none /var/lib
            mount -t tmpfs none /run
            mkdir -p /var/lib/kubelet/device-plugins /var/run/cdi
            mount --bind "$kubelet" /var/lib/kubelet/device-plugins
            mount --bind "$cdi" /var/run/cdi
            mount --bind "$node/sys" /sys
            mount --bind "$node/proc/devices" /proc/devices
            mount -t tmpfs -o mode=755 none /mnt
            cp -a /dev/null /mnt/
            {self.dev}
            mount --move /mnt /dev
            {self.start}
        """
        return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "slot"]

    def _arguments(self, node: FakeNode | str, flags: Sequence[str]) -> list[str]:
        assert not isinstance(node, str)
        places = [str(node.root), str(self._places.kubelet), str(self._places.cdi)]
        return [*places, *PYTHON, "-m", "sandbox_plugin"]

    def _environment(self, node: FakeNode | str) -> dict[str, str]:
        return {**OPERATOR, "TMPDIR": "/tmp"}


class Privileged(Slot):
    """As the GPU Operator starts it: with every capability, and a /dev that is a copy of the host's as it was then."""

    dev = 'cp -a "$node/dev/." /mnt/'


class Unprivileged(Slot):
    """As our own DaemonSet does: root without a capability, a root that is read-only, and no device in /dev."""

    start = """
            mount -o remount,bind,ro /
            exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
    """

    def _environment(self, node: FakeNode | str) -> dict[str, str]:
        # Its coverage could not be written down: with this empty it is not measured.
        return {**super()._environment(node), "COVERAGE_PROCESS_CONFIG": ""}


def can_mount() -> bool:
    asked = subprocess.run(
        ["unshare", "--mount", "--propagation=private", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        check=False,
    )
    return asked.returncode == 0


@pytest.mark.parametrize("slot", [Privileged, Unprivileged], ids=["privileged, a copy of /dev", "sysfs alone"])
@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_in_the_references_container_it_follows_the_node_whatever_its_dev_holds(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, preset: str, slot: type[Slot]
) -> None:
    if os.geteuid() or not can_mount():
        pytest.skip("needs root that may mount")
    node = fake_node(preset)
    node.unbind(FIRST_GPU)  # its node is not in the copy
    with slot(places, node) as running:
        kubelet.wait_for(lambda: healthy(kubelet) == names_of(reference_devices(node.root)))
        assert sockets(places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}
        node.bind(FIRST_GPU)
        wanted = reference_devices(node.root)
        assert len(wanted[PGPU]) == 8
        kubelet.wait_for(lambda: healthy(kubelet) == names_of(wanted))
        assert_gives(kubelet, wanted)
        wait_for_specs(places, wanted)
        node.unbind(SECOND_GPU)  # its node stays in the copy
        rest = reference_devices(node.root)
        (lost,) = wanted[PGPU].keys() - rest[PGPU].keys()
        kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {lost})
        wait_for_specs(places, rest)
        assert healthy(kubelet) == names_of(rest)
        assert not running.events("no kernel events")


def by_name(devices: Devices) -> dict[str, str]:
    """<resource>=<ID> -> node."""
    return {f"{resource}={number}": node for resource, nodes in devices.items() for number, node in nodes.items()}


def names_of(devices: Mapping[str, Iterable[str]]) -> set[str]:
    return {f"{resource}={device_id}" for resource, ids in devices.items() for device_id in ids}


def healthy(kubelet: GrpcKubelet) -> set[str]:
    return names_of({resource: kubelet.healthy(resource) for resource in kubelet.resources()})


def wait_for_specs(places: Places, devices: Devices) -> None:
    wait_until(lambda: read_folder(places.cdi).keys() == names_of(devices), "specs of just these devices")


def assert_gives(kubelet: GrpcKubelet, devices: Devices) -> None:
    """For each ID Allocate answers just the reference's node of that ID."""
    for resource, nodes in devices.items():
        assert_allocates(kubelet.plugin(resource), [[device_id] for device_id in nodes], nodes)


# Switching a node


PODS = {"training": (PGPU, 3), "inference": (PGPU, 1), "fabric": (NVSWITCH, 4)}
"""Pods that run, and how many devices each holds."""


@contextmanager
def running_pods(node: FakeNode, places: Places, devices: Devices, *, known: bool) -> Iterator[Devices]:
    """Pods whose VMs hold devices that the reference gave them, and PodResources that knows, if it is `known`."""
    left = {resource: list(nodes) for resource, nodes in devices.items()}
    held: Devices = {}
    with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
        for pod, (resource, number) in PODS.items():
            ids, left[resource] = left[resource][:number], left[resource][number:]
            pods.hold(pod, resource, *ids)
            held.setdefault(resource, {}).update({device_id: devices[resource][device_id] for device_id in ids})
        nodes = {node for nodes in held.values() for node in nodes.values()}
        for function in node.functions():
            cdev = function.vfio and f"/dev/vfio/devices/vfio{function.vfio.number}"
            if function.driver == "vfio-pci" and {cdev, f"/dev/vfio/{function.iommu_group}"} & nodes:
                node.set_enable(function.address, 1)  # what the kernel shows of a device that a VM uses
        if known:
            pods.start(age=3600)
        yield held


@pytest.mark.parametrize("known", [True, False], ids=["PodResources", "no PodResources"])
@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_a_node_that_is_switched_with_pods_running_keeps_every_pods_device(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, preset: str, known: bool
) -> None:
    node = fake_node(preset)
    devices = reference_devices(node.root)
    leave_specs(places, devices)
    leave_sockets(places, devices)
    with running_pods(node, places, devices, known=known) as held, Daemon(places, node) as plugin:
        kubelet.wait_for(lambda: healthy(kubelet) == names_of(devices))
        for resource in devices:
            assert [message.unhealthy for message in kubelet.history(resource)] == [[]] * len(kubelet.history(resource))
        assert not plugin.events("device changed")
        assert sockets(places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}
        assert read_folder(places.cdi, nodes_of(node.root)) == {n: (path,) for n, path in by_name(devices).items()}
        for function in node.functions():
            if function.driver == "vfio-pci":
                node.set_enable(function.address, 0)
        assert_gives(kubelet, held)  # to the next pods, now that these have ended


@pytest.mark.parametrize("names", ["by node", "by index"])
@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_specs_that_the_reference_left_are_taken_over_and_never_doubled(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, preset: str, names: str
) -> None:
    node = fake_node(preset)
    devices = reference_devices(node.root)
    left = devices
    if names == "by index":
        left = {resource: dict(zip("01234567", nodes.values(), strict=False)) for resource, nodes in devices.items()}
    leave_specs(places, left)
    with reading(lambda: read_folder(places.cdi)) as faults:
        plugin = daemon(node)
        kubelet.wait_for(lambda: healthy(kubelet) == names_of(devices))
        for resource in devices:
            plugin.wait_for("cdi spec of another writer replaced", resource=resource)
    assert not faults
    assert read_cdi(places.cdi) == by_name(devices)


def test_specs_that_the_reference_left_of_resources_without_a_device_are_removed(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    # Once there were switches, or a resource for each model; the second is the name of a model that is not here.
    leave_specs(places, {NVSWITCH: {"0": "/dev/vfio/95"}, "nvidia.com/GA100_A100_PCIE_80GB": {"1": "/dev/vfio/96"}})
    daemon(node, QUICK, P_GPU_ALIAS="", NVSWITCH_ALIAS="nvswitch")
    wanted = reference_devices(node.root, by_model=True)
    kubelet.wait_for(lambda: healthy(kubelet) == names_of(wanted))
    wait_for_specs(places, wanted)
