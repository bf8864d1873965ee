"""Whose a CDI spec is: pure, from the bytes of a file to who may replace it.

A file under the name of one of our specs may be replaced when it has our mark, when its kind is our resource's (the
reference plugin and kata-manager write such files), or when it is an unfinished or broken rest: empty, not valid YAML,
or a mapping without a `kind`, each without a kind of somebody else's and without an outermost field that CDI does not
have. Anything else belongs to another program and stays, and so does what is nested too deep to be read to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_plugin.outputs.spec_text import LARGEST, Outline, outline, quoted

MARK = "# Written by sandbox-plugin, which replaces this file whenever the node's devices change.\n"
_MARK_START = b"# Written by sandbox-plugin"
_FIELDS = ("cdiVersion", "kind", "annotations", "devices", "containerEdits")
"""Outermost fields of every version of CDI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Whether this plugin may replace a file, and why."""

    may_replace: bool
    why: str


def is_marked(content: bytes) -> bool:
    """Whether this plugin wrote this spec, now or when it ran before, even if the write was cut off within the mark."""
    return content.startswith(_MARK_START) or (content != b"" and _MARK_START.startswith(content))


def ownership(content: bytes, resource: str) -> Ownership:
    """Whether what is in the file of this resource's spec may be replaced."""
    if is_marked(content):
        return Ownership(may_replace=True, why="this plugin wrote it")
    if len(content) > LARGEST:
        return Ownership(may_replace=False, why=f"more than {LARGEST} bytes, and not written by this plugin")
    found = outline(content)
    kinds = [kind for kind in found.fields.get("kind", []) if not _is_cut_off(kind, resource, content)]
    if other := next((kind for kind in kinds if kind != resource), None):
        return Ownership(may_replace=False, why=f"kind {other[:80]}")
    if kinds:
        return Ownership(may_replace=True, why="it has the name and the kind of a resource that this plugin serves")
    if (strange := _strange_field(found)) is not None:
        return Ownership(may_replace=False, why=f"no kind, and the field {quoted(strange)}, which CDI does not have")
    if found.is_too_deep:
        return Ownership(may_replace=False, why="nested deeper than any CDI spec")
    if found.is_whole and found.fields.get("kind") == []:
        return Ownership(may_replace=False, why="its kind is not a string")
    if not found.is_whole:
        return Ownership(may_replace=True, why="it is not valid YAML or JSON, and names no other kind before the error")
    if found.is_empty:
        return Ownership(may_replace=True, why="it is empty")
    if not found.is_mapping:
        return Ownership(may_replace=False, why="it is not a CDI spec")
    return Ownership(may_replace=True, why="it is unfinished: it has no kind")


def stated_kind(content: bytes) -> str | None:
    """The kind of a spec, if it has exactly one."""
    kinds = outline(content).fields.get("kind", []) if len(content) <= LARGEST else []
    return kinds[0] if len(kinds) == 1 else None


def _is_cut_off(kind: str, resource: str, content: bytes) -> bool:
    """Whether the text breaks off within our kind."""
    return kind != resource and resource.startswith(kind) and content.rstrip().endswith(kind.encode())


def _strange_field(found: Outline) -> str | None:
    """An outermost field that no CDI spec has. In a text that breaks off, the last one may be the beginning of one."""
    for name in found.fields:
        if name not in _FIELDS and (found.is_whole or not any(field.startswith(name) for field in _FIELDS)):
            return name
    return None
