"""The text of a CDI spec into values: pure, and safe with whatever is in the file.

Both of Kata's libraries read JSON as YAML, and so does this. They differ in what a plain `on` or `010` means, so every
scalar stays text here, except null.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sandbox_plugin.host.files import LARGEST

_DEEPEST = 32
"""Levels of lists and mappings; a CDI spec has 8."""
_NULLS = ("", "~", "null", "Null", "NULL")


class NotYaml(Exception):
    """The text is not YAML, or not in a way that Kata takes. The message says why."""


class NotRead(Exception):
    """The text is left unread, although Kata may be able to read it. The message says why."""


def prepare() -> None:
    """Imports the parser, so that it is there when this process has no descriptors left: an import that fails half-way
    cannot be tried again."""
    _loader()


@cache
def _loader() -> Any:
    """Made when it is needed: after the first devices are served, unless a spec was left that we write otherwise."""
    import yaml

    base: type[yaml.BaseLoader] = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # with libyaml: many times as fast

    class Loader(base):  # type: ignore[misc, valid-type]
        """Refuses a key twice, as Kata does, and what would cost too much: aliases, and depth, at which libyaml
        overflows the stack."""

        _depth = 0

        def descend_resolver(self, parent: Any, index: Any) -> None:
            """Called for each node before what is in it is read."""
            self._depth += 1
            if self._depth > _DEEPEST:
                raise NotRead(f"it is nested more than {_DEEPEST} levels deep")

        def ascend_resolver(self) -> None:
            self._depth -= 1

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if node in self.constructed_objects:
                raise NotRead("it has YAML aliases")
            return super().construct_object(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            is_plain = not node.style  # neither in quotes nor a block
            return None if is_plain and node.value in _NULLS else node.value

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):
                raise NotYaml(f"the mapping at line {node.start_mark.line + 1} has a key twice")
            return mapping

    return Loader


def load(content: bytes) -> Any:
    """The one document of the text, as text, null, lists and mappings of these; an empty text is null.

    Raises NotYaml and NotRead.
    """
    if len(content) > LARGEST:  # to parse it would take seconds
        raise NotRead(f"it has more than {LARGEST} bytes")
    import yaml

    try:
        return yaml.load(content, _loader())
    except yaml.YAMLError as error:
        words = " ".join(str(error).split()).replace('in "<byte string>", ', "at ")
        raise NotYaml(f"not valid YAML or JSON: {words[:200]}") from None
