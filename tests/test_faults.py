"""Faults, one by one, against the real process: after each the kubelet's view equals the node's.

Those that need no more than a polite kubelet and a fake node are in test_daemon.py. KUBELET_RESTARTS says how many
restarts in a row are tried.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import daemon as daemon_process
import psutil
import pytest
from bare import BareClient, bare_client
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places, sockets
from grpc import StatusCode
from h2.settings import SettingCodes
from kubelet import TIMEOUT, GrpcKubelet, Manners, Plugin, Watch, refusal
from names import FIRST_GPU, NVSWITCH, PGPU, T4
from odd import ANSWERS, OddServer
from pods import PodResources
from trials import (
    QUICK,
    as_root,
    figures,
    run_broken,
    socket_of,
    tampered,
    view,
    wait_until,
    wait_until_it_sees,
)
from truth import Truth

from sandbox_plugin.cdi.render import MARK

RESTARTS = int(os.environ.get("KUBELET_RESTARTS", "10"))


# The kubelet is away, or comes and goes


@pytest.mark.parametrize("seconds", [pytest.param(2, id="2 s"), pytest.param(120, id="2 min", marks=pytest.mark.slow)])
@pytest.mark.timeout(180)
def test_while_the_kubelet_is_away_the_node_changes_and_nothing_of_it_is_lost(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, seconds: int
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node)
    wait_until_it_sees(kubelet, truth)
    for name in (PGPU, NVSWITCH):
        plugin.wait_for("registered", resource=name)
    kubelet.stop(leave_socket=True)
    since = plugin.mark()
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="does not answer")
    node.unbind(FIRST_GPU)
    with pytest.raises(AssertionError, match="no event"):
        plugin.wait_for("registered", since=since, timeout=seconds)
    complaints = plugin.events("endpoint trouble", since=since)
    assert len(complaints) <= 4, "the same complaint again and again"
    kubelet.start()
    started = time.monotonic()
    wait_until_it_sees(kubelet, truth)
    figures(f"view is whole after the kubelet was away for {seconds} s", [time.monotonic() - started])


@pytest.mark.timeout(300)
def test_after_each_of_many_kubelet_restarts_the_view_is_whole_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node)
    wait_until_it_sees(kubelet, truth)
    for name in (PGPU, NVSWITCH):
        plugin.wait_for("registered", resource=name)
    before = psutil.Process(plugin.pid).num_fds()
    chance = random.Random(4)
    took = []
    since = 0
    for turn in range(RESTARTS):
        wait = turn % 2  # every second time it is back within a millisecond, else when its end has been noticed
        for name in (PGPU, NVSWITCH):
            plugin.wait_for("registered", since=since, resource=name)
        since = plugin.mark()
        kubelet.stop(leave_socket=chance.random() < 0.5)  # killed, or asked to end
        if wait:
            plugin.wait_for("registration lost", since=since, resource=PGPU)
        (node.unbind if turn % 4 < 2 else node.bind)(FIRST_GPU) if turn % 2 == 0 else None
        started = time.monotonic()
        kubelet.start()  # deletes every socket and makes its own at once
        wait_until_it_sees(kubelet, truth)
        took.append(time.monotonic() - started)
    figures("from the start of a kubelet until it has the whole view", took)
    # A few more or less: folders are watched one after the other, and files are read all the time.
    wait_until(lambda: psutil.Process(plugin.pid).num_fds() <= before + 4, "files and sockets are left open")


def remove(folder: Path) -> None:
    """In one step: the daemon would make its sockets again in a folder that is being emptied."""
    away = folder.with_name("away")
    folder.rename(away)
    shutil.rmtree(away)


def test_a_kubelet_folder_that_is_deleted_and_made_again_is_served_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node)
    wait_until_it_sees(kubelet, truth)
    for _ in range(2):
        kubelet.stop()
        since = plugin.mark()
        remove(places.kubelet)
        plugin.wait_for("waiting for the kubelet directory", since=since, reason="No such file")
        kubelet.start()
        wait_until_it_sees(kubelet, truth)


def test_a_kubelet_folder_that_is_replaced_within_an_instant_is_served_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    daemon(node)
    wait_until_it_sees(kubelet, truth)
    kubelet.stop()
    remove(places.kubelet)
    kubelet.start()
    wait_until_it_sees(kubelet, truth)


def put_a_file(path: Path) -> None:
    path.write_text("no socket")


def put_a_folder(path: Path) -> None:
    path.mkdir()


def put_a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_a_file, put_a_folder, put_a_dangling_link])
def test_something_else_in_the_place_of_kubelet_sock_is_no_kubelet_until_a_real_one_comes(
    fake_node: MakeNode,
    absent_kubelet: GrpcKubelet,
    daemon: StartDaemon,
    places: Places,
    put: Callable[[Path], None],
) -> None:
    node = fake_node("workstation")
    places.kubelet.mkdir()
    put(absent_kubelet.socket)
    plugin = daemon(node)
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="no socket")
    absent_kubelet.socket.rename(places.top / "away")
    absent_kubelet.start()
    wait_until_it_sees(absent_kubelet, Truth(node.root))


def hang_up_on_everybody(path: Path, times: int) -> None:
    """Something that listens at `path` and ends each connection at once: as a kubelet does that is about to end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT)
        for _ in range(times):
            connection, _ = listener.accept()
            connection.close()
    path.unlink()


