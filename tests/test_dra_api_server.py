"""The client of the API server: what it asks, with which token, and how it says what went wrong."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from loop import in_loop, until
from slices import DRIVER, NODE, POOL

from sandbox_plugin.dra import api_server as api_servers
from sandbox_plugin.dra.api_server import ACCOUNT, ApiServer, in_cluster_url
from sandbox_plugin.dra.client import OPENED, ApiError, JsonObject
from sandbox_plugin.dra.plan import plan
from sandbox_plugin.fake.api_server import CLAIMS, NODES, SLICES, Account, FakeApiServer
from sandbox_plugin.host import files

CLAIM = {"metadata": {"name": "gpus", "namespace": "default"}, "status": {"allocation": {}}}


async def refusal(asked: Awaitable[object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await asked
    assert "\n" not in str(caught.value)
    return caught.value


def authority(folder: Path, name: str) -> ssl.SSLContext:
    """A certificate for 127.0.0.1 that is its own authority: a server's context. Its file is `<name>.crt`."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_a_pod_finds_the_api_server_in_its_environment() -> None:
    assert in_cluster_url({}) is None
    known = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert in_cluster_url(known) == "https://10.96.0.1:6443"
    assert in_cluster_url({"KUBERNETES_SERVICE_HOST": "fd00::1"}) == "https://[fd00::1]:443"
    assert Path("/var/run/secrets/kubernetes.io/serviceaccount") == ACCOUNT


# What is there, and what is not


@in_loop
async def test_a_claim_is_read_and_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    async with FakeApiServer() as server, ApiServer(url=server.url, account=tmp_path) as api:
        stored = server.put(CLAIMS, CLAIM)
        assert await api.claim("default", "gpus") == stored
        assert await api.claim("default", "other") is None
        assert await api.claim("other", "gpus") is None
        assert await api.claim("default", "../../nodes") is None, "a name is no path"


@in_loop
async def test_that_the_api_is_missing_is_not_that_a_claim_is(tmp_path: Path) -> None:
    async with FakeApiServer(has_api=False) as server, ApiServer(url=server.url, account=tmp_path) as api:
        server.put(CLAIMS, CLAIM)
        error = await refusal(api.claim("default", "gpus"))
        assert (error.status, "resource.k8s.io/v1" in str(error)) == (404, True)


@in_loop
async def test_the_uid_of_a_node_is_read_and_of_none_there_is_none(tmp_path: Path) -> None:
    async with FakeApiServer() as server, ApiServer(url=server.url, account=tmp_path) as api:
        server.put(NODES, {"metadata": {"name": NODE, "uid": "u-1"}})
        assert await api.node_uid(NODE) == "u-1"
        assert await api.node_uid("other") is None


