"""A strict reader of feature files, by NFD's own rules and by none of our code.

It refuses what nfd-worker would skip or nfd-master would refuse (source/local/local.go and
pkg/apis/nfd/validate/validate.go of node-feature-discovery), and also what both let pass but nobody wants: a label
twice, white space, an empty value, no expiry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

OWN = "sandbox-plugin.feature.node.kubernetes.io/"
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_LARGEST = 65536
_LONGEST_PREFIX, _LONGEST = 253, 63


@dataclass(frozen=True)
class Features:
    """What a folder of feature files makes of a node."""

    labels: Mapping[str, str]
    expires: datetime

    @property
    def own(self) -> dict[str, str]:
        """Those under this plugin's prefix, without it."""
        return {name.removeprefix(OWN): value for name, value in self.labels.items() if name.startswith(OWN)}


def read_features(folder: Path) -> Features | None:
    """What nfd-worker gets from a folder; None: no label. AssertionError for what is against the rules."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")] if folder.is_dir() else []
    if not files:
        return None
    (file,) = files
    assert file.is_file()
    assert not file.is_symlink()
    assert file.stat().st_mode & 0o444 == 0o444, "nfd-worker does not run as root"
    return parse(file.read_bytes())


def parse(content: bytes) -> Features:
    assert 0 < len(content) <= _LARGEST
    assert content.endswith(b"\n"), "cut off"
    labels: dict[str, str] = {}
    expires: datetime | None = None
    for line in content.decode("ascii").removesuffix("\n").split("\n"):
        assert line == line.strip(), repr(line)
        assert line, "an empty line"
        if line.startswith("# +"):
            directive, has_value, value = line.removeprefix("# +").partition("=")
            assert (directive, has_value) == ("expiry-time", "="), line
            assert expires is None
            assert not labels, "it would not count for what stands before it"
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value), f"{value} is not RFC 3339, in UTC"
            expires = datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            continue
        if line.startswith("#"):
            continue
        name, has_value, value = line.partition("=")
        assert has_value, "its value would be `true`"
        assert name not in labels, f"{name} twice"
        _check(name, value)
        labels[name] = value
    assert expires is not None
    assert labels
    return Features(labels, expires)


def _check(name: str, value: str) -> None:
    prefix, has_prefix, last = name.partition("/")
    assert has_prefix, f"{name}: unprefixed keys are not allowed"
    assert len(prefix) <= _LONGEST_PREFIX
    assert _SUBDOMAIN.fullmatch(prefix), name
    assert len(last) <= _LONGEST
    assert _NAME.fullmatch(last), name
    if prefix == "kubernetes.io" or prefix.endswith(".kubernetes.io"):
        assert re.search(r"(^|\.)(feature|profile)\.node\.kubernetes\.io$", prefix), f"{name}: namespace is not allowed"
    assert value
    assert len(value) <= _LONGEST
    assert _NAME.fullmatch(value), f"{name}={value}"
