"""The demo's story: the seconds that it tells are those that pass, and what it tells is true on every preset.

The node is a real fake node; the kubelet is a stub that hears of each change after a time of the test's choosing, by
the test's own clock. The same story with a real kubelet and daemon is in test_demo.py.
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

from sandbox_plugin.api import v1beta1
from sandbox_plugin.fake.kubelet import Allocation, FakeKubelet, Listed
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.story import Story, StoryError, Told
from sandbox_plugin.model import PciFunction

RESOURCES = {0x030000: PGPU, 0x030200: PGPU, 0x068000: NVSWITCH}
STARTING, CHANGING, SERVING, NOTICING = 5.0, 0.25, 0.5, 32.0
"""Seconds that pass while the daemon starts, while a node is changed, while the kubelet begins to serve, and between a
message and whoever waits for it. All of them, and the delays below, are added without any rounding."""


class Clock:
    def __init__(self) -> None:
        self.now = 1024.0

    def __call__(self) -> float:
        return self.now


class Node(FakeNode):
    """A node whose changes take some time, and are watched."""

    clock = Clock()
    on_change: Callable[[str], None] | None = None
    """Called with the address, after `create`."""

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
        if self.on_change:
            self.clock.now += CHANGING
            self.on_change(address)


class Kubelet(FakeKubelet):
    """What it lists is what the node showed when it was last waited for."""

    def __init__(self, node: FakeNode, clock: Clock, delay: float) -> None:
        super().__init__(Path("nowhere"))
        self.clock = clock
        self.delay = delay
        self.addresses = {_id(f): f.address for f in node.functions() if f.vfio and f.class_code in RESOURCES}
        self._node = node
        self._devices: dict[str, dict[str, Listed]] = {}
        self._listed_at = 0.0

    async def start(self) -> None:
        self.clock.now += SERVING

    async def stop(self) -> None:
        self._devices = {}

    def resources(self) -> list[str]:
        return sorted(self._devices)

    def devices(self, resource: str) -> Mapping[str, Listed]:
        return self._devices.get(resource, {})

    def listed_at(self, resource: str) -> float:
        assert resource in self._devices
        return self._listed_at

    async def wait_for(self, predicate: Callable[[], bool], seconds: float) -> None:
        self.clock.now += self.delay
        self._listed_at = self.clock.now
        self._devices = {}
        for device_id, address in self.addresses.items():
            function = self._node.function(address)
            healthy = function.vfio is not None and function.link_speed != "Unknown"
            nodes = () if function.numa_node is None else (function.numa_node,)
            listed = Listed(id=device_id, healthy=healthy, numa_nodes=nodes)
            self._devices.setdefault(RESOURCES[function.class_code], {})[device_id] = listed
        self.clock.now += NOTICING
        if not predicate():
            raise TimeoutError

    async def admit(self, pod: str, resource: str, count: int) -> Allocation:
        self.clock.now += self.delay
        ids = tuple(sorted(self.healthy(resource), key=int)[:count])
        self.allocations.append(
            Allocation(pod=pod, resource=resource, ids=ids, answer=v1beta1.ContainerAllocateResponse())
        )
        return self.allocations[-1]


def _id(function: PciFunction) -> str:
    assert function.vfio is not None
    return str(function.vfio.number if function.vfio.cdev else function.iommu_group)


def play(story: Story, times: int = 1) -> list[Told]:
    async def chapters() -> list[Told]:
        return [told for _ in range(times) async for told in story.chapters()]

    return asyncio.run(chapters())


@pytest.fixture
def make_story(places: Places) -> Callable[..., Story]:
    """A story that has not been played, on a preset. Changing what a pod holds is an error."""

    def make(preset: str, delay: float = 1.0) -> Story:
        node = Node.create(places.top / "node", preset)
        assert isinstance(node, Node)
        clock = Clock()
        kubelet = Kubelet(node, clock, delay)

        def refuse_if_held(address: str) -> None:
            (device_id,) = (i for i, a in kubelet.addresses.items() if a == address)
            assert kubelet.holder(PGPU, device_id) is None, f"{address} is in a pod"
            assert not (node.function(address).vfio and node.function(address).enable), f"a VM has {address}"

        node.clock, node.on_change = clock, refuse_if_held
        story = Story(node=node, kubelet=kubelet, started_at=clock.now, health_interval=1.0, clock=clock)
        clock.now += STARTING
        return story

    return make


# Its seconds


@pytest.mark.parametrize("delay", [0.125, 3.5])
@pytest.mark.parametrize("preset", ["hgx-h100", "gh200"])
def test_the_seconds_run_from_the_cause_to_the_message_that_shows_it(
    make_story: Callable[..., Story], preset: str, delay: float
) -> None:
    told = play(make_story(preset, delay))
    seconds = {re.sub(r" \(.*?\)", "", chapter.title): chapter.seconds for chapter in told}
    gpu = "11" if preset == "hgx-h100" else "0"
    driver = "vfio-pci" if preset == "hgx-h100" else "nvgrace_gpu_vfio_pci"
    assert seconds == {
        "The daemon starts on a node whose GPUs are bound to vfio.": STARTING + delay,
        f"A pod asks for {4 if preset == 'hgx-h100' else 1} of nvidia.com/pgpu.": delay,
        f"GPU {gpu} falls off the PCI bus.": CHANGING + delay,
        f"GPU {gpu} answers again.": CHANGING + delay,
        "The kubelet restarts, and deletes every socket in its folder.": SERVING + delay,
        f"Somebody binds GPU {gpu} to the nvidia driver.": CHANGING + delay,
        f"And back to {driver}.": CHANGING + delay,
        "The pod ends.": None,
    }


def test_what_the_kubelet_never_sees_is_not_told(
    make_story: Callable[..., Story], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Node, "sicken", lambda *_: None)
    with pytest.raises(StoryError, match=r"0009:01:00\.0 stayed healthy within 10 s"):
        play(make_story("gh200"))


# Its truth


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "empty"])
def test_on_every_preset_things_happen_to_gpus_that_no_pod_holds_and_each_is_told_with_its_outcome(
    make_story: Callable[..., Story], preset: str
) -> None:
    story = make_story(preset)
    told = play(story, times=2)
    assert len(told) == 8 + 7, "the devices appear once"
    gpus = sum(1 for spec in PRESETS[preset].functions() if RESOURCES.get(spec.model.class_code) == PGPU)
    for chapter in told:
        if chapter.title.startswith("A pod asks for"):
            taken = len(re.findall(r"\d+", chapter.result.partition(" on ")[0]))
            assert chapter.title == f"A pod asks for {taken} of nvidia.com/pgpu."
            assert taken == (1 if gpus <= 2 else 4)
        elif "falls off" in chapter.title or chapter.title.startswith("Somebody binds"):
            assert chapter.result == f"nvidia.com/pgpu: {gpus - 1} of {gpus} healthy"
        elif "answers again" in chapter.title or chapter.title.startswith("And back"):
            assert chapter.result == f"nvidia.com/pgpu: {gpus} of {gpus} healthy"
    assert not any(f.enable and f.vfio for f in story.node.functions()), "a VM still has a GPU"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "empty"])
def test_a_chapter_has_four_lines_at_most_on_80_columns(make_story: Callable[..., Story], preset: str) -> None:
    columns = 80 - len("│ 12.0 s    │")  # the frame, and the column with the times
    for told in play(make_story(preset)):
        lines = [line for text in (told.title, told.why, told.result) for line in textwrap.wrap(text, columns)]
        assert len(lines) <= 4, lines


def test_where_there_is_one_gpu_the_pod_ends_before_anything_happens_to_it_and_that_is_said(
    make_story: Callable[..., Story],
) -> None:
    told = play(make_story("gh200"))
    titles = [chapter.title for chapter in told]
    assert titles.index("The pod ends.") < titles.index("GPU 0 (0009:01:00.0) falls off the PCI bus.")
    (end,) = (chapter for chapter in told if chapter.title == "The pod ends.")
    assert end.why.startswith("This node has no other GPU")
