"""`sandbox-plugin demo`: a fake node and a fake kubelet, and between them the real daemon as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_plugin.cli.screen import flowed, heading, opened, wrapped
from sandbox_plugin.cli.signals import run_until_signal
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import Line, Part, Styled, is_terminal
from sandbox_plugin.cli.temporary import temporary_folder
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.kubelet import FakeKubelet, Listed
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.story import Story, StoryError, Told, where_ids_begin
from sandbox_plugin.hints import not_one_of
from sandbox_plugin.trouble import first_failure

_HEALTH_INTERVAL = 1.0
"""Seconds; the daemon's own default is 5."""
_PAUSE = 3.0
"""Seconds between steps on a terminal, for a person to look."""
_REFRESH = 1 / 8
"""Seconds between two screens."""
_WIDTH = 80
"""Of plain lines."""
_LOG_LINES = 6
_CHAPTERS = 8
"""What is remembered of the story; so much of it is shown as fits."""
_FREE, _IN_A_POD, _UNHEALTHY = "green", "yellow", "bold red"
"""How a device is shown: each also differs in its letters, for those who see no colours."""
_LEGEND = (
    "devices: ",
    Styled("free", _FREE),
    "  ",
    Styled("[in a pod]", _IN_A_POD),
    "  ",
    Styled("!unhealthy", _UNHEALTHY),
)


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a fake node and a fake kubelet in a temporary folder, runs the daemon on them, and shows what the "
        "kubelet sees while things happen to the node. On a terminal it goes on until Ctrl-C; otherwise it tells the "
        "story once, in plain lines."
    )
    parser.add_argument("--preset", metavar="PRESET", default="hgx-h100", help="the fake node; default: hgx-h100")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # The story is one of whole GPUs.
    playable = [name for name, preset in PRESETS.items() if name != "empty" and not preset.vgpu_cards]
    if args.preset not in playable:
        raise UsageError(f"--preset: {not_one_of(args.preset, playable)}")
    with temporary_folder("sandbox-demo-", _short_folder()) as folder:
        node = FakeNode.create(folder / "node", args.preset)
        kubelet, told = FakeKubelet(folder / "kubelet", folder / "pod-resources.sock"), list[Told]()
        try:
            run_until_signal(lambda: _play(args.preset, node, kubelet, folder, told), {})
        except BaseExceptionGroup as failures:
            error = first_failure(failures)
            if isinstance(error, OSError):
                raise error from None
            if not isinstance(error, StoryError):
                raise
            print(f"sandbox-plugin: the demo stopped: {error}", file=sys.stderr)
            return 1
    say(_summary(told, kubelet))
    return 0


async def _play(preset: str, node: FakeNode, kubelet: FakeKubelet, folder: Path, told: list[Told]) -> None:
    """Plays the story, and appends each of its steps to `told`."""
    async with kubelet, running_daemon(folder) as daemon:
        story = Story(node=node, kubelet=kubelet, started_at=daemon.started_at, health_interval=_HEALTH_INTERVAL)
        if is_terminal():
            await _show_live(preset, kubelet, story, daemon, told)
        else:
            await tell(preset, story, told)


