"""What tests of the daemon begin with, in one line each: a node, a kubelet, the daemon itself."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest
from daemon import Daemon, Places
from daemon import places as make_places
from hypothesis import HealthCheck, settings
from kubelet import GrpcKubelet
from pods import PodResources
from trials import wait_until_it_sees
from truth import Truth

from sandbox_plugin.fake.node import FakeNode

MakeNode = Callable[[str], FakeNode]
"""Makes a node from a preset."""


def pytest_configure() -> None:
    """What no machine and no way to start the tests may decide: how long things take, and whether SIGHUP is ignored.

    Under `nohup` it is, and what a test starts would inherit that.
    """
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


class StartDaemon(Protocol):
    """Starts the daemon on a node. At the end of the test it must end in order, as `Daemon.close` says."""

    def __call__(self, node: FakeNode | str, /, *flags: str, **environment: str) -> Daemon: ...


class Serve(Protocol):
    """Starts the daemon on a node, or on a new one of a preset, and waits until all is registered.

    Returns the node, the daemon, and `agree`, which waits until the kubelet's view equals the node's.
    """

    def __call__(
        self, node: FakeNode | str, /, *flags: str, **environment: str
    ) -> tuple[FakeNode, Daemon, Callable[[], None]]: ...


@pytest.fixture
def places() -> Iterator[Places]:
    """Empty folders for one made-up machine."""
    with make_places() as made:
        yield made


@pytest.fixture
def fake_node(places: Places) -> MakeNode:
    """Makes a node from a preset: `fake_node("hgx-h100")`."""
    return places.node


@pytest.fixture
def absent_kubelet(places: Places) -> Iterator[GrpcKubelet]:
    """A kubelet that has not been started, and whose folder does not exist."""
    with GrpcKubelet(places.kubelet) as made:
        yield made


@pytest.fixture
def kubelet(absent_kubelet: GrpcKubelet) -> GrpcKubelet:
    """A running kubelet."""
    absent_kubelet.start()
    return absent_kubelet


@pytest.fixture
def daemon(places: Places, absent_kubelet: GrpcKubelet) -> Iterator[StartDaemon]:
    """Starts the daemon on a node: `daemon(node, "--gpu-alias=", NVSWITCH_ALIAS="")`. It ends before the kubelet."""
    with ExitStack() as stack:
        yield lambda node, /, *flags, **environment: stack.enter_context(Daemon(places, node, *flags, **environment))


@pytest.fixture
def serve(fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon) -> Serve:
    """Starts the daemon and has it registered: `node, plugin, agree = serve("workstation")`."""

    def begin(node: FakeNode | str, /, *flags: str, **environment: str) -> tuple[FakeNode, Daemon, Callable[[], None]]:
        made = fake_node(node) if isinstance(node, str) else node
        truth = Truth(made.root)
        plugin = daemon(made, *flags, **environment)
        wait_until_it_sees(kubelet, truth)
        for resource in truth.read():
            plugin.wait_for("registered", resource=resource)
        return made, plugin, lambda: wait_until_it_sees(kubelet, truth)

    return begin


@pytest.fixture
def pods(places: Places) -> Iterator[PodResources]:
    """A PodResources that has not been started."""
    with PodResources(places.top / "pod-resources/kubelet.sock") as made:
        yield made