def test_a_kubelet_that_hangs_up_on_everybody_is_tried_again(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    places.kubelet.mkdir()
    plugin = daemon(node)
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="no socket")
    for _ in range(30):
        hang_up_on_everybody(absent_kubelet.socket, times=2)
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="the kubelet does not answer")
    absent_kubelet.start()
    wait_until_it_sees(absent_kubelet, Truth(node.root))


def test_a_pod_resources_socket_that_hangs_up_costs_no_more_than_knowledge(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    folder = places.top / "pod-resources"
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(hang_up_on_everybody, folder / "kubelet.sock", 1)
        wait_until((folder / "kubelet.sock").exists, "it listens")
        node = fake_node("workstation")
        plugin = daemon(node)
        listening.result()
    plugin.wait_for("PodResources unavailable")
    wait_until_it_sees(kubelet, Truth(node.root))


def test_a_socket_of_ours_that_somebody_deletes_comes_back_and_is_registered(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node)
    plugin.wait_for("registered", resource=PGPU)
    since = plugin.mark()
    socket_of(places).unlink()
    plugin.wait_for("registration lost", since=since, reason="our socket is gone")
    plugin.wait_for("registered", since=since, resource=PGPU)
    assert len(kubelet.registrations) == 2
    wait_until_it_sees(kubelet, Truth(node.root))


def test_something_that_is_no_socket_in_the_place_of_ours_is_named_and_waited_for(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    socket_of(places).write_text("in the way")
    plugin = daemon(node)
    plugin.wait_for("endpoint trouble", resource=PGPU, reason=f"cannot listen at {socket_of(places)}")
    assert socket_of(places).read_text() == "in the way"
    socket_of(places).unlink()
    wait_until_it_sees(kubelet, Truth(node.root))


# Register and ListAndWatch go wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manners", "reason", "seconds"),
    [
        (Manners.HANGS, "no answer in 20 s", 20),
        (Manners.FORGETS, "accepted the registration but never asked for the devices", 10),
    ],
)
@pytest.mark.timeout(120)
def test_a_register_without_an_answer_or_a_stream_is_given_up_in_time_and_tried_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, manners: Manners, reason: str, seconds: int
) -> None:
    node = fake_node("workstation")
    kubelet.manners = manners
    plugin = daemon(node)
    kubelet.wait_for(lambda: kubelet.calls)
    started = time.monotonic()
    plugin.wait_for("endpoint trouble", resource=PGPU, reason=reason, timeout=seconds + 10)
    took = time.monotonic() - started
    assert seconds - 1 < took < seconds + 5
    kubelet.manners = Manners.POLITE
    wait_until_it_sees(kubelet, Truth(node.root), timeout=30)