@in_loop
async def test_a_slice_is_written_listed_replaced_watched_and_deleted(tmp_path: Path) -> None:
    (create,) = plan(POOL, [[{"name": "a"}]], {}, 0)
    async with FakeApiServer() as server, ApiServer(url=server.url, account=tmp_path) as api:
        await api.create_slice(create.object, dry_run=True)
        assert server.slices() == []
        begun = (await api.slices(DRIVER, NODE)).version
        made = await api.create_slice(create.object)
        assert list((await api.slices(DRIVER, NODE)).items) == [made]
        assert list((await api.slices(DRIVER, "node-2")).items) == []
        (replace,) = plan(POOL, [[{"name": "b"}]], {made["metadata"]["name"]: made}, 1)
        newer = await api.replace_slice(replace.object)
        assert (await refusal(api.replace_slice(replace.object))).status == 409
        assert (await refusal(api.delete_slice(made))).status == 409, "it is not this version any more"
        await api.delete_slice(newer)
        await api.delete_slice(newer)
        events: list[JsonObject] = []
        async with aclosing(api.watch_slices(DRIVER, NODE, begun, 60)) as watch:
            async for event in watch:
                events.append(event)
                if event["type"] == "BOOKMARK":
                    break
        assert [each["type"] for each in events] == [OPENED, "ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
        server.forget()
        with pytest.raises(ApiError) as gone:
            async for _ in api.watch_slices(DRIVER, NODE, begun, 60):
                pass
        assert gone.value.status == 410


# The token and the authority


@in_loop
async def test_a_token_that_was_replaced_is_read_again_when_the_old_one_is_refused(tmp_path: Path) -> None:
    accounts = {"second": Account(node=NODE)}
    token = tmp_path / "token"
    token.write_text("first\n")
    async with FakeApiServer(accounts=accounts) as server, ApiServer(url=server.url, account=tmp_path) as api:
        assert (await refusal(api.slices(DRIVER, NODE))).status == 401
        token.write_text("second\n")
        await api.slices(DRIVER, NODE)
        token.unlink()
        await api.slices(DRIVER, NODE)  # it is read once a minute


@in_loop
async def test_without_a_token_it_asks_without_and_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    async with FakeApiServer(accounts={}) as server:
        async with ApiServer(url=server.url, account=tmp_path) as api:
            assert str(await refusal(api.slices(DRIVER, NODE))) == "the API server answered 401: Unauthorized"
        (tmp_path / "token").mkdir()
        async with ApiServer(url=server.url, account=tmp_path) as api:
            assert str(await refusal(api.slices(DRIVER, NODE))) == f"{tmp_path}/token cannot be read: Is a directory"


@in_loop
async def test_only_a_server_of_the_clusters_authority_gets_the_token_and_a_new_authority_is_read(
    tmp_path: Path,
) -> None:
    right, wrong = authority(tmp_path, "right"), tmp_path / "wrong.crt"
    authority(tmp_path, "wrong")
    ca = tmp_path / "ca.crt"
    ca.write_bytes(wrong.read_bytes())
    async with FakeApiServer(tls=right) as server, ApiServer(url=server.url, account=tmp_path) as api:
        error = await refusal(api.slices(DRIVER, NODE))
        assert "certificate verify failed" in str(error)
        assert not server.requests
        ca.write_bytes((tmp_path / "right.crt").read_bytes())
        await api.slices(DRIVER, NODE)
        assert server.url.startswith("https://")


@in_loop
async def test_an_authority_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing of the kind")
    async with ApiServer(url="https://127.0.0.1:1", account=tmp_path) as api:
        assert f"{tmp_path}/ca.crt cannot be used" in str(await refusal(api.slices(DRIVER, NODE)))


# A server that is not as it should be


async def answered(
    work: Callable[[web.Request], Awaitable[web.StreamResponse]],
    folder: Path,
    asked: Callable[[ApiServer], Awaitable[object]] = lambda api: api.slices(DRIVER, NODE),
) -> ApiError:
    """What becomes of a list, or of what is asked, that is answered so."""
    runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0)
    runner.app.router.add_route("*", "/{path:.*}", work)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with ApiServer(url=url, account=folder, patience=1.0) as api:
            return await refusal(asked(api))
    finally:
        await runner.cleanup()


NONSENSE = [
    *(b"", b"<html>", b"[]", b"\xff", b"{}", b'{"items": []}', b'{"metadata": []}'),
    b'{"metadata": {"resourceVersion": "x"}}',
    b'{"items": [{}], "metadata": {"resourceVersion": "1"}}',
    b'{"items": [7], "metadata": {"resourceVersion": "1"}}',
]


