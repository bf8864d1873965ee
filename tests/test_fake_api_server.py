"""The fake API server by the real one's rules: what it takes, what it refuses, and what a watch tells."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

import aiohttp
import pytest
from loop import in_loop
from slices import DRIVER, NODE

from sandbox_plugin.fake.api_server import SLICES, Account, FakeApiServer
from sandbox_plugin.fake.slice_rules import stored, violations

PATH = "/apis/resource.k8s.io/v1/resourceslices"
Slice = dict[str, Any]


def a_slice(name: str = "one", **spec: Any) -> Slice:
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    whole = {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": [{"name": "a"}], **spec}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": name}, "spec": whole}


@asynccontextmanager
async def asking(server: FakeApiServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with server, aiohttp.ClientSession(server.url) as session:
        yield session


async def ask(session: aiohttp.ClientSession, method: str, path: str, **how: Any) -> tuple[int, Any]:
    async with session.request(method, path, **how) as answer:
        return answer.status, await answer.json(content_type=None) if "json" in answer.content_type else None


# Limits


def test_a_good_slice_has_nothing_against_it() -> None:
    taint = {"key": f"{DRIVER}/unhealthy", "value": "gone", "effect": "NoExecute"}
    attributes = {"a": {"int": 1}, f"{DRIVER}/b": {"bool": True}, "c": {"string": "x" * 64}, "d": {"version": "1.0.0"}}
    device = {"name": "a", "attributes": attributes, "capacity": {"m": {"value": "1Gi"}}, "taints": [taint]}
    assert violations(a_slice(devices=[device])) == []
    assert violations(a_slice(devices=[{"name": f"d-{n}"} for n in range(128)])) == []


def tainted(count: int) -> list[Slice]:
    taint = {"key": "a", "effect": "NoSchedule"}
    return [{"name": f"d-{n}", "taints": [taint] if n == 0 else []} for n in range(count)]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"driver": "d" * 64}, "spec.driver: Invalid value"),
        ({"pool": {"name": "a_b", "generation": 1, "resourceSliceCount": 1}}, "spec.pool.name: Invalid value"),
        ({"pool": {"name": NODE, "generation": -1, "resourceSliceCount": 1}}, "spec.pool.generation"),
        ({"pool": {"name": NODE, "generation": 1, "resourceSliceCount": 0}}, "spec.pool.resourceSliceCount"),
        ({"allNodes": True}, "exactly one of nodeName"),
        ({"nodeName": "A"}, "spec.nodeName: Invalid value"),
        ({"devices": [{"name": f"d-{n}"} for n in range(129)]}, "Too many: 129: must have at most 128 items"),
        ({"devices": tainted(65)}, "Too many: 65: must have at most 64 items"),
        ({"devices": [{"name": "a"}, {"name": "a"}]}, "Duplicate value: 'a'"),
        ({"devices": [{"name": "a.b"}]}, "must be a DNS label"),
        ({"devices": [{"name": "a" * 64}]}, "must be a DNS label"),
        ({"devices": [{"name": "a", "attributes": {f"a{n}": {"int": 1} for n in range(33)}}]}, "must not exceed 32"),
        ({"devices": [{"name": "a", "attributes": {"a-b": {"int": 1}}}]}, "must be a C identifier"),
        ({"devices": [{"name": "a", "attributes": {"a" * 33: {"int": 1}}}]}, "must be a C identifier"),
        ({"devices": [{"name": "a", "attributes": {f"{'d' * 64}/a": {"int": 1}}}]}, "must be a DNS subdomain"),
        ({"devices": [{"name": "a", "attributes": {"a": {}}}]}, "exactly one value must be specified"),
        ({"devices": [{"name": "a", "attributes": {"a": {"int": True}}}]}, "Invalid value: True"),
        ({"devices": [{"name": "a", "attributes": {"a": {"int": 2**63}}}]}, f"Invalid value: {2**63}"),
        ({"devices": [{"name": "a", "attributes": {"a": {"string": "ä" * 33}}}]}, "may not be more than 64 bytes"),
        ({"devices": [{"name": "a", "capacity": {"m": {"value": "1 GiB"}}}]}, "Invalid value: '1 GiB'"),
        ({"devices": [{"name": "a", "capacity": {"m": {"value": 1}}}]}, "Invalid value: 1"),
        ({"devices": [{"name": "a", "taints": [{"key": "a", "effect": "NoSchedule"}] * 17}]}, "Too many: 17"),
        ({"devices": [{"name": "a", "taints": [{"key": "a b", "effect": "None"}]}]}, "key: Invalid value: 'a b'"),
        ({"devices": [{"name": "a", "taints": [{"key": "A/b", "effect": "None"}]}]}, "key: Invalid value: 'A'"),
        ({"devices": [{"name": "a", "taints": [{"key": "a", "value": "b c", "effect": "None"}]}]}, "value: Invalid"),
        ({"devices": [{"name": "a", "taints": [{"key": "a", "effect": "NoGo"}]}]}, "Unsupported value: 'NoGo'"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_is_against_a_limit_is_named(spec: Slice, why: str) -> None:
    (violation,) = violations(a_slice(**spec))
    assert why in violation


@pytest.mark.parametrize("change", [{"driver": "b"}, {"nodeName": "b"}])
def test_what_cannot_be_changed_is_named(change: Slice) -> None:
    (violation,) = violations(a_slice(**change), a_slice())
    assert "field is immutable" in violation
    other = a_slice(pool={"name": "b", "generation": 1, "resourceSliceCount": 1})
    assert violations(other, a_slice()) == ["spec.pool.name: Invalid value: 'b': field is immutable"]


def test_what_is_stored_has_times_in_new_taints_and_quantities_in_their_shortest_form() -> None:
    taints = [{"key": "a", "effect": "None"}, {"key": "b", "effect": "None", "timeAdded": "before"}]
    sizes = {name: {"value": name} for name in ("1024Mi", "1536Ki", "1024", "0Ki", "2048Ei")}
    new = a_slice(devices=[{"name": "a", "taints": taints, "capacity": sizes}])
    (device,) = stored(new, "now", drops=())["devices"]
    assert [taint["timeAdded"] for taint in device["taints"]] == ["now", "before"]
    assert [each["value"] for each in device["capacity"].values()] == ["1Gi", "1536Ki", "1024", "0Ki", "2048Ei"]
    (device,) = stored(new, "now", drops=("taints", "capacity"))["devices"]
    assert device == {"name": "a"}


# Writes


@in_loop
async def test_versions_rise_and_an_update_of_an_older_one_is_a_conflict() -> None:
    server = FakeApiServer()
    async with asking(server) as session:
        status, made = await ask(session, "POST", PATH, json=a_slice())
        assert status == 201
        changed = deepcopy(made)
        changed["spec"]["devices"] = [{"name": "b"}]
        status, newer = await ask(session, "PUT", f"{PATH}/one", json=changed)
        assert status == 200
        assert int(newer["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
        assert (newer["metadata"]["uid"], newer["metadata"]["generation"]) == (made["metadata"]["uid"], 2)
        assert (await ask(session, "PUT", f"{PATH}/one", json=changed))[0] == 409
        assert await ask(session, "PUT", f"{PATH}/one", json=newer) == (200, newer), "no change is no new version"
        assert (await ask(session, "POST", PATH, json=a_slice()))[1]["reason"] == "AlreadyExists"
        status, refused = await ask(session, "POST", PATH, json=newer)
        assert (status, "resourceVersion" in refused["message"]) == (400, True)
        assert (await ask(session, "PUT", f"{PATH}/other", json=newer))[0] == 404
        assert await ask(session, "GET", f"{PATH}/one") == (200, newer)


@in_loop
async def test_a_name_is_made_up_where_it_is_asked_for_and_a_dry_run_stores_nothing() -> None:
    server = FakeApiServer()
    async with asking(server) as session:
        new = {**a_slice(), "metadata": {"generateName": "abc-"}}
        status, made = await ask(session, "POST", PATH, params={"dryRun": "All"}, json=new)
        assert (status, made["metadata"]["name"].startswith("abc-"), server.slices()) == (201, True, [])


@in_loop
async def test_a_delete_may_be_bound_to_one_version_and_what_is_invalid_or_no_json_is_refused() -> None:
    server = FakeApiServer()
    async with asking(server) as session:
        await ask(session, "POST", PATH, json=a_slice())
        for wrong in ({"uid": "x"}, {"resourceVersion": "1"}):
            status, _ = await ask(session, "DELETE", f"{PATH}/one", json={"preconditions": wrong})
            assert status == 409
        assert (await ask(session, "DELETE", f"{PATH}/one"))[0] == 200
        assert (await ask(session, "DELETE", f"{PATH}/one"))[0] == 404
        status, refused = await ask(session, "POST", PATH, json=a_slice(driver="A"))
        assert (status, "spec.driver" in refused["message"]) == (422, True)
        assert (await ask(session, "POST", PATH, data=b"{"))[0] == 400
        assert (await ask(session, "GET", "/apis/apps/v1/deployments"))[0] == 404


@in_loop
async def test_an_account_may_do_what_its_role_allows_on_its_own_node() -> None:
    server = FakeApiServer(accounts={"t": Account(node="node-2", may=frozenset({("create", SLICES)}))})
    async with asking(server) as session:
        token = {"Authorization": "Bearer t"}
        assert (await ask(session, "GET", PATH))[0] == 401
        assert (await ask(session, "GET", PATH, headers=token))[0] == 403
        assert (await ask(session, "POST", PATH, headers=token, json=a_slice()))[0] == 422
        assert (await ask(session, "POST", PATH, headers=token, json=a_slice(nodeName="node-2")))[0] == 201


# Lists and watches


@in_loop
async def test_a_field_selector_selects_and_one_of_another_field_is_refused() -> None:
    server = FakeApiServer()
    for name, driver, node in (("one", DRIVER, NODE), ("two", DRIVER, "node-2"), ("three", "other.example", NODE)):
        server.put(SLICES, a_slice(name, driver=driver, nodeName=node))
    async with asking(server) as session:
        selects = {"fieldSelector": f"spec.driver={DRIVER},spec.nodeName={NODE}"}
        _, listed = await ask(session, "GET", PATH, params=selects)
        assert [each["metadata"]["name"] for each in listed["items"]] == ["one"]
        assert listed["metadata"]["resourceVersion"] == "4"
        status, _ = await ask(session, "GET", PATH, params={"fieldSelector": "spec.pool.name=a"})
        assert status == 400


async def events(session: aiohttp.ClientSession, count: int, **params: str) -> list[tuple[str, str]]:
    """Types and versions of so many events, or of all until the watch ends."""
    found: list[tuple[str, str]] = []
    async with session.get(PATH, params={"watch": "1", **params}) as answer:
        while len(found) < count and (line := await answer.content.readline()):
            event = json.loads(line)
            found.append((event["type"], event["object"].get("metadata", {}).get("resourceVersion", "")))
    return found


@in_loop
async def test_a_watch_tells_what_came_after_its_version_and_bookmarks_only_to_who_wants_them() -> None:
    server = FakeApiServer(bookmark_every=0.01)
    async with asking(server) as session:
        server.put(SLICES, a_slice("one"))
        server.put(SLICES, a_slice("one", devices=[]))
        server.put(SLICES, a_slice("other", driver="other.example"))
        server.remove(SLICES, "one")
        mine = {"fieldSelector": f"spec.driver={DRIVER}"}
        told = [("ADDED", "2"), ("MODIFIED", "3"), ("DELETED", "5")]
        marked = await events(session, 4, resourceVersion="1", allowWatchBookmarks="true", **mine)
        assert marked == [*told, ("BOOKMARK", "5")]
        assert await events(session, 9, resourceVersion="1", timeoutSeconds="0.1", **mine) == told
        assert await events(session, 9, resourceVersion="3", timeoutSeconds="0.1", **mine) == told[2:]


@in_loop
async def test_a_watch_of_a_version_that_is_gone_is_told_so() -> None:
    server = FakeApiServer()
    async with asking(server) as session:
        server.put(SLICES, a_slice())
        server.forget()
        assert await events(session, 9, resourceVersion="1") == [("ERROR", "")]
        assert await events(session, 9, resourceVersion="3", timeoutSeconds="0.1") == []
