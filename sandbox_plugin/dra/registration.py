"""The sockets of the driver: one by which the kubelet finds it, and one by which it is called.

The kubelet watches its folder `plugins_registry`: a socket that appears there is asked who it is, one that vanishes is
forgotten, and a kubelet that starts asks all of them. So there is nothing to do but to keep both sockets there.

Their names are others in each run: the kubelet takes no endpoint twice, and with the same names a new run could be
taken for the old one. What runs that were killed have left is removed; this one has the node's lock, so none of them
serves any more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from sandbox_plugin.api import pluginregistration
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.driver import Driver, plugin_folder
from sandbox_plugin.dra.services import VERSIONS, DraHealthServicer, DraPluginServicer
from sandbox_plugin.rpc import sockets
from sandbox_plugin.rpc.server import UnixServer
from sandbox_plugin.trouble import Trouble

if TYPE_CHECKING:
    from grpclib._typing import IServable

_LOOK = 1.0
"""Seconds between looks whether both sockets are still there, and between attempts to make them."""
_LONGEST_STEM = 40
"""Characters of the driver's name in that of its registration socket: a socket's path has 107 bytes at most."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationStatus:
    """How the driver stands with the kubelet, for whoever wants to show it."""

    is_listening: bool
    """Whether both sockets are there."""
    registered_at: float | None
    """Since when the kubelet has it, in monotonic seconds; None: it does not."""
    registrations: int
    """Times the kubelet accepted it."""
    trouble: str | None
    """Why it cannot listen, or what the kubelet said when it refused."""


class Registration(pluginregistration.RegistrationBase):
    """What the kubelet asks at the first socket. `told` gets what the kubelet says: None, or why it refuses."""

    def __init__(self, driver: str, endpoint: Path, told: Callable[[str | None], None]) -> None:
        self._driver, self._endpoint, self._told = driver, endpoint, told

    async def get_info(self, request: pluginregistration.InfoRequest) -> pluginregistration.PluginInfo:
        return pluginregistration.PluginInfo(
            type="DRAPlugin", name=self._driver, endpoint=str(self._endpoint), supported_versions=list(VERSIONS)
        )

    async def notify_registration_status(
        self, status: pluginregistration.RegistrationStatus
    ) -> pluginregistration.RegistrationStatusResponse:
        self._told(None if status.plugin_registered else f"the kubelet refuses it: {status.error}")
        if status.plugin_registered:
            log.info("driver registered", driver=self._driver, endpoint=str(self._endpoint))
        else:
            log.warning("driver not registered", driver=self._driver, reason=status.error)
        return pluginregistration.RegistrationStatusResponse()


class Sockets:
    """Keeps the driver's sockets in their places while `run` runs."""

    def __init__(self, settings: Settings, driver: Driver) -> None:
        self._driver = driver
        self.registry = settings.kubelet_dir.parent / "plugins_registry"
        """The kubelet's folder."""
        self._folder = plugin_folder(settings)
        self._trouble = Trouble()
        self._is_listening = False
        self._registered_at: float | None = None
        self._registrations = 0
        self._refusal: str | None = None

    @property
    def status(self) -> RegistrationStatus:
        return RegistrationStatus(
            is_listening=self._is_listening,
            registered_at=self._registered_at,
            registrations=self._registrations,
            trouble=self._trouble.now or self._refusal,
        )

    def _heard(self, refusal: str | None) -> None:
        """The kubelet has said whether it takes the driver."""
        self._refusal = refusal
        self._registered_at = self._driver.registry.now() if refusal is None else None
        self._registrations += refusal is None

    async def run(self) -> None:
        """Runs until cancelled; then the kubelet is told by the end of the first socket, before the second one ends."""
        while True:
            try:
                with self._serving() as own:
                    self._trouble.update(None)
                    await _loss(own)
                log.warning("driver's socket is gone", reason="somebody removed it; it is made anew")
            except OSError as error:
                if self._trouble.update(str(error)):
                    log.warning("driver cannot listen", reason=str(error))
                await asyncio.sleep(_LOOK)

    @contextmanager
    def _serving(self) -> Iterator[dict[Path, sockets.Identity]]:
        """Both sockets, with who answers there. Raises OSError."""
        stem, run = self._driver.name[:_LONGEST_STEM], secrets.token_hex(4)
        endpoint, entrance = self._folder / f"dra-{run}.sock", self.registry / f"{stem}-{run}-reg.sock"
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in [*self._folder.glob("dra-*.sock"), *self.registry.glob(f"{stem}-????????-reg.sock")]:
            left.unlink(missing_ok=True)
        with ExitStack() as stack:
            services: list[IServable] = [DraPluginServicer(self._driver), DraHealthServicer(self._driver)]
            own = {endpoint: _serve(stack, endpoint, services)}
            own[entrance] = _serve(stack, entrance, [Registration(self._driver.name, endpoint, self._heard)])
            self._is_listening = True
            try:
                yield own
            finally:
                self._is_listening, self._registered_at, self._refusal = False, None, None


async def _loss(own: Mapping[Path, sockets.Identity]) -> None:
    """Returns when one of these sockets is not the one that was made."""
    while True:
        await asyncio.sleep(_LOOK)
        if any(sockets.identity(path) != identity for path, identity in own.items()):
            return


def _serve(stack: ExitStack, path: Path, services: Collection[IServable]) -> sockets.Identity:
    listener, own = sockets.listen_at(path)
    stack.callback(sockets.remove, path, own)
    stack.enter_context(UnixServer(listener, lambda: services))
    return own
