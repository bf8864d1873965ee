"""A whole terminal that is drawn again and again: sections of lines, cut to its size."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sandbox_plugin.cli.stdout import visible
from sandbox_plugin.cli.tables import Line, Part, Styled, has_colors, painted, text_of, wrap

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Another screen without a cursor; back to the one before (xterm's control sequences, which all of today's know)."""
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


class Screen:
    """The terminal, inside `opened`."""

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        size = shutil.get_terminal_size()
        return size.columns, size.lines

    def draw(self, lines: Sequence[Line]) -> None:
        """Shows these lines from the top; what does not fit is cut off."""
        columns, height = self.size
        colors = has_colors()
        shown = (painted(_cut(line, columns), colors=colors) + _CLEAR_LINE for line in lines[:height])
        sys.stdout.write(_HOME + "\n".join(shown) + _CLEAR_BELOW)
        sys.stdout.flush()


@contextmanager
def opened() -> Iterator[Screen]:
    """A screen to draw on. At the end the terminal shows what it showed before."""
    try:
        sys.stdout.write(_ENTER)
        yield Screen()
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def heading(title: str, columns: int) -> Line:
    """The first line of a section."""
    return [Styled(f"── {title} ".ljust(columns, "─"), "dim")]


def wrapped(text: str, width: int, style: str = "") -> list[Line]:
    """A text in lines of this width."""
    return [[Styled(line, style)] for line in wrap(text, width)]


def flowed(words: Sequence[Part], width: int) -> list[Line]:
    """Words, each in its own style, in lines of this width."""
    lines: list[list[Part]] = [[]]
    for word in words:
        if lines[-1] and len(text_of(lines[-1])) + 1 + len(text_of([word])) > width:
            lines.append([])
        lines[-1] += [" ", word] if lines[-1] else [word]
    return list(lines)


def _cut(line: Line, columns: int) -> Line:
    kept: list[Part] = []
    left = columns
    for part in line:
        text, style = (part, "") if isinstance(part, str) else part
        text = visible(text)[:left]
        kept.append(Styled(text, style))
        left -= len(text)
    return kept