def test_while_register_hangs_streams_of_other_clients_are_served(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    truth.read()
    kubelet.manners = Manners.HANGS
    daemon(node)
    kubelet.wait_for(lambda: kubelet.calls)
    with other_client(places, kubelet) as watch:
        kubelet.wait_for(lambda: watch.last is not None and len(watch.last.healthy) == 2)
        node.unbind(T4)
        kubelet.wait_for(lambda: watch.last is not None and len(watch.last.unhealthy) == 1)
    kubelet.manners = Manners.POLITE
    kubelet.restart()
    wait_until_it_sees(kubelet, truth)


@contextmanager
def other_client(places: Places, kubelet: GrpcKubelet) -> Iterator[Watch]:
    """A stream that no registration led to."""
    client = Plugin(socket_of(places))
    try:
        yield Watch(client, kubelet.changed, on_end=lambda: None)
    finally:
        client.close()


def test_the_loss_of_the_kubelets_stream_is_seen_whatever_others_have_open(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"))
    plugin.wait_for("registered", resource=PGPU)
    with other_client(places, kubelet) as stranger:
        kubelet.wait_for(lambda: stranger.received)
        since = plugin.mark()
        kubelet.plugin(PGPU).close()
        plugin.wait_for("registration lost", since=since, resource=PGPU, reason="stream ended")
        kubelet.wait_for(lambda: len(kubelet.registrations) == 2 and kubelet.resources() == {PGPU})
        assert stranger.ended is None


def test_streams_that_others_open_and_end_do_not_make_us_register(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    plugin = daemon(node)
    wait_until_it_sees(kubelet, truth)
    for _ in range(10):
        with other_client(places, kubelet) as stranger:
            kubelet.wait_for(lambda stranger=stranger: stranger.received)  # type: ignore[misc]
    node.unbind(T4)
    wait_until_it_sees(kubelet, truth)
    assert not plugin.events("registration lost")
    assert kubelet.calls == 1


@pytest.mark.parametrize("cut", [True, False], ids=["connection cut", "stream reset"])
def test_a_stream_that_ends_while_something_is_sent_over_it_is_lost_at_once(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, cut: bool
) -> None:
    """Not only when the garbage collector comes by."""
    kubelet.manners = Manners.FORGETS
    with ExitStack() as stack:
        clients: list[BareClient] = []

        def connect(_: str) -> None:
            if not clients:
                clients.append(stack.enter_context(bare_client(socket_of(places))))

        kubelet.on_register = connect  # a connection that is made now counts as the kubelet's
        plugin = daemon(fake_node("workstation"), PYTHONPATH=tampered(places, "import gc; gc.disable()"))
        kubelet.wait_for(lambda: clients and kubelet.registrations)
        (client,) = clients
        client.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 5})  # for the list there is no room
        stream = client.ask("ListAndWatch")
        client.send()
        plugin.wait_for("registered", resource=PGPU)
        kubelet.manners = Manners.POLITE
        if cut:
            client.socket.close()
        else:
            client.http.reset_stream(stream)
            client.send()
        plugin.wait_for("registration lost", resource=PGPU, reason="stream ended")
        kubelet.wait_for(lambda: kubelet.resources() == {PGPU})


def test_odd_answers_to_register_are_named_and_tried_again(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    odd = ["a prefix that ends too early", "status 0 without a message", "no :status", "a compressed message"]
    places.kubelet.mkdir()
    node = fake_node("workstation")
    with OddServer(places.kubelet / "kubelet.sock", [ANSWERS[name] for name in odd]):
        plugin = daemon(node)
        for words in ("less data than expected", "AssertionError", ":status", "Compression"):
            plugin.wait_for("endpoint trouble", reason=words)
    absent_kubelet.start()
    wait_until_it_sees(absent_kubelet, Truth(node.root))


@pytest.mark.parametrize("odd", ["a message that ends too early", "status 0 and nothing else", "no :status"])
def test_an_odd_answer_of_pod_resources_costs_no_more_than_knowledge(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, odd: str
) -> None:
    (places.top / "pod-resources").mkdir()
    node = fake_node("workstation")
    with OddServer(places.top / "pod-resources/kubelet.sock", [ANSWERS[odd]]):
        plugin = daemon(node)
        plugin.wait_for("PodResources unavailable", reason="not a valid gRPC answer")
        wait_until_it_sees(kubelet, Truth(node.root))


def test_of_two_streams_on_one_connection_both_are_kept_up_to_date_and_either_may_end(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    plugin = daemon(node)
    wait_until_it_sees(kubelet, truth)
    registration = kubelet.registration(PGPU)
    assert registration is not None
    assert registration.watch is not None
    second = Watch(registration.plugin, kubelet.changed, on_end=lambda: None)
    kubelet.wait_for(lambda: second.received)
    node.unbind(T4)
    kubelet.wait_for(lambda: second.last is not None and second.last.unhealthy)
    wait_until_it_sees(kubelet, truth)
    since = plugin.mark()
    second.cancel()  # the newest: a real kubelet would have dropped us with it
    plugin.wait_for("registration lost", since=since, resource=PGPU, reason="stream ended")
    plugin.wait_for("registered", since=since, resource=PGPU)
    wait_until_it_sees(kubelet, truth)


def test_a_connection_that_is_cut_in_the_middle_of_everything_is_registered_anew(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    plugin = daemon(node)
    for turn in range(3):
        wait_until_it_sees(kubelet, truth)
        (node.unbind if turn % 2 else node.bind)(T4) if turn else None
        kubelet.plugin(PGPU).close()  # with its stream, whatever is on its way
        kubelet.wait_for(lambda turn=turn: len(kubelet.registrations) == turn + 2)  # type: ignore[misc]
    wait_until_it_sees(kubelet, truth)
    plugin.wait_for("registration lost", reason="stream ended")


# The process or the machine runs out of something


@contextmanager
def no_descriptors(plugin: Daemon) -> Iterator[None]:
    """Not one file can be opened more, and no connection accepted: RLIMIT_NOFILE, while it runs."""
    before = resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE, before)


def test_without_file_descriptors_what_was_known_stays_and_afterwards_nothing_is_lost(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node, QUICK)
    wait_until_it_sees(kubelet, truth)
    before = view(kubelet)
    messages = len(kubelet.history(PGPU))
    with no_descriptors(plugin):
        plugin.wait_for("scan failed", reason="Too many open files")
        refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["4"]))
        assert refused.status is StatusCode.FAILED_PRECONDITION, "what cannot be looked at is not promised"
        node.unbind(FIRST_GPU)
        kubelet.plugin(PGPU).options()
        assert view(kubelet) == before
        assert len(kubelet.history(PGPU)) == messages
    wait_until_it_sees(kubelet, truth)


def test_a_kubelet_that_restarts_while_there_are_no_file_descriptors_is_registered_with_when_there_are(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node, QUICK)
    wait_until_it_sees(kubelet, truth)
    with no_descriptors(plugin):
        since = plugin.mark()
        kubelet.restart()
        plugin.wait_for("endpoint trouble", since=since, resource=PGPU)
    wait_until_it_sees(kubelet, truth)


NO_THREADS = """
import os, threading
def scarce(start):
    def refuse(*args, **kwargs):
        if os.path.exists(os.environ["NO_THREADS"]):
            raise RuntimeError("can't start new thread")
        return start(*args, **kwargs)
    return refuse
for name in {"_start_new_thread", "_start_joinable_thread"} & vars(threading).keys():
    setattr(threading, name, scarce(vars(threading)[name]))
"""
"""As at the limit of a pod's pids."""


def test_without_threads_what_was_known_stays_and_afterwards_nothing_is_lost(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    flag = places.top / "no-threads"
    plugin = daemon(node, QUICK, PYTHONPATH=tampered(places, NO_THREADS), NO_THREADS=str(flag))
    wait_until_it_sees(kubelet, truth)
    before = view(kubelet)
    since = plugin.mark()
    flag.touch()
    plugin.wait_for("scan failed", since=since, reason="can't start new thread")
    plugin.wait_for("cdi trouble", since=since, reason="can't start new thread")
    plugin.wait_for("folders not watched", since=since, reason="can't start new thread")
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["5"]))
    assert refused.status is StatusCode.FAILED_PRECONDITION, "what cannot be looked at is not promised"
    node.unbind(FIRST_GPU)
    kubelet.plugin(PGPU).options()
    assert view(kubelet) == before
    flag.unlink()
    wait_until_it_sees(kubelet, truth)
    kubelet.plugin(PGPU).allocate(["5"])
    flag.touch()
    plugin.terminate()
    assert plugin.wait(TIMEOUT) == 0


