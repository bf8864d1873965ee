"""Preparing claims and giving them back: what is prepared, in memory, in the checkpoint, and in files for containers.

    claim (API server) -> devices (inventory) -> last look -> ledger -> checkpoint -> CDI specs -> answer

From the last look to the ledger nothing is awaited, so that an Allocate and a Prepare for one device see each other.
What is in the ledger stays there until the claim is given back, also when a later step fails: the kubelet asks for
Prepare again, or for Unprepare, and until then nobody else gets the devices.

Giving back goes the other way, and the ledger is last: by Unprepare, or unasked (dra/releaser.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.calls import ClaimCalls
from sandbox_plugin.dra.checkpoint import checkpoint_folder, checkpoint_path, read_all
from sandbox_plugin.dra.claim_files import ClaimFiles
from sandbox_plugin.dra.claim_specs import Terms, cdi_ids, nodes_for, render_files
from sandbox_plugin.dra.claims import (
    Asked,
    ClaimId,
    Given,
    Prepared,
    Refused,
    Wanted,
    Why,
    choose,
    give,
    read_claim,
    usable,
)
from sandbox_plugin.dra.client import ApiError, Claims
from sandbox_plugin.dra.names import devices_by_name, pool_name
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.host.paths import boot_id
from sandbox_plugin.model import Device, LastLook
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Trouble

_INTERVAL = 5.0
"""Seconds after which it is seen to that all files are there, although nothing has changed."""
_RETRY = 1.0
"""Seconds between attempts to read the checkpoint."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def plugin_folder(settings: Settings) -> Path:
    """The driver's own, below the kubelet's `plugins`: beside the folder for device plugins."""
    return settings.kubelet_dir.parent / "plugins" / settings.dra_driver_name


async def load_claims(settings: Settings, registry: Registry, work: FileWork) -> dict[str, Prepared]:
    """The claims that are prepared, by UID, and the registry knows them too; as long as it takes. `work`: that of all
    files of claims, of this and of earlier turns.

    Before anything is given: until the checkpoint can be read, nobody knows what claims hold.
    """
    folder = plugin_folder(settings)
    trouble = Trouble()
    while True:
        try:
            prepared = await work.finish(partial(read_all, folder, boot_id(settings.host_root)))
        except OSError as error:
            if trouble.update(str(error)):
                log.error("claim checkpoint not read", path=str(checkpoint_folder(folder)), reason=str(error))
            await asyncio.sleep(_RETRY)
            continue
        registry.learn(claims={uid: each.for_ledger() for uid, each in prepared.items()})
        return prepared


