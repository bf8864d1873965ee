#!/usr/bin/env python3
"""Makes sandbox_plugin/api from protos/, or with --check says whether it is what protos/ give.

Apart from the package because it needs tools that only developers install: grpc_tools' protoc and betterproto's
plugin for it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
API = ROOT / "sandbox_plugin" / "api"
DOCSTRING = '"""The kubelet\'s gRPC APIs. Generated from protos/ by scripts/generate-api.py: never edited."""\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Make sandbox_plugin/api again from protos/.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 with the difference if there is one"
    )
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        try:
            fresh = generate(Path(folder))
        except subprocess.CalledProcessError as error:
            print(error.stderr, end="", file=sys.stderr)
            return 1
    if check:
        return report({path.name: path.read_text() for path in API.glob("*.py")}, fresh)
    API.mkdir(exist_ok=True)
    for stale in {path.name for path in API.glob("*.py")} - fresh.keys():
        (API / stale).unlink()
    for name, text in fresh.items():
        (API / name).write_text(text)
    return 0


def generate(folder: Path) -> dict[str, str]:
    """File name -> text of every module of the api, one for each proto package.

    Raises CalledProcessError, with protoc's words in its `stderr`, for protos that are not well-formed.
    """
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--python_betterproto_out={folder}", *sources]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # `python -m` looks for modules in the folder it runs in first: so it runs in one that holds none.
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env={**os.environ, "PATH": tools})
    modules = {_module(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("*/__init__.py")}
    return {"__init__.py": DOCSTRING} | {
        f"{module}.py": modules[module] for module in sorted(modules) if modules[module]
    }


def _module(package: Path) -> str:
    """What a proto package is called here: short where it is one of Kubernetes' long ones, as `dra_v1`."""
    return "_".join(package.parts).removeprefix("k8s_io_kubelet_pkg_apis_")


def report(committed: dict[str, str], fresh: dict[str, str]) -> int:
    """Prints how what is committed differs from a fresh generation. Returns the exit status."""
    for name in sorted(committed.keys() | fresh.keys()):
        before, after = (files.get(name, "").splitlines(keepends=True) for files in (committed, fresh))
        sys.stdout.writelines(difflib.unified_diff(before, after, f"committed/{name}", f"generated/{name}"))
    if committed == fresh:
        return 0
    print("sandbox_plugin/api is not what protos/ give: run scripts/generate-api.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