def test_connections_that_come_while_there_are_no_file_descriptors_are_served_when_there_are(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, QUICK)
    wait_until_it_sees(kubelet, Truth(node.root))
    since = plugin.mark()
    client = Plugin(socket_of(places))
    with no_descriptors(plugin), socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(socket_of(places)))
        plugin.wait_for("no connection accepted", since=since, reason="Too many open files")
    try:
        assert client.options().get_preferred_allocation_available
    finally:
        client.close()


def test_a_socket_of_ours_that_is_deleted_while_nobody_can_be_accepted_at_it_is_made_again_afterwards(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"), QUICK)
    plugin.wait_for("registered", resource=PGPU)
    with no_descriptors(plugin), socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(socket_of(places)))
        plugin.wait_for("no connection accepted")
        since = plugin.mark()
        socket_of(places).unlink()
        plugin.wait_for("registration lost", since=since)
        plugin.wait_for("endpoint trouble", since=since, reason="cannot listen")
        with pytest.raises(AssertionError, match="no event"):  # it would come back to a listener that is closed
            plugin.wait_for("registered", since=since, timeout=1.5)
    plugin.wait_for("registered", since=since)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 KiB at `folder`."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Writes until there is no room."""
    filler = disk / "filler"
    written = subprocess.run(
        ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, text=True, check=False
    )
    assert "No space left" in written.stderr
    return filler


