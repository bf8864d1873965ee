"""What an administrator sees of a node that serves claims: `status`, the probe, and the metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import pytest
from conftest import MakeNode, StartDaemon
from daemon import Places, run_command
from dra_manager import DRIVER, NODE, DraManager, NotPrepared, api_server, claim_object
from facts import gpu, host
from kubelet import GrpcKubelet
from names import PGPU
from pods import PodResources
from trials import wait_until

from sandbox_plugin.cli.status_table import status_lines
from sandbox_plugin.cli.tables import text_of
from sandbox_plugin.fake.api_server import FakeApiServer
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.outputs.document import SERVING, STANDING_BY, Parts, document
from sandbox_plugin.registry import Registry

FIRST, SECOND = "0000:1b:00.0", "0000:43:00.0"
"""GPUs of an hgx-h100."""
NAMES = ("pci-0000-1b-00-0", "pci-0000-43-00-0")


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture
def manager(places: Places, api: FakeApiServer) -> Iterator[DraManager]:
    places.kubelet.mkdir()
    with DraManager(places.top, api) as made:
        yield made


def ask(node: FakeNode, *flags: str) -> tuple[int, str]:
    """Exit status, and all that is said."""
    answer = run_command("status", f"--fake-sysfs={node.root}", *flags)
    return answer.returncode, answer.stdout + answer.stderr


def told(node: FakeNode) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run_command("status", f"--fake-sysfs={node.root}", "--output=json").stdout)
    return document


def holder(node: FakeNode, address: str) -> Any:
    devices = [device for resource in told(node)["resources"] for device in resource["devices"]]
    return next(device["holder"] for device in devices if device["pci_addresses"] == [address])


def wait_until_claims_can_be_had(manager: DraManager) -> None:
    """Until PodResources has answered no claim is prepared, although the driver is registered and its slices there."""
    manager.wait_for(lambda: {manager.health(name) for name in NAMES} == {("HEALTHY", "")})


# The real daemon


def test_status_shows_the_driver_its_slices_and_who_has_which_claim(
    manager: DraManager,
    api: FakeApiServer,
    absent_kubelet: GrpcKubelet,
    pods: PodResources,
    fake_node: MakeNode,
    daemon: StartDaemon,
) -> None:
    absent_kubelet.start()
    pods.start(age=3600.0)
    node = fake_node("hgx-h100")
    plugin = daemon(node, *manager.flags)
    plugin.wait_for("driver registered")
    plugin.wait_for("ResourceSlices published")
    api.put("resourceclaims", claim_object("gpus", *NAMES))
    wait_until_claims_can_be_had(manager)
    manager.prepare("vm", "gpus")
    assert holder(node, FIRST) == {"namespace": "default", "pod": None, "container": None, "claim": "gpus"}
    assert "claim default/gpus" in ask(node)[1]
    pods.hold_by_claim("vm", "gpus", DRIVER, *NAMES)
    wait_until(lambda: holder(node, FIRST)["pod"], "PodResources has named the pod")
    assert holder(node, SECOND) == {"namespace": "default", "pod": "vm", "container": "vm", "claim": "gpus"}
    dra = told(node)["dra"]
    assert dra["driver"] == DRIVER
    assert dra["registration"]["state"] == "registered"
    assert dra["registration"]["registered_seconds"] >= 0
    (published,) = api.slices()
    generation = published["spec"]["pool"]["generation"]
    assert {k: dra["slices"][k] for k in ("pool", "slices", "devices", "generation", "trouble")} == {
        "pool": NODE,
        "slices": 1,
        "devices": 12,
        "generation": generation,
        "trouble": None,
    }
    (claim,) = dra["claims"]
    assert (claim["namespace"], claim["name"], claim["uid"]) == ("default", "gpus", "uid-of-gpus")
    assert (claim["pod"], claim["container"]) == ("vm", "vm")
    assert (claim["abandoned_seconds"], claim["remark"]) == (None, None)
    assert [device["pci_address"] for device in claim["devices"]] == [FIRST, SECOND]
    status, text = ask(node)
    assert f"DRA driver {DRIVER}: registered" in text
    assert f"pool {NODE}, generation {generation}: 12 devices in 1 slice\n" in text
    assert f"claim default/gpus: {FIRST}, {SECOND}; pod vm" in text
    assert "default/vm/vm, claim gpus" in next(line for line in text.splitlines() if FIRST in line)
    assert max(map(len, text.splitlines())) <= 80
    assert status == 0
    manager.unprepare("vm")
    assert told(node)["dra"]["claims"] == []


def test_on_a_node_for_claims_only_what_a_claim_has_is_healthy(
    manager: DraManager, api: FakeApiServer, pods: PodResources, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    pods.start(age=3600.0)
    node = fake_node("hgx-h100")
    plugin = daemon(node, *manager.flags, "--device-plugin=off")
    plugin.wait_for("driver registered")
    api.put("resourceclaims", claim_object("gpus", *NAMES))
    wait_until(lambda: not told(node)["not_ready"], "it is ready")
    wait_until_claims_can_be_had(manager)
    manager.prepare("vm", "gpus")
    assert f"{PGPU}: 8 of 8 Healthy, by claims alone" in ask(node)[1]
    assert "claim default/gpus" in ask(node)[1]
    assert [event for event in plugin.events("device changed") if event["health"] != "Healthy"] == []


def test_a_driver_that_the_kubelet_does_not_register_is_not_ready_and_says_why(
    places: Places, api: FakeApiServer, absent_kubelet: GrpcKubelet, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    absent_kubelet.start()
    node = fake_node("hgx-h100")
    with DraManager(places.top, api, services=("v2.DRAPlugin",)) as manager:
        plugin = daemon(node, *manager.flags)
        plugin.wait_for("driver not registered")
        status, text = ask(node, "--probe")
        assert status == 1
        assert f"DRA driver {DRIVER}: the kubelet refuses it: none of" in text
        registration = told(node)["dra"]["registration"]
        assert (registration["state"], registration["registrations"]) == ("refused", 0)


def test_an_api_server_that_says_no_makes_a_new_plugin_not_ready_until_it_says_yes_and_an_old_one_stays_ready(
    manager: DraManager, api: FakeApiServer, absent_kubelet: GrpcKubelet, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    absent_kubelet.start()
    api.fail(403, times=100_000)
    node = fake_node("hgx-h100")
    plugin = daemon(node, *manager.flags, "--health-interval=0.2")
    plugin.wait_for("driver registered")
    plugin.wait_for("ResourceSlice trouble", reason="403")
    status, text = ask(node, "--probe")
    assert (status, "ResourceSlices: the API server answered 403" in text) == (1, True)
    assert "slices are not published: the API server answered 403" in ask(node)[1]
    api.stop_failing()
    wait_until(lambda: ask(node, "--probe") == (0, "ready\n"), "it has published")
    api.fail(403, times=100_000)
    node.sicken(FIRST)
    wait_until(lambda: told(node)["dra"]["slices"]["trouble"], "it cannot tell of that")
    assert ask(node, "--probe") == (0, "ready\n"), "its slices are there, and a rollout is not at fault"
    assert any(remark.startswith("ResourceSlices: ") for remark in told(node)["remarks"])


def test_the_device_plugin_is_ready_without_an_api_server_and_claims_alone_are_not(
    places: Places, manager: DraManager, absent_kubelet: GrpcKubelet, fake_node: MakeNode, daemon: StartDaemon
) -> None:
    absent_kubelet.start()
    away = ["--dra", f"--node-name={NODE}", "--api-server=http://127.0.0.1:1"]
    node = fake_node("hgx-h100")
    both = daemon(node, *away)
    both.wait_for("ResourceSlice trouble", reason="cannot be asked")
    wait_until(lambda: ask(node, "--probe") == (0, "ready\n"), "what is served without it is served")
    assert ask(node)[0] == 1, "but there is something to look at"
    both.close()
    only = daemon(node, *away, "--device-plugin=off")
    only.wait_for("ResourceSlice trouble", reason="cannot be asked")
    only.wait_for("driver registered")
    assert told(node)["not_ready"][0].startswith("ResourceSlices: the API server at http://127.0.0.1:1")


def scraped(plugin: Any) -> dict[str, float]:
    """Series -> value."""
    (address,) = plugin.wait_for("metrics served")["address"]
    page = urlopen(f"http://{address}/metrics", timeout=30).read().decode()
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {series.removesuffix("{}"): float(value) for series, _, value in lines}


def test_claims_calls_and_slices_are_counted_and_without_dra_there_is_no_such_series(
    manager: DraManager,
    api: FakeApiServer,
    absent_kubelet: GrpcKubelet,
    pods: PodResources,
    fake_node: MakeNode,
    daemon: StartDaemon,
) -> None:
    pods.start(age=3600.0)
    absent_kubelet.start()
    node = fake_node("hgx-h100")
    plugin = daemon(node, *manager.flags, "--metrics-address=127.0.0.1:0")
    plugin.wait_for("driver registered")
    plugin.wait_for("ResourceSlices published")
    api.put("resourceclaims", claim_object("gpus", *NAMES))
    api.put("resourceclaims", claim_object("bad", "pci-0000-99-00-0"))
    wait_until_claims_can_be_had(manager)
    manager.prepare("vm", "gpus")
    with pytest.raises(NotPrepared):
        manager.prepare("other", "bad")
    now = scraped(plugin)
    of_request = 'sandbox_plugin_claim_request_duration_seconds_count{method="Node%sResources",outcome="%s"}'
    wanted = {
        "sandbox_plugin_claims_prepared": 1,
        of_request % ("Prepare", "ok"): 1,
        of_request % ("Prepare", "refused"): 1,
        of_request % ("Unprepare", "ok"): 0,
        'sandbox_plugin_claim_refusals_total{reason="unknown-device"}': 1,
        "sandbox_plugin_dra_registered": 1,
        "sandbox_plugin_dra_registrations_total": 1,
        "sandbox_plugin_resource_slices_current": 1,
        "sandbox_plugin_resource_slices": 1,
        "sandbox_plugin_resource_slice_devices": 12,
        'sandbox_plugin_api_server_failures_total{code="403"}': 0,
    }
    assert {series: now.get(series) for series in wanted} == wanted
    writes = now["sandbox_plugin_resource_slice_writes_total"]
    assert writes in (1, 2), "two, if PodResources had not answered before the first"
    plugin.close()
    without = daemon(node, "--metrics-address=127.0.0.1:0")
    without.wait_for("registered", resource=PGPU)
    assert [s for s in scraped(without) if re.search("claim_|claims_|dra_|slice|api_server", s)] == []


# The rules, without a daemon


def scanned() -> Inventory:
    registry = Registry(Rules(), requires_cdi=False)
    return registry.observe(host(gpu("0000:01:00.0", vfio=1)))


REGISTERED = {"state": "registered", "trouble": None}
PUBLISHED = {"published": True, "trouble": None, "refused": False}
WELL = Parts(
    plugin={"version": "1", "node": NODE, "uptime_seconds": 1.0},
    turn={"state": SERVING, "reason": None},
    registrations={PGPU: REGISTERED},
    scan={"age_seconds": None, "trouble": None},
    dra={"driver": DRIVER, "registration": REGISTERED, "slices": PUBLISHED, "claims": []},
)


def shown(*, offers_resources: bool = True, state: str = SERVING, **dra: Any) -> tuple[list[str], list[str]]:
    """What is not ready, and remarks."""
    turn = {"state": state, "reason": None}
    parts = replace(WELL, dra={**(WELL.dra or {}), **dra}, offers_resources=offers_resources, turn=turn)
    made = document(scanned(), parts)
    return made["not_ready"], made["remarks"]


AWAY = {"published": False, "trouble": "it is away", "refused": False}
NO = {"published": False, "trouble": "403", "refused": True}


def test_what_of_dra_makes_a_plugin_not_ready() -> None:
    assert shown() == ([], [])
    why = f"DRA driver {DRIVER}: the kubelet has not registered it yet"
    assert shown(registration={"state": "serving", "trouble": None}) == ([why], [])
    assert shown(registration={"state": "not begun", "trouble": "no folder"})[0] == [f"DRA driver {DRIVER}: no folder"]
    for slices in (None, {"published": False, "trouble": None, "refused": False}):
        assert shown(slices=slices) == (["ResourceSlices: they are not published yet"], [])
    assert shown(slices=NO) == (["ResourceSlices: 403"], [])
    assert shown(slices={**NO, "published": True}) == ([], ["ResourceSlices: 403"])
    assert shown(slices=AWAY) == ([], ["ResourceSlices: it is away"])
    assert shown(slices=AWAY, offers_resources=False) == (["ResourceSlices: it is away"], [])
    assert shown(slices={**AWAY, "published": True}, offers_resources=False) == ([], ["ResourceSlices: it is away"])
    assert shown(slices=None, registration={"state": "not begun", "trouble": None}, state=STANDING_BY) == ([], [])


def test_the_table_fits_and_cuts_nothing_of_long_names() -> None:
    name = "virt-launcher-training-on-many-gpus-gpus-x7k2p"
    devices = [{"pci_address": f"0000:{n:02x}:00.0"} for n in range(1, 9)]
    claim: dict[str, Any] = {"namespace": "research", "name": name, "pod": f"{name}-pod", "devices": devices}
    claim |= {"abandoned_seconds": None, "remark": None}
    lost = {**claim, "pod": None, "abandoned_seconds": 600.0, "remark": "nobody knows"}
    slices = {"published": True, "pool": NODE, "generation": 3, "devices": 9, "slices": 2, "trouble": "it is away"}
    dra = {"driver": DRIVER, "registration": {**REGISTERED, "registered_seconds": 90}, "slices": slices}
    made = document(Inventory(), replace(WELL, dra={**dra, "claims": [claim, lost]}))
    lines = [text_of(line) for line in status_lines(made, 80)]
    assert max(map(len, lines)) <= 80
    text = re.sub(r"\s+", " ", " ".join(lines))
    addresses = ", ".join(device["pci_address"] for device in devices)
    assert f"claim research/{name}: {addresses}; pod {name}-pod" in text
    assert f"{addresses}; PodResources names no pod, looks abandoned for 10 min" in text
    assert f"claim research/{name}: nobody knows" in text
    assert f"claim research/{name}: nobody knows" in made["remarks"]
    assert f"pool {NODE}, generation 3: 9 devices in 2 slices; out of date: it is away" in text
