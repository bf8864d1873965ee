"""What things cost, in counts that do not depend on the machine: modules, reads, wake-ups, threads, messages.

How long they take is for `just bench`; docs/performance.md has the figures.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cdi_bench import offered
from conftest import StartDaemon
from daemon import ROOT, Places, bare_environment, clean_environment
from kubelet import GrpcKubelet
from machines import machine
from names import PGPU
from trials import wait_until

from sandbox_plugin.cdi.render import render_spec
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host.last_look import objection
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.sweep import Remembered, Sweep
from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HostFacts

GPU = "0000:01:00.0"
"""The first of `machine`."""


def loaded_by(module: str, then: str = "pass") -> set[str]:
    """What a fresh interpreter has imported after this module, and a statement."""
    code = f"import {module}, sys; {then}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=bare_environment()
    )
    return set(done.stdout.split())


LATER = {"yaml", "tomllib", "difflib", "watchfiles", "anyio", "sandbox_plugin.host.watch", "sandbox_plugin.cdi.foreign"}
LATER |= {"prometheus_client", "sandbox_plugin.outputs.http", "sandbox_plugin.outputs.metrics"}
LATER |= {"sandbox_plugin.outputs.events", "sandbox_plugin.outputs.feature_writer"}
"""What the daemon needs only after its devices are served, or seldom."""
OF_CLAIMS = {"aiohttp", "sandbox_plugin.dra"}
"""What nobody has without `--dra`."""
OF_PEOPLE = {"sandbox_plugin.fake", "sandbox_plugin.cli.tables", "sandbox_plugin.cli.demo", "sandbox_plugin.cli.status"}
OF_PEOPLE |= {"shtab"}
OF_THE_DAEMON = {"structlog", "grpclib", "betterproto", "asyncio", "aiofiles"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("sandbox_plugin.cli.run", LATER | OF_CLAIMS | OF_PEOPLE),
        ("sandbox_plugin.cli.status", LATER | OF_PEOPLE - {"sandbox_plugin.cli.status"} | OF_THE_DAEMON),
        ("sandbox_plugin.cli.list_devices", LATER | OF_PEOPLE | OF_THE_DAEMON - {"asyncio", "aiofiles"} | {"json"}),
        ("sandbox_plugin.cli.demo", OF_CLAIMS | {"prometheus_client", "sandbox_plugin.daemon"}),
        ("sandbox_plugin.cli.commands", LATER | OF_PEOPLE | OF_THE_DAEMON),
    ],
    ids=["the daemon", "the probe", "list", "the demo", "--version"],
)
def test_a_start_imports_nothing_that_it_does_not_need_yet(module: str, without: set[str]) -> None:
    assert loaded_by(module) & without == set()


def test_a_spec_that_an_earlier_run_left_is_read_without_the_parser_of_yaml() -> None:
    left = render_spec(PGPU, [offered(PGPU, 4)]).encode()
    loaded = loaded_by("sandbox_plugin.cdi.lint", f"assert sandbox_plugin.cdi.lint.read_spec({left!r}).devices")
    assert "yaml" not in loaded


@contextmanager
def reads() -> Iterator[Callable[[], int]]:
    """How many files and folders this process opens."""
    number = 0
    is_deaf = False

    def hear(event: str, _: tuple[Any, ...]) -> None:
        """Stays for ever, so at the end it is made deaf."""
        nonlocal number
        number += not is_deaf and event in ("open", "os.listdir", "os.scandir")

    sys.addaudithook(hear)
    try:
        yield lambda: number
    finally:
        is_deaf = True


def sweep(paths: HostPaths, memory: Remembered) -> HostFacts:
    return Sweep(paths=paths, began_at=time.monotonic(), memory=memory, hanging=frozenset()).run()


def reads_of(gpus: int, folder: Path) -> tuple[float, float, int]:
    """What is opened for each GPU in the first scan, and in the next, and for one GPU by the look before Allocate."""
    paths, memory = HostPaths(FakeNode.create(folder / str(gpus), machine(gpus)).root), Remembered()
    with reads() as count:
        facts = sweep(paths, memory)
        first = count()
        sweep(paths, memory)
        again = count() - first
        device = find_devices(facts, Rules()).devices[-1]
        before = count()
        assert objection(paths, device, facts.functions) is None
        return first / gpus, again / gpus, count() - before


def test_a_scan_reads_as_much_for_a_gpu_and_an_allocate_as_much_at_all_on_a_big_node_as_on_a_small_one(
    tmp_path: Path,
) -> None:
    small, big = reads_of(8, tmp_path), reads_of(64, tmp_path)
    first, again, look = small  # of a scan with the port above each GPU, and the group
    assert first <= 33
    assert again <= 16
    assert look <= 7
    assert all(cost <= of_small for cost, of_small in zip(big, small, strict=True))


def test_a_change_is_one_message_and_a_new_device_one_more_when_it_is_in_the_cdi_spec(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = FakeNode.create(places.top / "node", machine(4))
    daemon(node)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 4)
    assert len(kubelet.history(PGPU)) == 1
    node.unbind(GPU)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 3)
    messages = len(kubelet.history(PGPU))
    assert messages <= 3, "unbound, and gone"
    node.bind(GPU)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 4)
    assert len(kubelet.history(PGPU)) <= messages + 2


def test_a_daemon_that_idles_on_a_real_host_sleeps(places: Places) -> None:
    flags = [f"--kubelet-dir={places.kubelet}", f"--cdi-dir={places.cdi}", f"--status-socket={places.top}/status.sock"]
    places.kubelet.mkdir()
    command = [sys.executable, "-m", "sandbox_plugin", "run", *flags, f"--pod-resources-socket={places.top}/none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment({})) as process:
        try:
            assert process.stderr is not None
            assert "starting" in process.stderr.readline()
            # What others do on this host wakes it too (kernel events), so a quiet second is waited for.
            wait_until(lambda: wakes_in_a_second(process.pid) < 20, "a second with few wake-ups of all threads")
            threads = psutil.Process(process.pid).num_threads()
        finally:
            process.terminate()
    assert threads < 12


def wakes_in_a_second(pid: int) -> int:
    before = switches(pid)
    time.sleep(1)
    return switches(pid) - before


def switches(pid: int) -> int:
    """How often the threads of a process have gone to sleep by themselves."""
    status = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(line.split()[1]) for text in status for line in text.splitlines() if line.startswith("voluntary_"))