@as_root
def test_with_a_full_disk_new_devices_wait_for_their_spec_and_those_that_stand_there_are_kept(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    node.unbind(FIRST_GPU)
    with small_disk(places.cdi) as disk, ExitStack() as stack:
        plugin = stack.enter_context(Daemon(places, node, QUICK))
        wait_until_it_sees(kubelet, truth)
        specs = {path.name: path.read_text() for path in disk.glob("*.yaml")}
        filler = fill(disk)
        node.bind(FIRST_GPU)
        plugin.wait_for("cdi trouble", resource=PGPU, reason="No space left")
        assert kubelet.healthy(PGPU) == {"5", "6", "7", "8", "9", "10", "11"}
        assert {path.name: path.read_text() for path in disk.glob("*.yaml")} == specs, "no half-written spec"
        wait_until(lambda: not list(disk.glob(".*")), "a temporary file is left")
        filler.unlink()
        wait_until_it_sees(kubelet, truth)


@as_root
def test_a_disk_that_is_full_from_the_start_is_waited_for(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("hgx-h100")
    with small_disk(places.cdi) as disk, ExitStack() as stack:
        filler = fill(disk)
        plugin = stack.enter_context(Daemon(places, node, QUICK))
        plugin.wait_for("cdi trouble", resource=PGPU, reason="No space left")
        assert kubelet.calls == 0
        filler.unlink()
        wait_until_it_sees(kubelet, Truth(node.root))


@as_root
def test_on_a_read_only_disk_specs_that_stand_there_go_on_to_count(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    with small_disk(places.cdi) as disk, ExitStack() as stack:
        plugin = stack.enter_context(Daemon(places, node, QUICK))
        wait_until_it_sees(kubelet, truth)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        node.unbind(FIRST_GPU)  # Unhealthy at once, although its spec cannot be taken away
        plugin.wait_for("cdi trouble", resource=PGPU, reason="Read-only file system")
        wait_until_it_sees(kubelet, truth)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        since = plugin.mark()
        plugin.wait_for("cdi spec written", since=since, resource=PGPU)
        assert "vfio4" not in (disk / "nvidia.com-pgpu.yaml").read_text()


@as_root
def test_after_a_start_on_a_read_only_disk_what_an_earlier_run_wrote_counts(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("hgx-h100")
    node.unbind(FIRST_GPU)
    others = {"5", "6", "7", "8", "9", "10", "11"}
    with small_disk(places.cdi) as disk:
        with Daemon(places, node, QUICK):
            kubelet.wait_for(lambda: kubelet.healthy(PGPU) == others)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        node.bind(FIRST_GPU)
        with Daemon(places, node, QUICK) as plugin:
            plugin.wait_for("cdi trouble", resource=PGPU, reason="Read-only file system")
            kubelet.wait_for(lambda: kubelet.healthy(PGPU) == others and kubelet.unhealthy(PGPU) == {"4"})
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            wait_until_it_sees(kubelet, Truth(node.root))


@as_root
def test_a_stale_spec_that_cannot_be_removed_is_named_by_its_path_and_removed_when_it_can_be(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("workstation")
    with small_disk(places.cdi) as disk:
        stale = disk / "nvidia.com-left-behind.yaml"
        stale.write_bytes(MARK.encode())
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with Daemon(places, node, QUICK) as plugin:
            plugin.wait_for("cdi trouble", path=str(stale), reason="Read-only file system")
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            plugin.wait_for("stale cdi spec removed", path=str(stale))
            wait_until_it_sees(kubelet, Truth(node.root))


def test_without_inotify_the_timers_alone_find_everything(
    fake_node: MakeNode,
    kubelet: GrpcKubelet,
    daemon: StartDaemon,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    command = 'echo 0 >/proc/sys/user/max_inotify_instances && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run([*limit, command, "sh", "true"], check=False).returncode:
        pytest.skip("a user namespace with an inotify limit of its own cannot be had here")
    monkeypatch.setattr(daemon_process, "PYTHON", (*limit, command, "sh", *daemon_process.PYTHON))
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node, QUICK)
    plugin.wait_for("folders not watched")
    wait_until_it_sees(kubelet, truth)
    started = time.monotonic()
    node.unbind(FIRST_GPU)
    wait_until_it_sees(kubelet, truth)
    figures("a loss is seen without inotify, looking every 0.2 s", [time.monotonic() - started])
    started = time.monotonic()
    kubelet.restart()
    wait_until_it_sees(kubelet, truth)
    figures("registered with a new kubelet without inotify", [time.monotonic() - started])
    since = plugin.mark()
    socket_of(places).unlink()
    plugin.wait_for("registered", since=since, resource=PGPU)


# Clocks


SET_BACK = """
import datetime, os, time
FLAG = os.environ["CLOCK_FLAG"]
def shift():
    return 3600 if os.path.exists(FLAG) else 0
now, now_ns, get = time.time, time.time_ns, time.clock_gettime
time.time = lambda: now() - shift()
time.time_ns = lambda: now_ns() - shift() * 10**9
time.clock_gettime = lambda which: get(which) - (shift() if which == time.CLOCK_REALTIME else 0)
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) - datetime.timedelta(seconds=shift())
datetime.datetime = Shifted
"""


def test_a_clock_that_is_set_back_an_hour_changes_nothing_but_the_log(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    flag = places.top / "set-back"
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node, QUICK, PYTHONPATH=tampered(places, SET_BACK), CLOCK_FLAG=str(flag))
    wait_until_it_sees(kubelet, truth)
    before = plugin.wait_for("registered", resource=PGPU)
    flag.touch()
    since = plugin.mark()
    node.sicken(FIRST_GPU)
    wait_until_it_sees(kubelet, truth)
    node.heal(FIRST_GPU)
    wait_until_it_sees(kubelet, truth)  # after its 2 seconds, not after an hour
    kubelet.restart()
    wait_until_it_sees(kubelet, truth)
    after = plugin.wait_for("registered", since=since, resource=PGPU)
    stamps = [datetime.fromisoformat(event["timestamp"]) for event in (before, after)]
    assert (stamps[0] - stamps[1]).total_seconds() > 3500, "the clock was not set back, so this test shows nothing"


# A read that hangs


def test_while_a_read_hangs_in_sysfs_streams_go_on_and_other_devices_are_given_at_once(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    plugin = daemon(node, QUICK)
    wait_until_it_sees(kubelet, Truth(node.root))
    trap = node.folder(FIRST_GPU) / "class"
    text = trap.read_bytes()
    trap.unlink()
    os.mkfifo(trap)  # whoever opens it to read hangs, as in a reset that does not end
    took = []
    while not kubelet.unhealthy(PGPU):  # for the second in which the daemon waits for it
        started = time.monotonic()
        assert len(kubelet.plugin(PGPU).allocate(["11"]).container_responses) == 1
        took.append(time.monotonic() - started)
    figures("Allocate of another device while a read hangs", took)
    assert kubelet.unhealthy(PGPU) == {"4"}
    assert min(took) < 0.5, "it waits for the scan, which waits for a second"
    started = time.monotonic()
    node.unbind("0000:43:00.0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4", "5"})
    figures("another device's loss reaches the kubelet while a read hangs", [time.monotonic() - started])
    threads = psutil.Process(plugin.pid).num_threads()
    node.unbind("0000:52:00.0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4", "5", "6"})
    wait_until(lambda: psutil.Process(plugin.pid).num_threads() <= threads + 2, "every scan leaves a thread behind")
    give_back(trap, text)
    node.bind("0000:43:00.0")
    node.bind("0000:52:00.0")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)


def give_back(trap: Path, text: bytes) -> None:
    """Puts the attribute back and lets go whoever hangs at the FIFO."""
    fifo = trap.with_name("fifo")
    trap.rename(fifo)
    trap.write_bytes(text)
    os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))
    fifo.unlink()


# A file system that hangs


HANGING_WRITE = """
import os
replace = os.replace
def hang(source, target):
    if os.path.exists(os.environ["HANGS"]):
        with open(os.environ["HANGS"]):  # a pipe: this comes back when somebody opens it to write
            pass
    return replace(source, target)
os.replace = hang
"""


def let_go(pipe: Path) -> None:
    """Whoever hangs at the pipe goes on, and nobody hangs there again."""
    gone = pipe.with_name("gone")
    pipe.rename(gone)
    os.close(os.open(gone, os.O_RDWR | os.O_NONBLOCK))
    gone.unlink()


@pytest.mark.slow
def test_while_a_cdi_write_hangs_devices_say_so_and_sigterm_ends_the_process_as_always(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    truth = Truth(node.root)
    pipe = places.top / "pipe"
    plugin = daemon(node, PYTHONPATH=tampered(places, HANGING_WRITE), HANGS=str(pipe))
    wait_until_it_sees(kubelet, truth)
    for turn in range(2):
        since = plugin.mark()
        os.mkfifo(pipe)
        started = time.monotonic()
        node.unbind(T4)
        kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"13"})  # at once, whatever becomes of the spec
        figures("a loss is seen while a CDI write hangs", [time.monotonic() - started])
        plugin.wait_for("cdi trouble", since=since, resource=PGPU, reason="has not answered for 5 s")
        kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"11", "13"})
        refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["11"]))
        assert refused.status is StatusCode.FAILED_PRECONDITION
        assert "not-in-cdi" in refused.message
        if turn == 0:
            let_go(pipe)
            node.bind(T4)
            kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    took = plugin.terminate()
    figures("SIGTERM ends it while a CDI write hangs", [took])
    assert sockets(places.kubelet) == set()
    (left,) = places.cdi.glob(".*")  # the thread that hung had written it, and is gone
    left.unlink()


