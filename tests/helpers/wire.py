"""The gRPC APIs by other hands than ours: google.protobuf and grpcio code, generated from protos/ when tests run.

Apart from the package, so that what the tests hold against the daemon shares no line with it but the protos.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROTOS = Path(__file__).resolve().parents[2] / "protos"
MODULES = {
    "deviceplugin": "deviceplugin.v1beta1.api_pb2",
    "deviceplugin_grpc": "deviceplugin.v1beta1.api_pb2_grpc",
    "podresources": "podresources.v1.api_pb2",
    "podresources_grpc": "podresources.v1.api_pb2_grpc",
    "registration": "pluginregistration.v1.api_pb2",
    "registration_grpc": "pluginregistration.v1.api_pb2_grpc",
    "dra": "dra.v1.api_pb2",
    "dra_grpc": "dra.v1.api_pb2_grpc",
    "health": "drahealth.v1alpha1.api_pb2",
    "health_grpc": "drahealth.v1alpha1.api_pb2_grpc",
}


def generate(folder: Path) -> None:
    """Writes the modules below `folder`, as packages named like the folders of protos/."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    outputs = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *sources], check=True)


@cache
def load_wire() -> Any:
    """The generated modules, as `MODULES` names them.

    Once for each process: protobuf's descriptor pool takes a file only once.
    """
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        sys.path.insert(0, folder)
        try:
            return SimpleNamespace(**{name: importlib.import_module(path) for name, path in MODULES.items()})
        finally:
            sys.path.remove(folder)
