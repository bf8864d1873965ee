"""Two plugins on one node, as in a rolling update: the new pod starts while the old one runs.

Both are real processes that share a kubelet's folder. The end is always one live registration with all devices.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import Serve, StartDaemon
from daemon import Places, sockets
from kubelet import GrpcKubelet
from names import FIRST_GPU, NVSWITCH, PGPU, T4
from trials import figures, socket_of, wait_until

from sandbox_plugin.kubelet.lock import LOCK_NAME, NodeLock
from sandbox_plugin.rpc.sockets import identity


def test_the_newcomer_stands_by_and_says_so_and_touches_nothing(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node, old, agree = serve("hgx-h100")
    before = {name: identity(places.kubelet / name) for name in sockets(places.kubelet)}
    new = daemon(node, "--health-interval=0.1")
    said = new.wait_for("standing by")
    assert "this one takes over when it ends" in said["reason"]
    node.unbind(FIRST_GPU)
    agree()
    new.wait_for("not offered", pci_address=FIRST_GPU)  # it follows the node meanwhile
    assert {name: identity(places.kubelet / name) for name in sockets(places.kubelet)} == before
    assert kubelet.calls == 2
    assert not new.events("registered")
    assert not new.events("cdi spec written"), "specs are written by one plugin alone"
    assert not old.events("registration lost")
    assert len(new.events("standing by")) == 1, "said once"
    old.terminate()
    new.wait_for("taking over")


@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_the_newcomer_takes_over_when_the_old_one_ends_whose_end_does_not_take_it_down(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, killed: bool
) -> None:
    """A kubelet drops the client that counts when any stream of the resource ends: the old streams must end first."""
    node, old, agree = serve("hgx-h100")
    new = daemon(node)
    new.wait_for("standing by")
    ended = time.monotonic()
    if killed:
        old.kill()
    else:
        old.terminate()
    for resource in (PGPU, NVSWITCH):
        new.wait_for("registered", resource=resource)
    agree()
    figures(f"takes over after {'SIGKILL' if killed else 'SIGTERM'}", [time.monotonic() - ended])
    assert sockets(places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}
    node.unbind(FIRST_GPU)
    agree()
    streams = [r.watch for r in kubelet.registrations if r.watch is not None]
    assert [watch.ended is None for watch in streams] == [False, False, True, True]
    assert not new.events("registration lost")
    assert kubelet.calls == 4
    new.close()  # the old one is judged at the end, when nothing of the new one's is there any more


def test_two_that_stand_by_do_not_both_take_over(serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon) -> None:
    node, old, agree = serve("workstation")
    others = [daemon(node), daemon(node)]
    for other in others:
        other.wait_for("standing by")
    old.kill()
    kubelet.wait_for(lambda: len(kubelet.registrations) == 2)
    agree()
    assert sum(len(other.events("taking over")) for other in others) == 1
    first, last = sorted(others, key=lambda other: not other.events("taking over"))
    first.kill()
    last.wait_for("registered", resource=PGPU)
    agree()
    assert kubelet.calls == 3


def test_a_kubelet_that_restarts_while_two_are_there_gets_one_registration(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node, old, agree = serve("workstation")
    new = daemon(node)
    new.wait_for("standing by")
    kubelet.restart()
    agree()
    assert not new.events("registered")
    assert not new.events("taking over")
    old.kill()
    new.wait_for("registered", resource=PGPU)
    agree()
    assert kubelet.calls == 3


@pytest.mark.parametrize("what", ["the folder", "the lock"])
def test_when_somebody_removes_what_decides_one_goes_on_and_the_other_stands_by(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, what: str
) -> None:
    node, old, agree = serve("workstation")
    new = daemon(node)
    new.wait_for("standing by")
    if what == "the folder":
        kubelet.stop()
        shutil.rmtree(places.kubelet.rename(places.top / "away"))  # in one step: nothing is made again in it
        kubelet.start()
    else:
        (places.kubelet / LOCK_NAME).unlink()
    agree()
    node.unbind(T4)
    agree()
    before = identity(socket_of(places))
    node.bind(T4)
    agree()
    assert identity(socket_of(places)) == before
    since = {plugin: plugin.mark() for plugin in (old, new)}
    holder, other = sorted(
        since, key=lambda plugin: max((e["timestamp"] for e in plugin.events("registered")), default=""), reverse=True
    )
    holder.kill()
    other.wait_for("registered", since=since[other], resource=PGPU)
    agree()


def test_who_finds_another_lock_in_the_place_of_its_own_stops_serving_until_that_is_free(
    serve: Serve, places: Places
) -> None:
    _, plugin, agree = serve("workstation")
    with open(places.top / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (places.top / "lock").rename(places.kubelet / LOCK_NAME)
        plugin.wait_for("standing by")
        wait_until(lambda: not sockets(places.kubelet), "its sockets are gone")
    plugin.wait_for("taking over")
    agree()


def test_a_lock_on_a_file_that_is_removed_before_it_is_locked_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or two plugins would both have one: one on the removed file, the other on the new one."""
    flock = fcntl.flock
    held: list[int] = []

    def too_late(descriptor: int, operation: int) -> None:
        if not held:
            (tmp_path / LOCK_NAME).unlink()
            held.append(os.open(tmp_path / LOCK_NAME, os.O_RDWR | os.O_CREAT))
            flock(held[0], fcntl.LOCK_EX)  # the other one has locked the new file
        flock(descriptor, operation)

    async def is_taken_soon() -> bool:
        try:
            async with asyncio.timeout(1), NodeLock(folder=tmp_path).taken():
                return True
        except TimeoutError:
            return False

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert not asyncio.run(is_taken_soon())
    os.close(held[0])
    assert asyncio.run(is_taken_soon())
