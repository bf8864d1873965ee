"""Claims that the kubelet has forgotten are given back, and no others: each pod that could be taken for a lost one."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from devices import nothing_against
from dra_manager import DRIVER, NODE, claim_object
from facts import gpu, host
from loop import in_loop, until
from structlog.testing import capture_logs

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra import driver as drivers
from sandbox_plugin.dra import releaser as releasers
from sandbox_plugin.dra.abandoned import (
    FIRST_PAUSE,
    LONGEST_GAP,
    LONGEST_PAUSE,
    PATIENCE,
    InUse,
    Look,
    Pods,
    Suspicion,
    judge,
)
from sandbox_plugin.dra.claims import ClaimId, Refused
from sandbox_plugin.dra.client import ApiError, JsonObject
from sandbox_plugin.dra.driver import Driver, load_claims
from sandbox_plugin.dra.releaser import Releaser
from sandbox_plugin.dra.run import Dra
from sandbox_plugin.fake.api_server import FakeApiServer
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HostFacts
from sandbox_plugin.registry import Registry
from sandbox_plugin.shutdown import Shutdown

A, B = "0000:01:00.0", "0000:02:00.0"
NAME_A, NAME_B = "pci-0000-01-00-0", "pci-0000-02-00-0"
GPUS = ClaimId(namespace="default", name="gpus", uid="uid-of-gpus")
FACTS = host(gpu(A, vfio=1, group=50), gpu(B, vfio=2, group=51))
HOUR = 3600.0


@dataclass(kw_only=True)
class Bench:
    """One node with one claim, its kubelet and its API server; an hour is a moment."""

    folder: Path
    facts: HostFacts = FACTS
    device: str = NAME_A
    now: float = 10_000.0
    objects: dict[str, JsonObject | ApiError] = field(default_factory=dict)
    asked: int = 0
    """Times the API server was."""
    named: bool = False
    """PodResources names a pod with the claim's device."""
    pod_resources: str = "there"
    """`there`, `young`, `silent` or `absent`."""
    in_use: bool = False
    """A VM has the device A."""
    work: FileWork = field(default_factory=lambda: FileWork(lambda: None))

    @property
    def settings(self) -> Settings:
        return Settings(kubelet_dir=self.folder / "device-plugins", cdi_dir=self.folder / "cdi", node_name=NODE)

    async def start(self, *, prepares: bool = True, told: bool = True) -> Bench:
        """A run of the plugin; it prepares the claim, unless an earlier one has. `told`: PodResources has answered."""
        self.registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False, clock=lambda: self.now)
        prepared = await load_claims(self.settings, self.registry, self.work)
        self.registry.observe(self.facts)
        if told:
            self.registry.learn(holdings=Holdings(asked_at=self.now))
        self.driver = Driver(
            settings=self.settings,
            registry=self.registry,
            api=self,
            last_look=nothing_against,
            work=self.work,
            prepared=prepared,
        )
        if prepares and not prepared:
            self.objects["gpus"] = claim_object("gpus", self.device)
            await self.driver.prepare(GPUS)
        self.releaser = Releaser(driver=self.driver, api=self)
        self.asked = 0
        return self

    async def claim(self, namespace: str, name: str) -> JsonObject | None:
        self.asked += 1
        found = self.objects.get(name)
        if isinstance(found, ApiError):
            raise found
        return found

    def scan(self) -> None:
        functions = dict(self.facts.functions)
        if self.in_use:
            functions[A] = replace(functions[A], enable=1)
        self.registry.observe(host(*functions.values(), unreadable=self.facts.unreadable, began_at=self.now))

    def tell(self) -> None:
        """PodResources answers, or does not."""
        self.now += 1
        if self.pod_resources == "absent":
            self.registry.learn(pod_resources=False)
        elif self.pod_resources != "silent":
            claims = frozenset({("default/gpus", A)}) if self.named else frozenset[tuple[str, str]]()
            complete = self.pod_resources != "young"
            self.registry.learn(holdings=Holdings(asked_at=self.now, claims=claims, complete=complete))

    async def wait(self, seconds: float, *, step: float = FIRST_PAUSE) -> None:
        """Time goes on; PodResources is asked and the claims are looked at, again and again."""
        end = self.now + seconds
        while self.now < end:
            self.scan()
            self.tell()
            self.now += step
            await self.releaser.look()

    def is_held(self) -> bool:
        """Whether the claim has its device still."""
        return self.device in self.driver.device_names


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(folder=tmp_path)