HANGING_FOLDER = """
import os
from sandbox_plugin.cdi import foreign
def hanging(function):
    def hang(path):
        if "etc/cdi" in str(path) and os.path.exists(os.environ["HANGS"]):
            with open(os.environ["HANGS"]):
                pass
        return function(path)
    return hang
foreign._specs_below = hanging(foreign._specs_below)
os.statvfs = hanging(os.statvfs)
"""


def test_while_the_other_cdi_folder_hangs_ours_is_looked_after_and_sigterm_ends_the_process_as_always(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    pipe = places.top / "pipe"
    os.mkfifo(pipe)
    plugin = daemon(node, PYTHONPATH=tampered(places, HANGING_FOLDER), HANGS=str(pipe))
    wait_until_it_sees(kubelet, Truth(node.root))
    plugin.wait_for("folders not watched", reason="no answer in 2 s")
    spec = places.cdi / "nvidia.com-pgpu.yaml"
    for _ in range(5):
        spec.unlink()
        wait_until(spec.exists, "our spec comes back")
    (places.cdi / "bad.yaml").write_text("cdiVersion: 9.9.9\n")
    plugin.wait_for("bad cdi spec", path=str(places.cdi / "bad.yaml"))
    node.unbind(T4)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"13"})
    took = plugin.terminate()
    figures("SIGTERM ends it while the other CDI folder hangs", [took])
    let_go(pipe)


