"""How log lines look: JSON, one object a line, or a console format for people."""

from __future__ import annotations

import logging
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

from sandbox_plugin.cli.stdout import visible


def configure_logs(log_format: str | None, level: str, stream: TextIO) -> None:
    """Sets up structlog for this process. `log_format` is `json` or `console`; None: console on a terminal."""
    console = log_format == "console" or (log_format is None and stream.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console, key="timestamp"),
    ]
    last: list[Processor]
    if console:
        last = [_only_visible, structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=24)]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)


def _only_visible(_: object, __: str, event: EventDict) -> EventDict:
    """For the console: names from sysfs may hold anything. Where there is a blank in a value, structlog quotes it."""
    return {k: visible(v) if isinstance(v, str) and (k == "event" or " " not in v) else v for k, v in event.items()}


class _Libraries(logging.Handler):
    """What asyncio and grpclib log, as lines like our own."""

    def emit(self, record: logging.LogRecord) -> None:
        message = (record.getMessage().splitlines() or [""])[0]
        structlog.get_logger().log(record.levelno, message, logger=record.name, exc_info=record.exc_info)
