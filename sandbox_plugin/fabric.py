"""Which GPU is which module of its HGX board: the file of `--fabric-partitions`, read again with every scan.

Another tool writes it at boot, perhaps after this daemon began. So a file that is missing or wrong is no failure: it is
said once, and allocation goes on without partitions. Nobody talks to the Fabric Manager here.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.inventory.partitions import parse_modules
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Trouble

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_MOST_BYTES = 65536
"""A file with all GPUs of a node has less than 1 KB."""


class FabricFile:
    """Keeps `registry.modules` as the file says. A file that hangs holds up nothing else."""

    def __init__(self, path: Path, registry: Registry) -> None:
        self._path = path
        self._registry = registry
        self._trouble = Trouble()
        self._foreign = Trouble()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            scanned = self._registry.functions
            await self._look()
            await self._registry.stepped()
            while self._registry.functions is scanned:  # an Allocate, or an answer of PodResources
                await self._registry.stepped()

    async def _look(self) -> None:
        try:
            modules = parse_modules(await on_thread(_read)(self._path))
        except (OSError, ValueError) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            if self._trouble.update(why):
                log.warning("allocation without fabric partitions", file=str(self._path), reason=why)
            modules = {}
        else:
            self._trouble.update(None)
            if modules != self._registry.modules:
                log.info("fabric partitions", file=str(self._path), gpus=len(modules))
        self._registry.modules = modules
        foreign = self._registry.addresses_not_here(modules)
        if self._foreign.update(", ".join(sorted(foreign)) or None):
            log.warning(
                "no PCI function here has these addresses: ignored", file=str(self._path), pci_addresses=foreign
            )


def _read(path: Path) -> str:
    """The text of the file. Blocks. Raises OSError, or ValueError if it cannot be such a file."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
