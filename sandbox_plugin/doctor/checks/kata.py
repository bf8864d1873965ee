"""Kata's configuration files, and what in them the node must have ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import KataFile, Node, Unread

_tell = Teller(Group.KATA)
_GPU_SHIM = "nvidia-gpu"
"""In the names of the files that Kata makes for GPUs."""
_NO_PORT = "no-port"
_CONFIDENTIAL = ("confidential_guest", "sev_snp_guest", "tdx_guest")


def findings(node: Node) -> Iterator[Finding]:
    if not node.settings.consumer.reads_cdi:
        return
    files = node.kata
    if isinstance(files, Unread):
        yield _tell.fail("configuration", files.why, "Unmount what hangs there: Kata waits for it too.")
    elif not files and (node.in_container or node.is_fake):
        where = "this fake node" if node.is_fake else "this container; run doctor on the host"
        yield _tell.unseen("configuration", f"Kata's files are not in {where}")
    elif not files:
        seen = "Kata is not in /etc/kata-containers, /opt/kata or /usr/share/defaults"
        yield _tell.warn("configuration", seen, "Install Kata Containers (kata-deploy), unless it is elsewhere.")
    else:
        yield from _files(node, files)


def _files(node: Node, files: tuple[KataFile, ...]) -> Iterator[Finding]:
    broken = [file for file in files if file.trouble is not None]
    for file in broken:
        yield _tell.fail("configuration", str(file.trouble), "Repair this file: its runtime class starts no pod.")
    for_gpus = [file for file in files if file.trouble is None and _is_for_gpus(file)]
    wrong = [finding for file in for_gpus for finding in _file(node, file)]
    yield from wrong
    if not for_gpus and not broken:
        seen = f"none of {len(files)} files plugs devices: cold_plug_vfio is {_NO_PORT} in all"
        yield _tell.warn("configuration", seen, 'Use the runtime class kata-qemu-nvidia-gpu, or set "root-port".')
    elif not wrong and for_gpus:
        count = len(for_gpus)
        yield _tell.passed(
            "configuration", f"{count} file{'' if count == 1 else 's'} for GPUs, e.g. {for_gpus[0].path.name}"
        )
    yield from _hugepages(node, for_gpus)
    yield from _memlock(node, for_gpus)


def _is_for_gpus(file: KataFile) -> bool:
    ports = [section.get("cold_plug_vfio") for section in _hypervisors(file)]
    return _GPU_SHIM in file.path.name or any(port not in (None, "", _NO_PORT) for port in ports)


def _hypervisors(file: KataFile) -> list[Mapping[str, Any]]:
    """The tables `[hypervisor.NAME]`."""
    tables = file.says.get("hypervisor")
    return [table for table in tables.values() if isinstance(table, dict)] if isinstance(tables, dict) else []


def _has(file: KataFile, *keys: str) -> bool:
    """Whether one of these is true in it."""
    return any(section.get(key) is True for section in _hypervisors(file) for key in keys)


def _file(node: Node, file: KataFile) -> Iterator[Finding]:
    cold = [port for section in _hypervisors(file) if (port := section.get("cold_plug_vfio")) is not None]
    if not cold or any(port in ("", _NO_PORT) for port in cold):
        seen = f"{file.path}: cold_plug_vfio is {cold[0] if cold else 'not set'!r}, so no GPU gets into the VM"
        yield _tell.fail("cold-plug", seen, 'Set cold_plug_vfio = "root-port" in [hypervisor.qemu].')
    if not file.sockets:
        seen = f"{file.path}: pod_resource_api_sock is empty, so Kata does not learn which GPUs a pod has"
        path = "/var/lib/kubelet/pod-resources/kubelet.sock"
        make = _tell.fail if _GPU_SHIM in file.path.name else _tell.warn  # it may serve pods with CDI annotations
        yield make("pod-resources-socket", seen, f'Set pod_resource_api_sock = "{path}" in [runtime].')
    elif not all(file.sockets.values()) and node.pod_resources.trouble is None:
        # Without a PodResources, whose absence is a finding of its own, nothing is said of its path.
        (named,) = file.sockets
        seen = f"{file.path}: pod_resource_api_sock is {named}, which is not there"
        yield _tell.fail("pod-resources-socket", seen, f"Set it to {node.settings.pod_resources_socket}.")
    yield from _iommufd(node, file)


def _iommufd(node: Node, file: KataFile) -> Iterator[Finding]:
    if _has(file, "enable_iommufd") and not node.host.kernel_has_cdevs:
        seen = f"{file.path}: enable_iommufd is true, and this kernel has no VFIO cdevs"
        yield _tell.fail("iommufd", seen, "Set it to false, or boot a kernel with CONFIG_VFIO_DEVICE_CDEV.")
    is_off = any(section.get("enable_iommufd") is False for section in _hypervisors(file))
    if is_off and _has(file, *_CONFIDENTIAL):
        seen = f"{file.path}: enable_iommufd is false, and confidential guests need iommufd"
        yield _tell.fail("iommufd", seen, "Set enable_iommufd = true.")


def _hugepages(node: Node, files: list[KataFile]) -> Iterator[Finding]:
    wanting = [file for file in files if _has(file, "enable_hugepages")]
    if not wanting or isinstance(node.limits, Unread):
        return
    free = {size: free for size, (_, free) in node.limits.hugepages.items()}
    if any(free.values()):
        counts = ", ".join(f"{count} of {size}" for size, count in free.items() if count)
        yield _tell.passed("hugepages", f"free: {counts}")
    else:
        seen = f"{wanting[0].path}: enable_hugepages is true, and no huge page is free"
        yield _tell.fail(
            "hugepages", seen, "Reserve some (vm.nr_hugepages, or hugepages= at boot), or set it to false."
        )


def _memlock(node: Node, files: list[KataFile]) -> Iterator[Finding]:
    """All memory of a VM is pinned: with CAP_IPC_LOCK without limit (vfio_lock_acct), so this is for rootless VMs."""
    wanting = [file for file in files if _has(file, "rootless")]
    if not wanting or isinstance(node.limits, Unread):
        return
    for runtime, limit in node.limits.memlock.items():
        if limit != "unlimited":
            seen = f"{wanting[0].path}: rootless is true, and {runtime} may lock only {limit} bytes of memory"
            yield _tell.fail("memlock", seen, f"Set LimitMEMLOCK=infinity in the systemd unit of {runtime}.")
    if not node.limits.memlock:
        yield _tell.unseen("memlock", "no containerd or CRI-O is seen, whose limit VMs inherit")
