"""Whose a CDI spec is: pure, from the bytes of a file to who may replace it.

A file under the name of one of our specs may be replaced when it has our mark, when its kind is our resource's (the
reference plugin and kata-manager write such files), or when it is an unfinished or broken rest: empty, not valid YAML,
or a mapping without a `kind`. Anything else belongs to another program and stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_plugin.cdi.text import NotRead, NotYaml, load

MARK = "# Written by sandbox-plugin, which replaces this file whenever the node's devices change.\n"
_MARK_START = b"# Written by sandbox-plugin"


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
    try:
        spec = load(content)
    except NotYaml:
        return Ownership(may_replace=True, why="it is not valid YAML or JSON")
    except NotRead as error:
        return Ownership(may_replace=False, why=str(error))
    if not spec and not isinstance(spec, list):
        return Ownership(may_replace=True, why="it is empty")
    if not isinstance(spec, dict):
        return Ownership(may_replace=False, why="it is not a CDI spec")
    kind = spec.get("kind")
    if not kind:
        return Ownership(may_replace=True, why="it is unfinished: it has no kind")
    if kind == resource:
        return Ownership(may_replace=True, why="it has the name and the kind of a resource that this plugin serves")
    if resource.startswith(str(kind)) and content.endswith(str(kind).encode()):
        return Ownership(may_replace=True, why="it is unfinished: it breaks off within its kind")
    return Ownership(may_replace=False, why=f"kind {str(kind)[:80]}")


def stated_kind(content: bytes) -> str | None:
    """The kind of a spec, whatever else is wrong with it; None: it has none, or cannot be read."""
    try:
        spec = load(content)
    except (NotYaml, NotRead):
        return None
    kind = spec.get("kind") if isinstance(spec, dict) else None
    return kind if isinstance(kind, str) else None
