"""What our CDI specs say, and how they are told from others: pure.

Rules of the format: CDI specification 0.5.0. Kata reads versions 0.1.0 to 0.6.0 strictly, and one bad spec in the
folder fails every pod, hence: no empty `devices`, only the device's own node, no field that is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device

MARK = "# Written by sandbox-plugin, which replaces this file whenever the node's devices change.\n"
_MARK_START = b"# Written by sandbox-plugin"
"""What the mark begins with in every version of this plugin."""
_NAME = "  - name: "
"""What an entry begins with."""


def render_specs(inventory: Inventory) -> dict[str, str]:
    """Resource name -> the text of its spec, for every resource with at least one device whose node exists."""
    return {
        resource: render_spec(resource, [d for d in devices if d.node_exists])
        for resource, devices in inventory.resources.items()
        if any(d.node_exists for d in devices)
    }


def render_spec(resource: str, devices: Iterable[Device]) -> str:
    """One spec. Kata looks up `<resource name>=<device ID>`, so the kind is the resource and the name is the ID."""
    return MARK + _head(resource) + "".join(map(_entry, devices))


def is_marked(content: bytes) -> bool:
    """Whether this plugin wrote this spec, now or when it ran before, even if the write was cut off within the mark."""
    return content.startswith(_MARK_START) or (content != b"" and _MARK_START.startswith(content))


def ids_in_spec(content: bytes, resource: str, devices: Iterable[Device]) -> frozenset[str]:
    """IDs of those devices that a spec has which this plugin wrote, now or when it ran before; none of any other."""
    written = content.decode("utf-8", "replace")
    head = MARK + _head(resource)
    if not written.startswith(head):
        return frozenset()
    entries = {_NAME + rest for rest in written.removeprefix(head).split(_NAME)}
    return frozenset(device.id for device in devices if device.node_exists and _entry(device) in entries)


def _head(resource: str) -> str:
    return f'cdiVersion: "0.5.0"\nkind: {json.dumps(resource)}\ndevices:\n'


def _entry(device: Device) -> str:
    return f"""{_NAME}{json.dumps(device.id)}
    containerEdits:
      deviceNodes:
        - path: {json.dumps(device.node)}
"""
