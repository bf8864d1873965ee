"""CDI specs: what tells Kata which node belongs to a device name.

`render_specs` is pure. `CdiWriter` keeps the folder equal to what it renders: each file is replaced whole, a device is
in the spec before it is listed as Healthy, and a node that is gone leaves the spec. A file is ours when its first line
carries our mark, or when its name and its kind are those of a resource that we serve (the reference plugin and
kata-manager write such files), or when it has the name and no kind at all (somebody is at it, or broke off); nothing
else is ever touched.

Rules of the format: CDI specification 0.5.0. Kata reads versions 0.1.0 to 0.6.0 strictly, and one bad spec in the
folder fails every pod, hence: no empty `devices`, only the device's own node, no field that is not needed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import aiofiles.os
import structlog

from sandbox_plugin.inventory.naming import cdi_file_name
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device
from sandbox_plugin.registry import Registry

MARK = "# Written by sandbox-plugin, which replaces this file whenever the node's devices change.\n"
_MARK_START = b"# Written by sandbox-plugin"
_KIND = re.compile(rb"""^["']?kind["']?\s*:\s*["']?([^\s"',}]+)""", re.MULTILINE)
"""In YAML as every writer of specs writes it: a key at the start of a line is one of the whole."""
_TEMPORARY = ".sandbox-plugin.tmp"
"""Not .yaml and not .json: readers of the folder do not look at it."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_T = TypeVar("_T")
_Stamp = tuple[int, int, int]
"""Inode number, time of the last change (ns) and size in bytes: a file that has the same is not read again."""


def render_specs(inventory: Inventory) -> dict[str, str]:
    """Resource name -> the text of its spec, for every resource with at least one device whose node exists."""
    return {
        resource: render_spec(resource, [d for d in devices if d.node_exists])
        for resource, devices in inventory.resources.items()
        if any(d.node_exists for d in devices)
    }


def render_spec(resource: str, devices: list[Device]) -> str:
    """One spec. Kata looks up `<resource name>=<device ID>`, so the kind is the resource and the name is the ID."""
    lines = ['cdiVersion: "0.5.0"', f"kind: {json.dumps(resource)}", "devices:"]
    for device in devices:
        lines += [
            f"  - name: {json.dumps(device.id)}",
            "    containerEdits:",
            "      deviceNodes:",
            f"        - path: {json.dumps(device.node)}",
        ]
    return MARK + "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnDisk:
    """A spec and the devices in it."""

    text: bytes
    ids: frozenset[str]
    stamp: _Stamp | None = None
    """The file as it was when this was seen to stand in it; None: never."""


@dataclass(kw_only=True)
class CdiWriter:
    """Keeps the specs in `folder` equal to the registry's inventory, and tells the registry what stands on disk.

    `is_ours(resource)` says whether a resource name is one that we may serve. Every `recheck` seconds the files are
    looked at again, so that what somebody else deleted or overwrote comes back.
    """

    folder: Path
    registry: Registry
    is_ours: Callable[[str], bool]
    recheck: float = 5.0
    _seen: dict[str, _OnDisk] = field(default_factory=dict)
    """What was last seen to stand in the file of a resource."""
    _trouble: dict[str, str] = field(default_factory=dict)
    _replaced: dict[str, int] = field(default_factory=dict)
    """How often somebody else's spec was replaced: two writers are named once, not at every turn."""

    async def run(self) -> None:
        """Runs until cancelled. The specs stay then: running pods may be restarted against them."""
        while True:
            inventory = self.registry.current
            if inventory.version:
                await self._sync(inventory)
            try:
                async with asyncio.timeout(min(self.recheck, 1.0) if self._trouble else self.recheck):
                    await self.registry.newer_than(inventory.version)
            except TimeoutError:
                continue

    async def _sync(self, inventory: Inventory) -> None:
        specs = render_specs(inventory)
        in_cdi: dict[str, frozenset[str]] = {}
        trouble: dict[str, str] = {}
        written: list[str] = []
        for resource, text in specs.items():
            wanted = _OnDisk(
                text=text.encode(), ids=frozenset(d.id for d in inventory.resources[resource] if d.node_exists)
            )
            try:
                if await self._put(resource, wanted):
                    written.append(resource)
            except OSError as error:
                trouble[resource] = f"its CDI spec cannot be written: {error.filename or self.folder}: {error.strerror}"
            except _NotOurs as error:
                trouble[resource] = str(error)
            if resource in self._seen:
                in_cdi[resource] = self._seen[resource].ids
        self.registry.learn(in_cdi=in_cdi, cdi_trouble=trouble)  # before anything else: pods may be waiting for it
        await asyncio.sleep(0)  # the kubelet first: the endpoints were woken by that
        for resource in written:
            log.info("cdi spec written", resource=resource, path=str(self.folder / cdi_file_name(resource)))
        stale = await self._remove_stale(wanted={cdi_file_name(resource) for resource in specs})
        for about, why in (trouble | stale).items():
            if self._trouble.get(about) != why:
                log.error("cdi trouble", resource=about, reason=why)
        self._trouble = trouble | stale

    async def _put(self, resource: str, wanted: _OnDisk) -> bool:
        """Makes the file what is wanted; says whether that is news. When it fails, `_seen` has what stands there."""
        file = self.folder / cdi_file_name(resource)
        before = self._seen.get(resource)
        try:
            brought = await _to_its_end(_bring(file, resource, wanted.text, before))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # those say nothing about the file
                self._seen.pop(resource, None)
            raise
        if before is not None and before.text != brought.found:
            del self._seen[resource]
        if brought.failure is not None:
            raise brought.failure
        self._seen[resource] = replace(wanted, stamp=brought.stamp)
        if brought.found == wanted.text:
            return False
        if brought.found is None or _is_ours(brought.found, before):
            return True
        return self._tell_of_other_writer(resource, file)

    def _tell_of_other_writer(self, resource: str, file: Path) -> bool:
        """Names the other writer, then the fight; after that nothing is news any more. Says whether something was."""
        times = self._replaced[resource] = self._replaced.get(resource, 0) + 1
        if times == 1:
            reason = "it has the name and the kind of a resource that this plugin serves, or the name and no kind"
            log.warning("cdi spec of another writer replaced", resource=resource, path=str(file), reason=reason)
        elif times == 2:
            log.error(
                "another writer keeps writing our cdi spec",
                resource=resource,
                path=str(file),
                reason="it was written again after this plugin had replaced it; it is replaced whenever that happens",
                action="stop the other writer (an older device plugin, or kata-manager), or give the resource an alias",
            )
        return times <= 2

    async def _remove_stale(self, wanted: set[str]) -> dict[str, str]:
        """Removes the specs of ours that no resource wants. Returns what could not be removed, and why."""
        try:
            names = await aiofiles.os.listdir(self.folder)
        except OSError:
            return {}
        trouble = {}
        for name in sorted(set(names) - wanted):
            file = self.folder / name
            try:
                content = await _to_its_end(_content(file)) if name.endswith(".yaml") else None
            except OSError:
                continue  # a folder, say: what cannot be read is not known to be ours
            try:
                if content is not None and self._is_stale(name, content):
                    await aiofiles.os.unlink(file)
                    log.info("stale cdi spec removed", path=str(file))
            except OSError as error:
                trouble[name] = f"stale CDI spec {file} cannot be removed: {error.strerror}"
        return trouble

    def _is_stale(self, name: str, content: bytes) -> bool:
        if is_marked(content):
            return True
        kind = _kind(content)
        return kind is not None and self.is_ours(kind) and name == cdi_file_name(kind)


class _NotOurs(Exception):
    """The file that has our name is not ours to replace."""


def is_marked(content: bytes) -> bool:
    """Whether this plugin wrote this spec, now or when it ran before."""
    return content.startswith(_MARK_START)


def _kind(content: bytes) -> str | None:
    """The kind that a spec states, as far as one can tell without taking it for valid."""
    if content.lstrip()[:1] == b"{":
        with suppress(ValueError, RecursionError):
            kind = json.loads(content).get("kind")
            return kind if isinstance(kind, str) else None
    match = _KIND.search(content)
    return match[1].decode("utf-8", "replace") if match else None


async def _to_its_end(work: Awaitable[_T]) -> _T:
    """Lets file work end although the caller is cancelled meanwhile: a thread that is in it cannot be stopped anyway,
    and what it opens must be closed."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # how it ended is nobody's business any more, and asyncio would complain
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Brought:
    """How it went to bring a file to what is wanted."""

    found: bytes | None
    """What stood there before; None if there was no file."""
    stamp: _Stamp | None = None
    """The file as it is now."""
    failure: OSError | _NotOurs | None = None
    """Why what was found stands there still."""


def _bring_now(file: Path, resource: str, wanted: bytes, before: _OnDisk | None) -> _Brought:
    """Replaces the file if something else than `wanted` stands there. Raises OSError when that cannot be seen."""
    stamp = _stamp(file)
    found = before.text if before is not None and stamp == before.stamp else _read(file)
    if found == wanted:
        return _Brought(found=found, stamp=stamp)
    if found is not None and not _is_ours(found, before) and (kind := _kind(found)) not in (None, resource):
        reason = f"{file} is somebody else's (kind {kind}): move it away or choose another alias"
        return _Brought(found=found, failure=_NotOurs(reason))
    try:
        try:
            stamp = _replace(file, wanted)
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            stamp = _replace(file, wanted)
    except OSError as error:
        return _Brought(found=found, failure=error)
    return _Brought(found=found, stamp=stamp)


def _is_ours(found: bytes, before: _OnDisk | None) -> bool:
    return is_marked(found) or (before is not None and found == before.text)


def _stamp(file: Path) -> _Stamp | None:
    """Which file, in which state, lies there; None if there is none."""
    try:
        return _stamp_of(os.stat(file))
    except FileNotFoundError:
        return None


def _stamp_of(status: os.stat_result) -> _Stamp:
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _read(file: Path) -> bytes | None:
    """What stands in the file; None if there is none."""
    try:
        with open(file, "rb", opener=_open_at_once) as opened:
            return opened.read(1 << 20)
    except FileNotFoundError:
        return None


def _replace(file: Path, content: bytes) -> _Stamp:
    """Replaces a file whole: a reader sees the old one or the new one. Leaves nothing behind when it fails."""
    temporary = file.with_name(f".{file.name}{_TEMPORARY}")
    try:
        with open(temporary, "wb", opener=_open_0644) as opened:
            opened.write(content)
            opened.flush()
            stamp = _stamp_of(os.fstat(opened.fileno()))
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return stamp


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer


def _open_0644(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    os.fchmod(descriptor, 0o644)  # whatever the umask: container runtimes of other users read it
    return descriptor


# One way to a worker thread and back for each, and not one for every call to the system in it: a pod may be waiting.
_content = aiofiles.os.wrap(_read)
_bring = aiofiles.os.wrap(_bring_now)
