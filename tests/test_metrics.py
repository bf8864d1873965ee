"""The page of metrics: what it says of an inventory and of the parts, in which words, and at what cost.

The client's own parsers read it, which take nothing that the two formats do not allow.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from daemon import ROOT
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sandbox_plugin.dra.calls import PREPARE, ClaimCalls
from sandbox_plugin.dra.claims import Why
from sandbox_plugin.dra.publisher import Failure
from sandbox_plugin.durations import Durations
from sandbox_plugin.inventory.health import SETTLE
from sandbox_plugin.inventory.ledger import Holdings, Places, PreparedClaim
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.calls import Calls as KubeletCalls
from sandbox_plugin.kubelet.calls import Refused
from sandbox_plugin.model import HostFacts, LinkLimit, PciFunction, Reason
from sandbox_plugin.outputs import document
from sandbox_plugin.outputs.metrics import catalogue
from sandbox_plugin.outputs.metrics.catalogue import ENTRIES, Entry, Kind
from sandbox_plugin.outputs.metrics.exposition import Exposition
from sandbox_plugin.outputs.metrics.health_history import HealthHistory
from sandbox_plugin.outputs.metrics.parts import Calls, ClaimParts, Parts
from sandbox_plugin.registry import Registry

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OFF: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}
LIMITS = (LinkLimit("32.0 GT/s PCIe", 16), LinkLimit("16.0 GT/s PCIe", 8))
ERRORS: dict[str, Any] = {"fatal_errors": 0, "nonfatal_errors": 2, "correctable_errors": 5}
SHOWN = document.Parts(
    plugin={"version": "1.2.3", "node": "gpu-7", "consumer": "kata"},
    turn={"state": document.SERVING, "reason": None},
    registrations={PGPU: {"state": "registered", "registrations": 2, "losses": 1, "streams": 1, "trouble": None}},
    events=[
        {"source": "kernel events", "state": "up", "reason": None},
        {"source": "inotify", "state": "down", "reason": "no watches"},
        {"source": "PodResources", "state": "off", "reason": None},
    ],
)
Series = Mapping[frozenset[tuple[str, str]], float]


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A registry, and the page that is made of it. The wall clock is a thousand seconds ahead of the other one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, pod_labels: bool = True) -> None:
        self.clock = Clock()
        self.registry = Registry(Rules(), requires_cdi=False, clock=self.clock)
        self.history = HealthHistory(registry=self.registry)
        self.parts = Parts(shown=SHOWN)
        self.exposition = Exposition(self.registry, self.history, lambda: self.parts, pod_labels=pod_labels)
        monkeypatch.setattr("sandbox_plugin.outputs.metrics.exposition.time.time", lambda: self.clock.now + 1000)
        self.registry.serve()

    def see(self, *functions: PciFunction) -> None:
        """A scan sees these."""
        self.registry.observe(replace(host(*functions), began_at=self.clock.now))

    def families(self, accept: str = "") -> list[Metric]:
        page = self.exposition.page(accept)
        parse: Callable[[str], Iterable[Metric]] = parse_openmetrics if accept else parse_text
        return list(parse(page.body.decode()))

    def series(self, entry: Entry) -> Series:
        """Labels -> value, of the samples that have the entry's own name."""
        return {
            frozenset(sample.labels.items()): sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == entry.name
        }

    def of(self, entry: Entry, **labels: str) -> float | None:
        """The value of the one series that has these labels; None: there is none."""
        found = [value for each, value in self.series(entry).items() if labels.items() <= dict(each).items()]
        assert len(found) < 2, found
        return found[0] if found else None


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def busy(bench: Bench) -> None:
    """A node on which there is something to say of everything: a device in a pod, one that is ill, one in use."""
    bench.see(gpu(A, vfio=3, link_limits=LIMITS, **ERRORS), gpu(B, vfio=4, group=51), gpu(C, vfio=None, group=52))
    bench.registry.allocate([(PGPU, "3")])
    bench.clock.now += 1
    held = Holdings(asked_at=bench.clock.now, pods={(PGPU, "3"): "ns/vm"}, containers={(PGPU, "3"): "main"})
    bench.registry.learn(holdings=held, pod_resources=True)
    bench.see(gpu(A, vfio=3, enable=1, link_limits=LIMITS, **ERRORS), gpu(B, vfio=4, group=51, **OFF))
    took = Durations()
    took.add(0.002)
    calls = KubeletCalls()
    calls.refusals[Reason.OFF_THE_BUS] += 1
    bench.parts = Parts(
        shown=SHOWN,
        registered_at={PGPU: 100.4},
        calls={PGPU: Calls(took={("Allocate", "OK"): took}, refusals=calls.refusals)},
        kubelet_restarts=1,
        scans=took,
        scan_triggers={"start": 1, "timer": 3},
        scan_failures=2,
        last_scan_at=101.0,
        cdi_writes={PGPU: 1},
        cdi_failures={PGPU: 2},
        foreign_specs={"bad": 1, "not-judged": 0},
    )


