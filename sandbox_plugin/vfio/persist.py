"""What makes vfio-pci take the same functions at the next boot: texts for modules-load.d and modprobe.d. Pure, but for
`write`."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_plugin.model import HostFacts
from sandbox_plugin.vfio.memory import replace_text
from sandbox_plugin.vfio.plan import GENERIC, matching

_MARK = "# Written by `sandbox-plugin vfio bind --persist`, which replaces it as a whole."

NEXT_STEPS = """\
What only a person may set, and what only a person knows:
  kernel command line  Intel: intel_iommu=on   AMD: nothing (the IOMMU is on; iommu=pt switches SEV-SNP off)
  initramfs            made anew, if GPU drivers are in it: update-initramfs -u, or dracut -f
  built-in drivers     (often xhci_hcd) come before any module: run `vfio bind` at every boot"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted:
    """The files, and what they cannot do."""

    files: dict[str, str]
    """Path below the host's root -> content."""
    taken_too: tuple[str, ...]
    """Functions that vfio-pci would take at the next boot although they are not asked for."""
    remarks: tuple[str, ...]


def persisted(facts: HostFacts, drivers: Mapping[str, str], aliases: Iterable[tuple[str, str]]) -> Persisted:
    """`drivers`: the functions that shall be bound, and the vfio driver of each.

    vfio-pci knows functions by their IDs only, before any other driver: so it must be loaded first (softdep), and takes
    every function of the machine with these IDs. Variant drivers take no IDs.
    """
    functions = [facts.functions[address] for address in sorted(drivers)]
    by_id = [f for f in functions if drivers[f.address] == GENERIC]
    ids = sorted({"{:04x}:{:04x}".format(*f.model_id) for f in by_id})
    first = sorted({module for f in by_id for _, module in matching(f, "pci", aliases) if "vfio" not in module})
    settings = [_MARK]
    settings += [f"options vfio-pci ids={','.join(ids)}"] if ids else []
    settings += [f"softdep {module} pre: vfio-pci" for module in first] if ids else []
    others = sorted({f.address for f in facts.functions.values() if f.model_id in {g.model_id for g in by_id}})
    taken_too = [address for address in others if address not in drivers]
    variants = [f"{f.address} ({drivers[f.address]})" for f in functions if drivers[f.address] != GENERIC]
    remarks = []
    if ids and not first:
        remarks.append("modules.alias names no driver that claims these functions: no softdep lines")
    if variants:
        remarks.append(f"variant drivers take no IDs: run `vfio bind` at every boot for {', '.join(variants)}")
    return Persisted(
        files={
            "etc/modules-load.d/sandbox-plugin.conf": "\n".join([_MARK, *sorted(set(drivers.values())), ""]),
            "etc/modprobe.d/sandbox-plugin.conf": "\n".join([*settings, ""]),
        },
        taken_too=tuple(taken_too),
        remarks=tuple(remarks),
    )


def write(root: Path, files: dict[str, str]) -> None:
    """Writes each file as a whole. Raises OSError where a folder is missing: this is not the host's /etc then."""
    for name in files:
        if not (root / name).parent.is_dir():
            raise OSError(
                errno.ENOENT, "there is no such folder: is the host's /etc mounted here?", str((root / name).parent)
            )
    for name, text in files.items():
        replace_text(root / name, text)