@in_loop
async def test_a_claim_that_the_kubelet_has_forgotten_is_given_back_when_all_agree_for_half_an_hour(
    bench: Bench,
) -> None:
    await bench.start()
    del bench.objects["gpus"]
    with capture_logs() as logged:
        await bench.wait(PATIENCE - 2 * FIRST_PAUSE)
        assert bench.is_held()
        assert bench.releaser.abandoned_since(GPUS.uid) is not None
        await bench.wait(4 * FIRST_PAUSE)
    assert not bench.is_held()
    assert [path for path in bench.folder.rglob("*") if path.is_file()] == []
    assert bench.registry.current.by_key[("nvidia.com/pgpu", "1")].health.healthy
    assert bench.releaser.released == 1
    (line,) = [event for event in logged if event["event"] == "claim released"]
    why = "the API server has no such claim, and for 30 min no pod was named that has it, and no VM used its devices"
    assert (line["claim"], line["pci_address"], line["reason"]) == ("default/gpus", A, why)


@in_loop
async def test_so_is_one_that_an_earlier_run_prepared(bench: Bench) -> None:
    await bench.start()
    del bench.objects["gpus"]
    await bench.start()
    await bench.wait(HOUR)
    assert not bench.is_held()


OTHER_UID = claim_object("gpus", NAME_A, uid="another")
NOT_ALLOCATED = {**claim_object("gpus"), "status": {}}
OTHER_DEVICES = claim_object("gpus", NAME_B)
OTHER_NODE = claim_object("gpus", {"device": NAME_A, "pool": "another"})


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (OTHER_UID, "the claim was deleted, and another one has its name"),
        (NOT_ALLOCATED, "the claim is not allocated any more"),
        (OTHER_DEVICES, "the claim was allocated other devices"),
        (OTHER_NODE, "the claim was allocated other devices"),
    ],
)
@in_loop
async def test_one_that_is_another_or_has_nothing_here_any_more_is_given_back_too(
    bench: Bench, found: JsonObject, why: str
) -> None:
    await bench.start()
    bench.objects["gpus"] = found
    with capture_logs() as logged:
        await bench.wait(HOUR)
    assert not bench.is_held()
    assert logged[-1]["reason"].startswith(why)


# What is no reason


@in_loop
async def test_a_sandbox_that_is_being_made_keeps_its_claim_although_pod_resources_does_not_name_it_yet(
    bench: Bench,
) -> None:
    """Prepare has been answered, the images are pulled, and no device is open: the API server has the claim."""
    await bench.start()
    await bench.wait(4 * HOUR)
    assert bench.is_held()


@in_loop
async def test_a_claim_that_no_container_refers_to_keeps_its_devices_and_is_asked_about_seldom(bench: Bench) -> None:
    """PodResources names the claims that containers refer to, and not all that a pod has."""
    await bench.start()
    await bench.wait(10 * LONGEST_PAUSE)
    assert bench.is_held()
    assert bench.asked <= 13


@in_loop
async def test_a_running_pod_whose_kubelet_lost_its_records_keeps_its_claim(bench: Bench) -> None:
    """A kubelet that forgot it names its devices for no pod; the API server still has the claim for it."""
    await bench.start()
    bench.named = True
    await bench.wait(HOUR)
    bench.named = False
    bench.in_use = True
    await bench.wait(4 * HOUR)
    assert bench.is_held()
    bench.in_use = False  # its VM is started again
    await bench.wait(4 * HOUR)
    assert bench.is_held()


@in_loop
async def test_a_pod_that_was_force_deleted_while_its_vm_runs_keeps_the_devices_until_the_vm_has_ended_for_long(
    bench: Bench,
) -> None:
    """It is gone from the API server, its claim with it, and from PodResources."""
    await bench.start()
    del bench.objects["gpus"]
    bench.in_use = True
    await bench.wait(4 * HOUR)
    assert bench.is_held()
    bench.in_use = False
    await bench.wait(PATIENCE / 2)
    assert bench.is_held()
    await bench.wait(2 * PATIENCE)
    assert not bench.is_held()


@in_loop
async def test_a_pod_that_has_ended_and_is_not_given_back_yet_keeps_its_claim_until_the_kubelet_comes(
    bench: Bench,
) -> None:
    """The API server may have deleted the claim, and no VM runs. The kubelet gives it back within its minute, or when
    the driver is there again; an Unprepare after that finds nothing, and that is no error."""
    await bench.start()
    del bench.objects["gpus"]
    await bench.wait(PATIENCE / 2)
    assert bench.is_held()
    await bench.driver.unprepare(GPUS)
    assert bench.releaser.released == 0
    await bench.wait(HOUR)
    await bench.driver.unprepare(GPUS)
    assert bench.releaser.released == 0


