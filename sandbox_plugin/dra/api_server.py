"""The client of the API server: what the other parts of this room ask it, over HTTP with aiohttp.

Within a pod Kubernetes says where the API server is, and puts a token and a certificate authority into files which it
replaces from time to time: both are read again.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from sandbox_plugin import __version__
from sandbox_plugin.dra.client import OPENED, ApiError, JsonObject, Listed
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.host.threads import on_thread

RESOURCE_API = "/apis/resource.k8s.io/v1"
SLICES = f"{RESOURCE_API}/resourceslices"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts `token` and `ca.crt` of the pod's service account."""

_PATIENCE = 10.0
"""Seconds for one answer. The kubelet gives a whole Prepare 45 s."""
_TOKEN_KEEPS = 60.0
"""Seconds after which the token is read again; the kubelet replaces it minutes before it ends."""
_LONGEST_LINE = 1 << 22
"""Bytes of one event of a watch: a slice has some 100 KB at most, and etcd takes no object above 1.5 MB."""
_PROBES = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""So that the end of an API server which cannot say goodbye is noticed within 30 s, also by a watch that is quiet."""


def in_cluster_url(environment: Mapping[str, str]) -> str | None:
    """Where the API server is by the variables that Kubernetes sets in each pod; None: this is no pod."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        return None
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


