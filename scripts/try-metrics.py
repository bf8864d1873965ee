#!/usr/bin/env python3
"""The metrics for real: Prometheus scrapes the daemon on a fake node while the story of `sandbox-plugin demo` plays.

    scripts/try-metrics.py

What the story does must show in Prometheus, every query of docs/monitoring.md must have an answer at some time, and
`promtool` must find nothing wrong with the page. Needs `prometheus` (scripts/install-prometheus.sh) and what the
program needs: `python3 scripts/dev.py setup`. Prints a line for each; exit status 1 if something did not show. Takes a
minute: a kubelet that has just started is not believed that a pod is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sandbox_plugin.cli.demo_stage import running_daemon  # noqa: E402
from sandbox_plugin.fake.kubelet import FakeKubelet  # noqa: E402
from sandbox_plugin.fake.node import FakeNode  # noqa: E402
from sandbox_plugin.fake.story import POD, Story  # noqa: E402

NAMESPACE, NAME = POD.split("/")
SHOWN: Mapping[str, tuple[str, ...]] = {
    "The daemon starts": ("sum(sandbox_plugin_device_healthy) == 12", "sum(sandbox_plugin_registered) == 2"),
    "A pod asks for 4": (
        f'count(sandbox_plugin_device_holder_info{{namespace="{NAMESPACE}", pod="{NAME}"}}) == 4',
        "sum(sandbox_plugin_device_in_use) == 4",
        'sandbox_plugin_kubelet_request_duration_seconds_count{method="Allocate", code="OK"} == 1',
    ),
    "GPU 11 (0000:df:00.0) falls off": (
        'sandbox_plugin_device_unhealthy_info{pci_address="0000:df:00.0", reason="off-the-bus"}',
        'sandbox_plugin_devices{health="Unhealthy", reason="off-the-bus"} == 1',
    ),
    "GPU 11 answers again": (
        'sandbox_plugin_device_healthy{pci_address="0000:df:00.0"} == 1',
        'sandbox_plugin_device_health_transitions_total{reason="settling"} == 1',
    ),
    "The kubelet restarts": ("sandbox_plugin_kubelet_restarts_total == 1", "sandbox_plugin_ready == 1"),
    "Somebody binds GPU 11": ('sandbox_plugin_device_unhealthy_info{reason="not-bound"}',),
    "And back": ("sum(sandbox_plugin_device_healthy) == 12",),
    "The pod ends": ("sum(sandbox_plugin_device_allocated) == 0",),
}
"""How a chapter's title begins -> what Prometheus must answer something to, soon."""
PATIENCE = 60.0
"""Seconds in which something must show."""


def queries_of_document() -> list[str]:
    """All that docs/monitoring.md asks Prometheus, for a pod and a GPU of the story."""
    found = re.findall(r"```promql\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    return [query.strip().replace('pod="training"', f'pod="{NAME}"') for query in found]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def prometheus(folder: Path, scraped: int) -> Iterator[Callable[[str], Awaitable[list[Any]]]]:
    """A Prometheus of our own; with what asks it a query."""
    port = free_port()
    job = {
        "job_name": "sandbox-plugin",
        "honor_labels": True,
        "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}],
    }
    interval = {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
    (folder / "prometheus.json").write_text(json.dumps({"global": interval, "scrape_configs": [job]}))
    flags = (f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}")
    with open(folder / "prometheus.log", "wb") as log:
        command = ["prometheus", f"--config.file={folder}/prometheus.json", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(query: str) -> list[Any]:
        try:
            with urlopen(f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': query})}", timeout=5) as answer:
                return list(json.load(answer)["data"]["result"])
        except URLError as error:
            if hasattr(error, "code") and error.code == 400:
                raise SystemExit(f"{query}: {error}") from None
            return []  # it has not begun yet

    try:
        yield lambda query: asyncio.to_thread(ask, query)
    finally:
        process.terminate()
        process.wait()


async def play(folder: Path) -> None:
    """Raises SystemExit."""
    port = free_port()
    os.environ["SANDBOX_PLUGIN_METRICS_ADDRESS"] = f"127.0.0.1:{port}"
    node = FakeNode.create(folder / "node", "hgx-h100")
    unanswered = dict.fromkeys(queries_of_document())
    waiting = dict(SHOWN)
    async with (
        AsyncExitStack() as stack,
        FakeKubelet(folder / "kubelet", folder / "pod-resources.sock") as kubelet,
        running_daemon(folder) as daemon,
    ):
        ask = stack.enter_context(prometheus(folder, port))
        story = Story(node=node, kubelet=kubelet, started_at=daemon.started_at, health_interval=1.0)
        async for told in story.chapters():
            print(told.title, flush=True)
            (begin,) = (each for each in waiting if told.title.startswith(each))
            for query in waiting.pop(begin):
                print(f"    {await until_answered(ask, query):5.1f} s  {query}", flush=True)
            for query in list(unanswered):
                if await ask(query):
                    del unanswered[query]
        print("A VM outside Kubernetes takes a GPU.", flush=True)
        node.set_enable("0000:df:00.0", 1)
        for query in list(unanswered):
            print(f"    {await until_answered(ask, query):5.1f} s  {' '.join(query.split())}", flush=True)
        await asyncio.to_thread(check_page, port)
    if waiting:
        raise SystemExit(f"the story has no such chapters any more: {', '.join(waiting)}")
    print("Every query of docs/monitoring.md had an answer.")


async def until_answered(ask: Callable[[str], Awaitable[list[Any]]], query: str) -> float:
    """How many seconds it took. Raises SystemExit."""
    began_at = time.monotonic()
    while not await ask(query):
        if time.monotonic() - began_at > PATIENCE:
            raise SystemExit(f"nothing has shown for {PATIENCE:g} s: {query}")
        await asyncio.sleep(0.1)
    return time.monotonic() - began_at


def check_page(port: int) -> None:
    """What promtool says of the page. Raises SystemExit."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        page = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    if done.returncode or done.stdout or done.stderr:
        raise SystemExit(f"promtool check metrics:\n{(done.stdout + done.stderr).decode()}")
    print(f"promtool finds nothing wrong with a page of {len(page.splitlines())} lines.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="sandbox-metrics-", dir="/tmp") as temporary:
        asyncio.run(play(Path(temporary)))