@in_loop
async def test_a_claim_that_pod_resources_names_is_kept_and_the_api_server_is_not_asked(bench: Bench) -> None:
    await bench.start()
    del bench.objects["gpus"]
    bench.named = True
    await bench.wait(4 * HOUR)
    assert bench.is_held()
    assert bench.asked == 0


@in_loop
async def test_a_pod_that_is_named_in_between_begins_the_half_hour_anew(bench: Bench) -> None:
    await bench.start()
    del bench.objects["gpus"]
    for _ in range(5):
        bench.named = False
        await bench.wait(0.9 * PATIENCE)
        bench.named = True
        await bench.wait(FIRST_PAUSE)
    assert bench.is_held()


@in_loop
async def test_a_claim_that_the_kubelet_asks_for_again_in_between_is_kept(bench: Bench) -> None:
    await bench.start()
    del bench.objects["gpus"]
    for _ in range(5):
        await bench.wait(0.9 * PATIENCE)
        bench.objects["gpus"] = claim_object("gpus", NAME_A)
        await bench.driver.prepare(GPUS)
        del bench.objects["gpus"]
    assert bench.is_held()


@in_loop
async def test_a_claim_that_is_asked_for_while_it_is_looked_at_is_kept(bench: Bench) -> None:
    await bench.start()
    del bench.objects["gpus"]
    await bench.wait(PATIENCE - 2 * FIRST_PAUSE)
    asked = bench.claim

    async def ask(namespace: str, name: str) -> JsonObject | None:
        bench.now += 1
        bench.objects["gpus"] = claim_object("gpus", NAME_A)
        await bench.driver.prepare(GPUS)
        del bench.objects["gpus"]
        return await asked(namespace, name)

    bench.releaser.api = type("Api", (), {"claim": staticmethod(ask)})()
    await bench.wait(4 * HOUR)
    assert bench.is_held()


@in_loop
async def test_an_api_server_that_does_not_answer_or_answers_nonsense_says_nothing(bench: Bench) -> None:
    await bench.start()
    nonsense: list[Any] = [ApiError("it is away", status=503), ApiError("no", status=403), {"metadata": []}, {}]
    for found in nonsense:
        bench.objects["gpus"] = found
        await bench.wait(2 * HOUR)
        assert bench.is_held()
    del bench.objects["gpus"]
    for _ in range(5):
        await bench.wait(0.9 * PATIENCE)
        bench.objects["gpus"] = ApiError("it is away")
        await bench.wait(FIRST_PAUSE)
        del bench.objects["gpus"]
    assert bench.is_held(), "what was known before it failed is old"


@pytest.mark.parametrize("pod_resources", ["young", "silent", "silent from the start"])
@in_loop
async def test_pod_resources_that_does_not_answer_or_does_not_know_its_pods_yet_says_nothing(
    bench: Bench, pod_resources: str
) -> None:
    await bench.start()
    if pod_resources == "silent from the start":
        await bench.start(told=False)
        bench.registry.learn(pod_resources=True)
    del bench.objects["gpus"]
    bench.pod_resources = pod_resources.partition(" ")[0]
    await bench.wait(4 * HOUR)
    assert bench.is_held()


@in_loop
async def test_without_pod_resources_it_is_kept_and_said_once_how_to_give_it_back_by_hand(bench: Bench) -> None:
    await bench.start()
    await bench.start(told=False)
    bench.pod_resources = "absent"
    with capture_logs() as logged:
        await bench.wait(HOUR)
        assert logged == [], "its pod has it"
        del bench.objects["gpus"]
        await bench.wait(4 * HOUR)
    assert bench.is_held()
    (line,) = [event for event in logged if event["event"] == "claim not released"]
    file = bench.folder / "plugins" / DRIVER / "claims" / "uid-of-gpus.json"
    assert file.is_file()
    assert f"remove {file} and restart the plugin" in line["reason"]
    assert bench.releaser.remark(GPUS.uid) == line["reason"]
    file.unlink()
    bench.objects["other"] = claim_object("other", NAME_A)
    await bench.start(prepares=False)
    await bench.driver.prepare(ClaimId(namespace="default", name="other", uid="uid-of-other"))


@in_loop
async def test_a_vgpu_is_kept_because_nobody_can_see_whether_a_vm_has_it(tmp_path: Path) -> None:
    uuid = "00000000-0000-0000-0000-000000000001"
    mediated = gpu(uuid, vfio=1, group=50, mdev_type="nvidia-63", driver="nvidia-vgpu-vfio")
    bench = Bench(folder=tmp_path, facts=host(mediated), device=f"mdev-{uuid}")
    await bench.start()
    del bench.objects["gpus"]
    with capture_logs() as logged:
        await bench.wait(4 * HOUR)
    assert bench.is_held()
    assert "whether a VM has a vGPU cannot be seen" in logged[-1]["reason"]