def _summary(told: Sequence[Told], kubelet: FakeKubelet) -> str:
    """What was seen, in figures of this run, and what to try next."""
    times = sorted(chapter.seconds for chapter in told if chapter.seconds is not None)
    seen = "The demo has ended before anything happened."
    if times:
        fastest, middle, slowest = (_duration(times[at]) for at in (0, (len(times) - 1) // 2, -1))
        calls = (_counted(kubelet.registrations, "registration"), _counted(kubelet.lists, "list"))
        seen = (
            f"That is all. In this run {_counted(len(told), 'thing')} happened, and the kubelet saw {len(times)} of "
            f"them after {fastest} to {slowest}, half of them within {middle}. That took {calls[0]}, {calls[1]} of "
            f"devices and {_counted(kubelet.allocates, 'Allocate')}."
        )
    program = _program()
    return "\n".join((
        "",
        textwrap.fill(seen, _WIDTH),
        "",
        "What to try next: what another node offers, and what one lacks;",
        f"  {program} list --fake-sysfs workstation",
        f"  {program} doctor --fake-sysfs empty",
        "a node to change yourself, and how.",
        f"  {program} fake-node create hgx-h100 /tmp/node",
        f"  {program} fake-node --help",
    ))  # fmt: skip


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _program() -> str:
    """How a person would start this program here: `scripts/dev.py` installs it into the checkout."""
    path, here = Path(sys.argv[0]).absolute(), Path.cwd()
    is_ours = path.name == "sandbox-plugin" and path.is_relative_to(here)
    return str(path.relative_to(here)) if is_ours else "sandbox-plugin"


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
    which = ("resource", "device") if entry.get("device") else ("resource", "pci_address")
    about = [str(entry[key]) for key in (*which, "health", "reason") if entry.get(key)]
    return f"{entry.get('event', '')}: {' '.join(about)}" if about else str(entry.get("event", ""))


# Without a terminal, or on one that cannot draw


async def tell(preset: str, story: Story, told: list[Told]) -> None:
    """Plays the story once, in plain lines."""
    about = f"A fake node ({PRESETS[preset].summary}), a fake kubelet, and the real daemon between them."
    say(textwrap.fill(f"{about} {where_ids_begin(story.node)[1]}", _WIDTH))
    say("Times run from the change until the kubelet sees it, measured in this run.")
    say("On a terminal the demo is live, and goes on until Ctrl-C.")
    async for chapter in story.chapters():
        told.append(chapter)
        why = textwrap.fill(chapter.why, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        say(f"\n{len(told):2}. {chapter.title}\n{why}\n    {_duration(chapter.seconds):>8}  {chapter.result}")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# On a terminal


async def _show_live(preset: str, kubelet: FakeKubelet, story: Story, daemon: _Daemon, told: list[Told]) -> None:
    """Shows what the kubelet sees, and plays the story again and again."""
    ids = where_ids_begin(story.node)[0]

    async def play() -> None:
        while True:
            async for chapter in story.chapters():
                told.append(chapter)
                await asyncio.sleep(_PAUSE)

    with opened() as screen:
        async with asyncio.TaskGroup() as group:
            group.create_task(play())
            while True:
                columns, height = screen.size
                screen.draw(_screen(preset, ids, kubelet, told[-_CHAPTERS:], daemon.said, columns, height))
                await asyncio.sleep(_REFRESH)


def _screen(
    preset: str, ids: str, kubelet: FakeKubelet, told: Sequence[Told], said: Iterable[str], columns: int, height: int
) -> list[Line]:
    """The newest chapters get the lines that are left, so many of them as fit."""
    above: list[Line] = [
        [f"The fake node {preset}, a fake kubelet, the real daemon. Ctrl-C ends it."],
        heading("what the kubelet sees", columns),
        [*_LEGEND, "   ", Styled(ids, "dim")],
        *(line for resource in kubelet.resources() for line in _resource(kubelet, resource, columns)),
        heading("what happened, and how long until the kubelet saw it", columns),
    ]
    log = [line for entry in said for line in textwrap.wrap(entry, columns, subsequent_indent="  ")]
    below: list[Line] = [heading("the daemon says", columns), *([line] for line in log[-_LOG_LINES:])]
    room = height - len(above) - _LOG_LINES - 1
    story: list[Line] = []
    for chapter in reversed(told):
        lines = _chapter(chapter, columns)
        if len(story) + len(lines) > room:
            break
        story = lines + story
    return [*above, *story, *([""] for _ in range(room - len(story))), *below]


def _resource(kubelet: FakeKubelet, resource: str, columns: int) -> list[Line]:
    """How many devices of a resource are healthy, and each of them below, by NUMA nodes."""
    devices = kubelet.devices(resource)
    lines: list[Line] = [[Styled(resource, "bold"), f"  {len(kubelet.healthy(resource))} of {len(devices)} healthy"]]
    for node in sorted({device.numa_nodes for device in devices.values()}):
        title = f"NUMA {','.join(map(str, node))}:" if node else "no NUMA node:"
        cells = [
            _device_cell(device, is_held=kubelet.holder(resource, device.id) is not None)
            for device in sorted(devices.values(), key=lambda device: int(device.id))
            if device.numa_nodes == node
        ]
        lines += [["  ", *line] for line in flowed([Styled(title, "dim"), *cells], columns - 2)]
    return lines


def _device_cell(device: Listed, *, is_held: bool) -> Styled:
    if not device.healthy:
        return Styled(f"!{device.id}", _UNHEALTHY)
    return Styled(f"[{device.id}]", _IN_A_POD) if is_held else Styled(device.id, _FREE)


def _chapter(told: Told, columns: int) -> list[Line]:
    indent = " " * 10
    texts = ((told.title, "bold"), (told.why, "dim"), (told.result, ""))
    lines = [line for text, style in texts for line in wrapped(text, columns - len(indent), style)]
    times: list[Part] = [Styled(f"{_duration(told.seconds):>8}  ", "bold cyan"), *[indent] * (len(lines) - 1)]
    return [[time, *line] for time, line in zip(times, lines, strict=True)]
