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
from conftest import MakeNode, Serve, StartDaemon
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
SECOND_GPU, THIRD_GPU = "0000:43:00.0", "0000:52:00.0"
"""Of the preset `hgx-h100`; their IDs are 5 and 6."""


# The kubelet is away, or comes and goes


def test_while_the_kubelet_is_away_the_node_changes_and_nothing_of_it_is_lost(
    serve: Serve, kubelet: GrpcKubelet
) -> None:
    node, plugin, agree = serve("hgx-h100")
    kubelet.stop(leave_socket=True)
    plugin.wait_for("endpoint trouble", resource=PGPU, reason="does not answer")
    node.unbind(FIRST_GPU)
    plugin.wait_for("device changed", device="4")
    kubelet.start()
    started = time.monotonic()
    agree()
    figures("view is whole after the kubelet was away", [time.monotonic() - started])


@pytest.mark.timeout(300)
def test_after_each_of_many_kubelet_restarts_the_view_is_whole_again(serve: Serve, kubelet: GrpcKubelet) -> None:
    node, plugin, agree = serve("hgx-h100")
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
        agree()
        took.append(time.monotonic() - started)
    figures("from the start of a kubelet until it has the whole view", took)
    # A few more or less: folders are watched one after the other, and files are read all the time.
    wait_until(lambda: psutil.Process(plugin.pid).num_fds() <= before + 4, "files and sockets are left open")


@pytest.mark.parametrize("at_once", [False, True], ids=["and missed", "within an instant"])
def test_a_kubelet_folder_that_is_deleted_and_made_again_is_served_again(
    serve: Serve, kubelet: GrpcKubelet, places: Places, at_once: bool
) -> None:
    _, plugin, agree = serve("hgx-h100")
    kubelet.stop()
    since = plugin.mark()
    away = places.kubelet.rename(places.top / "away")  # in one step: the daemon would make its sockets in it again
    shutil.rmtree(away)
    if not at_once:
        plugin.wait_for("waiting for the kubelet directory", since=since, reason="No such file")
    kubelet.start()
    agree()


def put_nothing(path: Path) -> None:
    """No kubelet has been here."""


