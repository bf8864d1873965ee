"""The text of a CDI spec into values: pure, and safe with whatever somebody puts into the file.

Both of Kata's libraries read JSON as YAML, and their parsers descend from libyaml, so PyYAML's binding to libyaml reads
here where it is installed (it is in PyYAML's wheels). Scalars stay text, since what a plain `0` or `on` means depends
on the library and on the field: in a string field it is a string for both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

LARGEST = 1 << 18
"""Bytes: a larger text is not parsed, since that would take seconds. Specs of real tools have a tenth of that."""
_DEEPEST = 32
"""A CDI spec has 8 levels."""
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = ("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE = ("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_OCTAL = re.compile(r"[-+]?0[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_HARMLESS_TAGS = (None, "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class NotYaml(Exception):
    """The text is not YAML, or not in a way that both of Kata's libraries take. The message says why."""


class Undecided(Exception):
    """The text is YAML, and this module does not know what Kata's libraries make of it. The message says why."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value as it is written, which is how Kata's Rust library takes it for a string field."""

    text: str
    plain: bool
    """Without quotes: it may be null, a number or true."""

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in _NULLS

    @property
    def in_go(self) -> str:
        """What Kata's Go library takes for a string field: plain text means what it means in YAML 1.1, as text again.

        `on` is `true`, `010` is `8` and null is the empty string.
        """
        if not self.plain:
            return self.text
        if self.text in _NULLS:
            return ""
        if self.text in _TRUE:
            return "true"
        if self.text in _FALSE:
            return "false"
        if not self.text.isascii() or self.text[0] not in "+-.0123456789":
            return self.text
        digits = self.text.replace("_", "")
        with suppress(ValueError):
            whole = int(digits, 8 if _OCTAL.fullmatch(digits) else 0)
            if -(1 << 63) <= whole < 1 << 64:
                return str(whole)
        if _FLOAT.fullmatch(digits) and math.isfinite(number := float(digits)):
            return f"{number:.7g}" if abs(number) < 1e6 else f"{number:.7e}"  # 32 bits have some 7 digits
        return self.text


Value = Scalar | list["Value"] | dict[str, "Value"]


def parse(content: bytes) -> Value:
    """The one document of the text; an empty text is an empty scalar. Raises NotYaml and Undecided."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotYaml(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        text = " " + text[1:]  # serde_yaml keeps the byte order mark and takes it for indentation
    try:
        return _Document(_events(text.encode())).value()
    except (yaml.YAMLError, ValueError) as error:
        words = " ".join(str(error).split()).replace('in "<byte string>", ', "at ")
        raise NotYaml(f"not valid YAML or JSON: {words[:200]}") from None


def _events(content: bytes) -> Iterator[Any]:
    """The parser's events. PyYAML's own parser, where the binding to libyaml is missing, takes no tab in JSON."""
    if content.lstrip()[:1] == b"{":
        content = content.replace(b"\t", b" ")
    events: Iterator[Any] = yaml.parse(content, _PARSER)
    return events


@dataclass
class _Document:
    """Puts the parser's events together."""

    events: Iterator[Any]
    _anchors: dict[str | None, tuple[Value, int] | None] = field(default_factory=dict)
    """What each anchor stands for, and of how many nodes that is made; None while it is being read."""
    _nodes: int = 0
    _repeated: int = 0
    """How many nodes aliases add to that."""

    def value(self) -> Value:
        value: Value | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if value is not None:
                    raise NotYaml("more than one YAML document")
                if getattr(event, "version", None) not in (None, (1, 1)):
                    raise NotYaml("a %YAML directive other than 1.1")
                value, _ = self._value(next(self.events), depth=0)
        return Scalar("", plain=True) if value is None else value

    def _value(self, event: Any, depth: int) -> tuple[Value, int]:
        """The value that begins with this event, and of how many nodes it is made."""
        if depth > _DEEPEST:
            raise NotYaml(f"nested more than {_DEEPEST} levels deep")
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            return self._repeat(event.anchor)
        if event.tag not in _HARMLESS_TAGS:
            raise Undecided(f"it has the YAML tag {quoted(event.tag)}")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        value: Value
        size = 1
        if isinstance(event, yaml.ScalarEvent):
            value = Scalar(event.value, plain=event.style in (None, "") and event.tag is None)
        else:
            children = []
            while not isinstance(child := next(self.events), yaml.CollectionEndEvent):
                read, its_size = self._value(child, depth + 1)
                children.append(read)
                size += its_size
            value = children if isinstance(event, yaml.SequenceStartEvent) else _mapping(children)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, size)
        return value, size

    def _repeat(self, anchor: str | None) -> tuple[Value, int]:
        """What an alias stands for. Go's library refuses a document that aliases make too large; so does this."""
        if anchor not in self._anchors:
            raise NotYaml(f"an alias of the unknown anchor {quoted(anchor or '')}")
        known = self._anchors[anchor]
        if known is None:
            raise NotYaml(f"the anchor {quoted(anchor or '')} contains itself")
        self._repeated += known[1]
        whole = self._nodes + self._repeated
        if self._repeated > 100 and whole > 1000 and self._repeated / whole > _allowed_repetition(whole):
            raise NotYaml("its aliases repeat too much")
        return known[0], known[1] + 1