class Driver:
    """The claims of this node, for as long as this plugin serves.

    Usage:

        driver = Driver(settings=..., registry=..., api=..., last_look=..., work=..., prepared=await load_claims(...))
        async with asyncio.TaskGroup() as group:
            group.create_task(driver.run())
            devices = await driver.prepare(claim)      # as often as somebody asks
    """

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        api: Claims,
        last_look: LastLook,
        work: FileWork,
        prepared: Mapping[str, Prepared],
    ) -> None:
        assert settings.node_name is not None
        self.name = settings.dra_driver_name
        self.pool = pool_name(settings.node_name)
        self.registry = registry
        self.calls = ClaimCalls()
        self._whole_node = settings.whole_node
        self._api = api
        self._last_look = last_look
        self._terms = Terms(
            driver=self.name,
            consumer=settings.consumer,
            cdi_dir=settings.cdi_dir,
            folder=plugin_folder(settings),
        )
        self._prepared = dict(prepared)
        self._holds = {uid: each.for_ledger() for uid, each in prepared.items()}
        """As the registry knows them."""
        self._files = ClaimFiles(self._terms, boot_id(settings.host_root))
        self._writing = asyncio.Lock()
        """Held by whoever changes files, so that for one claim nothing is written and removed at once."""
        self._work = work
        self._trouble = Trouble()
        self._refused: dict[str, str] = {}
        """Why each claim was refused last, by UID."""
        self._asked_at: dict[str, float] = {}
        """When the kubelet last asked for each claim that was prepared already, by UID."""
        self.left_to_a_person: Collection[str] = ()
        """UIDs of claims that look abandoned: a person may remove their file, which is not written again then."""

    @property
    def prepared(self) -> list[Prepared]:
        """The claims that are prepared, by their names."""
        return sorted(self._prepared.values(), key=lambda each: str(each.claim))

    def prepared_at(self, uid: str) -> float:
        """When a prepared claim was prepared, in monotonic seconds; -inf: not by this run of the plugin."""
        return self._holds[uid].at

    def asked_at(self, uid: str) -> float:
        """When the kubelet last asked this run for a claim that is prepared, in monotonic seconds; -inf: never."""
        return self._asked_at.get(uid, self._holds[uid].at)

    def is_prepared(self, uid: str) -> bool:
        return uid in self._prepared

    def checkpoint_of(self, uid: str) -> Path:
        """The file that keeps a claim prepared over restarts."""
        return checkpoint_path(self._terms.folder, uid)

    @property
    def device_names(self) -> list[str]:
        """Of all devices that prepared claims hold."""
        return [given.wanted.device for prepared in self._prepared.values() for given in prepared.devices]

    # Prepare

    async def prepare(self, claim: ClaimId) -> list[tuple[Given, list[str]]]:
        """The devices of a claim, each with its CDI names, once all is written. For the same claim the same again.

        Raises Refused.
        """
        try:
            claim.check()
            known = self._prepared.get(claim.uid)
            asked = await self._ask(claim, known)
            if known is not None:
                self._asked_at[claim.uid] = self.registry.now()
            await self._hold(claim, asked, known)
            async with self._writing:
                prepared = await self._write(claim.uid)
        except Refused as error:
            if self._refused.get(claim.uid) != str(error):  # the kubelet asks again and again
                log.warning("claim refused", claim=str(claim), uid=claim.uid, reason=str(error))
            self._refused[claim.uid] = str(error)
            raise
        self._refused.pop(claim.uid, None)
        return list(zip(prepared.devices, cdi_ids(prepared, self._terms), strict=True))

    async def _ask(self, claim: ClaimId, known: Prepared | None) -> Asked:
        """What the claim was allocated. Raises Refused.

        Also of one that is prepared already: a kubelet that has lost its records gives nothing back, and the claim may
        have been allocated anew.
        """
        try:
            found = await self._api.claim(claim.namespace, claim.name)
        except ApiError as error:
            if known is not None:
                return known.asked
            raise Refused(f"the API server does not tell what it was allocated: {error}", Why.API_SERVER) from None
        asked = read_claim(claim, found, driver=self.name, pool=self.pool)
        if known is not None and known.asked.names != asked.names:
            has = ", ".join(sorted(device for _, device in known.asked.names))
            raise Refused(f"it has {has} from before, which the kubelet has not given back yet", Why.CHANGED)
        return asked if known is None else known.asked

    async def _hold(self, claim: ClaimId, asked: Asked, known: Prepared | None) -> None:
        """Enters the claim's devices into the ledger, if they can be given. Raises Refused.

        They are looked at also where they are there already: a VM that has one of them now is not that of a pod whose
        sandbox is about to be made.
        """
        devices = self._choose(claim.uid, asked.devices)
        looked_at = self.registry.now()
        for device_id, objection in (await self._last_look(devices, self.registry.functions)).items():
            device = next(device for device in devices if device.id == device_id)
            raise Refused(f"device {device.address} ({device.resource}={device.id}): {objection.why}", Why.LAST_LOOK)
        for before, device in zip(devices, self._choose(claim.uid, asked.devices), strict=True):
            if (before.node, before.as_bound) != (device.node, device.as_bound):
                words = f"device {device.address} ({device.resource}={device.id}) changed while it was looked at"
                raise Refused(words, Why.CHANGED)
        for wanted, device in zip(asked.devices, devices, strict=True):
            nodes_for(wanted, device, self._terms.consumer)
        if claim.uid in self._prepared:
            return
        if known is not None:
            raise Refused("it was given back while it was looked at", Why.CHANGED)
        self._learn(give(claim, asked, devices), at=self.registry.now(), looked_at=looked_at)
        ids, addresses = ",".join(d.id for d in devices), ",".join(d.address for d in devices)
        log.info("claim prepared", claim=str(claim), uid=claim.uid, device=ids, pci_address=addresses)

    def _choose(self, uid: str, wanted: Iterable[Wanted]) -> list[Device]:
        return choose(uid, wanted, self.registry.current, whole_node=self._whole_node)

    def _learn(self, prepared: Prepared, *, at: float = -math.inf, looked_at: float = -math.inf) -> None:
        """It is so from now on, here and in the ledger."""
        uid = prepared.claim.uid
        self._prepared[uid] = prepared
        self._holds[uid] = prepared.for_ledger(at=at, looked_at=looked_at)
        self.registry.learn(claims=dict(self._holds))

    async def _write(self, uid: str) -> Prepared:
        """Writes all that belongs to a claim, by its devices as they are now. Raises Refused."""
        if uid not in self._prepared:
            raise Refused("it was given back while it was prepared", Why.CHANGED)
        devices = self._choose(uid, self._prepared[uid].asked.devices)
        prepared = self._move(self._prepared[uid], devices)
        wanted = render_files(prepared, devices, self._terms, self.registry.egm_gpus)
        try:
            await self._work.finish(partial(self._files.record, prepared))
            await self._work.finish(partial(self._files.write, prepared, wanted))
        except OSError as error:
            raise Refused(f"its files cannot be written: {_words(error)}", Why.FILES) from None
        return prepared

    def _move(self, prepared: Prepared, devices: Sequence[Device | None]) -> Prepared:
        """The claim with its devices where they are now: one that was bound again has another node."""
        pairs = zip(prepared.devices, devices, strict=True)
        given = tuple(g if d is None else g.moved(d) for g, d in pairs)
        if given != prepared.devices:
            held = self._holds[prepared.claim.uid]
            prepared = replace(prepared, devices=given)
            self._learn(prepared, at=held.at, looked_at=held.looked_at)
        return prepared

    # Unprepare

    async def unprepare(self, claim: ClaimId) -> None:
        """Gives back what a claim holds, if anything. Raises Refused."""
        self._refused.pop(claim.uid, None)
        async with self._writing:
            prepared = await self._take_back(claim.uid)
        if prepared is not None:
            log.info("claim given back", claim=str(claim), uid=claim.uid, pci_address=_addresses(prepared))

    async def release(self, claim: ClaimId, why: str, *, unasked_since: float) -> bool:
        """As `unprepare`, but nobody has asked for it; not if the kubelet has had it prepared since then. Raises
        Refused."""
        async with self._writing:
            if claim.uid not in self._prepared or self.asked_at(claim.uid) >= unasked_since:
                return False
            prepared = await self._take_back(claim.uid)
        assert prepared is not None
        log.warning("claim released", claim=str(claim), uid=claim.uid, pci_address=_addresses(prepared), reason=why)
        return True

    async def _take_back(self, uid: str) -> Prepared | None:
        """The claim that is not prepared any more; None: it was not. Raises Refused."""
        prepared = self._prepared.get(uid)
        if prepared is None:
            return None
        try:
            await self._work.finish(partial(self._files.clear, prepared))
        except OSError as error:
            raise Refused(f"its files cannot be removed: {_words(error)}", Why.FILES) from None
        del self._prepared[uid], self._holds[uid]
        self._asked_at.pop(uid, None)
        self.registry.learn(claims=dict(self._holds))
        return prepared

    # What follows the inventory

    async def run(self) -> None:
        """Keeps the files of prepared claims as the node is, until cancelled: no spec names a node that is gone, or
        another device's. First it removes what is of no claim that is prepared."""
        await self._follow(self._clean)
        while True:
            inventory = self.registry.current
            if inventory.version:
                await self._follow(self._sync)
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL):
                    await self.registry.newer_than(inventory.version)

    async def _follow(self, work: Callable[[], Awaitable[None]]) -> None:
        async with self._writing:
            try:
                await work()
            except OSError as error:
                self._complain(_words(error))
            else:
                self._trouble.update(None)

    async def _clean(self) -> None:
        for path in await self._work.finish(partial(self._files.clean, list(self._prepared.values()))):
            log.info("file of no claim removed", path=str(path))

    async def _sync(self) -> None:
        for prepared in list(self._prepared.values()):
            inventory = self.registry.current
            named = devices_by_name(inventory)
            devices = [usable(prepared, given, named, inventory) for given in prepared.devices]
            moved = self._move(prepared, devices)
            if moved.claim.uid not in self.left_to_a_person:
                await self._work.finish(partial(self._files.record, moved))
            wanted = render_files(moved, devices, self._terms, self.registry.egm_gpus)
            await self._work.finish(partial(self._files.write, moved, wanted))

    # Files

    def _complain(self, why: str) -> None:
        if self._trouble.update(why):
            log.error("files of claims not written", reason=why)


def _addresses(prepared: Prepared) -> str:
    return ",".join(min(given.places.addresses) for given in prepared.devices)


def _words(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
