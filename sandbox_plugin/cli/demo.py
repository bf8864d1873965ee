"""`sandbox-plugin demo`: a fake node and a fake kubelet, and between them the real daemon as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sandbox_plugin.cli.signals import run_until_signal
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import is_terminal, plain_console
from sandbox_plugin.cli.temporary import temporary_folder
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.kubelet import FakeKubelet, Listed
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.story import Story, StoryError, Told
from sandbox_plugin.trouble import first_failure

_HEALTH_INTERVAL = 1.0
"""Seconds; the daemon's own default is 5."""
_PAUSE = 3.0
"""Seconds between steps on a terminal, for a person to look."""
_REFRESH = 1 / 8
"""Seconds between two screens."""
_LOG_LINES = 6
_CHAPTERS = 3
_CHAPTER_LINES = 4
"""Of these two the panel with the story is made; a chapter has four lines on 80 columns, and three on more."""
_OTHER_LINES = 18
"""What stands around the story: a line, the devices of two resources, the daemon's words, and the frames."""
_FREE, _IN_A_POD, _UNHEALTHY = "green", "yellow", "bold red"
"""How a device is shown: each also differs in its letters, for those who see no colours."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch the daemon on a fake node with a fake kubelet",
        description="Makes a fake node and a fake kubelet in a temporary folder, runs the daemon on them, and shows "
        "what the kubelet sees while things happen to the node. On a terminal it goes on until Ctrl-C; otherwise it "
        "tells the story once, in plain lines.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="PRESET", default="hgx-h100", help="the fake node; default: hgx-h100")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    playable = [name for name in PRESETS if name != "empty"]
    if args.preset not in playable:
        raise UsageError(f"--preset: {args.preset!r} is not one of {', '.join(playable)}")
    with temporary_folder("sandbox-demo-", _short_folder()) as folder:
        node = FakeNode.create(folder / "node", args.preset)
        try:
            run_until_signal(lambda: _play(args.preset, node, folder), {})
        except BaseExceptionGroup as failures:
            error = first_failure(failures)
            if isinstance(error, OSError):
                raise error from None
            if not isinstance(error, StoryError):
                raise
            print(f"sandbox-plugin: the demo stopped: {error}", file=sys.stderr)
            return 1
    return 0


async def _play(preset: str, node: FakeNode, folder: Path) -> None:
    fake_kubelet = FakeKubelet(folder / "kubelet", folder / "pod-resources.sock")
    async with fake_kubelet as kubelet, running_daemon(folder) as daemon:
        story = Story(node=node, kubelet=kubelet, started_at=daemon.started_at, health_interval=_HEALTH_INTERVAL)
        console = plain_console()
        if is_terminal() and not console.is_dumb_terminal:
            await _show_live(console, preset, kubelet, story, daemon)
        else:
            await tell(preset, story)


def _short_folder() -> str | None:
    """Where unix sockets, whose paths have 107 bytes at most, fit in; None: the usual folder for temporary files."""
    return None if len(tempfile.gettempdir()) < 50 else "/tmp"


# The daemon


@dataclass(kw_only=True)
class _Daemon:
    """The daemon's process, and the last that it said."""

    process: asyncio.subprocess.Process
    started_at: float
    said: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))

    async def listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(visible(_in_words(line.decode("utf-8", "replace").strip())))
        await self.process.wait()  # before anybody signals it: that would take its exit status away from the loop
        raise StoryError(f"the daemon ended: {' / '.join(self.said) or 'without a word'}")


