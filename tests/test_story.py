"""The demo's story: the seconds that it tells are those that pass, and what it tells is true on every preset.

The node is a real fake node; the kubelet is a stub that hears of each change after a second, by the test's own clock.
The same story with a real kubelet and daemon is in test_demo.py.
"""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from daemon import Places
from names import NVSWITCH, PGPU

from sandbox_plugin.fake.kubelet import Allocation, FakeKubelet, Listed
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.story import Story, StoryError, Told

RESOURCES = {0x030000: PGPU, 0x030200: PGPU, 0x068000: NVSWITCH}
STARTING, CHANGING, SERVING, HEARING, NOTICING = 5.0, 0.25, 0.5, 1.0, 32.0
"""Seconds that pass while the daemon starts, while a node is changed, while the kubelet begins to serve, until it hears
of something, and between a message and whoever waits for it. Sums of them are exact."""


class World(FakeNode):
    """A node whose changes take some time, and the clock. Changing what a VM holds is an error."""

    now = 1024.0

    def sicken(self, address: str, *, cold: bool = False) -> None:
        self._begin(address)
        super().sicken(address, cold=cold)

    def heal(self, address: str) -> None:
        self._begin(address)
        super().heal(address)

    def bind(self, address: str, driver: str = "vfio-pci") -> None:
        self._begin(address)
        super().bind(address, driver)

    def _begin(self, address: str) -> None:
        self.now += CHANGING
        function = self.function(address)
        assert not (function.vfio and function.enable), f"a VM has {address}"


class Kubelet(FakeKubelet):
    """What it lists is what the node showed when it was last waited for."""

    def __init__(self, world: World) -> None:
        super().__init__(Path("nowhere"))
        self._world = world
        self._ids: dict[str, str] = {}
        for function in world.functions():
            if function.vfio and function.class_code in RESOURCES:
                number = function.vfio.number if function.vfio.cdev else function.iommu_group
                self._ids[function.address] = str(number)
        self._listed: dict[str, dict[str, Listed]] = {}
        self._at = 0.0

    async def start(self) -> None:
        self._world.now += SERVING

    async def stop(self) -> None:
        self._listed = {}

    def resources(self) -> list[str]:
        return sorted(self._listed)

    def devices(self, resource: str) -> Mapping[str, Listed]:
        return self._listed.get(resource, {})

    def listed_at(self, resource: str) -> float:
        assert resource in self._listed
        return self._at

    async def wait_for(self, predicate: Callable[[], bool], seconds: float) -> None:
        self._world.now += HEARING
        self._at = self._world.now
        for address, device_id in self._ids.items():
            function = self._world.function(address)
            healthy = function.vfio is not None and function.link_speed != "Unknown"
            devices = self._listed.setdefault(RESOURCES[function.class_code], {})
            devices[device_id] = Listed(id=device_id, healthy=healthy)
        self._world.now += NOTICING
        if not predicate():
            raise TimeoutError

    async def admit(self, pod: str, resource: str, count: int) -> Allocation:
        self._world.now += HEARING
        ids = tuple(sorted(self.healthy(resource), key=int)[:count])
        self.allocations.append(Allocation(pod=pod, resource=resource, ids=ids))
        return self.allocations[-1]


def play(places: Places, preset: str, times: int = 1) -> list[Told]:
    world = World.create(places.top / "node", preset)
    assert isinstance(world, World)
    story = Story(node=world, kubelet=Kubelet(world), started_at=world.now, health_interval=1, clock=lambda: world.now)
    world.now += STARTING

    async def chapters() -> list[Told]:
        return [told for _ in range(times) async for told in story.chapters()]

    return asyncio.run(chapters())


@pytest.mark.parametrize(("preset", "gpus", "gpu"), [("hgx-h100", 4, 11), ("gh200", 1, 0)])
def test_the_seconds_run_from_the_cause_to_the_message_that_shows_it(
    places: Places, preset: str, gpus: int, gpu: int
) -> None:
    driver = "vfio-pci" if preset == "hgx-h100" else "nvgrace_gpu_vfio_pci"
    assert {re.sub(r" \(.*?\)", "", told.title): told.seconds for told in play(places, preset)} == {
        "The daemon starts on a node whose GPUs are bound to vfio.": STARTING + HEARING,
        f"A pod asks for {gpus} of nvidia.com/pgpu.": HEARING,
        f"GPU {gpu} falls off the PCI bus.": CHANGING + HEARING,
        f"GPU {gpu} answers again.": CHANGING + HEARING,
        "The kubelet restarts, and deletes every socket in its folder.": SERVING + HEARING,
        f"Somebody binds GPU {gpu} to the nvidia driver.": CHANGING + HEARING,
        f"And back to {driver}.": CHANGING + HEARING,
        "The pod ends.": None,
    }


def test_what_the_kubelet_never_sees_is_not_told(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "sicken", lambda *_: None)
    with pytest.raises(StoryError, match=r"did not see within 10 s: GPU 0 .* falls off the PCI bus"):
        play(places, "gh200")


@pytest.mark.parametrize("preset", [name for name, each in PRESETS.items() if name != "empty" and not each.vgpu_cards])
def test_on_every_preset_the_story_can_be_played_again_in_chapters_of_four_lines_at_most(
    places: Places, preset: str
) -> None:
    told = play(places, preset, times=2)
    assert len(told) == 8 + 7, "the devices appear once"
    columns = 80 - len("│ 12.0 s    │")  # the frame, and the column with the times
    for chapter in told:
        lines = [line for text in (chapter.title, chapter.why, chapter.result) for line in textwrap.wrap(text, columns)]
        assert len(lines) <= 4, lines