DRA: dict[str, Any] = {
    "driver": "vfio.sandbox-plugin",
    "registration": {"state": "registered", "registrations": 3, "trouble": None},
    "slices": {"published": True, "slices": 2, "devices": 70, "writes": 5, "trouble": None, "refused": False},
    "claims": [{"name": "gpus", "remark": None}],
}


def serve_claims(bench: Bench, **changes: Any) -> None:
    """With `--dra`, beside what is there already."""
    calls = ClaimCalls()
    calls.refusals[Why.HELD] += 1
    calls.took[PREPARE, "ok"].add(0.02)
    known = ClaimParts(
        took=calls.took, refusals=calls.refusals, registered_at=100.4, failures={"403": 1, "409": 0}, released=4
    )
    bench.parts = replace(bench.parts, shown=replace(bench.parts.shown, dra={**DRA, **changes}), claims=known)


# The catalogue


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_every_metric_of_the_catalogue_is_exposed_with_its_labels_type_and_meaning(bench: Bench, accept: str) -> None:
    busy(bench)
    serve_claims(bench)
    families = {family.name: family for family in bench.families(accept)}
    for entry in ENTRIES:
        name = entry.name.removesuffix("_total")
        is_info = entry.kind is Kind.INFO
        family = families.pop(name.removesuffix("_info") if accept else name)
        assert family.documentation == f"{entry.help}."
        assert family.type == ("gauge" if is_info and not accept else entry.kind.value)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(entry.labels), entry.name
            assert not is_info or sample.value == 1
    assert {name.partition("_")[0] for name in families} == {"process"}, "and nothing else but the process's own"


def test_names_follow_the_rules_of_prometheus() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.name.startswith("sandbox_plugin_")
        assert entry.name.endswith("_total") == (entry.kind is Kind.COUNTER)
        assert entry.name.endswith("_info") == (entry.kind is Kind.INFO)
        assert entry.name.removesuffix("_total").endswith(entry.unit.replace(" ", "_"))
        assert not entry.help.endswith(".")


def test_the_reference_in_the_document_is_what_the_code_says() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/metrics-reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_the_triggers_of_a_scan_are_those_that_the_code_gives() -> None:
    code = "".join(Path(ROOT, "sandbox_plugin", name).read_text() for name in ("rescans.py", "daemon.py"))
    given = re.findall(r'(?:\.wake, |\.wake\(|triggers = (?:self\._triggers or )?\{)"([a-z-]+)"', code)
    assert set(given) == set(catalogue.TRIGGERS)


def test_the_document_names_every_reason_of_a_refusal() -> None:
    text = Path(ROOT, "docs/monitoring.md").read_text()
    assert all(f"`{reason}`" in text for reason in (*Refused, *Why))


def test_the_kinds_of_failures_of_the_api_server_are_those_that_the_code_gives() -> None:
    named = re.findall(r"4\d\d|[45]xx|no-answer", catalogue.API_FAILURES.series)
    assert sorted(named) == sorted(Failure)


