"""Firmware and kernel: the IOMMU, interrupts, KVM, confidential guests."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import Kernel, Node, Unread

_tell = Teller(Group.PLATFORM)
_OFF = ("intel_iommu=off", "amd_iommu=off", "iommu=off")
_NO_REMAPPING = ("intremap=off", "nointremap")
_PASSTHROUGH = ("iommu=pt", "iommu.passthrough=1")
_ACS_OVERRIDE = "pcie_acs_override="
_SETUP = "Switch on the IOMMU in the firmware's setup: VT-d (Intel), IOMMU or AMD-Vi (AMD), SMMU (Arm)"


def findings(node: Node) -> Iterator[Finding]:
    kernel = node.kernel
    if isinstance(kernel, Unread):
        yield _tell.unseen("iommu", f"sysfs: {kernel.why}")
        return
    yield _iommu(node, kernel)
    if node.has_iommu:
        yield _interrupts(kernel)
    yield _command_line(kernel)
    yield _kvm(kernel)
    yield _confidential(node, kernel)


def _iommu(node: Node, kernel: Kernel) -> Finding:
    if node.has_iommu:
        names = ", ".join(kernel.iommus[:3]) + (f" and {len(kernel.iommus) - 3} more" if len(kernel.iommus) > 3 else "")
        return _tell.passed("iommu", f"{kernel.groups} groups" + (f" by {names}" if names else ""))
    seen = "the kernel has made no IOMMU groups"
    if found := [word for word in kernel.command_line if word in _OFF]:
        seen += f", since its command line has {' and '.join(found)}"
        return _tell.fail("iommu", seen, f"Remove {' and '.join(found)} from the kernel's command line, and reboot.")
    if kernel.tables is None:
        action = f"{_SETUP}; on Intel also boot with intel_iommu=on."
        return _tell.fail("iommu", f"{seen}; what the firmware offers cannot be seen", action)
    if not kernel.tables:
        return _tell.fail("iommu", f"{seen}, and the firmware has no table DMAR, IVRS or IORT", f"{_SETUP}.")
    seen += f", although the firmware has the table {', '.join(sorted(kernel.tables))}"
    if "DMAR" in kernel.tables and "intel_iommu=on" not in kernel.command_line:
        return _tell.fail("iommu", seen, "Add intel_iommu=on to the kernel's command line, and reboot.")
    return _tell.fail("iommu", seen, "Look in dmesg for DMAR, AMD-Vi or smmu: the driver says why it gave up.")


def _interrupts(kernel: Kernel) -> Finding:
    """vfio_iommu_type1_attach_group in drivers/vfio/vfio_iommu_type1.c refuses without it."""
    name = "interrupt-remapping"
    if not kernel.irq_chips:
        return _tell.unseen(name, "the kernel shows no interrupt chips")
    if remapped := sorted(chip for chip in kernel.irq_chips if chip.startswith("IR-")):
        return _tell.passed(name, f"on ({remapped[0]})")
    if "IO-APIC" not in kernel.irq_chips:
        return _tell.passed(name, "nothing to do on this architecture")
    words = [word for word in kernel.command_line if word in _NO_REMAPPING]
    action = "Switch it on in the firmware's setup (with VT-d or the IOMMU, and x2APIC)."
    if words:
        action = f"Remove {' and '.join(words)} from the kernel's command line, and reboot."
    if kernel.unsafe_interrupts:
        seen = "off, and allow_unsafe_interrupts lets VMs start all the same: one can send the host any interrupt"
        return _tell.warn(name, seen, action)
    return _tell.fail(name, "off, so vfio refuses every device", action)


def _command_line(kernel: Kernel) -> Finding:
    if not kernel.command_line:
        return _tell.unseen("command-line", "/proc/cmdline cannot be read")
    if found := [word for word in kernel.command_line if word.startswith(_ACS_OVERRIDE)]:
        seen = f"{found[0]} makes IOMMU groups smaller than the hardware separates: VMs may reach each other's GPUs"
        return _tell.warn("command-line", seen, "Remove it, unless all VMs of this node trust each other.")
    telling = [word for word in kernel.command_line if "iommu" in word or word.startswith(("vfio", "pci="))]
    return _tell.passed("command-line", " ".join(telling) or "nothing in it about IOMMU or vfio")


def _kvm(kernel: Kernel) -> Finding:
    if kernel.has_kvm:
        return _tell.passed("kvm", "loaded")
    action = "Switch on virtualization in the firmware's setup (VT-x, SVM), and load kvm_intel or kvm_amd."
    return _tell.fail("kvm", "not there, so no VM can start", action)


def _confidential(node: Node, kernel: Kernel) -> Finding:
    """What KVM says of itself. SEV-SNP needs an IOMMU that translates: iommu_snp_enable in drivers/iommu/amd/init.c."""
    on = [name for name, is_on in (("SEV-SNP", kernel.snp), ("TDX", kernel.tdx)) if is_on]
    if on:
        return _tell.passed("confidential-guests", f"KVM has {' and '.join(on)}")
    if not node.settings.require_iommufd:
        return _tell.passed("confidential-guests", "off; only confidential guests need SEV-SNP or TDX")
    action = "Switch on SEV-SNP or TDX in the firmware's setup, with kvm_amd.sev_snp=1 or kvm_intel.tdx=1."
    if found := [word for word in kernel.command_line if word in _PASSTHROUGH]:
        action = f"Remove {found[0]} from the kernel's command line: it switches SEV-SNP off."
    seen = "KVM has neither SEV-SNP nor TDX, and require-iommufd is set, which is for confidential guests"
    return _tell.fail("confidential-guests", seen, action)
