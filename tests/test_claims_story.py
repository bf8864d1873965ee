"""The story of `demo --dra`: what it tells has happened, and a plugin that does something else ends it with the reason.

The node is a real fake node; the plugin is a stub in the test's loop, which sees each change of the node at once. The
same story with the real daemon is in test_demo.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemon import Places
from dra_driver import HEALTHY, UNHEALTHY, ScriptedDriver
from loop import in_loop

from sandbox_plugin.api import dra_v1
from sandbox_plugin.fake import claims_story
from sandbox_plugin.fake.api_server import CLAIMS, SLICES, FakeApiServer
from sandbox_plugin.fake.claims_story import ClaimsStory
from sandbox_plugin.fake.dra_kubelet import DraKubelet
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.scheduler import allocated
from sandbox_plugin.fake.story import StoryError, Told, numbered

DRIVER = "vfio.sandbox-plugin"


class World(FakeNode):
    """A node that tells of each change: the address, and why the device is ill now."""

    on_change: Callable[[str, str], None]

    def sicken(self, address: str, *, cold: bool = False) -> None:
        super().sicken(address, cold=cold)
        self.on_change(address, "off-the-bus: it is lost")

    def heal(self, address: str) -> None:
        super().heal(address)
        self.on_change(address, "")

    def bind(self, address: str, driver: str = "vfio-pci") -> None:
        super().bind(address, driver)
        self.on_change(address, "not-bound: bound to nvidia" if driver == "nvidia" else "")


class Api(FakeApiServer):
    """The plugin restores slices at once."""

    restore: Callable[[], None]

    def wipe(self) -> None:
        super().wipe()
        self.restore()


class Plugin(ScriptedDriver):
    """A good one, with ways to be bad."""

    world: World
    addresses: list[str]
    api: Api
    ill: dict[str, str]
    holds: dict[str, str]
    """Device -> UID of the claim that has it."""
    publishes = tells = True
    gives_twice = leaves_specs = writes_no_spec = gives_no_node = False
    refuses = ""
    why_held = "claim default/training-gpus holds it"

    def publish(self) -> None:
        """What it knows of the node, to both sides."""
        if self.publishes:
            pool = {"name": "node-1", "generation": 1, "resourceSliceCount": 1}
            devices = [self._device(address) for address in self.addresses]
            spec = {"driver": DRIVER, "nodeName": "node-1", "pool": pool, "devices": devices}
            self.api.put(SLICES, {"metadata": {"name": "one"}, "spec": spec})
        if self.tells:
            ill = {name_of(address): self.ill.get(address, "") for address in self.addresses}
            self.tell({name: (UNHEALTHY if why else HEALTHY, why) for name, why in ill.items()})

    def _device(self, address: str) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "type": {"string": "nvswitch" if self.world.function(address).class_code == 0x068000 else "gpu"},
            "resource.kubernetes.io/pciBusID": {"string": address},
            "resource.kubernetes.io/numaNode": {"int": 0},
        }
        reason = self.ill.get(address, "").partition(":")[0]
        taints = [{"key": f"{DRIVER}/unhealthy", "value": reason, "effect": "NoSchedule"}] if reason else []
        return {"name": name_of(address), "attributes": attributes, "taints": taints}

    def change(self, address: str, why: str) -> None:
        self.ill[address] = why
        self.publish()

    def prepare(self, claim: dra_v1.Claim) -> dra_v1.NodePrepareResourceResponse:
        found = self.api.find(CLAIMS, claim.name, claim.namespace)
        assert found is not None
        names = sorted(allocated([found]))
        if self.refuses or (any(name in self.holds for name in names) and not self.gives_twice):
            return dra_v1.NodePrepareResourceResponse(error=self.refuses or self.why_held)
        self.holds |= dict.fromkeys(names, claim.uid)
        node = "/dev/vfio/none" if self.gives_no_node else "/dev/vfio/vfio"
        edits = {"deviceNodes": [{"path": node}]}
        spec = {"kind": "a/claim", "devices": [{"name": name, "containerEdits": edits} for name in names]}
        if not self.writes_no_spec:
            self._spec(claim).write_text(json.dumps(spec))
        devices = [dra_v1.Device(device_name=name, cdi_device_ids=[f"a/claim={name}"]) for name in names]
        return dra_v1.NodePrepareResourceResponse(devices=devices)

    def unprepare(self, claim: dra_v1.Claim) -> dra_v1.NodeUnprepareResourceResponse:
        if not self.leaves_specs:
            self._spec(claim).unlink(missing_ok=True)
        self.holds = {name: uid for name, uid in self.holds.items() if uid != claim.uid}
        return dra_v1.NodeUnprepareResourceResponse(error=self.refuses)

    def _spec(self, claim: dra_v1.Claim) -> Path:
        return self.folder / "cdi" / f"{claim.uid}.json"


def name_of(address: str) -> str:
    return f"pci-{address.replace(':', '-').replace('.', '-')}"


@asynccontextmanager
async def stage(places: Places, preset: str) -> AsyncIterator[tuple[ClaimsStory, Plugin]]:
    """The story, and the plugin that it is about."""
    world = World.open(FakeNode.create(places.top / "node", preset).root)
    assert isinstance(world, World)
    places.cdi.mkdir()
    api, plugin = Api(), Plugin(folder=places.top)
    plugin.world, plugin.api, plugin.ill, plugin.holds = world, api, {}, {}
    plugin.addresses = [function.address for _, function in numbered(world)]
    world.on_change, api.restore = plugin.change, plugin.publish
    async with plugin, DraKubelet(places.top, places.top / "pods.sock", api) as kubelet:
        yield (
            ClaimsStory(
                node=world, api=api, kubelet=kubelet, cdi_dir=places.cdi, started_at=time.monotonic(),
                health_interval=1,
            ),
            plugin,
        )  # fmt: skip


async def told_by(story: ClaimsStory) -> list[Told]:
    return [told async for told in story.chapters()]


@pytest.mark.parametrize(("preset", "count"), [("hgx-h100", 4), ("workstation", 1), ("gh200", 1)])
@in_loop
async def test_a_good_plugin_is_told_of_step_by_step_and_the_story_can_be_played_again(
    places: Places, preset: str, count: int
) -> None:
    async with stage(places, preset) as (story, plugin):
        told = await told_by(story)
        assert len(told) == 9
        assert all(each.seconds is not None and each.seconds >= 0 for each in told)
        assert told[1].title.startswith(f"A pod asks by a claim for {count} GPU")
        assert told[2].result == "claim default/training-gpus holds it"
        assert told[4].result == "taint unhealthy=off-the-bus:NoSchedule; the kubelet hears: it is lost"
        assert told[5].result == "1 CDI spec of the claim removed, none is left"
        assert plugin.prepared == ["training-gpus", "same-gpu-again"]
        assert plugin.unprepared == ["same-gpu-again", "training-gpus"]
        assert (plugin.holds, story.api.claims()) == ({}, [])
        assert [each.title for each in await told_by(story)] == [each.title for each in told[1:]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "publishes nothing": ({"publishes": False}, "the API server did not see within 0.1 s: The daemon starts"),
    "tells no health": ({"tells": False}, "the kubelet did not see within 0.1 s: The daemon starts"),
    "refuses": ({"refuses": "not today"}, "the pod did not start: .*not today"),
    "writes no spec": ({"writes_no_spec": True}, "no CDI spec has a/claim=pci-0009-01-00-0"),
    "gives no node": ({"gives_no_node": True}, "was given nodes that there are not: /dev/vfio/none"),
    "gives a GPU twice": ({"gives_twice": True}, "two claims have pci-0009-01-00-0"),
    "refuses for another reason": ({"why_held": "it is Monday"}, "not refused because of the first: it is Monday"),
    "leaves specs": ({"leaves_specs": True}, r"CDI specs of the claim are left: .*\.json"),
}


@pytest.mark.parametrize("what", BAD)
@in_loop
async def test_what_a_bad_plugin_does_is_not_told_as_if_it_were_right(
    places: Places, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    faults, why = BAD[what]
    if "0.1 s" in why:
        monkeypatch.setattr(claims_story, "_PATIENCE", 0.1)
    async with stage(places, "gh200") as (story, plugin):
        for name, value in faults.items():
            setattr(plugin, name, value)
        if not plugin.publishes:
            story.api.wipe()
        if not plugin.tells:
            plugin.tell({})
        with pytest.raises(StoryError, match=why):
            await told_by(story)


@pytest.mark.parametrize("side", ["publishes", "tells"])
@in_loop
async def test_a_gpu_that_is_lost_must_be_seen_by_both(
    places: Places, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    who = {"publishes": "API server", "tells": "kubelet"}[side]
    async with stage(places, "gh200") as (story, plugin):
        chapters = story.chapters()
        for _ in range(4):
            await anext(chapters)
        setattr(plugin, side, False)
        monkeypatch.setattr(claims_story, "_PATIENCE", 0.1)
        with pytest.raises(StoryError, match=f"the {who} did not see within 0.1 s: GPU 0009:01:00.0 falls off"):
            await anext(chapters)


@in_loop
async def test_a_claim_that_is_not_given_back_or_cannot_be_scheduled_ends_it(places: Places) -> None:
    async with stage(places, "gh200") as (story, plugin):
        chapters = story.chapters()
        for _ in range(5):
            await anext(chapters)
        plugin.refuses = "the disk is full"
        with pytest.raises(StoryError, match=r"the claim was not given back: .*the disk is full"):
            await anext(chapters)
        with pytest.raises(StoryError, match="the pod was not scheduled: cannot allocate all claims"):
            await told_by(story)
