"""What each consumer gets, by the real process and a grpcio kubelet: the whole answer, and nothing beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import pytest
from conftest import MakeNode, StartDaemon
from daemon import ROOT, Daemon, Places
from google.protobuf import json_format
from kubelet import GrpcKubelet
from mediated import Mediated
from names import GEFORCE, NVSWITCH, PGPU, T4

from sandbox_plugin.fake.node import FakeNode

VGPU = "nvidia.com/GRID_T4-2Q"
KUBEVIRT = ("--consumer", "kubevirt")


def given(kubelet: GrpcKubelet, *containers: Sequence[str], resource: str = PGPU) -> list[dict[str, Any]]:
    """Everything that Allocate answers with for each container; empty fields are not in it."""
    answer = kubelet.plugin(resource).allocate(*containers)
    return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answer.container_responses]


def expected(*nodes: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The answer that gives these nodes and variables."""
    devices = [{"container_path": node, "host_path": node, "permissions": "mrw"} for node in nodes]
    return {"devices": devices} | ({"envs": dict(variables)} if variables else {})


def serve(kubelet: GrpcKubelet, daemon: StartDaemon, node: FakeNode, *flags: str, devices: int) -> Daemon:
    """The daemon for this consumer, as soon as that many GPUs are Healthy."""
    running = daemon(node, *flags)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == devices)
    return running


# Kata


@pytest.mark.parametrize(
    ("preset", "flags", "path"),
    [
        ("hgx-h100", [], "/dev/vfio/devices/vfio{}"),
        ("hgx-h100-group", [], "/dev/vfio/{}"),
        ("rtx-pro-6000", ["--require-iommufd"], "/dev/vfio/devices/vfio{}"),
    ],
)
def test_kata_gets_the_nodes_and_nothing_else(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, preset: str, flags: list[str], path: str
) -> None:
    serve(kubelet, daemon, fake_node(preset), *flags, devices=8)
    ids = sorted(kubelet.healthy(PGPU), key=int)
    nodes = [path.format(i) for i in ids]
    assert given(kubelet, ids[:3], ids[3:4]) == [expected(*nodes[:3]), expected(nodes[3])]


def test_for_confidential_guests_group_nodes_are_unhealthy_with_that_reason_and_never_given(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    running = daemon(fake_node("hgx-h100-group"), "--require-iommufd")
    kubelet.wait_for(lambda: len(kubelet.unhealthy(PGPU)) == 8 and len(kubelet.unhealthy(NVSWITCH)) == 4)
    one = min(kubelet.unhealthy(PGPU))
    with pytest.raises(grpc.RpcError) as refused:
        given(kubelet, [one])
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "confidential guests need an iommufd cdev" in (refused.value.details() or "")
    running.wait_for("device found", resource=PGPU, device=one, health="Unhealthy", reason="no-cdev: ")


# KubeVirt


def test_kubevirt_gets_an_address_for_each_device_and_the_nodes_that_libvirt_opens(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    """The GeForce's group has its audio and USB functions too: they have no address of their own."""
    node = fake_node("workstation")
    serve(kubelet, daemon, node, *KUBEVIRT, devices=2)
    geforce, t4 = (str(node.function(address).iommu_group) for address in (GEFORCE, T4))
    (both,), (one,) = given(kubelet, [t4, geforce]), given(kubelet, [geforce])
    assert both == expected(
        f"/dev/vfio/{t4}",
        "/dev/vfio/vfio",
        f"/dev/vfio/{geforce}",
        variables={"PCI_RESOURCE_NVIDIA_COM_PGPU": f"{T4},{GEFORCE}"},
    )
    assert one == expected(
        f"/dev/vfio/{geforce}", "/dev/vfio/vfio", variables={"PCI_RESOURCE_NVIDIA_COM_PGPU": GEFORCE}
    )


def test_on_a_kernel_with_cdevs_kubevirt_gets_both_ways_to_a_device(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    serve(kubelet, daemon, node, *KUBEVIRT, devices=8)
    by_id = {str(f.vfio.number): f for f in node.functions() if f.vfio is not None}
    first, second = by_id["4"], by_id["11"]
    assert given(kubelet, ["4", "11"]) == [
        expected(
            "/dev/vfio/devices/vfio4",
            "/dev/iommu",
            f"/dev/vfio/{first.iommu_group}",
            "/dev/vfio/vfio",
            "/dev/vfio/devices/vfio11",
            f"/dev/vfio/{second.iommu_group}",
            variables={"PCI_RESOURCE_NVIDIA_COM_PGPU": f"{first.address},{second.address}"},
        )
    ]


def test_a_group_of_several_gpus_is_one_device_and_has_one_address(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    group = node.function(GEFORCE).iommu_group
    node.remove(T4)
    node.add(T4, iommu_group=group)
    node.bind(T4)
    serve(kubelet, daemon, node, *KUBEVIRT, devices=1)
    assert given(kubelet, [str(group)]) == [
        expected(f"/dev/vfio/{group}", "/dev/vfio/vfio", variables={"PCI_RESOURCE_NVIDIA_COM_PGPU": GEFORCE})
    ]


def test_a_vgpu_has_its_uuid_in_a_variable_of_its_own(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    node.bind(T4, "nvidia")
    vgpus = Mediated(node, T4)
    first, second = (vgpus.add(number, "nvidia-231", "GRID T4-2Q", 70 + number) for number in (1, 2))
    serve(kubelet, daemon, node, *KUBEVIRT, devices=1)
    kubelet.wait_for(lambda: kubelet.healthy(VGPU) == {"71", "72"})
    assert given(kubelet, ["71", "72"], resource=VGPU) == [
        expected(
            "/dev/vfio/71",
            "/dev/vfio/vfio",
            "/dev/vfio/72",
            variables={"MDEV_PCI_RESOURCE_NVIDIA_COM_GRID_T4-2Q": f"{first},{second}"},
        )
    ]


def test_for_kubevirt_no_spec_is_written_and_none_is_waited_for(
    places: Places, fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    places.cdi.write_text("a file, where a folder cannot be made")
    running = serve(kubelet, daemon, fake_node("hgx-h100"), *KUBEVIRT, devices=8)
    assert len(given(kubelet, ["4"])) == 1
    assert places.cdi.read_text() == "a file, where a folder cannot be made"
    assert not running.events("cdi trouble")


# The document


def test_the_document_shows_what_a_run_shows() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/show-consumers.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
