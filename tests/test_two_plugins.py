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
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places, sockets
from kubelet import GrpcKubelet
from names import FIRST_GPU, NVSWITCH, PGPU
from trials import QUICK, figures, socket_of, wait_until_it_sees
from truth import Truth

from sandbox_plugin.kubelet.lock import LOCK_NAME, NodeLock
from sandbox_plugin.rpc.sockets import identity


def test_the_newcomer_stands_by_and_says_so_and_touches_nothing(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    old = daemon(node)
    wait_until_it_sees(kubelet, truth)
    before = {name: identity(places.kubelet / name) for name in sockets(places.kubelet)}
    new = daemon(node, "--health-interval=0.1")
    said = new.wait_for("standing by")
    assert "this one takes over when it ends" in said["reason"]
    since = old.mark()
    node.unbind(FIRST_GPU)
    wait_until_it_sees(kubelet, truth)
    assert {name: identity(places.kubelet / name) for name in sockets(places.kubelet)} == before
    assert kubelet.calls == 2
    assert not new.events("registered")
    assert not new.events("cdi spec written"), "specs are written by one plugin alone"
    assert not old.events("registration lost", since=since)
    assert len(new.events("standing by")) == 1, "said once"
    old.terminate()
    new.wait_for("taking over")


@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_the_newcomer_takes_over_when_the_old_one_ends(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, killed: bool
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    old = daemon(node, QUICK)
    wait_until_it_sees(kubelet, truth)
    new = daemon(node, QUICK)
    new.wait_for("standing by")
    node.sicken(FIRST_GPU)  # the newcomer follows the node while it stands by
    wait_until_it_sees(kubelet, truth)
    ended = time.monotonic()
    if killed:
        old.kill()
    else:
        old.terminate()
    new.wait_for("taking over")
    wait_until_it_sees(kubelet, truth)
    took = time.monotonic() - ended
    figures(f"takes over after {'SIGKILL' if killed else 'SIGTERM'}", [took])
    assert kubelet.calls == 4
    assert sockets(places.kubelet) == {"sandbox-pgpu.sock", "sandbox-nvswitch.sock"}
    node.sicken("0000:43:00.0")
    wait_until_it_sees(kubelet, truth)


def test_the_old_ones_exit_does_not_take_the_new_one_down(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    """A kubelet drops the client that counts when any stream of the resource ends: the old streams must end first."""
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    old = daemon(node)
    wait_until_it_sees(kubelet, truth)
    new = daemon(node)
    new.wait_for("standing by")
    old.terminate()
    wait_until_it_sees(kubelet, truth)
    for resource in (PGPU, NVSWITCH):
        new.wait_for("registered", resource=resource)
    streams = [r.watch for r in kubelet.registrations if r.watch is not None]
    assert [watch.ended is None for watch in streams] == [False, False, True, True]
    assert not new.events("registration lost")
    assert kubelet.calls == 4
    new.close()  # the old one is judged at the end, when nothing of the new one's is there any more


def test_rolling_updates_one_after_the_other_end_with_one_live_registration_each(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    running = daemon(node)
    wait_until_it_sees(kubelet, truth)
    for turn in range(4):
        following = daemon(node)
        following.wait_for("standing by")
        running.kill() if turn % 2 else running.terminate()
        following.wait_for("registered", resource=PGPU)
        following.wait_for("registered", resource=NVSWITCH)
        running = following
    wait_until_it_sees(kubelet, truth)
    assert kubelet.calls == 10


def test_two_that_stand_by_do_not_both_take_over(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    old = daemon(node)
    wait_until_it_sees(kubelet, truth)
    others = [daemon(node), daemon(node)]
    for other in others:
        other.wait_for("standing by")
    old.kill()
    kubelet.wait_for(lambda: len(kubelet.registrations) == 2)
    wait_until_it_sees(kubelet, truth)
    assert sum(len(other.events("taking over")) for other in others) == 1
    first = next(other for other in others if other.events("taking over"))
    (last,) = (other for other in others if other is not first)
    first.kill()
    last.wait_for("registered", resource=PGPU)
    wait_until_it_sees(kubelet, truth)
    assert kubelet.calls == 3


def test_a_kubelet_that_restarts_while_two_are_there_gets_one_registration(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    old = daemon(node)
    wait_until_it_sees(kubelet, truth)
    new = daemon(node)
    new.wait_for("standing by")
    for turn in range(3):
        kubelet.restart(leave_socket=turn % 2 == 0)
        wait_until_it_sees(kubelet, truth)
    assert not new.events("registered")
    assert not new.events("taking over")
    old.kill()
    wait_until_it_sees_again(kubelet, truth, new)


def wait_until_it_sees_again(kubelet: GrpcKubelet, truth: Truth, successor: Daemon) -> None:
    for resource in (PGPU, NVSWITCH):
        successor.wait_for("registered", resource=resource)
    wait_until_it_sees(kubelet, truth)


@pytest.mark.parametrize("what", ["the folder", "the lock"])
def test_when_somebody_removes_what_decides_one_goes_on_and_the_other_stands_by(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, what: str
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    plugins = [daemon(node)]
    wait_until_it_sees(kubelet, truth)
    plugins.append(daemon(node))
    plugins[1].wait_for("standing by")
    if what == "the folder":
        kubelet.stop()
        places.kubelet.rename(places.top / "away")  # in one step: nothing is made again in it
        shutil.rmtree(places.top / "away")
        kubelet.start()
    else:
        (places.kubelet / LOCK_NAME).unlink()
    wait_until_it_sees(kubelet, truth)
    node.unbind("0000:02:00.0")
    wait_until_it_sees(kubelet, truth)
    live = kubelet.registration(PGPU)
    assert live is not None
    before = identity(socket_of(places))
    node.bind("0000:02:00.0")
    wait_until_it_sees(kubelet, truth)
    assert identity(socket_of(places)) == before
    holder = max(plugins, key=lambda p: p.events("registered")[-1]["timestamp"] if p.events("registered") else "")
    (other,) = (p for p in plugins if p is not holder)
    since = other.mark()
    holder.kill()
    other.wait_for("registered", since=since, resource=PGPU)
    wait_until_it_sees(kubelet, truth)
    assert kubelet.registration(PGPU) is not live


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

    async def is_taken() -> bool:
        async with NodeLock(folder=tmp_path).taken():
            return True

    async def is_taken_soon() -> bool:
        try:
            return await asyncio.wait_for(is_taken(), 1)
        except TimeoutError:
            return False

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert not asyncio.run(is_taken_soon())
    os.close(held[0])
    assert asyncio.run(is_taken_soon())
