"""Claims on the real daemon, with a kubelet that speaks grpcio and a fake API server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from conftest import MakeNode, StartDaemon
from daemon import Places
from dra_manager import DRIVER, NODE, DraManager, api_server, claim_object

from sandbox_plugin.fake.api_server import FakeApiServer

FIRST = "pci-0000-1b-00-0"


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with api_server() as server:
        server.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        yield server


def flags(api: FakeApiServer) -> list[str]:
    return ["--dra", f"--node-name={NODE}", f"--api-server={api.url}"]


def test_a_claim_is_prepared_and_given_back(
    places: Places, fake_node: MakeNode, daemon: StartDaemon, api: FakeApiServer
) -> None:
    api.put("resourceclaims", claim_object("gpus", FIRST))
    places.kubelet.mkdir()
    with DraManager(places.top, api) as manager:
        daemon(fake_node("hgx-h100"), *flags(api))
        manager.wait_for(lambda: manager.health(FIRST)[0] == "HEALTHY")
        (name,) = manager.prepare("pod", "gpus")
        assert name == f"{DRIVER}/claim=uid-of-gpus_{FIRST}"
        (spec,) = places.cdi.glob(f"{DRIVER}_claim_*.json")
        print(spec.read_text(), json.loads(spec.read_text()))
        manager.unprepare("pod")
        assert not list(places.cdi.glob(f"{DRIVER}_*"))
