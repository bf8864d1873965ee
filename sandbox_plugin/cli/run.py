"""`sandbox-plugin run`: the daemon, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections import Counter
from typing import Any

import structlog

from sandbox_plugin import __version__, daemon
from sandbox_plugin.cli.logs import configure_logs
from sandbox_plugin.cli.options import add_options, settings_from
from sandbox_plugin.configuration import DAEMON_OPTIONS, unknown_variables
from sandbox_plugin.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="the daemon, until SIGTERM or SIGINT (also what runs without a command)",
        description="The daemon: finds devices bound to vfio-pci, writes CDI specs, registers with the kubelet and "
        "follows the node until SIGTERM or SIGINT.",
        allow_abbrev=False,
    )
    add_options(parser, *DAEMON_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with settings_from(args) as settings:
        configure_logs(settings.log_format, settings.log_level, sys.stderr)
        return asyncio.run(_until_signal(settings))


async def _until_signal(settings: Settings) -> int:
    """Runs the daemon; a signal is its graceful end, anything else that ends it is a failure."""
    log.info("starting", version=__version__, host=str(settings.host_root), kubelet_dir=str(settings.kubelet_dir))
    for name in unknown_variables(os.environ):
        log.warning("unknown variable", name=name, reason="no setting has this name; it is ignored")
    work = asyncio.ensure_future(daemon.run(settings))
    loop = asyncio.get_running_loop()
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        work.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGUSR1, _log_tasks)
    try:
        await work
    except asyncio.CancelledError:
        if not received:
            raise
    except ExceptionGroup as failures:
        log.critical("a part of the daemon failed", exc_info=failures)
        return 1
    log.info("stopped", reason=received[0].name if received else "")
    return 0


def _log_tasks() -> None:
    """For whoever wonders what the daemon is doing, or whether it grows."""
    running = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    log.info("tasks", count=running.total(), running=dict(sorted(running.items())))
