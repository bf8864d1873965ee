"""Keeps the ResourceSlices of this node as the inventory is, on an API server that may be slow, gone or unwilling.

It lists its slices, watches them, and writes what differs: when the inventory changes, and when somebody else has
changed or deleted a slice, as the kubelet does when it starts. Whatever fails, it begins again from the list, after a
pause that grows. Nothing else of the daemon waits for it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from http import HTTPStatus
from typing import Protocol

import structlog

from sandbox_plugin.dra.client import OPENED, ApiError, JsonObject, Listed
from sandbox_plugin.dra.pace import Pace
from sandbox_plugin.dra.plan import Pool, Verb, Write, plan, probe_of_taints, slice_name, without_times
from sandbox_plugin.dra.slices import Terms, dealt_out, render_devices
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import Backoff, happens
from sandbox_plugin.trouble import Trouble

_WATCH = (240, 300)
"""Seconds that a watch lasts, so that those of many nodes do not end together."""
_SHORT_WATCHES = 3
"""How many in a row may end within a second: one may do so because the API server restarts."""
_HOLDS = 30.0
"""Seconds after which what was begun again has held: the next failure is the first again."""
_LONGEST_WAIT = 300.0
"""Seconds at most that the API server may ask for."""
_EXPECTED = (HTTPStatus.CONFLICT, HTTPStatus.GONE)
"""Answers that say only that others were faster, or that time has passed."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Slices(Protocol):
    """What is asked of the API server. Everything raises `ApiError`, within some seconds."""

    async def node_uid(self, name: str) -> str | None:
        """None: there is no such node."""

    async def slices(self, driver: str, node: str) -> Listed:
        """Those of this driver on this node."""

    async def create_slice(self, new: JsonObject, *, dry_run: bool = False) -> JsonObject:
        """Returns it as it is stored, or with `dry_run` as it would be."""

    async def replace_slice(self, new: JsonObject) -> JsonObject:
        """Returns it as it is stored. Fails if it is not the version that `new` says."""

    async def delete_slice(self, old: JsonObject) -> None:
        """Deletes this very version, if it is there."""

    def watch_slices(self, driver: str, node: str, version: str, seconds: int) -> AsyncGenerator[JsonObject, None]:
        """Events since that version, for about so many seconds; the first is of type `OPENED`."""


class Failure(StrEnum):
    """How the API server failed, in one of few words: an HTTP status, the kind of one, or none at all."""

    NO_ANSWER = "no-answer"
    UNAUTHORIZED = "401"
    FORBIDDEN = "403"
    NOT_FOUND = "404"
    CONFLICT = "409"
    GONE = "410"
    INVALID = "422"
    TOO_MANY = "429"
    CLIENT = "4xx"
    SERVER = "5xx"


def failure_of(status: int | None) -> Failure:
    """Where an HTTP status is counted; None: there was no answer, or no sense in it."""
    if status is None:
        return Failure.NO_ANSWER
    if str(status) in tuple(Failure):
        return Failure(str(status))
    return Failure.SERVER if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Failure.CLIENT


