"""A small API server for the demo and the tests: ResourceSlices, claims and nodes, by the rules of the real one.

What it keeps to (k8s.io/apiserver, and pkg/registry/resource of Kubernetes 1.37): resourceVersions that rise over all
objects, field selectors, watches with bookmarks and "410 Gone", conflicts, preconditions, dry runs, validation, dropped
fields, and the admission policy by which a pod writes slices of its own node alone. Then it can be made to fail.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from sandbox_plugin.fake.slice_rules import stored, violations
from sandbox_plugin.fake.watched import Watched

SLICES, CLAIMS, NODES = "resourceslices", "resourceclaims", "nodes"
_GROUPS = {SLICES: "resource.k8s.io", CLAIMS: "resource.k8s.io", NODES: ""}
_KINDS = {SLICES: "ResourceSlice", CLAIMS: "ResourceClaim", NODES: "Node"}
_SELECTABLE = ("metadata.name", "spec.driver", "spec.nodeName")

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Account:
    """Whose token it is: the node of its pod, and what its role allows, as (verb, resource): manifests/overlays/dra."""

    node: str
    may: frozenset[tuple[str, str]] = frozenset(
        {(verb, SLICES) for verb in ("list", "watch", "create", "update", "delete")} | {("get", CLAIMS), ("get", NODES)}
    )


@dataclass(slots=True)
class Failure:
    """How the next requests of a kind fail."""

    status: int
    times: int
    verb: str | None = None
    retry_after: int | None = None
    loses_answer: bool = False
    """It is done, and the connection is cut."""


class _Refused(Exception):
    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


@dataclass(kw_only=True)
class FakeApiServer(Watched):
    """Usage:

    async with FakeApiServer() as api:
        ...                                # ask api.url
        api.slices()                       # what is stored, and api.requests what was asked
        api.fail(503, times=3)             # the next three requests
    """

    accounts: dict[str, Account] | None = None
    """By token. None: anybody may do everything, on every node."""
    tls: ssl.SSLContext | None = None
    port: int = 0
    has_api: bool = True
    """Whether it has resource.k8s.io/v1."""
    keeps_taints: bool = True
    """Whether the feature DRADeviceTaints is on."""
    drops: tuple[str, ...] = ()
    """Fields of devices that it does not know."""
    ends_watches: bool = False
    """Each at once, as a broken proxy does."""
    bookmark_every: float = 0.1
    bookmarks: int = 0
    """How many it has sent."""
    requests: Counter[str] = field(default_factory=Counter)
    """How often each verb was asked for, as `create resourceslices`."""
    _objects: dict[tuple[str, str, str], Object] = field(default_factory=dict)
    """By resource, namespace and name."""
    _events: list[tuple[int, str, str, Object]] = field(default_factory=list)
    """Version, resource, type, object."""
    _version: int = 1
    _oldest: int = 0
    """Watches from before this version are told that it is gone."""
    _failures: deque[Failure] = field(default_factory=deque)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None
    _is_up: bool = False
    _held: asyncio.Event = field(default_factory=asyncio.Event)

    # Its life

    async def __aenter__(self) -> FakeApiServer:
        self._is_up = True
        self._held.set()
        app = web.Application(middlewares=[self._guarded])
        v1, all_slices = "/apis/resource.k8s.io/v1", "/apis/resource.k8s.io/v1/resourceslices"
        app.add_routes(
            [
                web.get(all_slices, self._list),
                web.post(all_slices, self._create),
                web.get(f"{all_slices}/{{name}}", self._get),
                web.put(f"{all_slices}/{{name}}", self._replace),
                web.delete(f"{all_slices}/{{name}}", self._delete),
                web.get(f"{v1}/namespaces/{{namespace}}/{{resource:resourceclaims}}/{{name}}", self._get),
                web.get("/api/v1/{resource:nodes}/{name}", self._get),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """It is gone: connections end, and no more are taken. Also when it has been stopped before."""
        runner, self._runner = self._runner, None
        self._is_up = False
        self._held.set()
        self._end_watches()
        if runner is not None:
            await runner.cleanup()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    # What happens to it

    def fail(self, status: int, *, times: int = 1, verb: str | None = None, retry_after: int | None = None) -> None:
        """The next requests, or those of this verb, are answered so."""
        self._failures.append(Failure(status, times, verb, retry_after))

    def stop_failing(self) -> None:
        self._failures.clear()

    def lose_answers(self, times: int, *, verb: str) -> None:
        """The next requests of this verb are carried out, and then the connection is cut."""
        self._failures.append(Failure(0, times, verb, loses_answer=True))

    @property
    def is_failing(self) -> bool:
        """Whether failures are still to come."""
        return bool(self._failures)

    def hold(self) -> None:
        """No request is answered any more, until `release`."""
        self._held.clear()

    def release(self) -> None:
        self._held.set()

    def forget(self) -> None:
        """The past is compacted: watches end, and those that ask for what was before are told 410."""
        self._version += 1
        self._oldest = self._version
        self._events.clear()
        self._end_watches()

    # What is in it, past its rules

    def slices(self) -> list[Object]:
        """What is stored, by name."""
        return [each for (kind, _, _), each in sorted(self._objects.items()) if kind == SLICES]

    def claims(self) -> list[Object]:
        """What is stored, by namespace and name."""
        return [each for (kind, _, _), each in sorted(self._objects.items()) if kind == CLAIMS]

    def find(self, resource: str, name: str, namespace: str = "") -> Object | None:
        """One object; None: there is none of this name."""
        return self._objects.get((resource, namespace, name))

    def history_of_devices(self) -> list[set[str]]:
        """The names of the devices of each slice that there ever was, since `forget`."""
        return [
            {device["name"] for device in what["spec"]["devices"]}
            for _, resource, kind, what in self._events
            if resource == SLICES and kind != "DELETED"
        ]

    def put(self, resource: str, new: Object) -> Object:
        """Stores an object as an administrator or the kubelet would."""
        meta = new["metadata"]
        key = (resource, meta.get("namespace", ""), meta["name"])
        old = self._objects.get(key)
        self._version += 1
        kept = {**new, "metadata": {"uid": str(uuid.uuid4()), **meta, "resourceVersion": str(self._version)}}
        self._objects[key] = kept
        self._tell(resource, "ADDED" if old is None else "MODIFIED", kept)
        return kept

    def remove(self, resource: str, name: str, namespace: str = "") -> None:
        """Deletes an object as an administrator or the kubelet would."""
        old = self._objects.pop((resource, namespace, name))
        self._version += 1
        gone = {**old, "metadata": {**old["metadata"], "resourceVersion": str(self._version)}}
        self._tell(resource, "DELETED", gone)

    def wipe(self) -> None:
        """Deletes all slices, as the kubelet does when it starts."""
        for each in self.slices():
            self.remove(SLICES, each["metadata"]["name"])

    def _tell(self, resource: str, kind: str, what: Object) -> None:
        self._events.append((self._version, resource, kind, what))
        self._ring()

    def _end_watches(self) -> None:
        self._epoch = object()
        self._ring()

    _epoch: object = field(default_factory=object)
    """Another one: the watches of before end."""

    # Before and after each request

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            resource = request.match_info.get("resource", SLICES)
            verb = _verb(request)
            self.requests[f"{verb} {resource}"] += 1
            await self._held.wait()
            if not self._is_up:  # a request that comes while the last ones end
                raise web.HTTPServiceUnavailable
            failure = self._failure_of(verb)
            if failure is not None and not failure.loses_answer:
                wait = {} if failure.retry_after is None else {"retryAfterSeconds": failure.retry_after}
                raise _Refused(failure.status, "Unknown", "it was told to fail", **wait)
            self._admit(request, verb, resource)
            answer: web.StreamResponse = await handler(request)
            if failure is not None and request.transport is not None:
                request.transport.abort()
            return answer
        except _Refused as refused:
            headers = {}
            if "retryAfterSeconds" in refused.body["details"]:  # type: ignore[operator]
                headers["Retry-After"] = str(refused.body["details"]["retryAfterSeconds"])  # type: ignore[index]
            return web.json_response(refused.body, status=refused.code, headers=headers)
        except web.HTTPNotFound:
            return web.Response(status=404, text="404 page not found\n")

    def _failure_of(self, verb: str) -> Failure | None:
        failure = next((each for each in self._failures if each.verb in (None, verb)), None)
        if failure is not None:
            failure.times -= 1
            if not failure.times:
                self._failures.remove(failure)
        return failure

    def _admit(self, request: web.Request, verb: str, resource: str) -> None:
        if not self.has_api and resource != NODES:
            raise web.HTTPNotFound
        if self.accounts is None:
            return
        account = self._account(request)
        if account is None:
            raise _Refused(401, "Unauthorized", "Unauthorized")
        if (verb, resource) not in account.may:
            group = _GROUPS[resource]
            why = f'User cannot {verb} resource "{resource}" in API group "{group}" at the cluster scope'
            raise _Refused(403, "Forbidden", f"{resource} is forbidden: {why}", kind=resource)

    def _account(self, request: web.Request) -> Account | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return (self.accounts or {}).get(token)

    def _check_node(self, request: web.Request, one: Mapping[str, Any]) -> None:
        """The admission policy of manifests/overlays/dra."""
        account = self._account(request)
        if account is not None and account.node != one["spec"].get("nodeName"):
            message = f"a pod on node {account.node} may not write slices of {one['spec'].get('nodeName')}"
            raise _Refused(422, "Invalid", f"denied by ValidatingAdmissionPolicy: {message}")

    # The verbs

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(self._found(request))

    def _found(self, request: web.Request) -> Object:
        resource, name = request.match_info.get("resource", SLICES), request.match_info["name"]
        found = self._objects.get((resource, request.match_info.get("namespace", ""), name))
        if found is None:
            raise _Refused(404, "NotFound", f'{resource} "{name}" not found', name=name, kind=resource)
        return found

    async def _list(self, request: web.Request) -> web.StreamResponse:
        selects = _selector(request)
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request, selects)
        listed = [each for each in self.slices() if selects(each)]
        meta = {"resourceVersion": str(self._version)}
        body = {"kind": "ResourceSliceList", "apiVersion": "resource.k8s.io/v1", "metadata": meta, "items": listed}
        return web.json_response(body)

    async def _create(self, request: web.Request) -> web.Response:
        new = await _body(request)
        meta = dict(new.get("metadata") or {})
        if not meta.get("name"):
            meta["name"] = f"{meta['generateName']}{uuid.uuid4().hex[:5]}"
        if meta.get("resourceVersion"):
            raise _Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        self._check_valid(new)
        self._check_node(request, new)
        if (SLICES, "", meta["name"]) in self._objects:
            raise _Refused(409, "AlreadyExists", f'{SLICES} "{meta["name"]}" already exists', name=meta["name"])
        kept = {**new, "spec": self._stored(new)}
        kept["metadata"] = {**meta, "uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
        if request.query.get("dryRun") != "All":
            kept = self.put(SLICES, kept)
        return web.json_response(kept, status=201)

    async def _replace(self, request: web.Request) -> web.Response:
        old, new = self._found(request), await _body(request)
        version = new["metadata"].get("resourceVersion")
        if version and version != old["metadata"]["resourceVersion"]:
            raise _Refused(409, "Conflict", "the object has been modified; please apply your changes to the latest one")
        self._check_valid(new, old)
        self._check_node(request, old)
        spec = self._stored(new)
        if spec == old["spec"]:
            return web.json_response(old)
        meta = {**old["metadata"], "generation": old["metadata"].get("generation", 0) + 1}
        return web.json_response(self.put(SLICES, {**new, "metadata": meta, "spec": spec}))

    async def _delete(self, request: web.Request) -> web.Response:
        old = self._found(request)
        wanted = (await _body(request)).get("preconditions") or {} if request.can_read_body else {}
        self._check_node(request, old)
        for key in ("uid", "resourceVersion"):
            if wanted.get(key, old["metadata"][key]) != old["metadata"][key]:
                raise _Refused(409, "Conflict", f"Precondition failed: {key} in precondition: {wanted[key]}")
        self.remove(SLICES, old["metadata"]["name"])
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _stored(self, new: Object) -> Object:
        return stored(new, _now(), drops=(*self.drops, *(() if self.keeps_taints else ("taints",))))

    def _check_valid(self, new: Object, old: Object | None = None) -> None:
        if wrong := violations(new, old):
            name = new["metadata"].get("name", "")
            raise _Refused(422, "Invalid", f'ResourceSlice.resource.k8s.io "{name}" is invalid: {"; ".join(wrong)}')

    async def _watch(self, request: web.Request, selects: Callable[[Object], bool]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        seen, epoch = int(request.query["resourceVersion"]), self._epoch
        end = time.monotonic() + float(request.query.get("timeoutSeconds", "1800"))
        with suppress(ConnectionResetError):
            while self._epoch is epoch and self._is_up and not self.ends_watches and time.monotonic() < end:
                if seen < self._oldest:
                    gone = _Refused(410, "Expired", f"too old resource version: {seen} ({self._version})")
                    await _say(answer, "ERROR", gone.body)
                    break
                for version, resource, kind, what in [each for each in self._events if each[0] > seen]:
                    seen = version
                    if resource == SLICES and selects(what):
                        await _say(answer, kind, what)
                changed, patience = self._changed, min(self.bookmark_every, max(0.0, end - time.monotonic()))
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), patience)
                    continue
                if request.query.get("allowWatchBookmarks") == "true":
                    seen = self._version
                    mark = {"kind": "ResourceSlice", "metadata": {"resourceVersion": str(seen)}}
                    await _say(answer, "BOOKMARK", mark)
                    self.bookmarks += 1
        return answer


def _verb(request: web.Request) -> str:
    if request.method == "GET":
        if "name" in request.match_info:
            return "get"
        return "watch" if request.query.get("watch") else "list"
    return {"POST": "create", "PUT": "update", "DELETE": "delete"}.get(request.method, request.method)


def _selector(request: web.Request) -> Callable[[Object], bool]:
    terms = [term.partition("=") for term in request.query.get("fieldSelector", "").split(",") if term]
    for path, _, _ in terms:
        if path not in _SELECTABLE:
            raise _Refused(400, "BadRequest", f'field label "{path}" not supported')

    def selects(one: Object) -> bool:
        for path, _, value in terms:
            part, _, key = path.partition(".")
            if one[part].get(key, "") != value:
                return False
        return True

    return selects


async def _body(request: web.Request) -> Object:
    try:
        body = json.loads(await request.read())
    except ValueError:
        raise _Refused(400, "BadRequest", "the body is not JSON") from None
    assert isinstance(body, dict)
    return body


async def _say(answer: web.StreamResponse, kind: str, what: Mapping[str, Any]) -> None:
    await answer.write(json.dumps({"type": kind, "object": what}).encode() + b"\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