def put_a_stale_socket(path: Path) -> None:
    """As a kubelet that was killed leaves it."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))


def put_a_folder(path: Path) -> None:
    path.mkdir()


def put_a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_nothing, put_a_stale_socket, put_a_folder, put_a_dangling_link])
def test_whatever_lies_in_the_place_of_kubelet_sock_is_no_kubelet_until_a_real_one_comes(
    fake_node: MakeNode, absent_kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, put: Callable[[Path], None]
) -> None:
    node = fake_node("workstation")
    places.kubelet.mkdir()
    put(absent_kubelet.socket)
    plugin = daemon(node)
    reason = "does not answer" if put is put_a_stale_socket else "no socket"
    plugin.wait_for("endpoint trouble", resource=PGPU, reason=reason)
    if put in (put_a_folder, put_a_dangling_link):  # a kubelet that starts deletes sockets alone
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


@pytest.mark.parametrize("odd", [False, True], ids=["hangs up", "answers oddly"])
def test_a_pod_resources_that_hangs_up_or_answers_oddly_costs_no_more_than_knowledge(
    serve: Serve, places: Places, odd: bool
) -> None:
    path = places.top / "pod-resources/kubelet.sock"
    path.parent.mkdir()
    with ExitStack() as stack:
        if odd:
            stack.enter_context(OddServer(path, [ANSWERS["a message that ends too early"]]))
        else:
            stack.enter_context(ThreadPoolExecutor(1)).submit(hang_up_on_everybody, path, 1)
        wait_until(path.exists, "it listens")
        _, plugin, _ = serve("workstation")
        plugin.wait_for("PodResources unavailable", reason="not a valid gRPC answer" if odd else "")


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


def test_something_that_is_no_socket_in_the_place_of_ours_is_named_and_waited_for(serve: Serve, places: Places) -> None:
    _, plugin, agree = serve("workstation")
    since = plugin.mark()
    (places.top / "file").write_text("in the way")
    (places.top / "file").rename(socket_of(places))  # in one step: else there would be a new socket of ours
    plugin.wait_for("registration lost", since=since, reason="our socket is gone")
    plugin.wait_for("endpoint trouble", since=since, reason=f"cannot listen at {socket_of(places)}")
    assert socket_of(places).read_text() == "in the way"
    socket_of(places).unlink()
    plugin.wait_for("registered", since=since, resource=PGPU)
    agree()


# Register and ListAndWatch go wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manners", "reason"),
    [
        (Manners.HANGS, "no answer in 20 s"),
        (Manners.FORGETS, "accepted the registration but never asked for the devices"),
    ],
)
def test_a_register_without_an_answer_or_a_stream_is_given_up_in_time_and_tried_again(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, manners: Manners, reason: str
) -> None:
    node = fake_node("workstation")
    kubelet.manners = manners
    daemon(node).wait_for("endpoint trouble", resource=PGPU, reason=reason, timeout=60)
    kubelet.manners = Manners.POLITE
    wait_until_it_sees(kubelet, Truth(node.root))


def test_while_register_hangs_streams_of_other_clients_are_served(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    kubelet.manners = Manners.HANGS
    daemon(node)
    kubelet.wait_for(lambda: kubelet.calls)
    with kubelet.watching(PGPU) as watch:
        node.unbind(T4)
        kubelet.wait_for(lambda: watch.received[-1].unhealthy == ["13"])
    kubelet.manners = Manners.POLITE
    kubelet.restart()
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11"})


def test_streams_that_others_open_and_end_neither_make_us_register_nor_hide_the_loss_of_the_kubelets(
    serve: Serve, kubelet: GrpcKubelet
) -> None:
    node, plugin, agree = serve("hgx-h100")
    with kubelet.watching(PGPU) as older, kubelet.watching(PGPU) as newer:
        node.unbind(FIRST_GPU)
        kubelet.wait_for(lambda: older.received[-1].unhealthy == newer.received[-1].unhealthy == ["4"])
        older.cancel()
        node.unbind(SECOND_GPU)
        kubelet.wait_for(lambda: newer.received[-1].unhealthy == ["4", "5"])
        agree()
        assert not plugin.events("registration lost")
        assert kubelet.calls == 2
        kubelet.plugin(PGPU).close()
        plugin.wait_for("registration lost", resource=PGPU, reason="stream ended")
        agree()
        assert newer.ended is None


@pytest.mark.parametrize("what", ["its stream", "a second one on its connection", "its connection"])
def test_when_a_stream_of_the_kubelet_ends_the_resource_is_registered_again(
    serve: Serve, kubelet: GrpcKubelet, what: str
) -> None:
    node, plugin, agree = serve("workstation")
    registration = kubelet.registration(PGPU)
    assert registration is not None
    assert registration.watch is not None
    second = Watch(registration.plugin, kubelet.changed)
    kubelet.wait_for(lambda: second.received)
    node.unbind(T4)
    kubelet.wait_for(lambda: second.received[-1].unhealthy and kubelet.unhealthy(PGPU))
    if what == "its stream":
        registration.watch.cancel()
    elif what == "its connection":
        registration.plugin.close()
    else:
        second.cancel()  # the newest: a real kubelet would have dropped us with it
    plugin.wait_for("registration lost", resource=PGPU, reason="stream ended")
    kubelet.wait_for(lambda: len(kubelet.registrations) == 2)
    agree()


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


# The process or the machine runs out of something


@contextmanager
def no_descriptors(plugin: Daemon) -> Iterator[None]:
    """Not one file can be opened more, and no connection accepted: RLIMIT_NOFILE, once all of it runs."""
    plugin.wait_for("running")
    before = resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE, before)


def test_without_file_descriptors_what_was_known_stays_and_afterwards_nothing_is_lost(
    serve: Serve, kubelet: GrpcKubelet
) -> None:
    node, plugin, agree = serve("hgx-h100", QUICK)
    before = view(kubelet)
    messages = len(kubelet.history(PGPU))
    with no_descriptors(plugin):
        plugin.wait_for("scan failed", reason="Too many open files")
        refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["4"]))
        assert refused.status is StatusCode.FAILED_PRECONDITION, "what cannot be looked at is not given"
        node.unbind(FIRST_GPU)
        kubelet.plugin(PGPU).options()
        assert view(kubelet) == before
        assert len(kubelet.history(PGPU)) == messages
        since = plugin.mark()
        kubelet.restart()
        plugin.wait_for("endpoint trouble", since=since, resource=PGPU)
    agree()


def test_connections_that_come_while_there_are_no_file_descriptors_are_served_when_there_are(
    serve: Serve, places: Places
) -> None:
    _, plugin, agree = serve("workstation", QUICK)
    client = Plugin(socket_of(places))
    with no_descriptors(plugin), socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(socket_of(places)))
        plugin.wait_for("no connection accepted", reason="Too many open files")
    try:
        assert client.options().get_preferred_allocation_available
    finally:
        client.close()
    with no_descriptors(plugin), socket.socket(socket.AF_UNIX) as waiting:
        since = plugin.mark()
        waiting.connect(str(socket_of(places)))
        plugin.wait_for("no connection accepted", since=since)
        socket_of(places).unlink()
        plugin.wait_for("endpoint trouble", since=since, reason="cannot listen")
        with pytest.raises(AssertionError, match="no event"):  # it would come back to a listener that is closed
            plugin.wait_for("registered", since=since, timeout=1.5)
    plugin.wait_for("registered", since=since)
    agree()


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


def test_without_new_threads_it_goes_on_with_those_that_it_has(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    flag = places.top / "no-threads"
    node, plugin, agree = serve("hgx-h100", QUICK, PYTHONPATH=tampered(places, NO_THREADS), NO_THREADS=str(flag))
    plugin.wait_for("running")
    flag.touch()
    node.unbind(FIRST_GPU)
    agree()
    kubelet.plugin(PGPU).allocate(["5"])
    node.bind(FIRST_GPU)
    agree()
    plugin.terminate()
    assert plugin.wait(TIMEOUT) == 0


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


def remount(disk: Path, how: str) -> None:
    """`ro` or `rw`."""
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


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
    with small_disk(places.cdi) as disk:
        filler = fill(disk)
        with Daemon(places, node, QUICK) as plugin:
            plugin.wait_for("cdi trouble", resource=PGPU, reason="No space left")
            assert kubelet.calls == 0
            filler.unlink()
            wait_until_it_sees(kubelet, truth)
            specs = {path.name: path.read_text() for path in disk.glob("*.yaml")}
            filler = fill(disk)
            since = plugin.mark()
            node.bind(FIRST_GPU)
            plugin.wait_for("cdi trouble", since=since, resource=PGPU, reason="No space left")
            assert kubelet.healthy(PGPU) == {"5", "6", "7", "8", "9", "10", "11"}
            assert {path.name: path.read_text() for path in disk.glob("*.yaml")} == specs, "no half-written spec"
            wait_until(lambda: not list(disk.glob(".*")), "a temporary file is left")
            filler.unlink()
            wait_until_it_sees(kubelet, truth)


@as_root
def test_on_a_read_only_disk_specs_of_an_earlier_run_count_and_all_is_put_right_when_that_is_possible(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places
) -> None:
    node = fake_node("hgx-h100")
    node.unbind(FIRST_GPU)
    with small_disk(places.cdi) as disk:
        with Daemon(places, node, QUICK):
            kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 7)
        stale = disk / "nvidia.com-left-behind.yaml"
        stale.write_text(MARK)
        remount(disk, "ro")
        node.bind(FIRST_GPU)
        with Daemon(places, node, QUICK) as plugin:
            plugin.wait_for("cdi trouble", resource=PGPU, reason="Read-only file system")
            plugin.wait_for("cdi trouble", path=str(stale), reason="Read-only file system")
            kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 7 and kubelet.unhealthy(PGPU) == {"4"})
            node.unbind(SECOND_GPU)  # Unhealthy at once, although it cannot be taken out of the spec
            kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 6 and kubelet.unhealthy(PGPU) == {"4", "5"})
            remount(disk, "rw")
            plugin.wait_for("stale cdi spec removed", path=str(stale))
            kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 7 and kubelet.unhealthy(PGPU) == {"5"})
            assert "vfio5" not in (disk / "nvidia.com-pgpu.yaml").read_text()


def test_without_inotify_the_timers_alone_find_everything(
    serve: Serve, kubelet: GrpcKubelet, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    command = 'echo 0 >/proc/sys/user/max_inotify_instances && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run([*limit, command, "sh", "true"], check=False).returncode:
        pytest.skip("a user namespace with an inotify limit of its own cannot be had here")
    monkeypatch.setattr(daemon_process, "PYTHON", (*limit, command, "sh", *daemon_process.PYTHON))
    node, plugin, agree = serve("hgx-h100", QUICK)
    plugin.wait_for("folders not watched")
    started = time.monotonic()
    node.unbind(FIRST_GPU)
    agree()
    figures("a loss is seen without inotify, looking every 0.2 s", [time.monotonic() - started])
    started = time.monotonic()
    kubelet.restart()
    agree()
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
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    flag = places.top / "set-back"
    node, plugin, agree = serve("hgx-h100", QUICK, PYTHONPATH=tampered(places, SET_BACK), CLOCK_FLAG=str(flag))
    before = plugin.wait_for("registered", resource=PGPU)
    flag.touch()
    since = plugin.mark()
    node.sicken(FIRST_GPU)
    agree()
    node.heal(FIRST_GPU)
    agree()  # after its 2 seconds, not after an hour
    kubelet.restart()
    agree()
    after = plugin.wait_for("registered", since=since, resource=PGPU)
    stamps = [datetime.fromisoformat(event["timestamp"]) for event in (before, after)]
    assert (stamps[0] - stamps[1]).total_seconds() > 3500, "the clock was not set back, so this test shows nothing"


# What hangs


def let_go(pipe: Path) -> None:
    """Whoever hangs at the pipe goes on, and nobody hangs there again."""
    gone = pipe.with_name("gone")
    pipe.rename(gone)
    os.close(os.open(gone, os.O_RDWR | os.O_NONBLOCK))
    gone.unlink()


def test_while_a_read_hangs_in_sysfs_streams_go_on_and_other_devices_are_given_at_once(
    serve: Serve, kubelet: GrpcKubelet
) -> None:
    node, plugin, agree = serve("hgx-h100", QUICK)
    trap = node.folder(FIRST_GPU) / "class"
    text = trap.read_bytes()
    trap.unlink()
    os.mkfifo(trap)  # whoever opens it to read hangs, as in a reset that does not end
    took = []
    while not kubelet.unhealthy(PGPU):  # for the second in which the daemon waits for it
        started = time.monotonic()
        assert len(kubelet.plugin(PGPU).allocate(["11"]).container_responses) == 1
        took.append(time.monotonic() - started)
    assert len(took) > 1, "Allocate waits for the scan"
    figures("Allocate of another device while a read hangs", took)
    assert kubelet.unhealthy(PGPU) == {"4"}
    started = time.monotonic()
    node.unbind(SECOND_GPU)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4", "5"})
    figures("another device's loss reaches the kubelet while a read hangs", [time.monotonic() - started])
    threads = psutil.Process(plugin.pid).num_threads()
    node.unbind(THIRD_GPU)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"4", "5", "6"})
    wait_until(lambda: psutil.Process(plugin.pid).num_threads() <= threads + 2, "every scan leaves a thread behind")
    let_go(trap)
    trap.write_bytes(text)
    node.bind(SECOND_GPU)
    node.bind(THIRD_GPU)
    agree()


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


@pytest.mark.slow
def test_while_a_cdi_write_hangs_devices_say_so_and_sigterm_ends_the_process_as_always(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    pipe = places.top / "pipe"
    node, plugin, agree = serve("workstation", PYTHONPATH=tampered(places, HANGING_WRITE), HANGS=str(pipe))
    os.mkfifo(pipe)
    started = time.monotonic()
    node.unbind(T4)
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"13"})  # at once, whatever becomes of the spec
    figures("a loss is seen while a CDI write hangs", [time.monotonic() - started])
    plugin.wait_for("cdi trouble", resource=PGPU, reason="has not answered for 5 s")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"11", "13"})
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["11"]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "not-in-cdi" in refused.message
    let_go(pipe)
    node.bind(T4)
    agree()
    os.mkfifo(pipe)
    node.unbind(T4)
    wait_until(lambda: any(places.cdi.glob(".*")), "a spec is being written")
    figures("SIGTERM ends it while a CDI write hangs", [plugin.terminate()])
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
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    pipe = places.top / "pipe"
    os.mkfifo(pipe)
    node, plugin, agree = serve("workstation", PYTHONPATH=tampered(places, HANGING_FOLDER), HANGS=str(pipe))
    plugin.wait_for("folders not watched", reason="no answer in 2 s")
    spec = places.cdi / "nvidia.com-pgpu.yaml"
    spec.unlink()
    wait_until(spec.exists, "our spec comes back")
    (places.cdi / "bad.yaml").write_text("cdiVersion: 9.9.9\n")
    plugin.wait_for("bad cdi spec", path=str(places.cdi / "bad.yaml"))
    node.unbind(T4)
    agree()
    figures("SIGTERM ends it while the other CDI folder hangs", [plugin.terminate()])
    let_go(pipe)


# A fault of our own


BOOM = "def boom(*args, **kwargs): raise AttributeError('a fault of our own')"
BREAKS = {
    "a scan": "from sandbox_plugin.host import bus\n{boom}\nbus.read_groups = boom",
    "the CDI writer": "from sandbox_plugin.cdi import writer\n{boom}\nwriter.render_specs = boom",
    "an endpoint": "from sandbox_plugin.kubelet import endpoint\n{boom}\nendpoint.UnixServer = boom",
    "a Register call": "from sandbox_plugin.kubelet import endpoint\n{boom}\nendpoint._outcome = boom",
    "what PodResources says": "from sandbox_plugin.kubelet import podresources\n{boom}\npodresources.holdings = boom",
    "the lock": "from sandbox_plugin.kubelet import lock\n{boom}\nlock._is_at = boom",
}
"""In each part another task fails: one of the daemon's own, or one within the work of one who has the lock."""