# A fault of our own


BREAKS = {
    "a scan": "from sandbox_plugin.host import bus\n{boom}\nbus.read_groups = boom",
    "a step of the registry": "from sandbox_plugin import registry\n{boom}\nregistry.advance = boom",
    "the CDI writer": "from sandbox_plugin.cdi import writer\n{boom}\nwriter.render_specs = boom",
    "an endpoint": "from sandbox_plugin.kubelet import endpoint\n{boom}\nendpoint.UnixServer = boom",
    "a Register call": "from sandbox_plugin.kubelet import endpoint\n{boom}\nendpoint._outcome = boom",
    "the question to PodResources": "from sandbox_plugin.kubelet import podresources\n{boom}\n"
    "podresources.list_pods = boom",
    "the log of changes": "from sandbox_plugin import report\n{boom}\nreport._report_devices = boom",
    "the lock": "from sandbox_plugin.kubelet import lock\n{boom}\nlock._is_at = boom",
    "a watcher": "from sandbox_plugin.host import watch\n{boom}\nwatch.awatch = boom",
}
BOOM = "def boom(*args, **kwargs): raise RuntimeError('a fault of our own')"


@pytest.mark.parametrize("part", BREAKS)
def test_a_part_that_fails_unexpectedly_ends_the_process_loudly_with_status_1(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, part: str
) -> None:
    done = run_broken(places, fake_node("workstation"), BREAKS[part].format(boom=BOOM))
    assert done.returncode == 1, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    (critical,) = [event for event in events if event["level"] == "critical"]
    assert critical["event"] == "a part of the daemon failed"
    assert "a fault of our own" in critical["exception"]
    assert sockets(places.kubelet) == set()
    kubelet.wait_for(lambda: not kubelet.resources())


HOLDINGS_FAIL = """
from sandbox_plugin.kubelet import podresources
def boom(*args, **more):
    raise AttributeError("a fault of our own")
podresources.holdings = boom
"""