def is_refusal(status: int | None) -> bool:
    """Whether the API server said no to what it was asked, so that asking again will not help."""
    if status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return False
    return status not in (*_EXPECTED, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatus:
    """How the slices stand, for whoever wants to show it."""

    slices: int
    devices: int
    generation: int
    writes: int
    """How many there were since the start, whatever became of them."""
    failures: Mapping[str, int]
    """How often the API server failed, by `Failure`."""
    published: bool
    """Whether the slices were as they should be at least once since the start."""
    trouble: str | None
    """Why it cannot publish, while it cannot."""
    refused: bool
    """Whether that is because the API server says no, and not because it is away or busy."""


@dataclass(kw_only=True)
class Publisher:
    """Usage:

    publisher = Publisher(api=..., registry=..., pool=..., terms=...)
    await publisher.run()       # until it is cancelled
    """

    api: Slices
    registry: Registry
    pool: Pool
    terms: Terms
    clock: Callable[[], float] = time.monotonic
    pace: Pace = field(default_factory=Pace)
    backoff: Backoff = field(default_factory=lambda: Backoff(first=0.5, cap=60.0))
    _existing: dict[str, JsonObject] = field(default_factory=dict)
    """The slices as the API server has them, by name, as far as is known."""
    _newest: int = 0
    """The highest generation that was ever seen."""
    _altered: dict[str, tuple[Sequence[JsonObject], Sequence[JsonObject]]] = field(default_factory=dict)
    """Slice -> the devices that were written, and those that were stored instead."""
    _written: list[JsonObject] | None = None
    """The devices that were published last."""
    _keeps_taints: bool | None = None
    """Whether the API server does; None: it has not been asked since the last list."""
    _is_watching: bool = False
    _failure: ApiError | None = None
    """Of the watch."""
    _is_settled: bool = False
    _writes: int = 0
    _failures: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(Failure, 0)))
    _is_refused: bool = False
    """Whether the latest failure, of those that are no news, was a refusal."""
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    """Rung by everything that is worth a look."""
    _trouble: Trouble = field(default_factory=Trouble)
    _alteration: Trouble = field(default_factory=Trouble)

    @property
    def status(self) -> PublisherStatus:
        return PublisherStatus(
            slices=len(self._existing),
            devices=len(self._written or ()),
            generation=self._newest,
            writes=self._writes,
            failures=self._failures,
            published=self._written is not None,
            trouble=self._trouble.now,
            refused=self._trouble.now is not None and self._is_refused,
        )

    @property
    def is_settled(self) -> bool:
        """Whether all was as it should be at the last look, and nothing has happened since."""
        return self._is_settled and not self._bell.is_set()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear_of_changes())
            while True:
                began_at = self.clock()
                failure = await self._keep()
                if self.clock() - began_at >= _HOLDS:
                    self.backoff.reset()
                self._failures[failure_of(failure.status)] += 1
                if failure.status not in _EXPECTED:
                    self._is_refused = is_refusal(failure.status)
                    if self._trouble.update(str(failure)):
                        log.warning("ResourceSlice trouble", driver=self.pool.driver, reason=str(failure))
                await asyncio.sleep(max(self.backoff.next(), min(failure.retry_after or 0, _LONGEST_WAIT)))

    async def _hear_of_changes(self) -> None:
        """Rings for all that slices show: which GPU is which module of its board is not in the inventory."""
        seen: object = None
        while True:
            inventory = self.registry.current
            now = inventory.version, self.registry.modules
            if now != seen:
                seen = now
                self._bell.set()
            await self.registry.stepped()

    # From a list to the first failure

    async def _keep(self) -> ApiError:
        """Lists, watches, and writes what differs. Returns what failed."""
        try:
            version = await self._begin()
        except ApiError as error:
            return error
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(version))
            try:
                return await self._write_what_differs()
            except ApiError as error:
                return error
            finally:
                watching.cancel()

    async def _begin(self) -> str:
        """What is there now. Returns as of which version."""
        if self.pool.node_uid is None:
            self.pool = replace(self.pool, node_uid=await self._node_uid())
        listed = await self.api.slices(self.pool.driver, self.pool.node)
        self._existing = {each["metadata"]["name"]: each for each in listed.items}
        self._note_generations()
        self._failure, self._is_watching, self._keeps_taints = None, False, None
        return listed.version

    async def _node_uid(self) -> str | None:
        """None: there is no such node, or we may not read nodes. Then nobody deletes the slices with the node."""
        try:
            return await self.api.node_uid(self.pool.node)
        except ApiError as error:
            if error.status != HTTPStatus.FORBIDDEN:
                raise
            return None

    async def _watch(self, version: str) -> None:
        """Until it fails: then the reason is in `_failure`."""
        short = 0
        try:
            while short < _SHORT_WATCHES:
                began_at = self.clock()
                pool, seconds = self.pool, random.randint(*_WATCH)
                async with aclosing(self.api.watch_slices(pool.driver, pool.node, version, seconds)) as events:
                    async for event in events:
                        if event["type"] == OPENED:
                            self._is_watching = True
                            self._bell.set()
                            continue
                        version = event["object"]["metadata"]["resourceVersion"]
                        self._hear(event)
                short = short + 1 if self.clock() - began_at < 1 else 0
            raise ApiError("the API server ends each watch as soon as it begins")
        except ApiError as error:
            self._failure = error
            self._bell.set()

    def _hear(self, event: JsonObject) -> None:
        """Takes in one event of the watch. Of what was written since it happened it is no news."""
        if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
            return
        told = event["object"]
        name = told["metadata"]["name"]
        known = self._existing.get(name)
        if known is not None and _version(told) <= _version(known):
            return
        if event["type"] == "DELETED":
            self._existing.pop(name, None)
        else:
            self._existing[name] = told
        self._note_generations()
        self._bell.set()

    def _note_generations(self) -> None:
        self._newest = max([self._newest, *(each["spec"]["pool"]["generation"] for each in self._existing.values())])

    # What is written

    async def _write_what_differs(self) -> ApiError:
        """Until the watch fails. Raises `ApiError` when a write does."""
        while self._failure is None:
            self._bell.clear()
            self._is_settled = False
            inventory = self.registry.current
            if not inventory.version:  # the host has not been scanned yet: that is not a node without devices
                await self._bell.wait()
                continue
            devices = await self._devices(inventory)
            writes = plan(self.pool, self._as_stored(devices), self._existing, self._newest)
            if not writes:
                self._published(devices)
                self._is_settled = True
                await self._bell.wait()
                continue
            is_restore = devices == self._written
            wait = self.pace.until_restore(self.clock()) if is_restore else self.pace.until_change(self.clock())
            if wait > 0:
                await happens(self._bell, within=wait)
                continue
            for write in writes:
                await self._carry_out(write)
            (self.pace.restored if is_restore else self.pace.changed)(self.clock())
            self._published(devices)
            log.info(
                "ResourceSlices restored" if is_restore else "ResourceSlices published",
                driver=self.pool.driver,
                slices=len(self._existing),
                devices=len(devices),
                generation=self._newest,
            )
        return self._failure

    async def _devices(self, inventory: Inventory) -> list[JsonObject]:
        """As they should be on this API server. One that drops taints would show an Unhealthy device as a good one."""
        terms = replace(self.terms, boards=self.registry.boards)
        devices = render_devices(inventory, terms)
        if not any("taints" in device for device in devices):
            return devices
        if self._keeps_taints is None:
            answer = await self.api.create_slice(probe_of_taints(self.pool), dry_run=True)
            self._keeps_taints = bool(answer["spec"]["devices"][0].get("taints"))
            if not self._keeps_taints:
                why = "it drops taints (feature DRADeviceTaints): what is Unhealthy is left out of the slices"
                log.warning("API server without device taints", driver=self.pool.driver, reason=why)
        return devices if self._keeps_taints else render_devices(inventory, replace(terms, taints=False))

    def _as_stored(self, devices: Sequence[JsonObject]) -> list[Sequence[JsonObject]]:
        """The devices of each slice; where the API server has stored others than it was given, those: to write again
        would change nothing."""
        parts = dealt_out(devices)
        for index, part in enumerate(parts):
            given, stored = self._altered.get(slice_name(self.pool, index), (None, ()))
            if given == part:
                parts[index] = stored
        return parts

    async def _carry_out(self, write: Write) -> None:
        self._writes += 1
        name = write.object["metadata"]["name"]
        if write.verb is Verb.DELETE:
            await self.api.delete_slice(write.object)
            self._existing.pop(name, None)
            return
        ask = self.api.create_slice if write.verb is Verb.CREATE else self.api.replace_slice
        answer = await ask(write.object)
        self._existing[name] = answer
        self._note_generations()
        given, stored = (without_times(each["spec"])["devices"] for each in (write.object, answer))
        if given != stored:
            self._altered[name] = given, stored
            if self._alteration.update(name):
                log.warning("API server stored other devices than it was given", driver=self.pool.driver, slice=name)

    def _published(self, devices: list[JsonObject]) -> None:
        """All is as it should be."""
        self._written = devices
        if self._is_watching and self._trouble.now is not None:
            self._trouble.update(None)
            log.info("ResourceSlice trouble is over", driver=self.pool.driver)


def _version(existing: JsonObject) -> int:
    """Versions of one kind of object are numbers that rise (KEP-5504)."""
    return int(existing["metadata"]["resourceVersion"])
