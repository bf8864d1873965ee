"""Kernel modules and drivers of a host, as its files show them. Every call blocks."""

from __future__ import annotations

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths

_MODULES_ALIAS_LIMIT = 16 << 20
"""Bytes: that of a distribution's kernel has 1.5 MB."""


def read_aliases(paths: HostPaths) -> tuple[tuple[str, str], ...] | None:
    """Pattern and module of each `pci:` and `vfio_pci:` line of the running kernel's modules.alias (modules.alias(5)).

    None where there is no such file, as in a container that does not have the host's /lib/modules.
    """
    release = sysfs.text_or_none(f"{paths.root}/proc/sys/kernel/osrelease") or "unknown"
    text = sysfs.text_or_none(f"{paths.root}/lib/modules/{release}/modules.alias", limit=_MODULES_ALIAS_LIMIT)
    if text is None:
        return None
    lines = [line.split() for line in text.splitlines() if line.startswith(("alias vfio_pci:", "alias pci:"))]
    return tuple((words[1], words[2]) for words in lines if len(words) == 3)


def read_drivers(paths: HostPaths) -> frozenset[str]:
    """PCI drivers that are loaded."""
    return frozenset(sysfs.listed(paths.pci_drivers))