SHARED = host(gpu(A, vfio=1, group=50), gpu(B, vfio=2, group=50))


@pytest.mark.parametrize(
    ("was_used", "facts"),
    [
        (False, host(gpu(B, vfio=2, group=51), unreadable={A: "Input/output error"})),
        (True, host(gpu(A, vfio=None, group=50, enable=1), gpu(B, vfio=2, group=51))),
        (False, host(gpu(A, vfio=1, group=50), gpu(B, vfio=2, group=50, enable=1))),
    ],
    ids=["cannot be read", "is being unbound under a VM", "shares its group with one in use"],
)
@in_loop
async def test_a_device_that_a_vm_may_have_all_the_same_is_kept_until_it_is_seen_idle(
    bench: Bench, was_used: bool, facts: HostFacts
) -> None:
    bench.facts = SHARED
    await bench.start()
    bench.in_use = was_used
    bench.scan()
    bench.in_use = False
    del bench.objects["gpus"]
    bench.facts = facts
    await bench.wait(4 * HOUR)
    assert bench.is_held()
    bench.facts = SHARED
    await bench.wait(HOUR)
    assert not bench.is_held()


@pytest.mark.parametrize(
    "facts",
    [host(gpu(B, vfio=2, group=51)), host(gpu(A, vfio=None, driver="nvidia", enable=1), gpu(B, vfio=2, group=51))],
    ids=["is gone", "a host driver has"],
)
@in_loop
async def test_a_device_that_no_vm_can_have_keeps_nothing_from_being_given_back(bench: Bench, facts: HostFacts) -> None:
    await bench.start(prepares=False)
    bench.objects["gpus"] = claim_object("gpus", NAME_A, NAME_B)
    await bench.driver.prepare(GPUS)
    del bench.objects["gpus"]
    bench.facts = facts
    await bench.wait(HOUR)
    assert bench.driver.device_names == []


@in_loop
async def test_a_full_disk_is_said_once_and_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.start()
    del bench.objects["gpus"]

    async def fail(*_: object, **__: object) -> bool:
        raise Refused("its files cannot be removed", "files")

    with monkeypatch.context() as patch, capture_logs() as logged:
        patch.setattr(Driver, "release", fail)
        await bench.wait(4 * HOUR)
    assert [event["event"] for event in logged] == ["claim not released"]
    assert bench.is_held()
    await bench.wait(2 * FIRST_PAUSE)
    assert not bench.is_held()


@in_loop
async def test_a_claim_that_is_given_back_or_asked_for_just_then_is_not_released(bench: Bench) -> None:
    await bench.start()
    bench.now += 1
    assert not await bench.driver.release(GPUS, "x", unasked_since=bench.now - 1)
    await bench.driver.unprepare(GPUS)
    assert not await bench.driver.release(GPUS, "x", unasked_since=bench.now)


@in_loop
async def test_a_claim_that_is_given_back_while_it_is_looked_at_is_forgotten(bench: Bench) -> None:
    await bench.start()

    async def ask(namespace: str, name: str) -> None:
        await bench.driver.unprepare(GPUS)

    bench.releaser.api = type("Api", (), {"claim": staticmethod(ask)})()
    await bench.wait(FIRST_PAUSE)
    assert bench.releaser.abandoned_since(GPUS.uid) is None
    assert bench.releaser.remark(GPUS.uid) is None


@pytest.mark.parametrize("pod_resources", ["there", "absent"])
@in_loop
async def test_a_claim_that_is_given_back_while_another_is_looked_at_is_not_looked_at(
    bench: Bench, pod_resources: str
) -> None:
    await bench.start()
    other = ClaimId(namespace="default", name="zed", uid="uid-of-zed")
    bench.objects["zed"] = claim_object("zed", NAME_B)
    await bench.driver.prepare(other)
    bench.objects.clear()
    bench.pod_resources = pod_resources

    async def ask(namespace: str, name: str) -> None:
        await bench.driver.unprepare(other if name == "gpus" else GPUS)

    bench.tell()
    if pod_resources == "absent":
        await bench.releaser.look()
    bench.releaser.api = type("Api", (), {"claim": staticmethod(ask)})()
    await bench.wait(4 * FIRST_PAUSE)
    assert bench.driver.device_names == [NAME_A]