@asynccontextmanager
async def running_daemon(folder: Path) -> AsyncIterator[_Daemon]:
    """Runs `sandbox-plugin run` on the fake node, in a session of its own: Ctrl-C is for us to pass on.

    It has ended when the context ends.
    """
    started_at = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandbox_plugin", "run", "--log-format", "json"),
        *("--fake-sysfs", str(folder / "node"), "--kubelet-dir", str(folder / "kubelet")),
        *("--cdi-dir", str(folder / "cdi"), "--pod-resources-socket", str(folder / "pod-resources.sock")),
        *("--health-interval", str(_HEALTH_INTERVAL)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    daemon = _Daemon(process=process, started_at=started_at)
    try:
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(daemon.listen())
            yield daemon
            listening.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        while process.returncode is None:
            with suppress(asyncio.CancelledError):  # a signal that comes now asks for no more than is being done
                await process.wait()


def _in_words(line: str) -> str:
    """A JSON log line for people: what happened, to what, and why."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    about = [str(entry[key]) for key in ("resource", "device", "pci_address", "health", "reason") if entry.get(key)]
    return f"{entry.get('event', '')}: {' '.join(about)}" if about else str(entry.get("event", ""))


# Without a terminal, or on one that cannot draw


async def tell(preset: str, story: Story) -> None:
    """Plays the story once, in plain lines."""
    say(f"A fake node ({PRESETS[preset].summary}), a fake kubelet, and the real daemon between them.")
    say("Times run from the change until the kubelet sees it, measured in this run.")
    number = 0
    async for told in story.chapters():
        number += 1
        say(f"\n{number:2}. {told.title}\n    {told.why}\n    {_duration(told):>8}  {told.result}")
    say("\nThat is all. On a terminal the demo goes on, live, until Ctrl-C.")


def _duration(told: Told) -> str:
    if told.seconds is None:
        return ""
    return f"{told.seconds * 1000:.0f} ms" if told.seconds < 1 else f"{told.seconds:.1f} s"


# On a terminal


async def _show_live(console: Console, preset: str, kubelet: FakeKubelet, story: Story, daemon: _Daemon) -> None:
    """Shows what the kubelet sees, and plays the story again and again."""
    told: list[Told] = []

    def screen() -> Group:
        return Group(
            Text(f"The fake node {preset}, a fake kubelet, the real daemon. Ctrl-C ends it."),
            _devices_table(kubelet),
            _story_panel(told, chapters=max(1, min(_CHAPTERS, (console.height - _OTHER_LINES) // _CHAPTER_LINES))),
            Panel(
                Text("\n".join(daemon.said), no_wrap=True, overflow="ellipsis"),
                title="the daemon says",
                height=_LOG_LINES + 2,
            ),
        )

    async def play() -> None:
        while True:
            async for chapter in story.chapters():
                told[:] = [*told[1 - _CHAPTERS :], chapter]
                await asyncio.sleep(_PAUSE)

    # Drawn by the loop, not by the library's own thread: what a screen shows is then of one moment.
    with Live(get_renderable=screen, console=console, screen=True, auto_refresh=False) as live:
        async with asyncio.TaskGroup() as group:
            group.create_task(play())
            while True:
                live.refresh()
                await asyncio.sleep(_REFRESH)


def _devices_table(kubelet: FakeKubelet) -> Table:
    """What the kubelet sees: one line for each resource, one cell for each device."""
    table = Table(title="what the kubelet sees", expand=True, show_lines=False)
    table.add_column("resource", no_wrap=True)
    table.add_column("healthy", justify="right")
    legend = (("free", _FREE), "  ", ("[in a pod]", _IN_A_POD), "  ", ("!unhealthy", _UNHEALTHY))
    table.add_column(Text.assemble("devices: ", *legend), ratio=1)
    for resource in kubelet.resources():
        devices = kubelet.devices(resource)
        cells = Text()
        nodes = sorted({d.numa_nodes for d in devices.values()})
        for node in nodes:
            cells.append(f"{'NUMA ' + ','.join(map(str, node)) if node else 'no NUMA node'}: ", style="dim")
            for device in sorted((d for d in devices.values() if d.numa_nodes == node), key=lambda d: int(d.id)):
                cells.append_text(_device_cell(device, is_held=kubelet.holder(resource, device.id) is not None))
                cells.append(" ")
            cells.append("  ")
        table.add_row(resource, f"{len(kubelet.healthy(resource))}/{len(devices)}", cells)
    return table


def _device_cell(device: Listed, *, is_held: bool) -> Text:
    if not device.healthy:
        return Text(f"!{device.id}", _UNHEALTHY)
    return Text(f"[{device.id}]", _IN_A_POD) if is_held else Text(device.id, _FREE)


def _story_panel(told: list[Told], *, chapters: int) -> Panel:
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(justify="right", width=8)
    lines.add_column()
    for chapter in told[-chapters:]:
        lines.add_row(Text(_duration(chapter), "bold cyan"), Text(chapter.title, "bold"))
        lines.add_row("", Text(chapter.why, "dim"))
        lines.add_row("", Text(chapter.result))
    return Panel(
        lines, title="what happened, and how long until the kubelet saw it", height=chapters * _CHAPTER_LINES + 2
    )
