"""What both demos of `sandbox-plugin demo` play on: the daemon as a process, the screen, or plain lines."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sandbox_plugin.cli.screen import heading, opened, wrapped
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import Line, Part, Styled, is_terminal, wrap
from sandbox_plugin.fake.story import StoryError, Told, counted

HEALTH_INTERVAL = 1.0
"""Seconds; the daemon's own default is 5."""
_WIDTH = 80
"""Of plain lines."""
_PAUSE = 3.0
"""Seconds between steps on a terminal, for a person to look."""
_REFRESH = 1 / 8
"""Seconds between two screens."""
LOG_LINES = 6
_HIGH = 30
"""Lines of a terminal that has room for everything."""
_CHAPTERS = 8
"""What is remembered of the story; so much of it is shown as fits."""


class Chapters(Protocol):
    """A story."""

    def chapters(self) -> AsyncIterator[Told]:
        """Its steps, once. Called again it goes on where it ended. Raises StoryError."""


class Play(Protocol):
    """One demo: what is around the daemon, what happens to it, and how it is shown."""

    title: str
    """The first line of the screen."""
    subject: str
    """What the section of the screen with the story is about."""
    about: Sequence[str]
    """The paragraphs before a story in plain lines."""
    seen_by: str
    """Who sees what happens, in words."""
    fewest_log_lines: int
    """How many lines of the daemon's log are shown on a low terminal; on others `LOG_LINES`."""

    def surroundings(self) -> AbstractAsyncContextManager[Sequence[str]]:
        """What the daemon talks to. The context gives the flags by which the daemon finds it."""

    def story(self, started_at: float) -> Chapters:
        """The story, with a daemon that was started then, in monotonic seconds."""

    def panel(self, columns: int) -> list[Line]:
        """What is shown above the story, now."""

    def effort(self) -> str:
        """What all this took, in words and figures."""


async def perform(play: Play, folder: Path, told: list[Told]) -> None:
    """Plays the story, and appends each of its steps to `told`."""
    async with play.surroundings() as flags, running_daemon(folder, *flags) as daemon:
        story = play.story(daemon.started_at)
        if is_terminal():
            await _show_live(play, story, daemon, told)
        else:
            await _tell(play, story, told)


def summary(play: Play, told: Sequence[Told]) -> str:
    """What was seen, in figures of this run."""
    times = sorted(chapter.seconds for chapter in told if chapter.seconds is not None)
    seen = "The demo has ended before anything happened."
    if times:
        fastest, middle, slowest = (_duration(times[at]) for at in (0, (len(times) - 1) // 2, -1))
        seen = (
            f"That is all. In this run {counted(len(told), 'thing')} happened, and {play.seen_by} saw {len(times)} of "
            f"them after {fastest} to {slowest}, half of them within {middle}. That took {play.effort()}."
        )
    return textwrap.fill(seen, _WIDTH)


# The daemon


@dataclass(kw_only=True)
class _Daemon:
    """The daemon's process, and the last that it said."""

    process: asyncio.subprocess.Process
    started_at: float
    said: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))

    async def listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(visible(_in_words(line.decode("utf-8", "replace").strip())))
        await self.process.wait()  # before anybody signals it: that would take its exit status away from the loop
        raise StoryError(f"the daemon ended: {' / '.join(self.said) or 'without a word'}")


@asynccontextmanager
async def running_daemon(folder: Path, *flags: str) -> AsyncIterator[_Daemon]:
    """Runs `sandbox-plugin run` on the fake node in `folder`, in a session of its own: Ctrl-C is for us to pass on.

    It has ended when the context ends.
    """
    started_at = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandbox_plugin", "run", "--log-format", "json"),
        *("--fake-sysfs", str(folder / "node"), "--kubelet-dir", str(folder / "kubelet")),
        *("--cdi-dir", str(folder / "cdi"), "--pod-resources-socket", str(folder / "pod-resources.sock")),
        *("--health-interval", str(HEALTH_INTERVAL)),
        *flags,
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
    is_device = entry.get("device") and not entry.get("claim")  # claims name devices by their addresses
    which = ("claim", "resource", "device" if is_device else "pci_address")
    about = [str(entry[key]) for key in (*which, "health", "reason") if entry.get(key)]
    if "generation" in entry:
        about.append(f"generation {entry['generation']}")
    return f"{entry.get('event', '')}: {' '.join(about)}" if about else str(entry.get("event", ""))


# Without a terminal, or on one that cannot draw


async def _tell(play: Play, story: Chapters, told: list[Told]) -> None:
    """Plays the story once, in plain lines."""
    for paragraph in play.about:
        say(textwrap.fill(paragraph, _WIDTH))
    say("On a terminal the demo is live, and goes on until Ctrl-C.")
    async for chapter in story.chapters():
        told.append(chapter)
        why = textwrap.fill(chapter.why, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        took = f"    {_duration(chapter.seconds):>8}  "
        result = f"\n{' ' * len(took)}".join(wrap(chapter.result, _WIDTH - len(took)))
        say(f"\n{len(told):2}. {chapter.title}\n{why}\n{took}{result}")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# On a terminal


async def _show_live(play: Play, story: Chapters, daemon: _Daemon, told: list[Told]) -> None:
    """Shows how things stand, and plays the story again and again."""

    async def go_on() -> None:
        while True:
            async for chapter in story.chapters():
                told.append(chapter)
                await asyncio.sleep(_PAUSE)

    with opened() as screen:
        async with asyncio.TaskGroup() as group:
            group.create_task(go_on())
            while True:
                columns, height = screen.size
                screen.draw(_screen(play, told[-_CHAPTERS:], daemon.said, columns, height))
                await asyncio.sleep(_REFRESH)


def _screen(play: Play, told: Sequence[Told], said: Iterable[str], columns: int, height: int) -> list[Line]:
    """The newest chapters get the lines that are left, so many of them as fit."""
    above: list[Line] = [[play.title], *play.panel(columns), heading(play.subject, columns)]
    log_lines = LOG_LINES if height >= _HIGH else play.fewest_log_lines
    log = [line for entry in said for line in textwrap.wrap(entry, columns, subsequent_indent="  ")]
    below: list[Line] = [heading("the daemon says", columns), *([line] for line in log[-log_lines:])]
    room = height - len(above) - log_lines - 1
    story: list[Line] = []
    for chapter in reversed(told):
        lines = _chapter(chapter, columns)
        if len(story) + len(lines) > room:
            break
        story = lines + story
    return [*above, *story, *([""] for _ in range(room - len(story))), *below]


def _chapter(told: Told, columns: int) -> list[Line]:
    indent = " " * 10
    texts = ((told.title, "bold"), (told.why, "dim"), (told.result, ""))
    lines = [line for text, style in texts for line in wrapped(text, columns - len(indent), style)]
    times: list[Part] = [Styled(f"{_duration(told.seconds):>8}  ", "bold cyan"), *[indent] * (len(lines) - 1)]
    return [[time, *line] for time, line in zip(times, lines, strict=True)]
