"""The text of a CDI spec into values: pure, and safe with whatever somebody puts into the file.

Both of Kata's libraries read JSON as YAML, and so does this. What a plain `on` or `010` means depends on the library;
here a scalar stays text unless it is null or a whole number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

try:
    from yaml import CBaseLoader as _Base  # quick, and in PyYAML's wheels
except ImportError:
    from yaml import BaseLoader as _Base  # type: ignore[assignment]

LARGEST = 1 << 18
"""Bytes: a larger text is not parsed, since that would take seconds. Specs of real tools have a tenth of that."""
_DEEPEST = 32
"""A CDI spec has 8 levels."""
_NULLS = ("", "~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,19}|0x[0-9a-fA-F]{1,16}|0o[0-7]{1,22}|0b[01]{1,64})")

Value = None | int | str | list["Value"] | dict[str, "Value"]


class NotYaml(Exception):
    """The text is not YAML, or not in a way that Kata takes. The message says why."""


class NotRead(Exception):
    """The text is left unread, although Kata may be able to read it. The message says why."""


class _Loader(_Base):
    """Refuses a key twice, as Kata does, and what would cost too much: depth (libyaml overflows the stack), aliases."""

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
        if node.style:  # it has quotes, or is a block
            return node.value
        if node.value in _NULLS:
            return None
        return int(node.value, 0) if _NUMBER.fullmatch(node.value) else node.value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise NotYaml("a key that is not a string")
            if key in mapping:
                raise NotYaml(f"duplicate key {quoted(key)}")
            mapping[key] = self.construct_object(value_node, deep)
        return mapping


def load(content: bytes) -> Value:
    """The one document of the text; an empty text is null. Raises NotYaml and NotRead."""
    if len(content) > LARGEST:
        raise NotRead(f"it has more than {LARGEST} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotYaml(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")  # PyYAML's own parser takes no tab in JSON
    try:
        value: Value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        words = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise NotYaml(f"not valid YAML or JSON: {words[:200]}") from None
    return value


def quoted(value: Value) -> str:
    """A value as messages show it: a text in quotes, and short whatever is in it."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