@pytest.mark.parametrize("body", NONSENSE, ids=lambda body: body.decode("latin"))
def test_an_answer_without_sense_is_an_error_in_words(body: bytes, tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    @in_loop
    async def work() -> None:
        error = await answered(answer, tmp_path)
        assert error.status is None
        assert "cannot be asked: " in str(error) or "not of the kind" in str(error)

    work()


WHOLE = {"metadata": {"name": "a", "resourceVersion": "2"}, "spec": {"pool": {"generation": 1}, "devices": []}}


@pytest.mark.parametrize(
    "spoiled",
    [
        {"metadata": {"name": "a"}},
        {"metadata": {"resourceVersion": "2"}},
        {"metadata": {"name": "a", "resourceVersion": "two"}},
        {"spec": {"pool": {}}},
        {"spec": {"pool": {"generation": 1}, "devices": {"a": 1}}},
        {"spec": []},
    ],
)
def test_a_slice_that_is_none_and_an_event_that_is_none_are_errors(spoiled: dict[str, Any], tmp_path: Path) -> None:
    """A proxy may answer anything with 200: it must not end the daemon."""

    async def answer(request: web.Request) -> web.Response:
        told: dict[str, Any] = {**WHOLE, **spoiled}
        return web.json_response({"type": "ADDED", "object": told} if request.query.get("watch") else told)

    async def watched(api: ApiServer) -> None:
        async with aclosing(api.watch_slices(DRIVER, NODE, "1", 60)) as watch:
            async for _ in watch:
                pass

    @in_loop
    async def work() -> None:
        for asked in (lambda api: api.create_slice(WHOLE), lambda api: api.replace_slice(WHOLE), watched):
            assert "not of the kind" in str(await answered(answer, tmp_path, asked))

    work()


@in_loop
async def test_whoever_is_cancelled_while_certificates_are_read_waits_until_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends while OpenSSL reads on a thread would crash."""
    reads, goes_on = threading.Event(), threading.Event()

    def slow(authority: Path) -> ssl.SSLContext:
        reads.set()
        goes_on.wait()
        return ssl.create_default_context()

    monkeypatch.setattr(api_servers, "_context", slow)
    monkeypatch.setattr(files, "_LAST_PATIENCE", 60.0)
    async with ApiServer(url="https://127.0.0.1:1", account=tmp_path) as api:
        asked = asyncio.create_task(api.claim("default", "gpus"))
        await until(reads.is_set)
        asked.cancel()
        done, _ = await asyncio.wait([asked], timeout=0.05)
        assert not done
        goes_on.set()
        await asyncio.wait([asked])
        assert asked.cancelled()


@in_loop
async def test_without_tls_no_certificates_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(api_servers, "_context")
    async with FakeApiServer() as server, ApiServer(url=server.url, account=tmp_path) as api:
        assert await api.claim("default", "gpus") is None


@in_loop
async def test_a_redirect_is_not_followed_since_the_token_is_for_the_api_server_alone(tmp_path: Path) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    error = await answered(answer, tmp_path)
    assert error.status == 302
    assert asked == ["/apis/resource.k8s.io/v1/resourceslices"]


@in_loop
async def test_what_a_proxy_says_in_its_own_words_and_with_retry_after_is_understood(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=503, text="<html>no backend</html>", headers={"Retry-After": "7"})

    error = await answered(answer, tmp_path)
    assert (str(error), error.retry_after) == ("the API server answered 503: Service Unavailable", 7.0)

    async def dated(_: web.Request) -> web.Response:
        return web.Response(status=599, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})

    error = await answered(dated, tmp_path)
    assert (error.status, error.retry_after) == (599, None)


@in_loop
async def test_an_answer_that_stops_in_the_middle_ends_in_time(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        begun = web.StreamResponse()
        await begun.prepare(request)
        await begun.write(b'{"items": [')
        await until(lambda: request.transport is None or request.transport.is_closing())
        return begun

    assert "does not answer" in str(await answered(answer, tmp_path))


@in_loop
async def test_an_event_that_is_larger_than_a_read_comes_whole(tmp_path: Path) -> None:
    big: dict[str, Any] = {"metadata": {"name": "big", "annotations": {"a": "x" * 1_000_000}}}
    big["spec"] = {"driver": DRIVER, "nodeName": NODE, "pool": {"name": NODE, "generation": 1}, "devices": []}
    async with FakeApiServer() as server, ApiServer(url=server.url, account=tmp_path) as api:
        server.put(SLICES, big)
        async with aclosing(api.watch_slices(DRIVER, NODE, "1", 60)) as watch:
            events = [await anext(watch), await anext(watch)]
        assert len(events[1]["object"]["metadata"]["annotations"]["a"]) == 1_000_000