@pytest.mark.parametrize("part", BREAKS)
def test_a_part_that_fails_unexpectedly_ends_the_process_loudly_with_status_1(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, pods: PodResources, part: str
) -> None:
    pods.start(age=3600)
    done = run_broken(places, fake_node("workstation"), BREAKS[part].format(boom=BOOM))
    assert done.returncode == 1, done.stderr
    (critical,) = [event for event in map(json.loads, done.stderr.splitlines()) if event["level"] == "critical"]
    assert critical["event"] == "a part of the daemon failed"
    assert "a fault of our own" in critical["exception"]
    assert sockets(places.kubelet) == set()
    kubelet.wait_for(lambda: not kubelet.resources())


BREAKS_LATER = """
from sandbox_plugin import registry
advance = registry.advance
def boom_later(before, facts, *rest):
    if "0000:02:00.0" in facts.functions and facts.functions["0000:02:00.0"].driver is None:
        raise RuntimeError("a fault of our own")
    return advance(before, facts, *rest)
registry.advance = boom_later
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


@pytest.mark.parametrize("removable", [True, False], ids=["", "although its socket cannot be removed"])
def test_a_part_that_fails_later_ends_the_streams_as_well(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, removable: bool
) -> None:
    node = fake_node("workstation")

    def break_it() -> None:
        kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
        node.unbind(T4)

    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(break_it)
        done = run_broken(places, node, BREAKS_LATER + ("" if removable else CANNOT_REMOVE))
        broken.result()
    assert done.returncode == 1
    assert "a fault of our own" in done.stderr
    assert "Timeout" not in done.stderr
    assert socket_of(places).exists() is not removable
    kubelet.wait_for(lambda: not kubelet.resources())


def test_a_socket_that_cannot_be_removed_does_not_hold_up_the_end(serve: Serve, places: Places) -> None:
    _, plugin, _ = serve("hgx-h100", PYTHONPATH=tampered(places, CANNOT_REMOVE))
    plugin.terminate()
    for name in (PGPU, NVSWITCH):
        path = socket_of(places, name)
        plugin.wait_for("socket not removed", path=str(path), reason="Operation not permitted")
        path.unlink()


IGNORES_ITS_END = """
import asyncio
from sandbox_plugin.kubelet.lock import NodeLock
async def never(self):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
NodeLock.lost = never
"""


@pytest.mark.parametrize("fails", [False, True], ids=["SIGTERM", "a failing part"])
def test_an_end_that_a_task_ignores_is_brought_about_by_force_and_the_log_says_what_still_ran(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, fails: bool
) -> None:
    node = fake_node("workstation")
    with ExitStack() as stack:
        plugin = Daemon(places, node, PYTHONPATH=tampered(places, IGNORES_ITS_END + BREAKS_LATER))
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
        assert "NodeLock.run" in plugin.wait_for("ends by force")["running"]


HANGS_LATER = """
import asyncio, os, time, structlog
from sandbox_plugin.kubelet.lock import NodeLock
async def hang(self):
    while not os.path.exists(os.environ["HANGS"]):
        await asyncio.sleep(0.01)
    structlog.get_logger().warning("hanging")
    time.sleep(60)
