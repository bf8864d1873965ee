"""What the host's KVM says of confidential guests."""

from __future__ import annotations

from typing import NamedTuple

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths


class Confidential(NamedTuple):
    """Which kinds of confidential guest KVM can start."""

    snp: bool = False
    """SEV-SNP, by kvm_amd."""
    tdx: bool = False
    """TDX, by kvm_intel."""


def read_confidential(paths: HostPaths) -> Confidential:
    """Raises `sysfs.OutOfResources`."""
    modules = paths.root / "sys/module"
    return Confidential(
        snp=sysfs.is_on(f"{modules}/kvm_amd/parameters/sev_snp"),
        tdx=sysfs.is_on(f"{modules}/kvm_intel/parameters/tdx"),
    )
