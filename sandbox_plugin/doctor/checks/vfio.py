"""vfio itself: its drivers, its cdevs, and the mode without an IOMMU."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import Kernel, Node, Unread
from sandbox_plugin.model import is_vfio_driver

_tell = Teller(Group.VFIO)
_KERNEL = "Boot a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV."


def findings(node: Node) -> Iterator[Finding]:
    kernel = node.kernel
    if isinstance(kernel, Unread):
        yield _tell.unseen("driver", f"sysfs: {kernel.why}")
        return
    drivers = [driver for driver in kernel.drivers if is_vfio_driver(driver)]
    if node.has_vfio:
        yield _tell.passed("driver", f"{', '.join(drivers) or 'the vendor of the vGPUs has its own'} loaded")
        yield _cdevs(node, kernel)
    else:
        seen = "no vfio driver is loaded, so no GPU can be bound to one"
        yield _tell.fail("driver", seen, "Run modprobe vfio-pci, then `sandbox-plugin vfio bind --all --persist`.")
    if kernel.unsafe_noiommu:
        seen = "enable_unsafe_noiommu_mode is on: it lets programs use devices without protection of the host"
        yield _tell.warn(
            "noiommu", seen, "Remove vfio.enable_unsafe_noiommu_mode; the plugin never offers such devices."
        )


def _cdevs(node: Node, kernel: Kernel) -> Finding:
    if node.host.kernel_has_cdevs:
        return _tell.passed("cdevs", "the kernel makes them")
    seen = "this kernel has only group nodes, and confidential guests need VFIO cdevs"
    if node.settings.require_iommufd:
        return _tell.fail("cdevs", f"{seen}; require-iommufd is set", _KERNEL)
    if kernel.snp or kernel.tdx:
        return _tell.warn("cdevs", f"{seen}; KVM can start such guests", _KERNEL)
    return _tell.passed("cdevs", "none, group nodes only; only confidential guests need them")
