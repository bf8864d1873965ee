"""The CDI folders, and every spec in them, by Kata's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sandbox_plugin.cdi.lint import in_two_folders, lint
from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import CdiFolder, Node, Unread
from sandbox_plugin.inventory.nodes import vfio_nodes

_tell = Teller(Group.CDI)


def findings(node: Node) -> Iterator[Finding]:
    if not node.settings.consumer.reads_cdi:
        yield _tell.passed("specs", f"{node.settings.consumer} needs none")
        return
    folders = [folder for folder in node.cdi if isinstance(folder, CdiFolder)]
    for unread in [folder for folder in node.cdi if isinstance(folder, Unread)]:
        yield _tell.fail("folder", f"a CDI folder: {unread.why}", "Unmount what hangs there: Kata waits for it too.")
    for folder in folders:
        yield _folder(node, folder)
        yield from _specs(node, folder)
    yield from _twice(node, folders)


def _folder(node: Node, folder: CdiFolder) -> Finding:
    path, is_ours = node.shown(folder.path), folder.path == node.settings.cdi_dir
    if not folder.exists:
        what = "is not there yet; the plugin makes it" if is_ours else "is not there"
        if node.in_container:
            return _tell.unseen("folder", f"{path} is not there, or not mounted into this container")
        return _tell.passed("folder", f"{path} {what}")
    if is_ours and not folder.writable:
        return _tell.warn(
            "folder",
            f"{path} cannot be written by this user",
            "Run the plugin as uid 0 with this folder mounted to write; run doctor as root.",
        )
    count = len(folder.readings)
    return _tell.passed("folder", f"{path}, {count} spec{'' if count == 1 else 's'}")


def _specs(node: Node, folder: CdiFolder) -> Iterator[Finding]:
    wrong = lint(folder.readings)
    for file, why in wrong.items():
        action = "Repair it, have its tool write version 0.5.0 or 0.6.0, or move it out of the folder."
        yield _tell.fail("specs", f"{node.shown(file)}: {why}. It fails every Kata pod of this node", action)
    for file, reading in sorted(folder.readings.items()):
        if reading.unread is not None:
            action = "If Kata's pods fail on this node, look at this spec."
            yield _tell.warn("specs", f"{node.shown(file)}: {reading.unread}", action)
        elif file not in wrong and (missing := _missing(node, folder, reading.devices)):
            seen = f"{node.shown(file)} names nodes that do not exist: {', '.join(missing[:3])}"
            action = (
                "Remove the file if it is out of date. If it is the plugin's own, start the plugin: it writes it anew."
            )
            yield _tell.warn("nodes", seen, action)


def _missing(node: Node, folder: CdiFolder, devices: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Nodes of the devices that are not there, as far as that can be seen."""
    named = {path for paths in devices.values() for path in paths}
    vfio = {path for path in named if path.startswith("/dev/vfio/") and path != "/dev/vfio/vfio"}
    exist = vfio_nodes(node.host)
    gone = vfio - exist if exist is not None else set()
    is_live = node.host.dev_nodes is not None
    return sorted(gone | (folder.missing & named - vfio if is_live else set()))


def _twice(node: Node, folders: list[CdiFolder]) -> Iterator[Finding]:
    for number, folder in enumerate(folders):
        for other in folders[:number]:
            for file, why in in_two_folders(_spec_with(folder), _spec_with(other)).items():
                yield _tell.warn("specs", f"{node.shown(file)}: {why}", "Remove the device from one of the two specs.")


def _spec_with(folder: CdiFolder) -> dict[str, Path]:
    return {device: file for file, reading in folder.readings.items() for device in reading.devices}
