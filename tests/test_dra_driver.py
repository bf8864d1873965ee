"""Preparing claims and giving them back, where something goes wrong on the way: disk, API server, another call."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from devices import nothing_against
from dra_manager import DRIVER, NODE, claim_object
from facts import gpu, host
from loop import in_loop, until
from names import PGPU
from structlog.testing import capture_logs

from sandbox_plugin.api import dra_v1, v1alpha1
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra import driver as drivers
from sandbox_plugin.dra import services
from sandbox_plugin.dra.calls import PREPARE, UNPREPARE
from sandbox_plugin.dra.checkpoint import read_all
from sandbox_plugin.dra.claim_files import ClaimFiles
from sandbox_plugin.dra.claims import ClaimId, Refused
from sandbox_plugin.dra.client import ApiError, JsonObject
from sandbox_plugin.dra.driver import Driver, load_claims
from sandbox_plugin.dra.services import DraHealthServicer, DraPluginServicer, health_of
from sandbox_plugin.host import files
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Device, LastLook, Objection, PciFunction
from sandbox_plugin.registry import Registry

A, B = "0000:01:00.0", "0000:02:00.0"
NAME_A, NAME_B = "pci-0000-01-00-0", "pci-0000-02-00-0"
GPUS = ClaimId(namespace="default", name="gpus", uid="uid-of-gpus")
FACTS = host(gpu(A, vfio=1, group=50), gpu(B, vfio=2, group=51))


@dataclass
class Claims:
    """What the API server tells."""

    objects: dict[str, JsonObject | ApiError] = field(default_factory=dict)
    asked: int = 0

    async def claim(self, namespace: str, name: str) -> JsonObject | None:
        self.asked += 1
        found = self.objects.get(name)
        if isinstance(found, ApiError):
            raise found
        return found


@dataclass
class SlowLook:
    """A last look that finds nothing, when it may end."""

    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(
        self, devices: Sequence[Device], functions: Mapping[str, PciFunction]
    ) -> Mapping[str, Objection]:
        self.has_begun.set()
        await self.may_end.wait()
        return {}


@dataclass(kw_only=True)
class Node:
    """One node's registry and folders, for one run of the plugin after the other."""

    folder: Path
    claims: Claims = field(default_factory=lambda: Claims({"gpus": claim_object("gpus", NAME_A)}))
    registry: Registry = field(
        default_factory=lambda: Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False)
    )

    def __post_init__(self) -> None:
        self.hangs = asyncio.Event()
        """A folder does not answer."""
        self.work = FileWork(self.hangs.set)

    @property
    def settings(self) -> Settings:
        return Settings(kubelet_dir=self.folder / "device-plugins", cdi_dir=self.folder / "cdi", node_name=NODE)

    async def driver(self, last_look: LastLook = nothing_against) -> Driver:
        """A new run of the plugin."""
        self.registry = Registry(Rules(Settings(), ModelNames.load()), requires_cdi=False)
        prepared = await load_claims(self.settings, self.registry, self.work)
        self.registry.observe(FACTS)
        self.registry.learn(holdings=Holdings(asked_at=self.registry.now()))
        return Driver(
            settings=self.settings,
            registry=self.registry,
            api=self.claims,
            last_look=last_look,
            work=self.work,
            prepared=prepared,
        )

    @property
    def written(self) -> list[str]:
        """Names of all files of claims."""
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())

    def held(self) -> set[str]:
        """IDs that the device plugin API does not give because a claim has them."""
        return {d.id for d in self.registry.current.by_key.values() if d.health.reason == "held-by-other-api"}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(folder=tmp_path)


FILES = ["uid-of-gpus.json", f"{DRIVER}_claim_uid-of-gpus.json"]


