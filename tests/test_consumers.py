"""What each consumer gets, by the real process or by what makes its answers: the whole answer, nothing beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from conftest import MakeNode, StartDaemon
from daemon import ROOT, Places
from google.protobuf import json_format
from kubelet import GrpcKubelet
from mediated import Mediated
from names import FIRST_GPU, GEFORCE, NVSWITCH, PGPU, T4

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer, Settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.answers import answer, prepared


def given(kubelet: GrpcKubelet, *containers: Sequence[str]) -> list[dict[str, Any]]:
    """Everything that Allocate answers with for each container; empty fields are not in it."""
    responses = kubelet.plugin(PGPU).allocate(*containers).container_responses
    return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in responses]


def expected(*nodes: str) -> dict[str, Any]:
    """The answer that gives these nodes."""
    return {"devices": [{"container_path": node, "host_path": node, "permissions": "mrw"} for node in nodes]}


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
    daemon(fake_node(preset), *flags)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
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


def answered(
    node: FakeNode, *device_ids: str, resource: str = PGPU, consumer: Consumer = Consumer.KUBEVIRT
) -> v1beta1.ContainerAllocateResponse:
    """What a container gets that was given these devices of the node, in this order."""
    settings = Settings(consumer=consumer)
    facts = scan_now(HostPaths(node.root))
    found = find_devices(facts, Rules(settings, ModelNames.load()))
    devices = {device.id: device for device in found.devices if device.resource == resource}
    container = answer(settings.consumer, resource, [devices[device_id] for device_id in device_ids], facts.egm_gpus)
    (response,) = v1beta1.AllocateResponse().parse(prepared([container]).SerializeToString()).container_responses
    return response


def answering(*nodes: str, **variables: str) -> v1beta1.ContainerAllocateResponse:
    """The answer that gives these nodes and variables, and nothing else."""
    devices = [v1beta1.DeviceSpec(container_path=node, host_path=node, permissions="mrw") for node in nodes]
    return v1beta1.ContainerAllocateResponse(envs=variables, devices=devices)


def test_kubevirt_gets_an_address_for_each_device_and_the_nodes_that_libvirt_opens(fake_node: MakeNode) -> None:
    """The GeForce's group has its audio and USB functions too: they have no address of their own."""
    node = fake_node("workstation")
    geforce, t4 = (str(node.function(address).iommu_group) for address in (GEFORCE, T4))
    nodes = (f"/dev/vfio/{t4}", "/dev/vfio/vfio", f"/dev/vfio/{geforce}")
    assert answered(node, t4, geforce) == answering(*nodes, PCI_RESOURCE_NVIDIA_COM_PGPU=f"{T4},{GEFORCE}")


def test_kubevirt_gets_graces_memory_with_all_gpus_that_it_belongs_to_and_only_then(fake_node: MakeNode) -> None:
    node = fake_node("rtx-pro-6000")
    first, second, third = [f for f in node.functions() if f.vfio is not None][:3]
    for name, gpus in (("egm4", f"{first.address}\n{second.address}\n"), ("egm5", "")):
        folder = node.root / f"sys/class/egm/{name}"
        folder.mkdir(parents=True)
        (folder / "gpu_devices").write_text(gpus)
    ids = [str(f.vfio.number) for f in (first, second, third) if f.vfio is not None]

    def egm(*asked: str, consumer: Consumer = Consumer.KUBEVIRT) -> list[str]:
        given = answered(node, *asked, consumer=consumer).devices
        return [device.host_path for device in given if "egm" in device.host_path]

    assert egm(ids[0]) == egm(ids[1], ids[2]) == [], "part of its GPUs"
    assert egm(ids[1], ids[0]) == egm(*ids) == ["/dev/egm4"]
    assert egm(*ids, consumer=Consumer.KATA) == []


def test_on_a_kernel_with_cdevs_kubevirt_gets_both_ways_to_a_device(fake_node: MakeNode) -> None:
    node = fake_node("hgx-h100")
    by_id = {str(f.vfio.number): f for f in node.functions() if f.vfio is not None}
    first, second = by_id["4"], by_id["11"]
    nodes = (
        "/dev/vfio/devices/vfio4",
        "/dev/iommu",
        f"/dev/vfio/{first.iommu_group}",
        "/dev/vfio/vfio",
        "/dev/vfio/devices/vfio11",
        f"/dev/vfio/{second.iommu_group}",
    )
    addresses = f"{first.address},{second.address}"
    assert answered(node, "4", "11") == answering(*nodes, PCI_RESOURCE_NVIDIA_COM_PGPU=addresses)


def test_a_group_of_several_gpus_is_one_device_and_has_one_address(fake_node: MakeNode) -> None:
    node = fake_node("workstation")
    group = node.function(GEFORCE).iommu_group
    node.remove(T4)
    node.add(T4, iommu_group=group)
    node.bind(T4)
    nodes = (f"/dev/vfio/{group}", "/dev/vfio/vfio")
    assert answered(node, str(group)) == answering(*nodes, PCI_RESOURCE_NVIDIA_COM_PGPU=GEFORCE)


def test_a_vgpu_has_its_uuid_in_a_variable_of_its_own(fake_node: MakeNode) -> None:
    node = fake_node("workstation")
    node.bind(T4, "nvidia")
    vgpus = Mediated(node, T4)
    first, second = (vgpus.add(number, "nvidia-231", "GRID T4-2Q", 70 + number) for number in (1, 2))
    variables = {"MDEV_PCI_RESOURCE_NVIDIA_COM_GRID_T4-2Q": f"{first},{second}"}
    nodes = ("/dev/vfio/71", "/dev/vfio/vfio", "/dev/vfio/72")
    assert answered(node, "71", "72", resource="nvidia.com/GRID_T4-2Q") == answering(*nodes, **variables)


def test_for_kubevirt_no_spec_is_written_and_none_is_waited_for(
    places: Places, fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    places.cdi.write_text("a file, where a folder cannot be made")
    node = fake_node("hgx-h100")
    running = daemon(node, "--consumer", "kubevirt")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    group = f"/dev/vfio/{node.function(FIRST_GPU).iommu_group}"
    nodes = expected("/dev/vfio/devices/vfio4", "/dev/iommu", group, "/dev/vfio/vfio")
    assert given(kubelet, ["4"]) == [nodes | {"envs": {"PCI_RESOURCE_NVIDIA_COM_PGPU": FIRST_GPU}}]
    assert places.cdi.read_text() == "a file, where a folder cannot be made"
    assert not running.events("cdi trouble")


# The document


def test_the_document_shows_what_a_run_shows() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/show-consumers.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
