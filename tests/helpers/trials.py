"""What the tests of faults share: the kubelet's view beside the node's, and a process that is broken on purpose.

Apart from conftest, because scripts/soak.py and the tests both hold the kubelet's view against the node's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from daemon import ROOT, Places, clean_environment
from kubelet import TIMEOUT, GrpcKubelet
from names import PGPU
from truth import Truth, View

from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import FunctionSpec
from sandbox_plugin.fake.node import FakeNode

QUICK = "--health-interval=0.2"
"""For what no event tells of."""

_GPU = FunctionSpec(address="", model=models.H100_SXM5, parent="0000:40:03.1", numa_node=0, driver="vfio-pci")
"""For the free slot of the preset `empty`."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def pairs(fake_node: Callable[[str], FakeNode], count: int) -> FakeNode:
    """A node with cdevs and that many IOMMU groups of two GPUs each: 0 and 1, 2 and 3, ..."""
    node = fake_node("empty")
    for number in range(2 * count):
        node.add(replace(_GPU, address=f"0000:42:{number:02x}.0", iommu_group=90 + number // 2))
    return node


def view(kubelet: GrpcKubelet) -> View:
    """What the kubelet believes now: resource -> device ID -> health. Only resources that are registered."""
    return {
        resource: {device.id: device.health for device in kubelet.devices(resource).values()}
        for resource in kubelet.resources()
    }


def wait_until_it_sees(kubelet: GrpcKubelet, truth: Truth, timeout: float = TIMEOUT) -> None:
    """Until the kubelet's view equals the node's. Raises AssertionError with both."""
    wanted = truth.read()
    try:
        kubelet.wait_for(lambda: view(kubelet) == wanted, timeout)
    except AssertionError as error:
        raise AssertionError(f"the node has {wanted}\nthe kubelet sees {view(kubelet)}\n{error}") from None


def wait_until(predicate: Callable[[], object], what: str, timeout: float = TIMEOUT) -> None:
    """For what nobody notifies of, such as a file that goes: looks every 5 ms."""
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, f"after {timeout:g} s: {what}"
        time.sleep(0.005)


def figures(name: str, seconds: Sequence[float]) -> None:
    """Prints measured times, in milliseconds; `pytest -s` or `-rP` shows them. docs/reliability.md quotes them."""
    worst, median = max(seconds) * 1000, statistics.median(seconds) * 1000
    print(f"FIGURE {name}: median {median:.1f} ms, worst {worst:.1f} ms of {len(seconds)}")


def tampered(places: Places, code: str) -> str:
    """A PYTHONPATH with which `code` runs in the daemon's process before anything else does (sitecustomize)."""
    folder = places.top / "tampered"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_broken(places: Places, node: FakeNode, code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The daemon with one part broken by `code`, until it ends by itself. Raises TimeoutExpired if it lives on."""
    start = "import sys; from sandbox_plugin.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", f"{code}\n{start}", "run", *places.flags(node), *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env=clean_environment({"TMPDIR": str(places.top)}),
        check=False,
    )


def socket_of(places: Places, resource: str = PGPU) -> Path:
    return places.kubelet / f"sandbox-{resource.partition('/')[2]}.sock"
