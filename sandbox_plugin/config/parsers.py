"""From the text that a user gives for a setting to its value. A ValueError says what is allowed."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from sandbox_plugin.hints import not_one_of
from sandbox_plugin.model import Reason
from sandbox_plugin.names import (
    SHORTEST_SOCKET_NAME,
    SOCKET_PATH_BYTES,
    check_alias,
    check_driver_name,
    check_node_name,
    check_resource_name,
)

_Word = TypeVar("_Word", bound=str)
_T = TypeVar("_T")

_SOCKET_FOLDER_BYTES = SOCKET_PATH_BYTES - len("/") - SHORTEST_SOCKET_NAME
"""Longest path of a folder in which there is room for a socket of ours, if need be with its shortest name."""


def alias(text: str) -> str:
    """The last part of a resource name, or nothing."""
    if text:
        check_alias(text)
    return text


def whole_node(text: str) -> tuple[str, int | None]:
    """A resource, and how many of its devices are a whole node where that is said: `nvidia.com/pgpu=8`."""
    resource, has_count, count = text.partition("=")
    check_resource_name(resource)
    if has_count and not re.fullmatch("[1-9][0-9]{0,3}", count):
        raise ValueError(f"{text!r}: behind = must be a number of devices from 1 to 9999, as in 'nvidia.com/pgpu=8'")
    return resource, int(count) if has_count else None


def driver_name(text: str) -> str:
    """The name of a DRA driver."""
    check_driver_name(text)
    return text


def node_name(text: str) -> str:
    """The name of a node of Kubernetes."""
    check_node_name(text)
    return text


def reasons(*allowed: Reason) -> Callable[[str], frozenset[Reason]]:
    """A parser of some of these reasons, with commas in between."""
    one = OneOf(*allowed)
    return lambda text: frozenset(one(word.strip()) for word in text.split(","))


def url(text: str) -> str:
    """The URL of a server, without a path."""
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?/?", text):
        raise ValueError(f"{text!r} is not a URL such as 'https://10.96.0.1:443'")
    return text.rstrip("/")


def path(text: str) -> Path:
    """A path that inotify and the kubelet's API can name: those need UTF-8."""
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8, as a path must be here") from None
    return Path(text)


def socket_folder(text: str) -> Path:
    """A folder that is not there yet is waited for; what is something else will not become one."""
    folder = path(text)
    length = len(text.encode())
    if length > _SOCKET_FOLDER_BYTES:
        allowed = f"at most {_SOCKET_FOLDER_BYTES} are allowed, so that the names of sockets fit behind it"
        raise ValueError(f"the path has {length} bytes; {allowed}")
    with suppress(OSError):
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise ValueError(f"{text} is not a folder")
    return folder


def socket_path(text: str) -> Path:
    """Where a unix socket may lie."""
    found = path(text)
    if len(text.encode()) > SOCKET_PATH_BYTES:
        raise ValueError(f"the path has {len(text.encode())} bytes; that of a socket may have {SOCKET_PATH_BYTES}")
    return found


def seconds(text: str) -> float:
    """A number of seconds, with or without a fraction."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.1 <= number <= 3600:
        raise ValueError(f"{text!r} is not a number of seconds between 0.1 and 3600")
    return number


class OneOf(Generic[_Word]):
    """A parser of these words, which are written in small letters here and may be given in capitals."""

    def __init__(self, *words: _Word) -> None:
        self.words = words

    def __call__(self, text: str) -> _Word:
        for word in self.words:
            if word == text.lower():
                return word
        raise ValueError(not_one_of(text, self.words))


def or_off(parse: Callable[[str], _T]) -> Callable[[str], _T | None]:
    """A parser that also takes `off`, in capitals too, which is None: so a flag can undo what the config file says.

    No other word for it: `no` may be a file.
    """
    return lambda text: None if text.lower() == "off" else parse(text)


def host_port(text: str) -> tuple[str, int]:
    """A host, which may be empty for all addresses, and a port: `127.0.0.1:9400`, `[::1]:9400`, `:9400`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]*)):([0-9]{1,5})", text)
    if found is None or int(found[3]) > 65535 or not _is_host(found[1], found[2]):
        raise ValueError(f"{text!r} is not HOST:PORT, as in '127.0.0.1:9400', '[::]:9400' or ':9400'")
    return found[1] or found[2], int(found[3])


def _is_host(in_brackets: str | None, name: str) -> bool:
    """Whether it is an IPv6 address, or what can be looked up."""
    from ipaddress import IPv6Address  # here: few need it

    try:
        if in_brackets is not None:
            IPv6Address(in_brackets)
        else:
            name.encode("idna")
    except ValueError:
        return False
    return True


def switch(text: str) -> bool:
    """`true` or `false`, or what else people write for these."""
    word = OneOf("true", "false", "yes", "no", "on", "off", "1", "0")(text)
    return word in ("true", "yes", "on", "1")


def go_switch(text: str) -> bool:
    """The same, and what else the reference plugin takes (ParseBool in Go's strconv); empty is false."""
    return switch({"": "false", "t": "true", "f": "false"}.get(text.lower(), text))