@in_loop
async def test_the_ledger_knows_a_claim_before_the_disk_does_and_frees_it_after_the_disk(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()
    seen: list[tuple[str, set[str], int]] = []
    for name in ("record", "write", "clear"):
        real = getattr(ClaimFiles, name)

        def spy(self: ClaimFiles, *args: Any, name: str = name, real: Any = real) -> Any:
            seen.append((name, node.held(), len(node.written)))
            return real(self, *args)

        monkeypatch.setattr(ClaimFiles, name, spy)
    await driver.prepare(GPUS)
    await driver.unprepare(GPUS)
    assert seen == [("record", {"1"}, 0), ("write", {"1"}, 1), ("clear", {"1"}, 2)]
    assert node.held() == set()
    assert node.written == []


@in_loop
async def test_on_a_full_disk_a_claim_is_refused_stays_held_and_is_prepared_when_there_is_room(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()

    def full(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", full)
        with pytest.raises(Refused, match=r"its files cannot be written: .*uid-of-gpus\.json: No space left"):
            await driver.prepare(GPUS)
    assert node.held() == {"1"}
    await driver.prepare(GPUS)
    assert node.written == FILES
    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", full)
        await driver.unprepare(GPUS)
    assert node.written == []


@in_loop
async def test_a_claim_whose_files_cannot_be_removed_stays_held_and_known_to_the_next_run(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)

    def refuse(self: ClaimFiles, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(ClaimFiles, "_remove", refuse)
        with pytest.raises(Refused, match=r"its files cannot be removed: .*: Read-only file system"):
            await driver.unprepare(GPUS)
    assert node.held() == {"1"}
    await node.driver()
    assert node.held() == {"1"}


@dataclass
class DeadMount:
    """The checkpoint of a claim is written when the mount answers again."""

    hangs: threading.Event = field(default_factory=threading.Event)
    answers: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadMount]:
    mount, record = DeadMount(), ClaimFiles.record

    def hang(self: ClaimFiles, *args: Any) -> None:
        mount.hangs.set()
        mount.answers.wait()
        record(self, *args)

    monkeypatch.setattr(ClaimFiles, "record", hang)
    yield mount
    mount.answers.set()


@pytest.mark.parametrize("then", ["prepare", "unprepare"])
@in_loop
async def test_what_follows_a_call_that_was_given_up_waits_until_its_files_are_written(
    node: Node, mount: DeadMount, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The kubelet gives a call 45 s, and a dead mount none of its time. What the thread of that call writes at last
    would else replace what came after it: the checkpoint of a claim that was given back."""
    driver = await node.driver()
    call = asyncio.create_task(driver.prepare(GPUS))
    await until(mount.hangs.is_set)
    call.cancel()
    await asyncio.wait([call])
    assert node.held() == {"1"}
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    follows = asyncio.create_task(getattr(driver, then)(GPUS))
    await until(lambda: follows.done() or node.hangs.is_set())
    assert not follows.done()
    mount.answers.set()
    await follows
    assert (node.held(), node.written) == (({"1"}, FILES) if then == "prepare" else (set(), []))


@in_loop
async def test_a_claim_that_was_given_back_while_it_was_prepared_is_not_prepared(node: Node) -> None:
    driver = await node.driver()
    await driver._writing.acquire()
    prepare = asyncio.create_task(driver.prepare(GPUS))
    await until(lambda: GPUS.uid in driver._prepared)
    unprepare = asyncio.create_task(driver.unprepare(GPUS))
    again = asyncio.create_task(driver.prepare(GPUS))
    driver._writing.release()
    assert await prepare
    await unprepare
    with pytest.raises(Refused, match="it was given back while it was prepared"):
        await again
    assert (node.held(), node.written) == (set(), [])


@in_loop
async def test_two_calls_for_one_claim_at_once_prepare_it_once(node: Node) -> None:
    driver = await node.driver()
    first, second = await asyncio.gather(driver.prepare(GPUS), driver.prepare(GPUS))
    assert first == second
    assert node.written == FILES


@in_loop
async def test_an_allocate_and_a_prepare_for_one_device_see_each_other(node: Node) -> None:
    """Whichever comes first to the ledger, while the other one looks at the device, has it."""
    look = SlowLook()
    driver = await node.driver(look)
    call = asyncio.create_task(driver.prepare(GPUS))
    await look.has_begun.wait()
    node.registry.allocate([(PGPU, "1")])
    look.may_end.set()
    with pytest.raises(Refused, match="held-by-other-api"):
        await call


@in_loop
async def test_what_the_look_finds_and_what_changes_while_it_looks_refuses_the_claim(node: Node) -> None:
    async def busy(devices: Sequence[Device], functions: Mapping[str, PciFunction]) -> Mapping[str, Objection]:
        return {devices[0].id: Objection(why="a VM has it")}

    driver = await node.driver(busy)
    with pytest.raises(Refused, match=r"device 0000:01:00\.0 \(nvidia\.com/pgpu=1\): a VM has it"):
        await driver.prepare(GPUS)

    async def bound_again(devices: Sequence[Device], functions: Mapping[str, PciFunction]) -> Mapping[str, Objection]:
        node.registry.observe(host(gpu(A, vfio=3, group=50), gpu(B, vfio=2, group=51)))
        return {}

    driver = await node.driver(bound_again)
    with pytest.raises(Refused, match="changed while it was looked at"):
        await driver.prepare(GPUS)
    assert node.held() == set()


@in_loop
async def test_a_refusal_is_logged_once_until_it_is_another_or_the_claim_is_prepared(node: Node) -> None:
    driver = await node.driver()
    node.claims.objects["gpus"] = ApiError("it is away")
    with capture_logs() as logged:
        for reason in ("it is away", "it is away", "it is late", "it is away"):
            node.claims.objects["gpus"] = ApiError(reason)
            with pytest.raises(Refused):
                await driver.prepare(GPUS)
    assert [event["reason"].rpartition(": ")[2] for event in logged] == ["it is away", "it is late", "it is away"]


@in_loop
async def test_a_prepared_claim_is_prepared_again_though_the_api_server_is_away(node: Node) -> None:
    driver = await node.driver()
    first = await driver.prepare(GPUS)
    driver = await node.driver()
    node.claims.objects["gpus"] = ApiError("it is away")
    assert await driver.prepare(GPUS) == first


@in_loop
async def test_a_claim_that_is_given_back_while_it_is_looked_at_again_is_not_prepared(node: Node) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)
    look = SlowLook()
    driver = await node.driver(look)
    call = asyncio.create_task(driver.prepare(GPUS))
    await look.has_begun.wait()
    await driver.unprepare(GPUS)
    look.may_end.set()
    with pytest.raises(Refused, match="it was given back while it was looked at"):
        await call
    assert (node.held(), node.written) == (set(), [])


@in_loop
async def test_what_a_lost_turn_still_writes_is_written_before_the_next_turn_reads(
    node: Node, mount: DeadMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock went to another plugin and came back, while a call's files were being written."""
    driver = await node.driver()
    call = asyncio.create_task(driver.prepare(GPUS))
    await until(mount.hangs.is_set)
    call.cancel()
    await asyncio.wait([call])
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    turn = asyncio.create_task(node.driver())
    await until(lambda: turn.done() or node.hangs.is_set())
    assert not turn.done()
    mount.answers.set()
    driver = await turn
    assert driver.device_names == [NAME_A]
    await driver.unprepare(GPUS)
    assert (node.held(), node.written) == (set(), [])


@in_loop
async def test_until_the_checkpoint_can_be_read_nothing_begins(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "Input/output error")] * 2

    def read(folder: Path, boot: str) -> Any:
        if failures:
            raise failures.pop()
        return read_all(folder, boot)

    monkeypatch.setattr(drivers, "read_all", read)
    monkeypatch.setattr(drivers, "_RETRY", 0.0)
    with capture_logs() as logged:
        assert await load_claims(node.settings, node.registry, node.work) == {}
    assert [event["event"] for event in logged] == ["claim checkpoint not read"], "said once"


@in_loop
async def test_trouble_with_the_files_of_claims_is_said_once_and_ends_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)
    monkeypatch.setattr(drivers, "_INTERVAL", 0.01)
    tries: list[int] = []

    def fail(self: ClaimFiles, *args: Any) -> None:
        tries.append(1)
        raise OSError(errno.EIO, "Input/output error", "/x")

    with capture_logs() as logged:
        with monkeypatch.context() as patch:
            patch.setattr(ClaimFiles, "write", fail)
            task = asyncio.create_task(driver.run())
            await until(lambda: len(tries) > 2)
        spec = node.folder / "cdi" / FILES[1]
        spec.unlink()
        await until(spec.exists)
        task.cancel()
        await asyncio.wait([task])
    assert [event["reason"] for event in logged if event["log_level"] == "error"] == ["/x: Input/output error"]


@in_loop
async def test_a_device_that_is_bound_again_is_in_the_spec_by_its_new_node_and_its_former_one_is_kept_from_others(
    node: Node,
) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)
    spec, record = node.folder / "cdi" / FILES[1], node.folder / "plugins" / DRIVER / "claims" / FILES[0]
    task = asyncio.create_task(driver.run())
    node.registry.observe(host(gpu(A, vfio=3, group=50), gpu(B, vfio=1, group=51)))
    await until(lambda: "/dev/vfio/devices/vfio3" in spec.read_text())
    assert '"formerNodes": [\n        "/dev/vfio/devices/vfio1"' in record.read_text()
    assert "1" in node.held(), "a container may have that node"
    ((_, names),) = await driver.prepare(GPUS)
    assert names == [f"{DRIVER}/claim=uid-of-gpus_{NAME_A}"]
    task.cancel()
    await asyncio.wait([task])
    await driver.unprepare(GPUS)
    assert node.held() == set()


@in_loop
async def test_what_an_earlier_run_left_of_other_claims_is_removed_at_the_start(node: Node) -> None:
    left = node.folder / "cdi" / f"{DRIVER}_claim_gone.json"
    left.parent.mkdir()
    left.write_text("{}")
    driver = await node.driver()
    task = asyncio.create_task(driver.run())
    await until(lambda: not left.exists())
    task.cancel()
    await asyncio.wait([task])


# The services


@in_loop
async def test_every_claim_of_a_call_has_an_answer_of_its_own(node: Node) -> None:
    servicer = DraPluginServicer(await node.driver())
    claims = [dra_v1.Claim(namespace="default", uid=f"uid-of-{name}", name=name) for name in ("gpus", "none")]
    claims.append(dra_v1.Claim(namespace="..", uid="odd", name="odd"))
    answer = await servicer.node_prepare_resources(dra_v1.NodePrepareResourcesRequest(claims=claims))
    assert {uid: (len(each.devices), each.error[:32]) for uid, each in answer.claims.items()} == {
        "uid-of-gpus": (1, ""),
        "uid-of-none": (0, "the API server has no such claim"),
        "odd": (0, "'..', 'odd', 'odd': not a claim'"),
    }
    back = await servicer.node_unprepare_resources(dra_v1.NodeUnprepareResourcesRequest(claims=claims))
    assert {uid: each.error for uid, each in back.claims.items()} == dict.fromkeys(answer.claims, "")


@in_loop
async def test_each_claim_of_a_call_is_counted_by_its_outcome_and_a_refusal_by_its_reason(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()
    servicer, calls = DraPluginServicer(driver), driver.calls
    claims = [dra_v1.Claim(namespace="default", uid=f"uid-of-{name}", name=name) for name in ("gpus", "none")]
    await servicer.node_prepare_resources(dra_v1.NodePrepareResourcesRequest(claims=claims))
    await servicer.node_unprepare_resources(dra_v1.NodeUnprepareResourcesRequest(claims=claims[:1]))
    node.claims.objects["late"] = ApiError("it is away")
    late = [dra_v1.Claim(namespace="default", uid="late", name="late")]
    await servicer.node_prepare_resources(dra_v1.NodePrepareResourcesRequest(claims=late))

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(node.claims, "claim", hang)
    call = asyncio.create_task(servicer.node_prepare_resources(dra_v1.NodePrepareResourcesRequest(claims=late)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    counted = {key: took.cumulative[-1] for key, took in calls.took.items() if took.cumulative[-1]}
    assert counted == {
        (PREPARE, "ok"): 1,
        (PREPARE, "refused"): 2,
        (PREPARE, "cancelled"): 1,
        (UNPREPARE, "ok"): 1,
    }
    assert +calls.refusals == {"not-allocated": 1, "api-server": 1}


@in_loop
async def test_an_unprepare_that_fails_says_so(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)

    def refuse(self: ClaimFiles, *_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(ClaimFiles, "clear", refuse)
    claim = dra_v1.Claim(namespace="default", uid=GPUS.uid, name="gpus")
    answer = await DraPluginServicer(driver).node_unprepare_resources(
        dra_v1.NodeUnprepareResourcesRequest(claims=[claim])
    )
    assert answer.claims[GPUS.uid].error == "its files cannot be removed: gone"


@in_loop
async def test_health_is_told_at_once_when_it_changes_and_again_in_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await node.driver()
    await driver.prepare(GPUS)
    monkeypatch.setattr(services, "_REPEAT", 0.01)
    stream = DraHealthServicer(driver).node_watch_resources(v1alpha1.NodeWatchResourcesRequest())

    async def told() -> dict[str, tuple[int, str]]:
        message = await anext(stream)
        return {each.device.device_name: (int(each.health), each.message) for each in message.devices}

    assert await told() == await told() == {NAME_A: (1, ""), NAME_B: (1, "")}
    node.registry.observe(host(gpu(B, vfio=2, group=51)))
    assert (await told())[NAME_A] == (2, f"gone: {A} is not on the PCI bus any more")
    await stream.aclose()  # type: ignore[attr-defined]


def test_a_device_that_a_claim_holds_is_told_although_nobody_lists_it_and_unknown_is_not_unhealthy() -> None:
    registry = Registry(Rules(), requires_cdi=False)
    registry.learn(claims={}, pod_resources=True)
    told = health_of(registry.observe(FACTS), NODE, ["pci-0000-77-00-0"], 5)
    assert [(each.device.device_name, int(each.health), each.last_updated_time) for each in told] == [
        (NAME_A, 0, 5),
        (NAME_B, 0, 5),
        ("pci-0000-77-00-0", 2, 5),
    ]
    assert {each.health_check_timeout_seconds for each in told} == {30}