# What it says


def test_devices_are_counted_by_model_health_and_reason_and_healthy_ones_also_when_there_are_none(
    bench: Bench,
) -> None:
    bench.see(gpu(A, vfio=3), gpu(B, vfio=4, group=51, **OFF))
    assert bench.of(catalogue.DEVICES, health="Healthy") == 1
    assert bench.of(catalogue.DEVICES, health="Unhealthy", reason="off-the-bus") == 1
    bench.see(gpu(A, vfio=3, **OFF), gpu(B, vfio=4, group=51, **OFF))
    assert bench.of(catalogue.DEVICES, health="Healthy") == 0
    assert bench.of(catalogue.DEVICES, health="Unhealthy", reason="off-the-bus") == 2


def test_a_device_says_what_it_is(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3, numa_node=1))
    (labels,) = bench.series(catalogue.DEVICE_INFO)
    assert dict(labels) == {
        "resource": PGPU,
        "device": "3",
        "pci_address": A,
        "model": "unknown model 10de:2330",
        "numa_node": "1",
        "iommu_group": "50",
        "vfio_node": "/dev/vfio/devices/vfio3",
    }
    bench.see(gpu(A, vfio=3, numa_node=None))
    assert bench.of(catalogue.DEVICE_INFO, numa_node="") == 1


def test_the_series_of_a_device_go_with_the_device(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3), gpu(B, vfio=4, group=51))
    bench.registry.learn(holdings=Holdings(asked_at=bench.clock.now), pod_resources=True)
    assert len(bench.series(catalogue.HEALTH_CHANGED)) == 2
    for _ in range(2):
        bench.clock.now += 61
        bench.see(gpu(A, vfio=3))
        bench.registry.learn(holdings=Holdings(asked_at=bench.clock.now))
    text = bench.exposition.page("").body.decode()
    assert f'device="3",pci_address="{A}"' in text
    assert B not in text
    assert len(bench.history._last) == 1


def test_an_id_that_only_pod_resources_knows_has_no_address_and_no_group(bench: Bench) -> None:
    bench.registry.learn(holdings=Holdings(asked_at=bench.clock.now, pods={(PGPU, "9"): "ns/vm"}))
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.DEVICE_INFO, device="9", pci_address="", iommu_group="") == 1
    assert bench.of(catalogue.HOLDER, device="9", pod="vm", container="") == 1


def test_since_when_is_said_of_healthy_and_of_unhealthy_in_seconds_since_1970(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.HEALTH_CHANGED, device="3") == 1100
    bench.clock.now = 200.4
    bench.see(gpu(A, vfio=3, **OFF))
    assert bench.of(catalogue.HEALTH_CHANGED, device="3") == 1200
    bench.clock.now = 210
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.DEVICE_UNHEALTHY, device="3", reason="settling") == 1
    assert bench.of(catalogue.HEALTH_CHANGED, device="3") == 1200, "ill for another reason is ill since then"
    bench.clock.now = 210 + SETTLE
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.DEVICE_UNHEALTHY, device="3") is None
    assert bench.of(catalogue.HEALTH_CHANGED, device="3") == 1212


def test_a_number_that_went_to_another_function_is_another_device(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.HEALTH_CHANGED, device="3", pci_address=A) == 1100
    bench.clock.now = 150
    bench.see(gpu(B, vfio=3, group=51))
    assert bench.of(catalogue.HEALTH_CHANGED, device="3", pci_address=A) is None
    assert bench.of(catalogue.HEALTH_CHANGED, device="3", pci_address=B) == 1150


