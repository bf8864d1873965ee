"""What changed between two inventories, as log lines."""

from __future__ import annotations

import asyncio
import math

import structlog

from sandbox_plugin.inventory.ledger import DeviceKey, Grant, Ledger
from sandbox_plugin.inventory.rules import NOTHING_TO_OFFER
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, Reason, key_order
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LINES = 16
"""Devices that are looked at in one go."""


async def report(registry: Registry) -> None:
    """Logs what changes between inventories: one line for each device that comes, goes, or changes its health.

    A device that has just come waits for its CDI spec first: it is found when that is written.
    """
    known: dict[DeviceKey, Device] = {}
    unoffered = Troubles[str]()
    inventory = await registry.newer_than(0)
    if not inventory.resources:
        log.info("no device to offer yet", reason=NOTHING_TO_OFFER)
    while True:
        known = await _report_devices(known, inventory)
        for address, why in sorted(unoffered.update(inventory.unoffered).items()):
            log.info("not offered", pci_address=address, reason=why)
        inventory = await registry.newer_than(inventory.version)
        await asyncio.sleep(0)  # the kubelet first: the endpoints were woken by the same change


async def _report_devices(known: dict[DeviceKey, Device], inventory: Inventory) -> dict[DeviceKey, Device]:
    now = {d.key: d for devices in inventory.resources.values() for d in devices}
    now = {k: d for k, d in now.items() if k in known or d.health.reason is not Reason.NOT_IN_CDI}
    for number, key in enumerate(sorted(known.keys() | now.keys(), key=key_order)):
        if number % _LINES == 0:
            await asyncio.sleep(0)  # whoever waits has its turn in between: a line takes 0.1 ms
        before, after = known.get(key), now.get(key)
        about = {"resource": key[0], "device": key[1]}
        if after is None:
            assert before is not None
            log.info("device dropped", **about, pci_address=before.address)
        elif before is None or before.health != after.health or before.address != after.address:
            event = "device found" if before is None else "device changed"
            about["pci_address"] = after.address
            if after.health.healthy:
                log.info(event, **about, health="Healthy")
            else:
                log.warning(event, **about, health="Unhealthy", reason=str(after.health))
    return now


async def report_grants(registry: Registry) -> None:
    """Logs at debug what becomes of each grant: it begins, PodResources names its pod, it ends. Runs until cancelled.

    For `--log-level debug` alone: it looks at every step of the registry.
    """
    before = Ledger()
    while True:
        inventory = registry.current
        if inventory.memory.ledger is not before:
            _report_grants(before, inventory)
            before = inventory.memory.ledger
        await registry.stepped()


def _report_grants(before: Ledger, inventory: Inventory) -> None:
    ledger = inventory.memory.ledger
    for key in sorted(before.grants.keys() | ledger.grants.keys(), key=key_order):
        old, new = before.grants.get(key), ledger.grants.get(key)
        if old is new and before.named_by.get(key) is ledger.named_by.get(key):
            continue
        was_named = None if old is None else before.pod_of(old)
        if old is not None and (new is None or new.at != old.at):
            log.debug("grant ends", **_about(old), pod=was_named)
            was_named = None
        if new is None:
            continue
        if old is None or new.at != old.at:
            device = inventory.by_key.get(key)
            mates = [] if device is None else list(device.mates)
            log.debug("grant begins", **_about(new), node=new.places.node, iommu_group=new.places.group, mates=mates)
        if (pod := ledger.pod_of(new)) not in (None, was_named):
            answer = ledger.named_by[key]
            ms = round((answer.asked_at - new.at) * 1000) if math.isfinite(new.at) else None
            log.debug("grant named", **_about(new), pod=pod, container=answer.containers.get(key), ms=ms)


def _about(grant: Grant) -> dict[str, str]:
    addresses = ",".join(sorted(grant.places.addresses))
    return {"resource": grant.key[0], "device": grant.key[1], "pci_address": addresses or "-"}