def quoted(text: str) -> str:
    """A text as messages show it: in quotes, and short whatever is in it."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _allowed_repetition(nodes: int) -> float:
    """Which part of so many nodes may come from aliases: from 99 % down to 10 % (gopkg.in/yaml.v2)."""
    low, high = 400_000, 4_000_000
    return 0.99 - 0.89 * min(1.0, max(0, nodes - low) / (high - low))


def _mapping(children: list[Value]) -> dict[str, Value]:
    mapping: dict[str, Value] = {}
    in_go = set()
    for key, value in zip(children[::2], children[1::2], strict=True):
        if not isinstance(key, Scalar) or key.is_null:
            raise NotYaml("a key that is not a string")
        if key.text in mapping or key.in_go in in_go:
            raise NotYaml(f"duplicate key {quoted(key.text)}")
        mapping[key.text] = value
        in_go.add(key.in_go)
    return mapping


# What can be said of a text that may be broken


@dataclass(kw_only=True)
class Outline:
    """The outermost fields of a text, as far as it can be read."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    """Key -> its values that are scalars: a text may have several documents, or a key twice."""
    is_whole: bool = True
    """Whether the text is YAML to its end."""
    is_empty: bool = True
    """Whether there are nothing but comments, null and empty mappings."""
    is_mapping: bool = True
    """Whether there are nothing but mappings at the outermost level."""
    is_too_deep: bool = False
    """Whether it was left off where it is nested deeper than any spec: libyaml would take minutes over such a text."""


def outline(content: bytes) -> Outline:
    """What the text says at its outermost level, whatever is wrong with it further down."""
    found = Outline()
    try:
        _follow(_events(content), found)
    except (yaml.YAMLError, ValueError):
        found.is_whole = False
    return found


def _follow(events: Iterator[Any], found: Outline) -> None:
    depth = 0
    in_mapping = is_key = False
    key = ""
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            text = event.value if isinstance(event, yaml.ScalarEvent) else None
            if depth == 0:
                in_mapping = is_key = isinstance(event, yaml.MappingStartEvent)
                found.is_mapping &= in_mapping
                found.is_empty &= in_mapping or text in _NULLS
            elif depth == 1 and in_mapping:
                found.is_empty = False
                if is_key:
                    key = text or ""
                    found.fields.setdefault(key, [])
                elif text is not None:
                    found.fields[key].append(text)
                is_key = not is_key
            depth += isinstance(event, yaml.CollectionStartEvent)
            if depth > _DEEPEST:
                found.is_too_deep, found.is_whole = True, False
                return
