"""How log lines look: JSON, one object a line, or a console format for people."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from datetime import datetime
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

from sandbox_plugin.cli.stdout import visible

_COLUMNS = 120
"""Of a line on a console, and fewer where the terminal has fewer."""
_INDENT = " " * 4
"""Of what continues a line."""
_LEVELS = ("debug", "info", "warning", "error")
_EVENT_WIDTH = len("device found")
_KEY = re.compile(r" (?=[^ =]+=)")
"""The blank before `key=value`, colours and all."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def configure_logs(log_format: str | None, level: str, stream: TextIO) -> None:
    """Sets up structlog for this process. `log_format` is `json` or `console`; None: console on a terminal."""
    is_console = log_format == "console" or (log_format is None and stream.isatty())
    structlog.configure(
        processors=[structlog.processors.add_log_level, *(_console(stream) if is_console else _json())],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)


def _json() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", key="timestamp"),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]


def _console(stream: TextIO) -> list[Processor]:
    colors = stream.isatty() and not os.environ.get("NO_COLOR")
    styles = structlog.dev.ConsoleRenderer.get_default_level_styles(colors)
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors,
        pad_event_to=_EVENT_WIDTH,
        level_styles={level: styles[level] for level in _LEVELS},  # it pads to the longest of these
        sort_keys=False,
    )
    return [_add_local_time, _only_visible, renderer, lambda _, __, text: folded(str(text), _columns_of(stream))]


def _add_local_time(_: object, __: str, event: EventDict) -> EventDict:
    """Month to millisecond, as in the logs of Kubernetes's own programs."""
    event["timestamp"] = datetime.now().strftime("%m-%d %H:%M:%S.%f")[:-3]
    return event


def _only_visible(_: object, __: str, event: EventDict) -> EventDict:
    """For the console: names from sysfs may hold anything. Where there is a blank in a value, structlog quotes it."""
    return {k: visible(v) if isinstance(v, str) and (k == "event" or " " not in v) else v for k, v in event.items()}


def _columns_of(stream: TextIO) -> int:
    try:
        return min(_COLUMNS, os.get_terminal_size(stream.fileno()).columns) or _COLUMNS
    except (OSError, ValueError):  # no terminal, or no file at all
        return _COLUMNS


def folded(text: str, columns: int) -> str:
    """One event in lines of so many columns: what does not fit behind the others goes on, indented, in the next line.

    A value stays whole if it fits in a line. A word that does not, such as a path, stays whole all the same, for
    somebody may copy it. What comes below the first line, a traceback, is as it was.
    """
    first, newline, rest = text.partition("\n")
    if _width(first) <= columns:
        return text
    lines: list[str] = []
    for part in _KEY.split(first):
        if lines and _width(f"{lines[-1]} {part}") <= columns:
            lines[-1] += f" {part}"
        else:
            lines.append(f"{_INDENT}{part}" if lines else part)
    return "\n".join(piece for line in lines for piece in _wrapped(line.rstrip(), columns)) + newline + rest


def _wrapped(line: str, columns: int) -> list[str]:
    """Of a value that is longer than a line. A little early where colours count."""
    if _width(line) <= columns:
        return [line]
    words = line.lstrip()
    return textwrap.wrap(
        words,
        columns,
        initial_indent=line[: -len(words)],
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def _width(text: str) -> int:
    return len(_COLOR.sub("", text))


class _Libraries(logging.Handler):
    """What asyncio and grpclib log, as lines like our own."""

    def emit(self, record: logging.LogRecord) -> None:
        message = (record.getMessage().splitlines() or [""])[0]
        structlog.get_logger().log(record.levelno, message, logger=record.name, exc_info=record.exc_info)
