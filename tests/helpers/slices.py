"""ResourceSlices in tests: of what they are made, and how a scheduler reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.plan import Pool
from sandbox_plugin.dra.slices import Terms
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.sweep import Remembered, Sweep
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HostFacts
from sandbox_plugin.registry import Registry

DRIVER, NODE = "vfio.sandbox-plugin", "node-1"
POOL, TERMS = Pool(driver=DRIVER, node=NODE), Terms(driver=DRIVER)


def facts_of(node: FakeNode) -> HostFacts:
    """What a scan of the node finds."""
    paths = HostPaths(node.root)
    return Sweep(paths=paths, began_at=time.monotonic(), memory=Remembered(), hanging=frozenset()).run()


def registry_of(facts: HostFacts, settings: Settings | None = None) -> Registry:
    """A registry that has seen this, of a consumer that needs no CDI specs; PodResources says that no pod holds any."""
    made = Registry(Rules(settings or Settings(), ModelNames.load()), requires_cdi=False)
    made.learn(claims={}, holdings=Holdings(asked_at=made.now()))
    made.observe(facts)
    return made


def seen_by_scheduler(slices: Iterable[Mapping[str, Any]], node: str = NODE) -> list[str] | None:
    """The devices of the pool as a scheduler counts them: those of the highest generation, and only if there are as
    many slices of it as they say (GatherPools in k8s.io/dynamic-resource-allocation/structured). None: it waits."""
    pool = [each["spec"] for each in slices if each["spec"]["pool"]["name"] == node]
    newest = max((spec["pool"]["generation"] for spec in pool), default=None)
    current = [spec for spec in pool if spec["pool"]["generation"] == newest]
    if any(spec["pool"]["resourceSliceCount"] != len(current) for spec in current):
        return None
    return sorted(device["name"] for spec in current for device in spec["devices"])
