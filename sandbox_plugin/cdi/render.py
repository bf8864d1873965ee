"""What our CDI specs say, and how they are told from others: pure.

Rules of the format: CDI specification 0.5.0. Kata reads versions 0.1.0 to 0.6.0 strictly, and one bad spec in the
folder fails every pod, hence: no empty `devices`, only the device's own node, no field that is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import starmap
from typing import Any

from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device

MARK = "# Written by sandbox-plugin, which replaces this file whenever the node's devices change.\n"
_MARK_START = b"# Written by sandbox-plugin"
"""What the mark begins with in every version of this plugin."""
_NAME = "  - name: "
"""What an entry begins with."""
_QUOTED = re.compile(r'"([\w./-]*)"', re.ASCII)
"""A word in quotes: all that differs from spec to spec."""


def render_specs(inventory: Inventory) -> dict[str, str]:
    """Resource name -> the text of its spec, for every resource with at least one device whose node exists."""
    return {
        resource: render_spec(resource, [d for d in devices if d.node_exists])
        for resource, devices in inventory.resources.items()
        if any(d.node_exists for d in devices)
    }


def render_spec(resource: str, devices: Iterable[Device]) -> str:
    """One spec. Kata looks up `<resource name>=<device ID>`, so the kind is the resource and the name is the ID."""
    return _text(resource, [(device.id, device.node) for device in devices])


def read_rendered(content: bytes) -> dict[str, Any] | None:
    """What a spec says, as YAML, that is written just like this; None: any other, which takes a parser.

    Nearly every start finds specs that an earlier run wrote, and loading a parser of YAML takes longer than a scan.
    """
    words = _QUOTED.findall(content.decode("utf-8", "replace"))
    kind, devices = "".join(words[1:2]), list(zip(words[2::2], words[3::2], strict=False))
    if content != _text(kind, devices).encode():
        return None
    entries = [{"name": name, "containerEdits": {"deviceNodes": [{"path": node}]}} for name, node in devices]
    return {"cdiVersion": words[0], "kind": kind, "devices": entries}


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
    return frozenset(d.id for d in devices if d.node_exists and _entry(d.id, d.node) in entries)


def _text(resource: str, devices: Iterable[tuple[str, str]]) -> str:
    """The spec with these devices, each with its node."""
    return MARK + _head(resource) + "".join(starmap(_entry, devices))


def _head(resource: str) -> str:
    return f'cdiVersion: "0.5.0"\nkind: {json.dumps(resource)}\ndevices:\n'


def _entry(name: str, node: str) -> str:
    return f"""{_NAME}{json.dumps(name)}
    containerEdits:
      deviceNodes:
        - path: {json.dumps(node)}
"""
