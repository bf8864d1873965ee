"""In the guest, the gRPC code of the tests' kubelet was generated before the machine was made."""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace
from typing import Any

_MODULES = {
    "deviceplugin": "deviceplugin.v1beta1.api_pb2",
    "deviceplugin_grpc": "deviceplugin.v1beta1.api_pb2_grpc",
    "podresources": "podresources.v1.api_pb2",
    "podresources_grpc": "podresources.v1.api_pb2_grpc",
}


@cache
def load_wire() -> Any:
    """As the tests' own `wire.load_wire`, as far as the guest needs it."""
    return SimpleNamespace(**{name: importlib.import_module(path) for name, path in _MODULES.items()})
