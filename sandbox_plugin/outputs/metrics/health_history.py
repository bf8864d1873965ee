"""When the health of each device changed, and how often: what no single inventory can say."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sandbox_plugin.inventory.ledger import DeviceKey
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Health
from sandbox_plugin.registry import Registry


@dataclass(frozen=True, slots=True)
class _Last:
    """How a device was listed last."""

    address: str
    health: Health
    since: float
    """When it became Healthy, or Unhealthy, in monotonic seconds."""


@dataclass(kw_only=True)
class HealthHistory:
    """Follows the inventory. Of devices that are not listed any more nothing is kept."""

    registry: Registry
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a device of a resource became Healthy (an empty reason), or Unhealthy for a reason."""
    _last: dict[DeviceKey, _Last] = field(default_factory=dict)
    _version: int = 0

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self.catch_up()
            await self.registry.newer_than(self._version)

    def since(self, key: DeviceKey) -> float:
        """Since when a device of the current inventory has been Healthy or Unhealthy, in monotonic seconds."""
        return self._last[key].since

    def catch_up(self) -> Inventory:
        """Takes in the current inventory, and returns it."""
        inventory = self.registry.current
        if inventory.version == self._version:
            return inventory
        now = self.registry.now()
        last: dict[DeviceKey, _Last] = {}
        for key, device in inventory.by_key.items():
            before, health = self._last.get(key), device.health
            if before is not None and before.address != device.address:
                before = None  # the number is another function's now
            if before is None or before.health.reason != health.reason:
                self.transitions[device.resource, health.reason or ""] += 1
            is_same = before is not None and before.health.healthy == health.healthy
            last[key] = _Last(device.address, health, before.since if before is not None and is_same else now)
        self._last, self._version = last, inventory.version
        return inventory
