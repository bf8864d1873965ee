"""The publisher against a fake API server over real sockets: published, kept, restored, and never a storm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from facts import gpu, host
from loop import in_loop, until
from names import PGPU
from slices import DRIVER, NODE, POOL, TERMS, registry_of, seen_by_scheduler
from structlog.testing import capture_logs

from sandbox_plugin.dra.api_server import ApiServer
from sandbox_plugin.dra.client import OPENED, JsonObject, Listed
from sandbox_plugin.dra.pace import Pace
from sandbox_plugin.dra.plan import slice_name
from sandbox_plugin.dra.publisher import Publisher, failure_of, is_refusal
from sandbox_plugin.fake.api_server import NODES, SLICES, Account, FakeApiServer
from sandbox_plugin.model import HostFacts, PciFunction
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import Backoff

NAME = slice_name(POOL, 0)
TOKEN = "token-of-node-1"


class Clock:
    """Runs fast, so that nothing waits for the pace of real clusters."""

    def __init__(self, times: float = 50) -> None:
        self._times = times

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() * self._times


class QuickPace(Pace):
    """Tells waits in the seconds of a fast clock."""

    def __init__(self, times: float = 50) -> None:
        super().__init__()
        self._times = times

    def until_change(self, now: float) -> float:
        return super().until_change(now) / self._times

    def until_restore(self, now: float) -> float:
        return super().until_restore(now) / self._times


@dataclass(kw_only=True)
class Running:
    """A publisher at work."""

    server: FakeApiServer
    registry: Registry
    publisher: Publisher
    log: list[Any]

    def names(self) -> list[str] | None:
        return seen_by_scheduler(self.server.slices())

    async def shows(self, *names: str) -> None:
        """Until a scheduler sees these devices."""
        await until(lambda: self.names() == sorted(names))

    async def is_quiet(self) -> None:
        """Until it has nothing to write, and watches."""
        begun = self.server.requests[f"watch {SLICES}"]
        await until(lambda: self.publisher.status.trouble is None and self.publisher.is_settled)
        await until(lambda: self.server.requests[f"watch {SLICES}"] >= max(1, begun))

    def writes(self) -> int:
        return sum(self.server.requests[f"{verb} {SLICES}"] for verb in ("create", "update", "delete"))

    def troubles(self) -> list[str]:
        return [each["reason"] for each in self.log if each["event"] == "ResourceSlice trouble"]


def gpus(count: int) -> HostFacts:
    return host(*(gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n) for n in range(1, count + 1)))


def name_of(number: int) -> str:
    return f"pci-0000-{number:02x}-00-0"


@asynccontextmanager
async def publishing(
    folder: Path, facts: HostFacts | None = None, server: FakeApiServer | None = None, *, patience: float = 10.0
) -> AsyncIterator[Running]:
    (folder / "token").write_text(f"{TOKEN}\n")
    registry = registry_of(gpus(2) if facts is None else facts)
    with capture_logs() as log:
        async with (
            server or FakeApiServer() as api,
            ApiServer(url=api.url, account=folder, patience=patience) as client,
        ):
            publisher = Publisher(
                api=client,
                registry=registry,
                pool=POOL,
                terms=TERMS,
                clock=Clock(),
                pace=QuickPace(),
                backoff=Backoff(first=0.01, cap=0.05),
            )
            task = asyncio.create_task(publisher.run())
            try:
                yield Running(server=api, registry=registry, publisher=publisher, log=log)
            finally:
                assert not task.done(), task.exception()
                task.cancel()
                await asyncio.wait([task])


def sick(function: PciFunction) -> PciFunction:
    return replace(function, link_speed="Unknown", link_width=63)


@pytest.mark.parametrize(
    ("status", "counted_as", "refused"),
    [
        (None, "no-answer", False),
        (401, "401", True),
        (403, "403", True),
        (404, "404", True),
        (409, "409", False),
        (410, "410", False),
        (422, "422", True),
        (429, "429", False),
        (400, "4xx", True),
        (408, "4xx", False),
        (500, "5xx", False),
        (504, "5xx", False),
    ],
)
def test_a_failure_is_counted_by_its_status_and_told_apart_from_a_refusal(
    status: int | None, counted_as: str, refused: bool
) -> None:
    assert (failure_of(status), is_refusal(status)) == (counted_as, refused)


@in_loop
async def test_failures_are_counted_and_a_refusal_is_one_until_it_is_over(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        status = running.publisher.status
        assert (status.published, status.refused, status.trouble) == (True, False, None)
        assert not any(running.publisher.status.failures.values())
        running.server.fail(403, times=1000)
        running.registry.observe(gpus(3))
        await until(lambda: running.publisher.status.refused)
        assert running.publisher.status.failures["403"] >= 1
        running.server.stop_failing()
        running.server.fail(503, times=1000)
        await until(lambda: running.publisher.status.failures["5xx"])
        assert (running.publisher.status.refused, running.publisher.status.published) == (False, True)
        running.server.stop_failing()
        await running.shows(name_of(1), name_of(2), name_of(3))
        await until(lambda: running.publisher.status.trouble is None)


# What is published


@in_loop
async def test_the_devices_are_published_under_their_node_and_then_nothing_more_is_written(tmp_path: Path) -> None:
    server = FakeApiServer()
    server.put(NODES, {"metadata": {"name": NODE, "uid": "node-uid"}})
    async with publishing(tmp_path, server=server) as running:
        await running.shows(name_of(1), name_of(2))
        (one,) = server.slices()
        assert one["metadata"]["name"] == NAME
        assert one["metadata"]["ownerReferences"][0]["uid"] == "node-uid"
        assert (one["spec"]["driver"], one["spec"]["nodeName"]) == (DRIVER, NODE)
        await running.is_quiet()
        for _ in range(5):
            running.registry.observe(gpus(2))
        marks = server.bookmarks
        await until(lambda: server.bookmarks > marks + 2)
        assert running.writes() == 1
        assert server.requests[f"list {SLICES}"] == server.requests[f"watch {SLICES}"] == 1
        assert running.publisher.status.devices == 2


@in_loop
async def test_before_the_first_scan_nothing_is_written_and_nothing_of_before_is_deleted(tmp_path: Path) -> None:
    server = FakeApiServer()
    async with publishing(tmp_path, facts=HostFacts(unreachable="not mounted yet"), server=server) as running:
        server.put(SLICES, old_slice())
        await until(lambda: server.requests[f"watch {SLICES}"])
        await until(lambda: server.bookmarks)
        assert running.writes() == 0
        running.registry.observe(gpus(1))
        await running.shows(name_of(1))


def old_slice(name: str = "someones", **spec: Any) -> dict[str, Any]:
    pool = {"name": NODE, "generation": 6, "resourceSliceCount": 1}
    whole = {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": [{"name": "old"}], **spec}
    return {"metadata": {"name": name}, "spec": whole}


@in_loop
async def test_a_change_of_the_node_is_published_and_one_that_nobody_sees_is_not(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        running.registry.observe(gpus(3))
        await running.shows(name_of(1), name_of(2), name_of(3))
        await running.is_quiet()
        assert running.writes() == 2
        running.registry.observe(host(*gpus(3).functions.values(), group_nodes=frozenset({51, 52, 53, 99})))
        running.registry.allocate([(PGPU, "1")])
        await until(lambda: "taints" in running.server.slices()[0]["spec"]["devices"][0])
        await running.is_quiet()
        assert running.writes() == 4, "a probe, which is a dry run, and one update"
        assert running.server.slices()[0]["spec"]["pool"]["generation"] == 1


@in_loop
async def test_devices_that_leave_are_shown_with_taints_as_long_as_pods_may_have_them(
    tmp_path: Path,
) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        running.registry.observe(HostFacts())
        await until(
            lambda: running.names() is not None and "taints" in running.server.slices()[0]["spec"]["devices"][0]
        )


@in_loop
async def test_many_devices_are_many_slices_of_one_generation(tmp_path: Path) -> None:
    async with publishing(tmp_path, facts=gpus(130)) as running:
        await running.shows(*(name_of(n) for n in range(1, 131)))
        assert [len(each["spec"]["devices"]) for each in running.server.slices()] == [64, 64, 2]
        running.registry.observe(gpus(128))  # the last two stay, with taints
        await until(lambda: sum("taints" in d for d in running.server.slices()[2]["spec"]["devices"]) == 2)
        assert {each["spec"]["pool"]["generation"] for each in running.server.slices()} == {1}


@in_loop
async def test_what_an_earlier_run_left_is_taken_over_and_what_it_named_otherwise_is_deleted(tmp_path: Path) -> None:
    server = FakeApiServer()
    server.put(SLICES, old_slice())
    server.put(SLICES, old_slice("of-another-node", nodeName="node-2"))
    server.put(SLICES, old_slice("of-another-driver", driver="gpu.example.com"))
    async with publishing(tmp_path, server=server) as running:
        await until(lambda: len(server.slices()) == 3 and server.slices()[0]["metadata"]["name"] == NAME)
        assert server.slices()[0]["spec"]["pool"]["generation"] == 7
        await running.is_quiet()
        assert running.writes() == 2
    async with publishing(tmp_path, server=server) as running:
        await running.is_quiet()
        assert running.writes() == 2, "the second run finds all as it should be"


# What others do to them


@in_loop
async def test_slices_that_the_kubelet_deletes_when_it_starts_come_back(tmp_path: Path) -> None:
    async with publishing(tmp_path, facts=gpus(70)) as running:
        await running.is_quiet()
        everything = [name_of(n) for n in range(1, 71)]
        await running.shows(*everything)
        running.server.wipe()
        assert running.server.slices() == []
        await running.shows(*everything)
        assert {each["spec"]["pool"]["generation"] for each in running.server.slices()} == {2}
        await running.is_quiet()
        assert running.writes() == 4, "all that was deleted comes back at once"


@in_loop
async def test_what_somebody_changes_is_changed_back_and_what_somebody_adds_is_deleted(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        (one,) = running.server.slices()
        running.server.put(SLICES, {**one, "spec": {**one["spec"], "devices": []}})
        await running.shows(name_of(1), name_of(2))
        running.server.put(SLICES, old_slice())
        await until(lambda: [each["metadata"]["name"] for each in running.server.slices()] == [NAME])
        await running.shows(name_of(1), name_of(2))


@in_loop
async def test_somebody_who_deletes_again_and_again_does_not_make_it_a_storm(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        for _ in range(4):
            running.server.wipe()
            await running.shows(name_of(1), name_of(2))
        started = asyncio.get_running_loop().time()
        for _ in range(2):
            running.server.wipe()
            await running.shows(name_of(1), name_of(2))
        took = (asyncio.get_running_loop().time() - started) * 50
        assert took >= 8 + 16, "seconds of its clock: each wait is twice the one before"
        assert running.writes() == 7


@in_loop
async def test_a_change_does_not_wait_for_a_restore_that_does(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        running.publisher.pace.until_restore = lambda now: 3600.0  # type: ignore[method-assign]
        running.server.wipe()
        await until(lambda: running.publisher.status.slices == 0)
        running.registry.observe(gpus(3))
        await running.shows(name_of(1), name_of(2), name_of(3))


class Late:
    """An API server whose watch tells, after a create, what somebody had done to the slice before."""

    def __init__(self) -> None:
        self.writes = 0
        self.created, self.told = asyncio.Event(), asyncio.Event()

    async def node_uid(self, name: str) -> str | None:
        return None

    async def slices(self, driver: str, node: str) -> Listed:
        return Listed([], "1")

    async def create_slice(self, new: JsonObject, *, dry_run: bool = False) -> JsonObject:
        self.writes += 1
        self.created.set()
        return {**new, "metadata": {**new["metadata"], "resourceVersion": "5", "uid": "u"}}

    async def replace_slice(self, new: JsonObject) -> JsonObject:
        self.writes += 1
        return new

    async def delete_slice(self, old: JsonObject) -> None:
        self.writes += 1

    async def watch_slices(
        self, driver: str, node: str, version: str, seconds: int
    ) -> AsyncGenerator[JsonObject, None]:
        yield {"type": OPENED}
        await self.created.wait()
        for kind in ("ADDED", "DELETED"):
            old = old_slice(NAME)
            yield {"type": kind, "object": {**old, "metadata": {"name": NAME, "resourceVersion": "4"}}}
        self.told.set()
        await asyncio.Event().wait()


@in_loop
async def test_what_the_watch_tells_late_of_a_slice_that_was_written_since_is_no_news() -> None:
    api = Late()
    publisher = Publisher(api=api, registry=registry_of(gpus(2)), pool=POOL, terms=TERMS, clock=Clock())
    task = asyncio.create_task(publisher.run())
    await api.told.wait()
    await until(lambda: publisher.is_settled)
    assert (api.writes, publisher.status.slices) == (1, 1)
    task.cancel()
    await asyncio.wait([task])


@in_loop
async def test_which_module_of_its_board_a_gpu_is_is_published_when_it_is_known(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        running.registry.modules = {"0000:01:00.0": 1, "0000:02:00.0": 2}
        running.registry.observe(gpus(2))
        await until(lambda: "boardModule" in running.server.slices()[0]["spec"]["devices"][0]["attributes"])


# An API server in trouble


@pytest.mark.parametrize("status", [401, 403, 404, 409, 410, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("verb", ["get", "list", "create", "watch"])
def test_whatever_is_answered_it_goes_on_and_says_it_once(status: int, verb: str, tmp_path: Path) -> None:
    @in_loop
    async def work() -> None:
        server = FakeApiServer()
        server.fail(status, times=1 if (verb, status) == ("get", 403) else 3, verb=verb)
        async with publishing(tmp_path, server=server) as running:
            await running.shows(name_of(1), name_of(2))
            await until(lambda: not server.is_failing)
            await running.is_quiet()
            assert running.writes() <= 1 + 3
            if status in (409, 410) or (verb, status) == ("get", 403):
                assert running.troubles() == []
            else:
                (said,) = running.troubles()
                assert f"the API server answered {status}" in said
                assert "ResourceSlice trouble is over" in [each["event"] for each in running.log]

    work()


@pytest.mark.parametrize("status", [404, 409, 422, 500])
def test_an_update_that_fails_is_tried_again_from_what_is_there(status: int, tmp_path: Path) -> None:
    @in_loop
    async def work() -> None:
        async with publishing(tmp_path) as running:
            await running.is_quiet()
            running.server.fail(status, times=2, verb="update")
            running.registry.observe(gpus(3))
            await running.shows(name_of(1), name_of(2), name_of(3))
            await running.is_quiet()

    work()


@in_loop
async def test_a_delete_that_fails_is_tried_again_and_one_of_what_is_gone_is_none(tmp_path: Path) -> None:
    server = FakeApiServer()
    server.put(SLICES, old_slice())
    server.fail(500, verb="delete")
    async with publishing(tmp_path, server=server) as running:
        await running.is_quiet()
        await until(lambda: [each["metadata"]["name"] for each in server.slices()] == [NAME])
        assert server.requests[f"delete {SLICES}"] == 2


@in_loop
async def test_a_create_whose_answer_is_lost_makes_no_second_slice(tmp_path: Path) -> None:
    server = FakeApiServer()
    server.lose_answers(1, verb="create")
    async with publishing(tmp_path, server=server) as running:
        await running.shows(name_of(1), name_of(2))
        await running.is_quiet()
        assert len(server.slices()) == 1
        assert server.requests[f"create {SLICES}"] == 1


@in_loop
async def test_an_api_server_without_the_api_is_told_of_in_words_and_asked_again(tmp_path: Path) -> None:
    server = FakeApiServer(has_api=False)
    async with publishing(tmp_path, server=server) as running:
        await until(running.troubles)
        why = "it has no resource.k8s.io/v1, which Kubernetes has from 1.34 on"
        assert running.troubles() == [f"the API server answered 404: {why}"]
        server.has_api = True
        await running.shows(name_of(1), name_of(2))


@in_loop
async def test_retry_after_is_kept_to(tmp_path: Path) -> None:
    server = FakeApiServer()
    server.fail(429, retry_after=1, verb="list")
    async with publishing(tmp_path, server=server) as running:
        await until(lambda: server.requests[f"list {SLICES}"])
        refused_at = asyncio.get_running_loop().time()
        await running.shows(name_of(1), name_of(2))
        assert asyncio.get_running_loop().time() - refused_at > 0.9
        assert server.requests[f"list {SLICES}"] == 2


@in_loop
async def test_an_api_server_that_answers_nothing_is_given_up_and_later_asked_again(tmp_path: Path) -> None:
    server = FakeApiServer()
    async with publishing(tmp_path, server=server, patience=0.2) as running:
        await running.is_quiet()
        server.hold()
        running.registry.observe(gpus(3))
        await until(running.troubles)
        assert running.troubles() == [f"the API server at {server.url} does not answer"]
        server.release()
        await running.shows(name_of(1), name_of(2), name_of(3))


@in_loop
async def test_an_api_server_that_is_gone_and_comes_back_has_the_latest(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        port = running.server.port
        await running.server.stop()
        await until(running.troubles)
        assert "cannot be asked" in running.troubles()[0]
        running.registry.observe(gpus(3))
        async with FakeApiServer(port=port) as other:
            await until(lambda: seen_by_scheduler(other.slices()) == [name_of(1), name_of(2), name_of(3)])


@in_loop
async def test_a_watch_whose_version_is_gone_begins_again_from_the_list(tmp_path: Path) -> None:
    async with publishing(tmp_path) as running:
        await running.is_quiet()
        running.server.forget()
        running.server.put(SLICES, old_slice())
        await until(lambda: [each["metadata"]["name"] for each in running.server.slices()] == [NAME])
        assert running.server.requests[f"list {SLICES}"] >= 2
        assert running.troubles() == []


@in_loop
async def test_a_watch_that_ends_in_its_time_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_plugin.dra.publisher._WATCH", (1, 1))
    async with publishing(tmp_path) as running:
        await until(lambda: running.server.requests[f"watch {SLICES}"] >= 3)
        assert running.server.requests[f"list {SLICES}"] == 1
        running.server.wipe()
        await running.shows(name_of(1), name_of(2))


@in_loop
async def test_watches_that_end_at_once_are_a_trouble_and_no_storm(tmp_path: Path) -> None:
    server = FakeApiServer(ends_watches=True)
    async with publishing(tmp_path, server=server) as running:
        running.publisher.backoff.cap = running.publisher.backoff.first = 0.1
        await until(running.troubles)
        assert running.troubles() == ["the API server ends each watch as soon as it begins"]
        before = asyncio.get_running_loop().time(), server.requests[f"list {SLICES}"]
        await until(lambda: server.requests[f"list {SLICES}"] >= before[1] + 5)
        assert asyncio.get_running_loop().time() - before[0] > 5 * 0.07


# What older API servers drop, and what policies refuse


@in_loop
async def test_where_taints_are_dropped_an_unhealthy_device_is_never_shown_as_a_good_one(tmp_path: Path) -> None:
    facts = gpus(2)
    first, second = facts.functions.values()
    server = FakeApiServer(keeps_taints=False)
    async with publishing(tmp_path, facts=host(first, sick(second)), server=server) as running:
        await running.shows(name_of(1))
        assert [each["event"] for each in running.log].count("API server without device taints") == 1
        running.registry.observe(host(sick(first), sick(second)))
        await until(lambda: server.slices() == [])
        assert not any(name_of(2) in shown for shown in server.history_of_devices())


@in_loop
async def test_whether_taints_are_kept_is_asked_once_and_again_after_an_api_server_was_gone(tmp_path: Path) -> None:
    first, second = gpus(2).functions.values()
    async with publishing(tmp_path, facts=host(first, sick(second))) as running:
        await running.is_quiet()
        assert running.server.requests[f"create {SLICES}"] == 2
        running.registry.observe(host(sick(first), sick(second)))
        await until(lambda: all("taints" in d for d in running.server.slices()[0]["spec"]["devices"]))
        assert running.server.requests[f"create {SLICES}"] == 2
        running.server.forget()
        await until(lambda: running.server.requests[f"create {SLICES}"] == 3)


@in_loop
async def test_an_api_server_that_stores_something_else_is_not_asked_to_store_it_again(tmp_path: Path) -> None:
    server = FakeApiServer(drops=("capacity", "attributes"))
    async with publishing(tmp_path, server=server) as running:
        await running.shows(name_of(1), name_of(2))
        await running.is_quiet()
        marks = server.bookmarks
        await until(lambda: server.bookmarks > marks + 1)
        assert running.writes() == 1
        assert [each["event"] for each in running.log].count("API server stored other devices than it was given") == 1
        running.server.wipe()
        await running.shows(name_of(1), name_of(2))
        running.registry.observe(gpus(3))
        await running.shows(name_of(1), name_of(2), name_of(3))


@in_loop
async def test_the_slices_of_another_node_are_refused_by_the_policy_and_ours_are_not(tmp_path: Path) -> None:
    ours = FakeApiServer(accounts={TOKEN: Account(node=NODE)})
    async with publishing(tmp_path, server=ours) as running:
        await running.shows(name_of(1), name_of(2))
    others = FakeApiServer(accounts={TOKEN: Account(node="node-2")})
    async with publishing(tmp_path, server=others) as running:
        await until(running.troubles)
        assert "a pod on node node-2 may not write slices of node-1" in running.troubles()[0]
        assert others.slices() == []


@in_loop
async def test_a_role_without_nodes_costs_the_owner_and_no_more_and_one_without_slices_is_named(tmp_path: Path) -> None:
    may = Account(node=NODE).may
    server = FakeApiServer(accounts={TOKEN: Account(node=NODE, may=may - {("get", NODES)})})
    async with publishing(tmp_path, server=server) as running:
        await running.shows(name_of(1), name_of(2))
        assert "ownerReferences" not in server.slices()[0]["metadata"]
    server = FakeApiServer(accounts={TOKEN: Account(node=NODE, may=may - {("list", SLICES)})})
    async with publishing(tmp_path, server=server) as running:
        await until(running.troubles)
        assert "403: resourceslices is forbidden" in running.troubles()[0]
