"""Which driver a function had before it was bound to vfio, kept for `unbind` in one small file until the next boot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox_plugin.host.paths import boot_id
from sandbox_plugin.model import HostFacts

_STATE = "run/sandbox-plugin/vfio.json"
_VERSION = 1


class Memory:
    """The file below the host's /run, which is empty after a boot; one of an earlier boot is not believed either.

    A container keeps it over a restart if the host's /run/sandbox-plugin is mounted there.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / _STATE
        self._boot = boot_id(root)

    def recall(self, facts: HostFacts) -> dict[str, str | None]:
        """Address -> driver, of functions that are still the same model. Nothing, if the file makes no sense."""
        remembered: dict[str, str | None] = {}
        for address, entry in self._entries().items():
            function = facts.functions.get(address)
            if function is not None and entry.get("model") == "{:04x}:{:04x}".format(*function.model_id):
                driver = entry.get("driver")
                remembered[address] = driver if isinstance(driver, str) else None
        return remembered

    def remember(self, facts: HostFacts, drivers: Mapping[str, str | None]) -> None:
        """Adds what these functions have now. Raises OSError."""
        entries = self._entries()
        for address, driver in drivers.items():
            entries[address] = {"driver": driver, "model": "{:04x}:{:04x}".format(*facts.functions[address].model_id)}
        self._write(entries)

    def forget(self, addresses: Iterable[str]) -> None:
        """Raises OSError."""
        entries = self._entries()
        left = {address: entry for address, entry in entries.items() if address not in set(addresses)}
        if left != entries:
            self._write(left)

    def _entries(self) -> dict[str, dict[str, Any]]:
        with suppress(ValueError, AttributeError):
            document = json.loads(_text(self.path) or "{}")
            if document.get("version") == _VERSION and document.get("boot") == self._boot:
                return {str(address): dict(entry) for address, entry in document["functions"].items()}
        return {}

    def _write(self, entries: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps({"version": _VERSION, "boot": self._boot, "functions": entries}, indent=2))


def replace_text(path: Path, text: str) -> None:
    """Gives a file a new content as a whole: after a crash it is the old one or the new one. Raises OSError."""
    spare = path.with_name(f".{path.name}.new")
    try:
        with spare.open("w", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        spare.replace(path)
    except OSError as error:
        with suppress(OSError):
            spare.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
