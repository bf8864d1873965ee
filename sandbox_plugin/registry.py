"""The one truth of the process: the current inventory, and waiting for a newer one.

Everything that may change the inventory goes through it: `observe` (a scan's facts), `learn` and `serve` (what parts
found out), `allocate`. Each takes one step with the pure `inventory.advance`, on the loop's thread and without
awaiting, so that an Allocate which notes its grants can be sure that the next Allocate sees them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from sandbox_plugin.inventory.advance import advance, allocate
from sandbox_plugin.inventory.ledger import GRANT_UNUSED, Allocation, DeviceKey, Holdings, PreparedClaim
from sandbox_plugin.inventory.partitions import Board, boards
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.model import HostFacts, PciFunction
from sandbox_plugin.tasks import happens


class Registry:
    """Holds the current `Inventory`. Readers take `current` and keep it for the whole call.

    Usage, by a reader that follows the inventory:

        inventory = registry.current
        while True:
            ...                                            # use this one snapshot
            inventory = await registry.newer_than(inventory.version)

    A slow reader gets the latest inventory, never a backlog of old ones.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        requires_cdi: bool = True,
        claims_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self.modules: Mapping[str, int] = {}
        """Module numbers on their HGX boards by PCI address, where partitions are followed."""
        self._facts: HostFacts | None = None
        self._signals = Signals(in_cdi={} if requires_cdi else None, claims_only=claims_only)
        self._inventory = Inventory()
        self._wake_at: float | None = None
        self._changed = asyncio.Event()
        self._stepped = asyncio.Event()

    @property
    def current(self) -> Inventory:
        return self._inventory

    async def newer_than(self, version: int) -> Inventory:
        """Waits, without polling, until the current inventory's version is above `version`, and returns it."""
        while self._inventory.version <= version:
            await self._changed.wait()
        return self._inventory

    async def look_is_due(self) -> None:
        """Waits until another look would lead further although nothing happens: a device has settled, for one."""
        while self._wake_at is None or self._clock() < self._wake_at:
            patience = None if self._wake_at is None else self._wake_at - self._clock()
            await happens(self._stepped, within=patience)

    async def stepped(self) -> None:
        """Waits for the next `observe` or `learn`, whether or not it brings news."""
        await self._stepped.wait()

    def observe(self, facts: HostFacts, *, aer: Iterable[tuple[str, str]] = ()) -> Inventory:
        """Takes in a scan, with the AER events that had arrived before it began."""
        if facts.unreachable is not None and self._facts is None:
            return self._inventory  # nothing was seen yet: that is not a host without devices
        self._facts = facts
        return self._step(self._signals._replace(aer=tuple(aer)))

    @property
    def functions(self) -> Mapping[str, PciFunction]:
        """All functions by address, as the latest scan saw them."""
        return {} if self._facts is None else self._facts.functions

    @property
    def egm_gpus(self) -> Mapping[str, frozenset[str]]:
        """As in `HostFacts`, as the latest scan saw them."""
        return {} if self._facts is None else self._facts.egm_gpus

    @property
    def boards(self) -> tuple[Board, ...]:
        """The HGX boards whose partitions are known, with the GPUs of the latest scan."""
        return boards(self.modules, self._facts.functions.values()) if self.modules and self._facts else ()

    def addresses_not_here(self, addresses: Iterable[str]) -> list[str]:
        """Those that the latest scan did not see; none before the first scan."""
        return [] if self._facts is None else sorted(set(addresses).difference(self._facts.functions))

    @property
    def holdings(self) -> Holdings | None:
        """The latest answer of PodResources, if it ever gave one."""
        return self._signals.holdings

    @property
    def has_pod_resources(self) -> bool:
        """Whether there is a PodResources, as far as is known."""
        return self._signals.pod_resources

    @property
    def holders(self) -> dict[str, str | None]:
        """As `Ledger.holders`."""
        return self._inventory.memory.ledger.holders

    def now(self) -> float:
        """Monotonic seconds, as everything here counts them."""
        return self._clock()

    def allocate(self, keys: Iterable[DeviceKey], *, looked_at: float | None = None) -> Inventory:
        """Takes in that one Allocate is being answered with these devices of the current inventory.

        `looked_at`: when the look at them began that found nothing against them; None: just now.
        """
        devices = [self._inventory.by_key[key] for key in keys]
        now = self._clock()
        allocation = Allocation(devices=devices, looked_at=now if looked_at is None else looked_at)
        late = now + GRANT_UNUSED
        self._wake_at = late if self._wake_at is None else min(self._wake_at, late)
        return self._replace(allocate(self._inventory, allocation, self._signals, now))

    def serve(self, since: float | None = None) -> Inventory:
        """Takes in that this plugin serves since then, or now, and that another one may have done so until then."""
        self._signals = self._signals._replace(serving_since=self._clock() if since is None else since)
        return self._step(self._signals)

    def learn(
        self,
        *,
        holdings: Holdings | None = None,
        pod_resources: bool | None = None,
        former: Mapping[DeviceKey, str] | None = None,
        busy: Mapping[DeviceKey, frozenset[str]] | None = None,
        claims: Mapping[str, PreparedClaim] | None = None,
        in_cdi: Mapping[str, frozenset[str]] | None = None,
        cdi_trouble: Mapping[str, str] | None = None,
    ) -> Inventory:
        """Takes in what readers found out; what is not given stays as it was known."""
        known = self._signals.holdings
        if holdings is not None and (known is None or holdings.asked_at >= known.asked_at):  # else it comes late
            self._signals = self._signals._replace(holdings=holdings, pod_resources=True)
        if in_cdi is not None:
            self._signals = self._signals._replace(in_cdi=in_cdi)
        if cdi_trouble is not None:
            self._signals = self._signals._replace(cdi_trouble=cdi_trouble)
        if pod_resources is not None:
            self._signals = self._signals._replace(pod_resources=pod_resources)
        if former is not None:
            self._signals = self._signals._replace(former=former)
        if claims is not None:
            self._signals = self._signals._replace(claims=claims)
        return self._step(self._signals._replace(busy=busy or {}))

    def _step(self, signals: Signals) -> Inventory:
        if self._facts is None:
            return self._inventory
        inventory, self._wake_at = advance(self._inventory, self._facts, signals, self._clock(), self._rules)
        return self._replace(inventory)

    def _replace(self, inventory: Inventory) -> Inventory:
        before, self._inventory = self._inventory, inventory
        self._stepped.set()
        self._stepped = asyncio.Event()
        if self._inventory.version != before.version:
            self._changed.set()
            self._changed = asyncio.Event()
        return self._inventory
