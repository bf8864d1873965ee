"""Who may replace the file that has the name of one of our CDI specs: pure, from its bytes.

It may be replaced when it has our mark, when its kind is our resource's (the reference plugin and kata-manager write
such files), or when it is an unfinished or broken rest: empty, not valid YAML, or a mapping without a `kind`. Anything
else belongs to another program and stays.
"""

from __future__ import annotations

from typing import NamedTuple

from sandbox_plugin.cdi.render import is_marked
from sandbox_plugin.cdi.text import NotRead, NotYaml, load


class Ownership(NamedTuple):
    """Whether this plugin may replace a file, and why."""

    may_replace: bool
    why: str


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
