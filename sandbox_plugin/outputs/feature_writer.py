"""The feature file of Node Feature Discovery (NFD): written when what it says changes, and renewed before it expires.

It stays when this plugin ends, so that a restart takes no label away for a moment. NFD takes its labels away by itself
when nobody has renewed it for `_LIFE`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from sandbox_plugin.host import files
from sandbox_plugin.host.confidential import Confidential, read_confidential
from sandbox_plugin.host.files import FileWork, Known
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.sysfs import OutOfResources
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.outputs.labels import Seen, feature_file, labels, seen
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Trouble

FILE_NAME = "sandbox-plugin"
_LIFE = 3600.0
"""Seconds after which NFD drops the labels of a plugin that is gone. A node that boots again is back before that."""
_RENEW = 1200.0
"""Seconds after which the file is written again although nothing has changed: two attempts may fail."""
_INTERVAL = 5.0
"""Seconds between looks whether the file is still what was written, and attempts to write it."""
_PAUSE = 1.0
"""Seconds between two changes: NFD looks no more often (runNotifier in source/local/local.go)."""

_ACTION = "everything else goes on; the folder must be the host's, where nfd-worker reads it"

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class FeatureWriter:
    """Keeps the file in `folder` as the registry's inventory is. To be run only by the plugin that serves the node."""

    folder: Path
    registry: Registry
    paths: HostPaths
    names: ModelNames
    gpu_features: bool
    makes_folder: bool = True
    """Whether the folder is made where it is missing. Without a mount of the host's nobody would read it."""
    interval: float = _INTERVAL
    pause: float = _PAUSE
    clock: Callable[[], float] = time.time
    """Seconds since 1970, as NFD counts them too."""
    _seen: Seen = field(default_factory=Seen)
    _written: bytes | None = None
    _says: dict[str, str] = field(default_factory=dict)
    """The labels in what was written."""
    _renew_at: float = 0.0
    _on_disk: Known[bytes] | None = None
    _trouble: Trouble = field(default_factory=Trouble)

    def __post_init__(self) -> None:
        self._work = FileWork(self._tell_of_silence)

    @property
    def file(self) -> Path:
        return self.folder / FILE_NAME

    async def run(self) -> None:
        """Runs until cancelled."""
        inventory = self.registry.current
        while True:
            if inventory.version:  # else nothing has been seen yet: that is no node without devices
                self._seen = seen(inventory, self._seen)
                await self._sync()
            await asyncio.sleep(self.pause)
            try:
                async with asyncio.timeout(self.interval):
                    inventory = await self.registry.newer_than(inventory.version)
            except TimeoutError:
                inventory = self.registry.current

    async def _sync(self) -> None:
        try:
            confidential, self._on_disk = await self._work.finish(self._look)
            wanted = labels(self._seen, confidential, self.names, gpu_features=self.gpu_features)
            if wanted:
                await self._write(wanted)
            elif self._on_disk is not None:
                await self._remove(self._on_disk)
        except OSError as error:
            self._tell(f"{error.filename or self.file}: {error.strerror}")
        except OutOfResources as error:
            self._tell(str(error))
        else:
            self._trouble.update(None)

    def _look(self) -> tuple[Confidential, Known[bytes] | None]:
        """Blocks. Raises OSError and `OutOfResources`."""
        confidential = read_confidential(self.paths)
        if not self.makes_folder:
            os.stat(self.folder)
        try:
            return confidential, files.read(self.file, self._on_disk, bytes)
        except FileNotFoundError:
            return confidential, None

    async def _write(self, wanted: dict[str, str]) -> None:
        now = self.clock()
        is_there = self._on_disk is not None and self._on_disk.says == self._written
        if is_there and wanted == self._says and now < self._renew_at:
            return
        text = feature_file(wanted, datetime.fromtimestamp(now + _LIFE, UTC)).encode()
        self._on_disk = await self._work.finish(partial(files.replace, self.file, text))
        is_news = not is_there or wanted != self._says
        self._written, self._says, self._renew_at = text, wanted, now + _RENEW
        if is_news:
            log.info("node labels written", path=str(self.file), labels=len(wanted))

    async def _remove(self, found: Known[bytes]) -> None:
        if await self._work.finish(partial(files.remove, self.file, found.stamp)):
            log.info("node labels removed", path=str(self.file), reason="this node has no device to offer any more")
        self._written, self._on_disk = None, None

    def _tell_of_silence(self) -> None:
        self._tell(f"{self.folder} has not answered for {files.PATIENCE:g} s")

    def _tell(self, why: str) -> None:
        if self._trouble.update(why):
            log.error("no node labels", path=str(self.file), reason=why, action=_ACTION)
