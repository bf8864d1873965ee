"""What a kubelet should see of a fake node, by a slow and independent reading of its tree.

Shares no code and no idea with the daemon: plain files, one rule after the other, nothing remembered but which IDs were
there before. The state machine of test_truth.py holds the daemon against it.
"""

from __future__ import annotations

from pathlib import Path

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
View = dict[str, dict[str, str]]
"""Resource name -> device ID -> health."""

_RESOURCES = {"0x030000": "nvidia.com/pgpu", "0x030200": "nvidia.com/pgpu", "0x068000": "nvidia.com/nvswitch"}


class Truth:
    """Reads the tree below `root`. IDs that were there once stay, Unhealthy: nobody tells that no pod holds them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[tuple[str, str]] = set()

    def read(self) -> View:
        """The view now, of everything that was ever there when this was called."""
        present = self.present()
        self._known |= {(resource, number) for resource, devices in present.items() for number in devices}
        view: View = {}
        for resource, number in self._known:
            view.setdefault(resource, {})[number] = present.get(resource, {}).get(number, UNHEALTHY)
        return view

    def present(self) -> View:
        """What is bound to a vfio driver now."""
        view: View = {}
        for link in sorted((self._root / "sys/bus/pci/devices").iterdir()):
            folder = link.resolve()
            if _text(folder / "vendor") != "0x10de" or _text(folder / "class") not in _RESOURCES:
                continue
            if "vfio" not in _driver(folder):
                continue
            group = (folder / "iommu_group").resolve()
            number, node = self._node(folder, group)
            if number is None:
                continue
            well = _answers(folder) and all(_is_harmless(m.resolve()) for m in (group / "devices").iterdir())
            health = HEALTHY if well and (self._root / "dev/vfio" / node).exists() else UNHEALTHY
            view.setdefault(_RESOURCES[_text(folder / "class")], {})[number] = health
        return view

    def _node(self, folder: Path, group: Path) -> tuple[str | None, str]:
        """The device's number and its node below /dev/vfio."""
        if "vfio-dev" in (self._root / "proc/devices").read_text():
            found = [d.name for d in (folder / "vfio-dev").iterdir() if (d / "dev").exists()]
            return (found[0].removeprefix("vfio"), f"devices/{found[0]}") if found else (None, "")
        return (group.name, group.name)


def _answers(folder: Path) -> bool:
    return (_text(folder / "current_link_speed"), _text(folder / "current_link_width")) != ("Unknown", "63")


def _is_harmless(member: Path) -> bool:
    driver = _driver(member)
    return not driver or "vfio" in driver or driver in ("pci-stub", "pcieport")


def _driver(folder: Path) -> str:
    link = folder / "driver"
    return link.resolve().name if link.is_symlink() else ""


def _text(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""
