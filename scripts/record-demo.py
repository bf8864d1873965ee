#!/usr/bin/env python3
"""Records the demo on a terminal of 80 by 24 and draws docs/demo.svg, an animation: what people see, from a real run.

scripts/record-demo.py [--seconds 45]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINES = 80, 24
CELL, LINE, MARGIN = 8.4, 18, 12
WIDTH, HEIGHT = round(COLUMNS * CELL) + 2 * MARGIN, LINES * LINE + 2 * MARGIN
PAPER, INK = "#1c2128", "#d0d7de"
COLOURS = {"red": "#ff7b72", "green": "#56d364", "brown": "#e3b341", "blue": "#79c0ff", "cyan": "#76e3ea"}
"""By the names that the terminal emulator has for the eight colours; others are shown as plain text."""
SHORTEST = 0.25
"""Seconds: what is drawn over sooner is not a frame of its own."""

Run = tuple[int, str, str, bool]
"""Characters in one style: column, text, colour, bold."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What the terminal showed from a moment on."""

    at: float
    """Seconds since the start."""
    lines: tuple[tuple[Run, ...], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="how much of it is recorded")
    arguments = parser.parse_args()
    frames = record([sys.executable, "-m", "sandbox_plugin", "demo"], arguments.seconds)
    (ROOT / "docs/demo.svg").write_text(draw(frames, arguments.seconds))
    print(f"{len(frames)} frames")


def record(command: Sequence[str], seconds: float) -> list[Frame]:
    """Runs the command on a terminal of its own for so long, and ends it as Ctrl-C does."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=ROOT, env=environment) as process:
        os.close(its)
        try:
            return _frames(ours, seconds)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
            os.close(ours)


def _frames(terminal: int, seconds: float) -> list[Frame]:
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    frames: list[Frame] = []
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        if select.select([terminal], [], [], 0.05)[0]:
            stream.feed(os.read(terminal, 65536))
            continue  # there may be more of it
        lines = tuple(_runs(screen, row) for row in range(LINES))
        if any(lines) and (not frames or frames[-1].lines != lines):
            if frames and now - frames[-1].at < SHORTEST:
                now = frames.pop().at
            frames.append(Frame(now, lines))
    return frames


def _runs(screen: pyte.Screen, row: int) -> tuple[Run, ...]:
    cells = [(column, screen.buffer[row][column]) for column in range(COLUMNS)]
    runs = []
    for (colour, bold), group in groupby(cells, key=lambda cell: (cell[1].fg, cell[1].bold)):
        found = list(group)
        text = "".join(cell.data for _, cell in found).rstrip()
        if text:
            runs.append((found[0][0], text, colour, bold))
    return tuple(runs)


def draw(frames: Sequence[Frame], seconds: float) -> str:
    """The frames beside one another, and a window that goes from one to the next."""
    start = frames[0].at
    span = seconds - start
    steps = [
        f"{100 * (frame.at - start) / span:.2f}%{{transform:translateX(-{WIDTH * n}px)}}"
        for n, frame in enumerate(frames)
    ]
    lines: dict[tuple[Run, ...], str] = {}
    for frame in frames:
        for line in filter(None, frame.lines):
            lines.setdefault(line, f"l{len(lines)}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
        f"<style>@keyframes film{{{''.join(steps)}}}.film{{animation:film {span:.1f}s step-end infinite}}"
        f"text{{fill:{INK};white-space:pre}}</style>",
        "<defs>",
        *(f'<g id="{name}">{"".join(map(_text, line))}</g>' for line, name in lines.items()),
        "</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        '<g class="film">',
    ]
    for n, frame in enumerate(frames):
        shown = (
            f'<use href="#{lines[line]}" y="{MARGIN + LINE * (row + 1) - 4}"/>'
            for row, line in enumerate(frame.lines)
            if line
        )
        parts.append(f'<g transform="translate({WIDTH * n})">{"".join(shown)}</g>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _text(run: Run) -> str:
    column, text, colour, bold = run
    style = f' style="fill:{COLOURS[colour]}"' if colour in COLOURS else ""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{MARGIN + column * CELL:.1f}" textLength="{len(text) * CELL:.1f}"'  # columns stand, whatever the font
    return f"<text {place}{style}{weight}>{escape(text)}</text>"


if __name__ == "__main__":
    main()
