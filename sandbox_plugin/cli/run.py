"""`sandbox-plugin run`: the daemon, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import structlog

from sandbox_plugin import __version__
from sandbox_plugin.cli.logs import configure_logs
from sandbox_plugin.cli.options import add_options, require_aiohttp, settings_from
from sandbox_plugin.cli.signals import run_until_signal
from sandbox_plugin.config.load import known_variables, unknown_variables
from sandbox_plugin.config.settings import OPTIONS, Settings
from sandbox_plugin.daemon import Daemon
from sandbox_plugin.hints import did_you_mean
from sandbox_plugin.shutdown import Shutdown

_NO_VM = "they follow from what sysfs shows, and Node Feature Discovery labels the node: no VM is started for them"

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The daemon: finds devices bound to vfio-pci, writes CDI specs, registers with the kubelet and follows the "
        "node until SIGTERM or SIGINT."
    )
    add_options(parser, *(option.name for option in OPTIONS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as long as there are no tasks to log
    with settings_from(args) as settings:
        for flag, is_on in (("--dra", settings.dra), ("--node-events", settings.node_events)):
            if is_on:
                require_aiohttp(flag)
        configure_logs(settings.log_format, settings.log_level, sys.stderr)
        return _run_daemon(settings)


def _run_daemon(settings: Settings) -> int:
    """Runs the daemon; a signal is its graceful end, anything else that ends it is a failure."""

    daemon, shutdown = Daemon(settings), Shutdown()

    async def work() -> None:
        log.info("starting", version=__version__, host=str(settings.host_root), kubelet_dir=str(settings.kubelet_dir))
        for name in unknown_variables(os.environ):
            hint = did_you_mean(name, known_variables())
            log.warning("unknown variable", name=name, reason=f"no setting has this name{hint}; it is ignored")
        if settings.gpu_feature_labels:
            log.info("labels of GPU Feature Discovery", path=str(settings.features_folder), reason=_NO_VM)
        await daemon.run(shutdown)

    try:
        ended_by = run_until_signal(work, {signal.SIGUSR1: daemon.log_state}, at_signal=shutdown.begin)
    except ExceptionGroup:  # it is logged
        return 1
    finally:
        shutdown.is_over()
    log.info("stopped", reason=ended_by.name if ended_by else "")
    return 0