@dataclass(kw_only=True)
class ApiServer:
    """One API server. Every method raises `ApiError`, and nothing else, if it is not answered as it should be.

    Usage:

        async with ApiServer(url=...) as api:
            claim = await api.claim("default", "gpus")
    """

    url: str
    account: Path = ACCOUNT
    """The folder with `token` and `ca.crt`; without them it goes without."""
    patience: float = _PATIENCE
    _session: aiohttp.ClientSession | None = None
    _connecting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _reading: FileWork = field(default_factory=lambda: FileWork(lambda: None))
    _token: str | None = None
    _token_read_at: float = field(default=float("-inf"))

    async def __aenter__(self) -> ApiServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._hang_up()

    # What is asked

    async def claim(self, namespace: str, name: str) -> JsonObject | None:
        """As in `Claims`."""
        path = f"{RESOURCE_API}/namespaces/{quote(namespace, safe='')}/resourceclaims/{quote(name, safe='')}"
        return await self._get(path)

    async def node_uid(self, name: str) -> str | None:
        """The UID of a node; None: there is no node of this name."""
        node = await self._get(f"/api/v1/nodes/{quote(name, safe='')}")
        with _making_sense():
            return None if node is None else str(node["metadata"]["uid"])

    async def slices(self, driver: str, node: str) -> Listed:
        """The ResourceSlices of one driver on one node."""
        answer = await self._ask("GET", SLICES, params=_selected(driver, node))
        with _making_sense():
            items = [_slice(each) for each in answer.get("items") or []]
            return Listed(items, str(int(answer["metadata"]["resourceVersion"])))

    async def create_slice(self, new: JsonObject, *, dry_run: bool = False) -> JsonObject:
        """Returns it as it is stored, or with `dry_run` as it would be."""
        answer = await self._ask("POST", SLICES, body=new, params={"dryRun": "All"} if dry_run else {})
        return _slice(answer, stored=not dry_run)

    async def replace_slice(self, new: JsonObject) -> JsonObject:
        """Returns it as it is stored. Fails with 409 if it is not the version that `new` says."""
        return _slice(await self._ask("PUT", f"{SLICES}/{new['metadata']['name']}", body=new))

    async def delete_slice(self, old: JsonObject) -> None:
        """Deletes this very version. That it is gone already is no failure."""
        meta = old["metadata"]
        conditions = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": conditions}
        try:
            await self._ask("DELETE", f"{SLICES}/{meta['name']}", body=body)
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def watch_slices(
        self, driver: str, node: str, version: str, seconds: int
    ) -> AsyncGenerator[JsonObject, None]:
        """The events on them since that resourceVersion, for about so many seconds: `{"type": ..., "object": ...}`.

        The first is `{"type": OPENED}`. One of type BOOKMARK says only which version there is now. A version that the
        API server does not know any more is an `ApiError` with status 410.
        """
        params = _selected(driver, node) | {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        limits = aiohttp.ClientTimeout(sock_connect=self.patience, total=seconds + self.patience)
        async with self._answered("GET", SLICES, params=params, limits=limits) as answer:
            yield {"type": OPENED}
            while line := await answer.content.readline():
                yield _event(_object(line))

    async def create_event(self, event: JsonObject) -> None:
        """An Event of core/v1, in the namespace that it names."""
        await self._ask("POST", f"/api/v1/namespaces/{event['metadata']['namespace']}/events", body=event)

    # How it is asked

    async def _get(self, path: str) -> JsonObject | None:
        """An object; None: there is none of this name."""
        try:
            return await self._ask("GET", path)
        except _NoObjectError:
            return None

    async def _ask(
        self, method: str, path: str, *, body: JsonObject | None = None, params: Mapping[str, str] | None = None
    ) -> JsonObject:
        limits = aiohttp.ClientTimeout(total=self.patience)
        async with self._answered(method, path, body=body, params=params, limits=limits) as answer:
            return _object(await answer.read())

    @asynccontextmanager
    async def _answered(
        self,
        method: str,
        path: str,
        *,
        limits: aiohttp.ClientTimeout,
        body: JsonObject | None = None,
        params: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request, and its answer if it is a good one. What fails within the context becomes an `ApiError` too."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", "Accept": "application/json", **await self._authorization()}
        session = await self._connected()
        try:
            # No redirect: the token is for the API server alone.
            async with session.request(
                method,
                f"{self.url}{path}",
                data=data,
                params=params,
                headers=headers,
                timeout=limits,
                allow_redirects=False,
            ) as answer:
                if answer.status >= HTTPStatus.MULTIPLE_CHOICES:
                    if answer.status == HTTPStatus.UNAUTHORIZED:
                        self._token_read_at = float("-inf")
                    raise _refusal(answer.status, await answer.read(), answer.headers)
                yield answer
        except TimeoutError:
            raise ApiError(f"the API server at {self.url} does not answer") from None
        except (aiohttp.ClientError, ValueError, LookupError, OSError) as error:
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                await self._hang_up()  # the next request reads the authority again, which may have been replaced
            raise ApiError(f"the API server at {self.url} cannot be asked: {_words(error)}") from None

    async def _authorization(self) -> dict[str, str]:
        if time.monotonic() - self._token_read_at >= _TOKEN_KEEPS:
            file = self.account / "token"
            try:
                self._token = (await on_thread(Path.read_text)(file)).strip()
            except FileNotFoundError:
                self._token = None
            except (OSError, UnicodeDecodeError) as error:
                raise ApiError(f"{file} cannot be read: {_words(error)}") from None
            self._token_read_at = time.monotonic()
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    async def _connected(self) -> aiohttp.ClientSession:
        async with self._connecting:  # of two first requests one makes it
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(ssl=await self._tls(), socket_factory=_socket),
                    headers={"User-Agent": f"sandbox-plugin/{__version__}"},
                    read_bufsize=_LONGEST_LINE,
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            return self._session

    async def _tls(self) -> ssl.SSLContext | bool:
        """As `TCPConnector` takes it. Raises ApiError."""
        if not self.url.startswith("https:"):
            return True
        try:
            # It ends before whoever is cancelled goes on: a process that ends while OpenSSL reads certificates on a
            # thread crashes in OpenSSL's own end.
            return await self._reading.finish(partial(_context, self.account / "ca.crt"))
        except OSError as error:
            raise ApiError(f"{self.account}/ca.crt cannot be used: {_words(error)}") from None

    async def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class _NoObjectError(ApiError):
    """There is no object of this name."""


def _event(event: JsonObject) -> JsonObject:
    """The same, if it is one of a watch on slices. Raises `ApiError`, also for one that tells of an error."""
    with _making_sense():
        told = event["object"]
        if event["type"] == "ERROR":
            raise _refusal(int(told.get("code", 500)), told, {})
        if event["type"] == "BOOKMARK":
            int(told["metadata"]["resourceVersion"])
        else:
            _slice(told)
    return event


def _slice(found: JsonObject, *, stored: bool = True) -> JsonObject:
    """The same, if it has what is read of a slice. Raises `ApiError`: what answers may be no API server."""
    with _making_sense():
        meta, spec = found["metadata"], found["spec"]
        int(spec["pool"]["generation"])
        if not isinstance(spec.get("devices") or [], list):
            raise TypeError
        if stored and not (isinstance(meta["name"], str) and int(meta["resourceVersion"])):
            raise TypeError
    return found


@contextmanager
def _making_sense() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ApiError("the answer of the API server is not of the kind that was asked for") from None


def _context(authority: Path) -> ssl.SSLContext:
    """Blocks. What TLS trusts: the cluster's authority, or without that file the machine's."""
    return ssl.create_default_context(cafile=str(authority) if authority.exists() else None)


def _socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _selected(driver: str, node: str) -> dict[str, str]:
    return {"fieldSelector": f"spec.driver={driver},spec.nodeName={node}"}


def _object(text: bytes) -> JsonObject:
    """Raises ValueError if it is no JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its answer is not a JSON object")
    return found


def _refusal(status: int, body: bytes | JsonObject, headers: Mapping[str, str]) -> ApiError:
    """The error that an answer tells of: its body is a `Status` object, or it is not from the API's own code."""
    told: JsonObject = {}
    if isinstance(body, bytes):
        with suppress(ValueError):
            told = _object(body)
    else:
        told = body
    details = told.get("details") or {}
    message = str(told.get("message") or responses.get(status, "")).replace("\n", " ")
    if status == HTTPStatus.NOT_FOUND and told.get("kind") == "Status" and details.get("name"):
        return _NoObjectError(f"the API server answered 404: {message}", status=status)
    if status == HTTPStatus.NOT_FOUND:
        message = "it has no resource.k8s.io/v1, which Kubernetes has from 1.34 on"
    wants = headers.get("Retry-After") or str(details.get("retryAfterSeconds") or "")
    retry_after = float(wants) if wants.isascii() and wants.isdecimal() and len(wants) < 6 else None
    return ApiError(f"the API server answered {status}: {message}", status=status, retry_after=retry_after)


def _words(error: Exception) -> str:
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return words.replace("\n", " ")