def test_transitions_count_for_each_reason_and_all_are_there_from_the_start(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    assert len(bench.series(catalogue.TRANSITIONS)) == 1 + len(Reason)
    assert bench.of(catalogue.TRANSITIONS, reason="") == 1, "it arrived"
    assert bench.of(catalogue.TRANSITIONS, reason="off-the-bus") == 0
    bench.see(gpu(A, vfio=3, **OFF))
    bench.see(gpu(A, vfio=3, **OFF))
    assert bench.of(catalogue.TRANSITIONS, reason="off-the-bus") == 1


def test_a_change_between_two_scrapes_is_not_missed(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    bench.history.catch_up()
    bench.see(gpu(A, vfio=3, **OFF))
    bench.history.catch_up()
    bench.see(gpu(A, vfio=3))
    assert bench.of(catalogue.TRANSITIONS, reason="off-the-bus") == 1


def test_a_device_is_allocated_from_the_allocate_on_and_its_pod_is_named_when_it_is_known(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3), gpu(B, vfio=4, group=51))
    assert bench.of(catalogue.ALLOCATED, device="3") == 0
    bench.registry.allocate([(PGPU, "3")])
    assert bench.of(catalogue.ALLOCATED, device="3") == 1
    assert bench.of(catalogue.ALLOCATED_SINCE, device="3") == 1100
    assert bench.of(catalogue.HOLDER, device="3") is None
    bench.clock.now += 1
    held = Holdings(asked_at=bench.clock.now, pods={(PGPU, k): "ns/vm" for k in "34"}, containers={(PGPU, "3"): "c"})
    bench.registry.learn(holdings=held, pod_resources=True)
    assert bench.of(catalogue.HOLDER, device="3", pci_address=A, namespace="ns", pod="vm", container="c") == 1
    assert bench.of(catalogue.ALLOCATED, device="4") == 1
    assert bench.of(catalogue.ALLOCATED_SINCE, device="4") is None, "it was given before this plugin started"


def test_no_pod_is_named_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, pod_labels=False)
    busy(bench)
    assert bench.of(catalogue.ALLOCATED, device="3") == 1
    page = bench.exposition.page("").body
    assert b'pod="' not in page
    assert b'"ns"' not in page


def test_what_a_vm_uses_is_told_by_the_function(bench: Bench) -> None:
    busy(bench)
    assert bench.of(catalogue.IN_USE, device="3") == 1
    assert bench.of(catalogue.IN_USE, device="4") == 0


def test_what_is_not_offered_and_what_is_held_without_a_device_is_counted(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3), gpu(C, vfio=None, group=52))
    assert bench.of(catalogue.NOT_OFFERED) == 1
    assert bench.of(catalogue.HELD_WITHOUT_DEVICE) == 0


def test_errors_and_the_link_are_of_the_latest_scan(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3, link_limits=LIMITS, **ERRORS))
    assert {s: bench.of(catalogue.AER, severity=s) for s in ("fatal", "nonfatal", "correctable")} == {
        "fatal": 0,
        "nonfatal": 2,
        "correctable": 5,
    }
    assert bench.of(catalogue.LINK_SPEED) == 32e9
    assert bench.of(catalogue.LINK_WIDTH) == 16
    assert bench.of(catalogue.LINK_MAX_SPEED) == 16e9, "of the port"
    assert bench.of(catalogue.LINK_MAX_WIDTH) == 8


@pytest.mark.parametrize(
    "link",
    [OFF, {"link_speed": None, "link_width": None}, {"link_speed": "Unknown", "link_width": 0}],
    ids=["off the bus", "asleep", "a virtual function"],
)
def test_a_link_that_cannot_be_seen_has_no_series_and_its_limits_stay(bench: Bench, link: dict[str, Any]) -> None:
    bench.see(gpu(A, vfio=3, link_limits=LIMITS, **link))
    assert bench.of(catalogue.LINK_SPEED) is None
    assert bench.of(catalogue.LINK_WIDTH) is None
    assert bench.of(catalogue.LINK_MAX_WIDTH) == 8


