"""What NVIDIA's driver calls a GPU, and which family it is of: the words of NVIDIA's node labels.

Apart from naming.py, whose names come from pci.ids and make resources. These are for people who select nodes by the
labels of GPU Feature Discovery, whose product is the name that the driver gives. The driver runs in the VM, so here the
names of the models that servers have stand in a table; for others there is the name in pci.ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.model import NVIDIA, PciFunction

_LABEL_LENGTH = 63
"""Longest value of a label (IsValidLabelValue in k8s.io/apimachinery/pkg/util/validation)."""

_FAMILIES = {
    "GF": "fermi",
    "GK": "kepler",
    "GM": "maxwell",
    "GP": "pascal",
    "GV": "volta",
    "TU": "turing",
    "GA": "ampere",
    "AD": "ada-lovelace",
    "GH": "hopper",
    "GB": "blackwell",
}
"""First letters of the chip, with which pci.ids begins -> the word of GPU Feature Discovery (getArchFamily in
internal/lm/resource.go of NVIDIA/k8s-device-plugin, which goes by the compute capability)."""

_DRIVERS_NAMES: Mapping[int, str] = {
    0x1EB8: "Tesla T4",
    0x20B0: "NVIDIA A100-SXM4-40GB",
    0x20B2: "NVIDIA A100-SXM4-80GB",
    0x20B3: "NVIDIA A100-SXM-64GB",
    0x20B5: "NVIDIA A100 80GB PCIe",
    0x20B7: "NVIDIA A30",
    0x20BD: "NVIDIA A800-SXM4-40GB",
    0x20F1: "NVIDIA A100-PCIE-40GB",
    0x20F3: "NVIDIA A800-SXM4-80GB",
    0x20F5: "NVIDIA A800 80GB PCIe",
    0x20F6: "NVIDIA A800 40GB Active",
    0x2230: "NVIDIA RTX A6000",
    0x2235: "NVIDIA A40",
    0x2236: "NVIDIA A10",
    0x2237: "NVIDIA A10G",
    0x230E: "NVIDIA H20 NVL16",
    0x2321: "NVIDIA H100 NVL",
    0x2322: "NVIDIA H800 PCIe",
    0x2324: "NVIDIA H800",
    0x2329: "NVIDIA H20",
    0x232C: "NVIDIA H20-3e",
    0x2330: "NVIDIA H100 80GB HBM3",
    0x2331: "NVIDIA H100 PCIe",
    0x2335: "NVIDIA H200",
    0x2339: "NVIDIA H100",
    0x233A: "NVIDIA H800 NVL",
    0x233B: "NVIDIA H200 NVL",
    0x2342: "NVIDIA GH200 120GB",
    0x2348: "NVIDIA GH200 144G HBM3e",
    0x26B1: "NVIDIA RTX 6000 Ada Generation",
    0x26B5: "NVIDIA L40",
    0x26B9: "NVIDIA L40S",
    0x26BA: "NVIDIA L20",
    0x27B6: "NVIDIA L2",
    0x27B8: "NVIDIA L4",
    0x2901: "NVIDIA B200",
    0x2909: "NVIDIA B200",
    0x2941: "NVIDIA GB200",
    0x2BB1: "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    0x2BB4: "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    0x2BB5: "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    0x2BB9: "NVIDIA RTX 6000D",
    0x2C3A: "NVIDIA RTX PRO 4500 Blackwell Server Edition",
    0x3182: "NVIDIA B300 SXM6 AC",
    0x31C2: "NVIDIA GB300",
    0x31C3: "NVIDIA GB300",
}
"""By device ID, as the list of supported GPUs in NVIDIA's README of open-gpu-kernel-modules has them."""
_BY_SUBSYSTEM: Mapping[tuple[int, int | None], str] = {
    (0x20F5, 0x179A): "NVIDIA A800 80GB PCIe LC",
    (0x2342, 0x1809): "NVIDIA GH200 480GB",
    (0x25B6, 0x14A9): "NVIDIA A16",
    (0x25B6, 0x157E): "NVIDIA A2",
}
"""Where one device ID has several names: by device and subsystem device."""


def product(function: PciFunction, names: ModelNames) -> str:
    """The name of a GPU as a label's value: white space as `-`, and nothing that a label cannot have.

    GPU Feature Discovery writes the driver's name so, and, where it sees only vfio-pci, that of pci.ids. A model that
    is in neither is called by its IDs.
    """
    known = None
    if function.vendor == NVIDIA:
        by_subsystem = _BY_SUBSYSTEM.get((function.device, function.subsystem_device))
        known = by_subsystem or _DRIVERS_NAMES.get(function.device)
    return label_value(known or names.describe(*function.model_id))


def family(function: PciFunction, names: ModelNames) -> str | None:
    """`hopper`, for one; None where the name of the chip does not tell it."""
    chip = re.match(r"[A-Z]{2}(?=[0-9])", names.describe(*function.model_id))
    return _FAMILIES.get(chip[0]) if chip and function.vendor == NVIDIA else None


def memory_in_name(function: PciFunction, names: ModelNames) -> int | None:
    """MiB that the name of a GPU says that it has, if it says so."""
    found = re.search(r"(?<![0-9])([0-9]{1,4})-?GB(?![A-Za-z0-9])", product(function, names))
    return int(found[1]) * 1024 if found else None


def label_value(words: str) -> str:
    """The same words as a valid value of a label."""
    allowed = "-".join(re.sub(r"[^A-Za-z0-9_. -]", " ", words).split())
    return allowed[:_LABEL_LENGTH].strip("-_.")
