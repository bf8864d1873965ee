"""What Allocate gives a container, for each consumer: pure functions of the devices.

Kata gets the device's own node and nothing else: it finds the CDI name in PodResources, and the policy of a
confidential guest checks every variable and device. KubeVirt's virt-launcher needs to be told the PCI addresses, and
needs the nodes that libvirt opens: those of the device, and VFIO's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer
from sandbox_plugin.inventory.passing import by_cdev, by_group, egm_nodes
from sandbox_plugin.model import Device
from sandbox_plugin.rpc.codec import Prepared, field

_PERMISSIONS = b"mrw"
"""A VM needs the node whole: read, write, and mknod for runtimes that make it again in the sandbox."""


class Answer(NamedTuple):
    """What one container gets."""

    variables: Mapping[str, str]
    nodes: Sequence[str]
    """Each under its own path, to read, write and make."""


class _PreparedAnswer(Prepared, v1beta1.AllocateResponse):
    """An answer to Allocate, for which all pod admission waits."""


def prepared(answers: Iterable[Answer]) -> v1beta1.AllocateResponse:
    """The answer to an Allocate, from those for its containers."""
    return _PreparedAnswer(b"".join([field(1, _encoded(answer)) for answer in answers]))


def answer(
    consumer: Consumer, resource: str, devices: Sequence[Device], egm_gpus: Mapping[str, frozenset[str]]
) -> Answer:
    """The answer for one container that gets these devices, in this order. `egm_gpus`: as in `HostFacts`."""
    if consumer is Consumer.KUBEVIRT:
        nodes = [*_kubevirt_nodes(devices), *egm_nodes(devices, egm_gpus)]
        return Answer(_kubevirt_variables(resource, devices), nodes)
    return Answer({}, [device.node for device in devices])


def _encoded(answer: Answer) -> bytes:
    """A ContainerAllocateResponse: `envs` is its field 1, `devices` its field 3."""
    variables = bytes(v1beta1.ContainerAllocateResponse(envs=dict(answer.variables))) if answer.variables else b""
    return variables + b"".join([field(3, _device_spec(node.encode())) for node in answer.nodes])


def _device_spec(node: bytes) -> bytes:
    """A DeviceSpec: `container_path`, `host_path`, `permissions`."""
    return field(1, node) + field(2, node) + field(3, _PERMISSIONS)


def _kubevirt_variables(resource: str, devices: Sequence[Device]) -> dict[str, str]:
    """`PCI_RESOURCE_NVIDIA_COM_PGPU=0000:1b:00.0,...`: exactly one address for each device, in the devices' order.

    virt-launcher takes one address for each GPU of the VM; with one too many or too few all later ones would shift. Of
    a group with several devices it is the first one's. For mediated devices they are UUIDs, in `MDEV_PCI_RESOURCE_...`.
    """
    suffix = resource.upper().replace("/", "_").replace(".", "_")
    addresses: dict[str, list[str]] = {}
    for device in devices:
        addresses.setdefault("MDEV_PCI_RESOURCE" if device.mdev else "PCI_RESOURCE", []).append(device.address)
    return {f"{prefix}_{suffix}": ",".join(listed) for prefix, listed in addresses.items()}


def _kubevirt_nodes(devices: Sequence[Device]) -> list[str]:
    """Every node that libvirt may open for these devices, each once.

    On a kernel with cdevs those are the cdevs with /dev/iommu, and the group nodes with /dev/vfio/vfio as well: which
    of the two ways is gone is virt-launcher's choice, and today's goes the second.
    """
    return list(dict.fromkeys(node for d in devices for node in (*by_cdev(d), *by_group(d))))