def test_a_fault_of_our_own_in_what_pod_resources_said_is_not_taken_for_its_silence(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
        pods.start(age=3600)
        done = run_broken(places, fake_node("workstation"), HOLDINGS_FAIL)
    assert done.returncode == 1, done.stderr
    (critical,) = [e for e in map(json.loads, done.stderr.splitlines()) if e["level"] == "critical"]
    assert "a fault of our own" in critical["exception"]


BREAKS_LATER = """
from sandbox_plugin import registry
advance = registry.advance
def boom(before, facts, *rest):
    if "0000:02:00.0" in facts.functions and facts.functions["0000:02:00.0"].driver is None:
        raise RuntimeError("a fault of our own")
    return advance(before, facts, *rest)
registry.advance = boom
"""


def test_a_part_that_fails_later_ends_the_streams_as_well(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("workstation")

    def break_it() -> None:
        kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
        node.unbind(T4)

    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(break_it)
        done = run_broken(places, node, BREAKS_LATER)
        broken.result()
    assert done.returncode == 1
    assert "a fault of our own" in done.stderr
    kubelet.wait_for(lambda: not kubelet.resources())
    assert sockets(places.kubelet) == set()


FAILS_ONCE = """
from sandbox_plugin.kubelet import servicer
answer = servicer.answer
def boom(*args):
    servicer.answer = answer
    raise RuntimeError("a fault of our own")
servicer.answer = boom
"""


CANNOT_REMOVE = """
import errno
from pathlib import Path
unlink = Path.unlink
def boom(path, missing_ok=False):
    if path.suffix == ".sock":
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
    unlink(path, missing_ok)
Path.unlink = boom
"""
"""As on a disk that turned read-only, or that fails."""


def test_a_socket_that_cannot_be_removed_does_not_hold_up_the_end(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("hgx-h100"), PYTHONPATH=tampered(places, CANNOT_REMOVE))
    for name in (PGPU, NVSWITCH):
        plugin.wait_for("registered", resource=name)
    plugin.terminate()
    for name in (PGPU, NVSWITCH):
        path = socket_of(places, name)
        plugin.wait_for("socket not removed", path=str(path), reason="Operation not permitted")
        path.unlink()


def test_nor_the_end_that_a_failing_part_begins(fake_node: MakeNode, kubelet: GrpcKubelet, places: Places) -> None:
    node = fake_node("workstation")

    def break_it() -> None:
        kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
        node.unbind(T4)

    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(break_it)
        done = run_broken(places, node, CANNOT_REMOVE + BREAKS_LATER.replace("boom", "boom_later"))
        broken.result()
    assert done.returncode == 1
    assert "a fault of our own" in done.stderr
    assert "Timeout" not in done.stderr
    kubelet.wait_for(lambda: not kubelet.resources())


DOES_NOT_END = """
import asyncio, time
from sandbox_plugin.kubelet.lock import NodeLock
async def never(self):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            {then}
NodeLock.lost = never
"""


def test_an_end_that_does_not_come_is_brought_about_by_force_without_threads_too(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    flag = places.top / "no-threads"
    code = NO_THREADS + DOES_NOT_END.format(then="time.sleep(60)")
    with ExitStack() as stack:
        plugin = Daemon(places, fake_node("workstation"), PYTHONPATH=tampered(places, code), NO_THREADS=str(flag))
        stack.callback(plugin.kill)
        plugin.wait_for("registered", resource=PGPU)
        flag.touch()
        plugin.terminate()
        assert plugin.wait(TIMEOUT) == 1


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"], ids=["a task ignores it", "the loop hangs"])
@pytest.mark.parametrize("fails", [False, True], ids=["SIGTERM", "a failing part"])
def test_an_end_that_does_not_come_is_brought_about_by_force_and_stderr_says_what_still_ran(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, then: str, fails: bool
) -> None:
    node = fake_node("workstation")
    code = DOES_NOT_END.format(then=then) + (BREAKS_LATER if fails else "")
    with ExitStack() as stack:
        plugin = Daemon(places, node, PYTHONPATH=tampered(places, code))
        stack.callback(plugin.kill)
        plugin.wait_for("registered", resource=PGPU)
        if fails:
            node.unbind(T4)
            since = plugin.mark()
            failed = plugin.wait_for("a part of the daemon failed")  # at once, and not when all others have ended
            assert "a fault of our own" in failed["exception"]
            assert not plugin.events("ends by force", since=since)
        else:
            plugin.terminate()
        assert plugin.wait(TIMEOUT) == 1
        if then == "pass":
            assert "NodeLock.run" in plugin.wait_for("ends by force")["running"]
        else:
            assert re.search(r"Timeout.*sitecustomize.*in never", plugin.log(), re.DOTALL)


HANGS_ALREADY = """
import asyncio, os, time, structlog
from sandbox_plugin.kubelet.lock import NodeLock
async def hang(self):
    while not os.path.exists(os.environ["HANG"]):
        await asyncio.sleep(0.01)
    structlog.get_logger().warning("hanging")
    time.sleep(60)
NodeLock.lost = hang
"""


def test_a_signal_that_comes_while_the_loop_hangs_ends_the_process_by_force(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    flag = places.top / "hang"
    environment = {"PYTHONPATH": tampered(places, HANGS_ALREADY), "HANG": str(flag)}
    with ExitStack() as stack:
        plugin = Daemon(places, fake_node("workstation"), **environment)
        stack.callback(plugin.kill)
        plugin.wait_for("registered", resource=PGPU)
        flag.touch()
        plugin.wait_for("hanging")
        plugin.terminate()
        assert plugin.wait(TIMEOUT) == 1
        assert re.search(r"Timeout.*in hang", plugin.log(), re.DOTALL)


def test_a_fault_while_one_call_is_answered_costs_that_call_alone_and_is_told(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    plugin = daemon(node, PYTHONPATH=tampered(places, FAILS_ONCE))
    wait_until_it_sees(kubelet, Truth(node.root))
    (device, *_) = sorted(kubelet.healthy(PGPU))
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([device]))
    assert refused.status in (StatusCode.UNKNOWN, StatusCode.INTERNAL)
    assert "a fault of our own" in str(plugin.wait_for("Application error", logger="grpclib.server"))
    plugin.excused.add("Application error")
    assert kubelet.plugin(PGPU).allocate([device]).container_responses
    assert len(kubelet.registrations) == 1
