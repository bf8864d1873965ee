"""What is asked of the API server, for whoever asks: the requests, and how they fail. `api_server.py` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

JsonObject = Mapping[str, Any]
"""An object of the API as its JSON says it, e.g. `{"metadata": {"name": ...}, "spec": ...}`."""


OPENED = "OPENED"
"""The type of an event that no API server sends: the watch has begun."""


class ApiError(Exception):
    """The API server did not do what it was asked. The message says why, in words, and is one line."""

    def __init__(self, reason: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        """The HTTP status; None: there was no answer, or no sense in it."""
        self.retry_after = retry_after
        """Seconds after which the API server wants to be asked again, if it said so."""


class Listed(NamedTuple):
    """An answer to a list."""

    items: Sequence[JsonObject]
    version: str
    """The resourceVersion as of which that is all; a watch begins there."""


class Claims(Protocol):
    """Reads ResourceClaims."""

    async def claim(self, namespace: str, name: str) -> JsonObject | None:
        """The claim as the API server has it now; None: there is none. Raises `ApiError`, within some seconds."""
