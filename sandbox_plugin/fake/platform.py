"""The firmware and the kernel of a fake node, beside PCI and vfio: what `doctor` looks at.

Names and formats are those of Linux 6.12 on a machine that is ready for passthrough; tests break them one by one.
"""

from __future__ import annotations

from pathlib import Path

from sandbox_plugin.fake.hardware import Kernel

_BOOT = "BOOT_IMAGE=/boot/vmlinuz root=/dev/sda1 ro"
_IOMMUS = {
    "dmar": ("DMAR", ("dmar0", "dmar1"), f"{_BOOT} intel_iommu=on", "IR-IO-APIC"),
    "ivhd": ("IVRS", ("ivhd0", "ivhd1"), _BOOT, "IR-IO-APIC"),
    "smmu3": ("IORT", ("smmu3.0x0000000100000000",), _BOOT, "GICv3"),
}
"""Kind -> ACPI table, names in /sys/class/iommu, kernel command line, and an interrupt chip."""
_LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1048576              1048576              files
Max locked memory         8388608              8388608              bytes
"""


def create_platform(root: Path, kernel: Kernel) -> None:
    """Makes it all, in a tree that has none of it."""
    table, iommus, command_line, chip = _IOMMUS[kernel.iommu]
    files = {
        "proc/cmdline": f"{command_line}\n",
        "proc/self/limits": _LIMITS,
        "proc/sys/fs/file-nr": "4096\t0\t9223372036854775807\n",
        "proc/sys/fs/inotify/max_user_instances": "8192\n",
        f"sys/firmware/acpi/tables/{table}": "",
        "sys/kernel/irq/0/chip_name": f"{chip}\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "0\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in ("sys/class/misc/kvm", "sys/bus/platform/devices", *(f"sys/class/iommu/{name}" for name in iommus)):
        (root / folder).mkdir(parents=True)
    # The kubelet's folder is this machine's own, on a fake host too: so are the locks in it.
    (root / "proc/locks").symlink_to("/proc/locks")