def test_an_end_of_the_link_that_says_nothing_is_no_limit(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3, link_limits=(LinkLimit("2.5 GT/s PCIe", 16), LinkLimit(None, None))))
    assert bench.of(catalogue.LINK_MAX_SPEED) == 2.5e9
    assert bench.of(catalogue.LINK_MAX_WIDTH) == 16
    assert bench.of(catalogue.AER, severity="fatal") is None, "a function without counters"
    bench.see(gpu(A, vfio=3, link_limits=(LinkLimit("2.5 GT/s PCIe", None),)))
    assert bench.of(catalogue.LINK_MAX_SPEED) == 2.5e9
    assert bench.of(catalogue.LINK_MAX_WIDTH) is None


def test_every_function_of_a_device_has_its_own_link(bench: Bench) -> None:
    bench.see(*(gpu(a, vfio=n, cdev=False, link_limits=LIMITS) for n, a in enumerate((A, B))))
    assert len(bench.series(catalogue.DEVICE_INFO)) == 1, "one group"
    assert bench.of(catalogue.LINK_WIDTH, device="50", pci_address=A) == 16
    assert bench.of(catalogue.LINK_WIDTH, device="50", pci_address=B) == 16


def test_a_function_that_cannot_be_read_now_has_no_link(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    facts = host(gpu(A, vfio=3))
    bench.registry.observe(replace(facts, functions={}, unreadable={A: "sysfs does not answer"}))
    assert bench.of(catalogue.DEVICE_UNHEALTHY, reason="unreadable") == 1
    assert bench.of(catalogue.LINK_WIDTH) is None


def test_what_the_parts_say_is_shown(bench: Bench) -> None:
    busy(bench)
    assert bench.of(catalogue.REGISTERED) == 1
    assert bench.of(catalogue.REGISTERED_SINCE) == 1100
    assert [bench.of(e) for e in (catalogue.REGISTRATIONS, catalogue.LOSSES, catalogue.STREAMS)] == [2, 1, 1]
    assert bench.of(catalogue.KUBELET_RESTARTS) == 1
    assert bench.of(catalogue.REFUSALS, reason="off-the-bus") == 1
    assert len(bench.series(catalogue.REFUSALS)) == len(Reason) + len(Refused)
    assert bench.of(catalogue.SCAN_TRIGGERS, trigger="timer") == 3
    assert bench.of(catalogue.SCAN_TRIGGERS, trigger="late-answer") == 0, "it is there from the start"
    assert bench.of(catalogue.SCAN_FAILURES) == 2
    assert bench.of(catalogue.LAST_SCAN) == 1101
    assert bench.of(catalogue.SOURCE_UP, source="uevent") == 1
    assert bench.of(catalogue.SOURCE_UP, source="inotify") == 0
    assert bench.of(catalogue.SOURCE_UP, source="pod-resources") is None, "it is off"
    assert bench.of(catalogue.CDI_WRITES) == 1
    assert bench.of(catalogue.CDI_FAILURES) == 2
    assert bench.of(catalogue.FOREIGN_SPECS, problem="bad") == 1
    assert bench.of(catalogue.READY) == 1
    assert bench.of(catalogue.BUILD, version="1.2.3") == 1
    assert bench.of(catalogue.NODE, node="gpu-7", consumer="kata") == 1
    assert bench.of(catalogue.TURN, state="serving") == 1
    assert bench.of(catalogue.TURN, state="waiting") == 0


def test_claims_and_slices_are_shown_and_without_dra_there_is_nothing_of_them(bench: Bench) -> None:
    busy(bench)
    (of_dra,) = (section.entries for section in catalogue.SECTIONS if section.title == "Dynamic Resource Allocation")
    assert not any(bench.series(entry) for entry in of_dra)
    serve_claims(bench)
    assert (bench.of(catalogue.CLAIMS), bench.of(catalogue.RELEASED)) == (1, 4)
    assert bench.of(catalogue.CLAIM_REFUSALS, reason="held") == 1
    assert len(bench.series(catalogue.CLAIM_REFUSALS)) == len({*Reason, *Why})
    assert bench.of(catalogue.DRA_REGISTERED) == bench.of(catalogue.SLICES_CURRENT) == 1
    assert bench.of(catalogue.DRA_REGISTERED_SINCE) == 1100
    assert bench.of(catalogue.DRA_REGISTRATIONS) == 3
    values = [bench.of(e) for e in (catalogue.SLICES, catalogue.SLICE_DEVICES, catalogue.SLICE_WRITES)]
    assert values == [2, 70, 5]
    assert (bench.of(catalogue.API_FAILURES, code="403"), bench.of(catalogue.API_FAILURES, code="409")) == (1, 0)
    serve_claims(bench, slices={**DRA["slices"], "trouble": "it is away"})
    assert bench.of(catalogue.SLICES_CURRENT) == 0
    bench.parts = replace(bench.parts, shown=replace(bench.parts.shown, turn={"state": "standing by", "reason": None}))
    assert not any(bench.series(entry) for entry in of_dra), "the other one speaks for the node"


def test_a_driver_that_has_not_begun_yet_is_not_registered_and_publishes_nothing(bench: Bench) -> None:
    dra = {**DRA, "registration": {"state": "not begun", "trouble": None}, "slices": None, "claims": []}
    bench.parts = replace(bench.parts, shown=replace(SHOWN, dra=dra))
    assert bench.of(catalogue.DRA_REGISTERED) == bench.of(catalogue.SLICES_CURRENT) == 0
    assert not bench.series(catalogue.CLAIMS)
    known = ClaimParts()
    bench.parts = replace(bench.parts, shown=replace(SHOWN, dra=DRA), claims=known)
    assert bench.of(catalogue.DRA_REGISTERED_SINCE) is None


def test_the_pod_that_has_a_device_by_a_claim_is_named(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    bench.registry.learn(claims={"uid": PreparedClaim(name="ns/gpus", devices=(HELD,), at=100.0)})
    assert bench.of(catalogue.ALLOCATED) == 1
    assert bench.of(catalogue.HOLDER) is None
    told = Holdings(asked_at=101.0, claims=frozenset({("ns/gpus", A)}), claim_pods={"ns/gpus": ("vm", "main")})
    bench.registry.learn(holdings=told)
    assert bench.of(catalogue.HOLDER, namespace="ns", pod="vm", container="main") == 1


HELD = Places(node="/dev/vfio/devices/vfio3", group=50, addresses=frozenset({A}))


def test_a_resource_that_is_not_registered_says_so(bench: Bench) -> None:
    bench.see(gpu(A, vfio=3))
    bench.parts = Parts(shown=replace(SHOWN, registrations={}))
    assert bench.of(catalogue.REGISTERED) == 0
    assert bench.of(catalogue.REGISTERED_SINCE) is None
    assert bench.of(catalogue.READY) == 0
    assert bench.of(catalogue.LAST_SCAN) is None


def test_before_the_first_scan_there_is_a_page_too(bench: Bench) -> None:
    assert bench.of(catalogue.READY) == 0
    assert not bench.series(catalogue.DEVICES)


def test_a_plugin_that_stands_by_leaves_the_devices_to_the_one_that_serves(bench: Bench) -> None:
    busy(bench)
    bench.parts = replace(bench.parts, shown=replace(SHOWN, turn={"state": document.STANDING_BY, "reason": None}))
    assert bench.of(catalogue.TURN, state="standing-by") == 1
    assert bench.of(catalogue.READY) == 1
    for entry in (catalogue.DEVICES, catalogue.DEVICE_INFO, catalogue.HOLDER, catalogue.REGISTERED, catalogue.AER):
        assert not bench.series(entry)


def test_durations_are_counted_in_buckets_each_with_all_that_were_shorter(bench: Bench) -> None:
    took = Durations()
    for seconds in (0.0005, 0.0006, 0.3, 7.0):
        took.add(seconds)
    bench.parts = Parts(shown=SHOWN, scans=took)
    (scans,) = (family for family in bench.families() if family.name == catalogue.SCANS.name)
    counts = {sample.labels["le"]: sample.value for sample in scans.samples if sample.name.endswith("_bucket")}
    assert counts["0.0005"] == 1, "a bound belongs to its bucket"
    assert (counts["0.001"], counts["0.25"], counts["0.5"], counts["5.0"], counts["+Inf"]) == (2, 2, 3, 3, 4)
    others = {sample.name.rpartition("_")[2]: sample.value for sample in scans.samples}
    assert others["count"] == 4
    assert others["sum"] == pytest.approx(7.3011)


def test_labels_may_have_any_text(bench: Bench) -> None:
    odd = 'a\\b"c\nd\u00e9'
    bench.parts = Parts(shown=replace(SHOWN, plugin={**SHOWN.plugin, "node": odd}))
    assert bench.of(catalogue.NODE, node=odd) == 1
    (family,) = (each for each in bench.families(OPENMETRICS) if each.name == "sandbox_plugin_node")
    assert family.samples[0].labels["node"] == odd


# Which format, and at what cost


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4;q=0.3", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "application/openmetrics-text; version=1.0.0",
        ),
        ("application/openmetrics-text;version=none", "text/plain; version=0.0.4"),
    ],
)
def test_the_client_has_its_choice_of_format(bench: Bench, accept: str, content_type: str) -> None:
    page = bench.exposition.page(accept)
    assert page.content_type.startswith(content_type)
    assert page.body.endswith(b"# EOF\n") == content_type.startswith("application")