NodeLock.lost = hang
"""
NO_WATCHDOG = """
import faulthandler
def refuse(*args, **kwargs):
    raise RuntimeError("unable to start watchdog thread")
faulthandler.dump_traceback_later = refuse
"""
"""As at the limit of a pod's pids: this thread is none of `threading`'s."""


@pytest.mark.parametrize("code", [HANGS_LATER, HANGS_LATER + NO_WATCHDOG], ids=["", "without threads too"])
def test_a_signal_that_comes_while_the_loop_hangs_ends_the_process_by_force(
    fake_node: MakeNode, kubelet: GrpcKubelet, places: Places, code: str
) -> None:
    flag = places.top / "hang"
    with ExitStack() as stack:
        plugin = Daemon(places, fake_node("workstation"), PYTHONPATH=tampered(places, code), HANGS=str(flag))
        stack.callback(plugin.kill)
        plugin.wait_for("registered", resource=PGPU)
        flag.touch()
        plugin.wait_for("hanging")
        plugin.terminate()
        assert plugin.wait(TIMEOUT) == 1
        if code == HANGS_LATER:
            wait_until(lambda: re.search(r"Timeout.*in hang", plugin.log(), re.DOTALL), "it says where it hung")


FAILS_ONCE = """
from sandbox_plugin.kubelet import servicer
answer = servicer.answer
def boom(*args):
    servicer.answer = answer
    raise RuntimeError("a fault of our own")
servicer.answer = boom
"""


def test_a_fault_while_one_call_is_answered_costs_that_call_alone_and_is_told(
    serve: Serve, kubelet: GrpcKubelet, places: Places
) -> None:
    _, plugin, _ = serve("workstation", PYTHONPATH=tampered(places, FAILS_ONCE))
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["11"]))
    assert refused.status in (StatusCode.UNKNOWN, StatusCode.INTERNAL)
    assert "a fault of our own" in str(plugin.wait_for("Application error", logger="grpclib.server"))
    plugin.excused.add("Application error")
    assert kubelet.plugin(PGPU).allocate(["11"]).container_responses
    assert len(kubelet.registrations) == 1
