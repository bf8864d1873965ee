#!/usr/bin/env python3
"""Every alert once for real: a real Prometheus scrapes the real daemon on a fake node, to which what an alert is about
is done, and undone. Each alert must fire, and must resolve.

    scripts/try-alerts.py [--only NAME ...]

The rules are those of the manifests; only their times are made short. What kube-state-metrics would say is served from
here. Needs `prometheus` (scripts/install-prometheus.sh) and what the tests need: `python3 scripts/dev.py setup`. Prints
a line for each alert; exit status 1 if one did not do as it should. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests/helpers")]

import grpc  # noqa: E402
import yaml  # noqa: E402
from daemon import Daemon, Places, places  # noqa: E402
from dra_manager import NODE, DraManager, api_server  # noqa: E402
from kubelet import GrpcKubelet, Plugin  # noqa: E402
from names import FIRST_GPU, PGPU  # noqa: E402
from pods import PodResources  # noqa: E402

from sandbox_plugin.fake.api_server import SLICES  # noqa: E402

RULE = ROOT / "manifests/components/prometheus-operator/prometheusrule.yaml"
_SHORTER = {"[1d]": "[5m]", "[1h]": "[8s]", "[15m]": "[8s]", "[2m]": "[6s]"}
"""Windows of the rules -> what they are here."""
_FOR = "2s"
_PATIENCE = 60.0
"""Seconds in which an alert must fire, or resolve."""
_NODE, _OTHER = NODE, "node-2"
_SECOND, _THIRD = "0000:43:00.0", "0000:52:00.0"
_KATA_NODE = 'kube_node_labels{{node="{}",label_katacontainers_io_kata_runtime="true"}} 1'
_USUAL = [
    _KATA_NODE.format(_NODE),
    'kube_daemonset_status_desired_number_scheduled{namespace="sandbox-plugin",daemonset="sandbox-plugin"} 1',
]
_WELL = [
    *_USUAL,
    'kube_daemonset_status_number_ready{namespace="sandbox-plugin",daemonset="sandbox-plugin"} 1',
    f'kube_node_status_capacity{{node="{_NODE}",resource="nvidia_com_pgpu",unit="integer"}} 8',
    f'kube_node_status_allocatable{{node="{_NODE}",resource="nvidia_com_pgpu",unit="integer"}} 8',
]


class Failed(Exception):
    """Something did not do as it should; the message says what."""


class Stage:
    """All that there is on it, and what can be done to it."""

    def __init__(self, at: Places, stack: ExitStack) -> None:
        self._at = at
        self._stack = stack
        self._port = _free_port()
        self.kubernetes = list(_WELL)
        """What kube-state-metrics says, as lines of Prometheus' text format."""
        self.node = at.node("hgx-h100")
        self.kubelet = stack.enter_context(GrpcKubelet(at.kubelet))
        self.kubelet.start()
        self.pods = stack.enter_context(PodResources(at.top / "pod-resources/kubelet.sock"))
        self.pods.start(age=3600)
        self.api = stack.enter_context(api_server())
        self.manager = stack.enter_context(DraManager(at.top, self.api))
        self.start()
        self._server = stack.enter_context(_serving(lambda: "\n".join([*self.kubernetes, ""])))
        self._url = stack.enter_context(_prometheus(at.top, self._port, self._server))

    def start(self) -> None:
        """Starts the daemon."""
        flags = (f"--metrics-address=127.0.0.1:{self._port}", "--health-interval=0.5")
        claims = ("--dra", f"--api-server={self.api.url}")
        self._daemon = self._stack.enter_context(Daemon(self._at, self.node, *flags, *claims, NODE_NAME=_NODE))
        self._daemon.wait_for("registered", resource=PGPU)

    def end(self) -> None:
        self._daemon.close()

    def link_is(self, lanes: int) -> None:
        self.node.set_attribute(FIRST_GPU, "current_link_width", f"{lanes}\n")

    def count(self, kind: str, total: str, errors: int) -> None:
        self.node.set_attribute(_SECOND, f"aer_dev_{kind}", f"Undefined 0\n{total} {errors}\n")

    def bad_spec(self) -> Path:
        return self._at.cdi / "of-another-program.yaml"

    def hide_bus(self, hidden: bool) -> None:
        bus = self.node.root / "sys/bus/pci/devices"
        away = bus.with_name("away")
        (bus if hidden else away).rename(away if hidden else bus)

    def ask_for_what_there_is_not(self) -> None:
        with suppress(grpc.RpcError):
            self.allocate("99")

    def allocate(self, *ids: str) -> None:
        plugin = Plugin(self._at.kubelet / "sandbox-pgpu.sock")
        try:
            plugin.allocate(ids)
        finally:
            plugin.close()

    def fill(self) -> None:
        gpus = [str(number) for number in range(4, 12)]
        self.allocate(*gpus)
        self.pods.hold("big", PGPU, *gpus)

    def refuse_slices(self) -> None:
        """From now on; what is there is deleted, so that something has to be written."""
        self.api.fail(403, times=1_000_000)
        self.api.remove(SLICES, self.api.slices()[0]["metadata"]["name"])

    def hide_drivers(self, hidden: bool) -> None:
        """The kubelet's folder where drivers register is away, or back."""
        if hidden:
            self.manager.stop()
            shutil.rmtree(self.manager.registry)
        else:
            self.manager.start()

    # What Prometheus says

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire now, one for each name."""
        alerts = json.load(urlopen(f"{self._url}/api/v1/alerts", timeout=10))["data"]["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    def wait(self, name: str, *, fires: bool) -> tuple[float, dict[str, Any]]:
        """How many seconds that took, and the alert. Raises Failed."""
        begun = time.monotonic()
        alert: dict[str, Any] = {}
        while (name in (now := self.firing())) is not fires:
            if time.monotonic() - begun > _PATIENCE:
                raise Failed(f"{name} does not {'fire' if fires else 'resolve'} within {_PATIENCE:g} s; firing: {now}")
            time.sleep(0.2)
        alert = now.get(name, {})
        return time.monotonic() - begun, alert

    def query(self, text: str) -> list[Any]:
        answer: list[Any] = json.load(urlopen(f"{self._url}/api/v1/query?query={text}", timeout=10))["data"]["result"]
        return answer


def _restart_without_a_gpu(stage: Stage) -> None:
    stage.end()
    stage.node.remove(_THIRD)
    stage.start()


def _put_back(stage: Stage) -> None:
    stage.node.add(_THIRD)
    stage.node.bind(_THIRD)


def _absent(stage: Stage) -> None:
    stage.kubernetes = [*_WELL, _KATA_NODE.format(_OTHER)]


def _well(stage: Stage) -> None:
    stage.kubernetes = list(_WELL)


def _changed(word: str, value: int) -> Callable[[Stage], None]:
    """kube-state-metrics says this of what has the word in its name."""

    def change(stage: Stage) -> None:
        stage.kubernetes = [re.sub(r"\d+$", str(value), line) if word in line else line for line in _WELL]

    return change


_BAD_SPEC = "cdiVersion: 9.9.9\nkind: other.com/gpu\ndevices: []\n"
Deed = Callable[[Stage], object]

ALERTS: dict[str, tuple[Deed, Deed]] = {
    "SandboxPluginDeviceUnhealthy": (lambda s: s.node.sicken(FIRST_GPU), lambda s: s.node.heal(FIRST_GPU)),
    "SandboxPluginNotRegistered": (lambda s: s.kubelet.stop(), lambda s: s.kubelet.start()),
    "SandboxPluginDriverNotRegistered": (lambda s: s.hide_drivers(True), lambda s: s.hide_drivers(False)),
    "SandboxPluginSlicesNotPublished": (lambda s: s.refuse_slices(), lambda s: s.api.stop_failing()),
    "SandboxPluginNotReady": (lambda s: s.kubelet.stop(), lambda s: s.kubelet.start()),
    "SandboxPluginForeignCdiSpec": (lambda s: s.bad_spec().write_text(_BAD_SPEC), lambda s: s.bad_spec().unlink()),
    "SandboxPluginPcieErrorsRising": (lambda s: s.count("correctable", "TOTAL_ERR_COR", 100), lambda _: None),
    "SandboxPluginPcieErrorUncorrected": (lambda s: s.count("nonfatal", "TOTAL_ERR_NONFATAL", 1), lambda _: None),
    "SandboxPluginPcieLinkNarrow": (lambda s: s.link_is(8), lambda s: s.link_is(16)),
    "SandboxPluginBlind": (lambda s: s.hide_bus(True), lambda s: s.hide_bus(False)),
    "SandboxPluginPodsRefused": (lambda s: s.ask_for_what_there_is_not(), lambda _: None),
    "SandboxPluginCapacityNearlyUsed": (lambda s: s.fill(), lambda s: s.pods.release("big")),
    "SandboxPluginDevicesLost": (_restart_without_a_gpu, _put_back),
    "SandboxPluginDown": (lambda s: s.end(), lambda s: s.start()),
    "SandboxPluginAbsent": (_absent, _well),
    "SandboxPluginPodsMissing": (_changed("number_ready", 0), _well),
    "SandboxPluginAllocatableBelowCapacity": (_changed("allocatable", 7), _well),
}
"""Name -> what makes it fire, and what makes it resolve; what counts errors of an hour resolves by itself."""


def short_rules() -> dict[str, Any]:
    """The rules of the manifests with shorter times. Raises Failed for one that is not tried here."""
    text = RULE.read_text()
    for long, short in _SHORTER.items():
        text = text.replace(long, short)
    rules: dict[str, Any] = yaml.safe_load(text)["spec"]
    named = set()
    for group in rules["groups"]:
        for rule in group["rules"]:
            named.add(rule.get("alert"))
            if "for" in rule:
                rule["for"] = _FOR
    if named - {None} != ALERTS.keys():
        raise Failed(f"the rules and this script differ in {sorted((named - {None}) ^ ALERTS.keys())}")
    return rules


@contextmanager
def _serving(text: Callable[[], str]) -> Iterator[int]:
    """Serves this text on a port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def _prometheus(top: Path, daemon_port: int, kubernetes_port: int) -> Iterator[str]:
    """A Prometheus that scrapes both every second; its address."""
    program = shutil.which("prometheus")
    if program is None:
        raise Failed("prometheus is not installed: scripts/install-prometheus.sh")
    port = _free_port()

    def job(name: str, target: int, labels: dict[str, str]) -> dict[str, Any]:
        targets = [{"targets": [f"127.0.0.1:{target}"], "labels": labels}]
        return {"job_name": name, "honor_labels": True, "static_configs": targets}

    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            job("sandbox-plugin", daemon_port, {"node": _NODE}),
            job("kube-state-metrics", kubernetes_port, {}),
        ],
    }
    folder = Path(tempfile.mkdtemp(prefix="prometheus-", dir=top))
    (folder / "rules.yaml").write_text(yaml.safe_dump(short_rules()))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(url := f"http://127.0.0.1:{port}", process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            urlopen(f"{url}/-/ready", timeout=1).close()
            return
        time.sleep(0.1)
    raise Failed("prometheus does not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _try(stage: Stage, name: str) -> None:
    """Raises Failed."""
    cause, cure = ALERTS[name]
    stage.wait(name, fires=False)
    cause(stage)
    fired, alert = stage.wait(name, fires=True)
    summary = alert["annotations"]["summary"]
    cure(stage)
    resolved, _ = stage.wait(name, fires=False)
    print(f"{name:<38} fires after {fired:4.1f} s, resolves after {resolved:4.1f} s: {summary}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes every alert fire and resolve in a real Prometheus.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*ALERTS], default=[*ALERTS])
    chosen = parser.parse_args().only
    try:
        with places() as at, ExitStack() as stack:
            stage = Stage(at, stack)
            while not stage.query("node:sandbox_plugin_devices:sum"):
                time.sleep(0.2)
            for name in chosen:
                _try(stage, name)
            for name in stage.firing():
                stage.wait(name, fires=False)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(chosen)} alerts fired and resolved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