@pytest.mark.parametrize("pod_resources", ["there", "absent"])
@in_loop
async def test_what_a_person_removes_of_a_claim_that_looks_abandoned_is_not_written_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pod_resources: str
) -> None:
    await bench.start()
    monkeypatch.setattr(drivers, "_INTERVAL", 0.01)
    file = bench.driver.checkpoint_of(GPUS.uid)
    following = asyncio.create_task(bench.driver.run())
    file.unlink()
    await until(file.exists)  # it does not look abandoned
    bench.pod_resources = pod_resources
    del bench.objects["gpus"]
    await bench.wait(FIRST_PAUSE)
    if pod_resources == "absent":
        assert f"remove {file} and restart the plugin" in str(bench.releaser.remark(GPUS.uid))
    file.unlink()
    (spec,) = (bench.folder / "cdi").iterdir()
    spec.unlink()
    await until(spec.exists)  # what follows the inventory has been there
    following.cancel()
    await asyncio.wait([following])
    assert not file.exists()
    await bench.start(prepares=False)
    assert bench.driver.device_names == []


@in_loop
async def test_a_claim_that_was_allocated_anew_waits_until_what_it_had_is_given_back(bench: Bench) -> None:
    """Its kubelet has lost its records: it asks for the new device, and never gave back the old one."""
    await bench.start()
    bench.objects["gpus"] = claim_object("gpus", NAME_B)
    for _ in range(3):
        with pytest.raises(Refused, match=f"it has {NAME_A} from before, which the kubelet has not given back yet"):
            await bench.driver.prepare(GPUS)
        await bench.wait(PATIENCE / 4)
    await bench.wait(HOUR)
    await bench.driver.prepare(GPUS)
    assert bench.driver.device_names == [NAME_B]


ALL_AGREE = Look(at=5000.0, lost="it is gone", pods=Pods.NOT_NAMED, in_use=InUse.NO)
SUSPECTED = Suspicion(at=4940.0, since=3000.0, why="it is gone")


def test_only_while_all_agree_and_nobody_asks_for_it_a_claim_looks_abandoned() -> None:
    assert judge(SUSPECTED, ALL_AGREE, -math.inf) == replace(SUSPECTED, at=5000.0)
    assert judge(SUSPECTED, ALL_AGREE, -math.inf).is_sure
    assert judge(None, ALL_AGREE, -math.inf).since == 5000.0
    for seen in (
        replace(ALL_AGREE, lost=None),
        *(replace(ALL_AGREE, pods=pods) for pods in Pods if pods is not Pods.NOT_NAMED),
        *(replace(ALL_AGREE, in_use=each) for each in InUse if each is not InUse.NO),
    ):
        assert judge(SUSPECTED, seen, -math.inf).since is None
    assert judge(SUSPECTED, ALL_AGREE, asked_at=5000.0).since is None, "it was asked for during the look"
    assert judge(SUSPECTED, ALL_AGREE, asked_at=4000.0).since == 5000.0, "and here before it"
    late = replace(ALL_AGREE, at=SUSPECTED.at + LONGEST_GAP + 1)
    assert judge(SUSPECTED, late, -math.inf).since == late.at, "nobody looked for long"


@in_loop
async def test_what_serves_claims_looks_for_such_claims_by_itself_and_shows_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real client of an API server that has no such claim."""
    await bench.start()
    monkeypatch.setattr(releasers, "FIRST_PAUSE", 0.01)
    async with FakeApiServer() as server:
        settings = replace(bench.settings, dra=True, api_server=server.url)
        prepared = await load_claims(settings, bench.registry, bench.work)
        dra = Dra(settings, bench.registry, last_look=nothing_against, work=bench.work, prepared=prepared)
        task = asyncio.create_task(dra.run(Shutdown()))
        seconds = []
        while claims := dra.shown()["claims"]:
            seconds.append(claims[0]["abandoned_seconds"])
            assert claims[0]["remark"] is None
            bench.tell()
            bench.now += FIRST_PAUSE
            asked = server.requests["get resourceclaims"]
            await until(lambda: server.requests["get resourceclaims"] > asked or not dra.shown()["claims"])  # noqa: B023
        assert dra.released == 1
        assert max(each for each in seconds if each is not None) > PATIENCE / 2
        task.cancel()
        await asyncio.wait([task])


@in_loop
async def test_it_looks_again_and_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.start()
    monkeypatch.setattr(releasers, "FIRST_PAUSE", 0.01)
    task = asyncio.create_task(bench.releaser.run())
    await until(lambda: bench.asked)
    bench.now += HOUR
    await until(lambda: bench.asked == 2)
    task.cancel()
    await asyncio.wait([task])
