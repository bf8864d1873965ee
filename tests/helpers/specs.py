"""CDI specs as data, as other programs write them."""

from __future__ import annotations

from typing import Any

import yaml


def document(**changes: Any) -> dict[str, Any]:
    """A good spec as values, with changes at its top; None takes a field away."""
    made = {"cdiVersion": "0.6.0", "kind": "vendor.com/class", "devices": [device("0")]} | changes
    return {key: value for key, value in made.items() if value is not None}


def device(name: Any = "d0", **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits or {"deviceNodes": [{"path": "/dev/null"}]}}


def reference(kind: str) -> dict[str, Any]:
    return document(cdiVersion="0.5.0", kind=kind, containerEdits={})


def as_text(spec: object) -> bytes:
    return yaml.safe_dump(spec).encode()