@given(accept=st.one_of(st.text(), st.from_regex(r"application/openmetrics-text;version=[0-9a-z.]*(;escaping=\w*)?")))
def test_whatever_a_client_accepts_it_gets_a_page(accept: str) -> None:
    made = Registry(Rules(), requires_cdi=False)
    page = Exposition(made, HealthHistory(registry=made), lambda: Parts(shown=SHOWN), pod_labels=True).page(accept)
    assert b"sandbox_plugin_build_info{" in page.body


def test_a_scrape_opens_nothing_but_the_process_s_own_numbers(bench: Bench) -> None:
    busy(bench)
    opened: list[str] = []
    is_deaf = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        """Stays for ever, so at the end it is made deaf."""
        if not is_deaf and event in ("open", "os.listdir", "os.scandir"):
            opened.append(str(arguments[0]))

    sys.addaudithook(hear)
    try:
        bench.exposition.page("")
    finally:
        is_deaf = True
    assert opened
    assert [path for path in opened if not path.startswith("/proc/")] == []


def test_the_number_of_series_is_what_the_document_says(bench: Bench) -> None:
    def lines(gpus: int) -> int:
        bench.see(*(gpu(f"0000:{n:02x}:00.0", vfio=n, group=n, link_limits=LIMITS, **ERRORS) for n in range(gpus)))
        bench.registry.allocate([(PGPU, str(n)) for n in range(gpus)])
        held = {(PGPU, str(n)): "ns/vm" for n in range(gpus)}
        bench.clock.now += 1
        bench.registry.learn(holdings=Holdings(asked_at=bench.clock.now, pods=held))
        return sum(not line.startswith(b"#") for line in bench.exposition.page("").body.splitlines())

    few, many = lines(2), lines(34)
    assert (many - few) / 32 == 14, "and one more for each that is Unhealthy"
    bench.parts = replace(bench.parts, calls={PGPU: Calls(refusals=KubeletCalls().refusals)})
    assert lines(34) - many == 2 * 16 + len(Reason) + len(Refused)
    before = lines(34)
    serve_claims(bench)
    of_failures = len(Failure) - len(bench.series(catalogue.API_FAILURES))
    text = Path(ROOT, "docs/monitoring.md").read_text()
    assert f"{lines(34) + of_failures - before} more with `--dra`" in text.replace("\n", " ")


def test_a_host_without_devices_has_no_series_of_devices(bench: Bench) -> None:
    bench.registry.observe(HostFacts())
    assert not bench.series(catalogue.DEVICE_INFO)
