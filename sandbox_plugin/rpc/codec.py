"""Messages that others sent: parsed, and checked to be what their type says.

betterproto takes what the wire says over what the .proto says: a number where a message or a string belongs is handed
on as a number. And of bytes that are not a message at all it raises whatever it stumbles over.
"""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import Any

import betterproto
from grpclib import GRPCError, Status
from grpclib.encoding.proto import ProtoCodec

_LONGEST_REASON = 300
"""Characters. It is put into a log line, or into a header of the answer."""


class MalformedMessage(ValueError):
    """Says which message, and what is wrong with it."""


class MessageCodec(ProtoCodec):
    """grpclib's own, but `decode` raises `MalformedMessage` for all that is not a whole message of its type."""

    def decode(self, data: bytes, message_type: Any) -> Any:
        try:
            message: Any = super().decode(data, message_type)
            _check(message)
        except Exception as error:
            raise MalformedMessage(f"not a valid {message_type.__name__}: {error}"[:_LONGEST_REASON]) from None
        return message


class RequestCodec(MessageCodec):
    """For a server. A malformed request is the caller's fault: grpclib would answer UNKNOWN, and log a traceback."""

    def decode(self, data: bytes, message_type: Any) -> Any:
        try:
            return super().decode(data, message_type)
        except MalformedMessage as error:
            raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from None


class Prepared:
    """First base of a message that is bytes already, where betterproto would hold up the loop: it takes 0.1 ms and more
    for each message within."""

    def __init__(self, content: bytes) -> None:
        self.__dict__["content"] = content  # not as an attribute: betterproto takes those for fields

    def SerializeToString(self) -> bytes:
        content: bytes = self.__dict__["content"]
        return content


def field(number: int, content: bytes) -> bytes:
    """One field that is a string or a message, as it stands within a message: its number and wire type 2, its length,
    its content (protobuf's encoding, "length-delimited records")."""
    return betterproto.encode_varint(number << 3 | 2) + betterproto.encode_varint(len(content)) + content


def _check(message: betterproto.Message) -> None:
    """Raises TypeError unless every field, all the way down, has the type that it is declared with."""
    for name, declared in _types(type(message)).items():
        _check_value(getattr(message, name), declared, f"{type(message).__name__}.{name}")


@cache
def _types(kind: type[betterproto.Message]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _check_value(value: Any, declared: Any, where: str) -> None:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Union:  # Optional
        if value is not None:
            _check_value(value, arguments[0], where)
    elif origin is list:
        items = _expect(value, list, where)
        if arguments[0] is str and set(map(type, items)) == {str}:
            return  # device IDs, of which there may be thousands while the kubelet waits
        for item in items:
            _check_value(item, arguments[0], where)
    elif origin is dict:
        for key, item in _expect(value, dict, where).items():
            _check_value(key, arguments[0], where)
            _check_value(item, arguments[1], where)
    elif isinstance(_expect(value, declared, where), betterproto.Message):
        _check(value)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{where} is not of type {kind.__name__}")
    return value
