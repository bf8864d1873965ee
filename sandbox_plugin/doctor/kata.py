"""Kata's configuration files, where its installers put them, each with its drop-ins. Blocking."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sandbox_plugin.doctor.node import KataFile

_FOLDERS = (
    "etc/kata-containers",
    "usr/share/defaults/kata-containers",
    "usr/local/share/defaults/kata-containers",
    "opt/kata/share/defaults/kata-containers",
)
"""Where an administrator, a distribution, `make install` and kata-deploy put them."""
_DEPTH = 3
"""Levels below: kata-deploy makes `runtime-rs/runtimes/SHIM/configuration-SHIM.toml`."""
_LARGEST = 1 << 20
"""Bytes of a file: Kata's own have less than 40 kB."""


def read_kata(root: Path) -> tuple[KataFile, ...]:
    """Each file once, under its shortest name: `configuration.toml` is often a link to another one."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for path in sorted(_below(root / folder, _DEPTH)):
            found.setdefault(os.path.realpath(path), path)
    return tuple(_read(path, root) for path in found.values())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth and entry.name != "config.d":
                yield from _below(Path(entry.path), depth - 1)
        elif entry.name.startswith("configuration") and entry.name.endswith(".toml"):
            yield Path(entry.path)


def _read(path: Path, root: Path) -> KataFile:
    """The file, and over it those of `config.d` beside it, in the order of their names, as Kata merges them."""
    shown = Path("/") / path.relative_to(root)
    says: dict[str, Any] = {}
    try:
        for part in (path, *sorted((path.parent / "config.d").glob("*.toml"))):
            shown_part = part
            says = _merged(says, tomllib.loads(_text(part)))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not valid TOML: {error}"
        return KataFile(path=shown, trouble=f"{Path('/') / shown_part.relative_to(root)}: {why}")
    runtime = says.get("runtime")
    named = runtime.get("pod_resource_api_sock") if isinstance(runtime, dict) else None
    sockets = {named: os.path.exists(root / named.lstrip("/"))} if named and isinstance(named, str) else {}
    return KataFile(path=shown, says=says, sockets=sockets)


def _text(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_LARGEST).decode()


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
