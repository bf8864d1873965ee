"""The running daemon, asked by grpcio, gives the sets that docs/topology.md shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import StartDaemon
from kubelet import GrpcKubelet

from examples import Example, examples
from sandbox_plugin.fake.node import FakeNode

PGPU = "nvidia.com/pgpu"
PRESETS = sorted({example.preset for example in examples()})


@pytest.mark.parametrize("policy", ["packed", "spread"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_daemon_prefers_what_the_doc_shows(
    preset: str, policy: str, fake_node: Callable[[str], FakeNode], kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(fake_node(preset), f"--allocation-policy={policy}")
    every = kubelet.wait_for(lambda: kubelet.healthy(PGPU))
    rows: list[Example] = [example for example in examples() if example.preset == preset]
    assert rows
    for row in rows:
        available = sorted(row.available or every, reverse=True)
        answer = kubelet.plugin(PGPU).prefer(available, row.size, row.must_include)
        assert tuple(answer) == row.answers[policy], str(row)
