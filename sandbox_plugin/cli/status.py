"""`sandbox-plugin status`: what the running daemon thinks, asked over its status socket.

It is the pod's probe too, which runs every few seconds: what is imported here must be little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox_plugin.cli.options import add_options
from sandbox_plugin.cli.signals import Interrupted
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.config.load import FAKE_SYSFS_VARIABLE, flag_or_variable, load_settings
from sandbox_plugin.config.settings import UsageError

_TIMEOUT = 1.5
"""Seconds for the whole answer."""
_MOST = 16 << 20
"""Bytes of an answer: no daemon says more."""
_REFRESH = 1.0
"""Seconds between two screens of --watch."""


class _NoAnswer(Exception):
    """No daemon answers, and why."""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Asks the daemon of this node over its status socket. Exit status: 0 all is well, or it stands by while "
        "another plugin serves the node; 1 something is not well, or no daemon answers; 2 wrong usage."
    )
    add_options(parser, "status_socket")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--output", type=str.lower, choices=("table", "json"), default="table", help="default: table")
    how.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    how.add_argument(
        "--probe",
        action="store_true",
        help="one line, for a readiness probe: 1 only when the plugin cannot serve, not when a device is Unhealthy",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    path = _socket_path(args)
    if args.watch:
        return _watch(path)
    try:
        document = _ask(path)
    except _NoAnswer as error:
        print(f"sandbox-plugin: {visible(str(error))}", file=sys.stderr)
        return 1
    if args.probe:
        reasons = document["not_ready"]
        ready = "standing by" if document["turn"]["state"] == "standing by" else "ready"
        say(visible("not ready: " + "; ".join(reasons)) if reasons else ready)
        return 1 if reasons else 0
    reasons = document["not_ready"] + document["remarks"]
    if args.output == "json":
        say(json.dumps(document, indent=2))
    else:
        from sandbox_plugin.cli.status_table import print_status

        print_status(document)
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        print(f"sandbox-plugin: {visible(reasons[0])}{more}", file=sys.stderr)
    return 1 if reasons else 0


def _socket_path(args: argparse.Namespace) -> Path:
    """Raises `UsageError`."""
    flags = vars(args)
    settings = load_settings(flags, os.environ)
    fake = flag_or_variable("fake_sysfs", flags, FAKE_SYSFS_VARIABLE, os.environ)
    if fake is None:
        return settings.status_socket
    if not os.path.isdir(fake[0]):
        raise UsageError(f"{fake[1]}: {fake[0]!r} is not a folder: of a daemon on a preset give --status-socket")
    return settings.on_fake_host(Path(fake[0])).status_socket


def _ask(path: Path) -> dict[str, Any]:
    """The daemon's document. Raises `_NoAnswer`."""
    end = time.monotonic() + _TIMEOUT
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(str(path))
            while len(answer) < _MOST:
                connection.settimeout(max(end - time.monotonic(), 0.001))
                if not (part := connection.recv(1 << 16)):
                    break
                answer += part
        document: Any = json.loads(answer)
    except TimeoutError:
        raise _NoAnswer(f"the daemon does not answer at {path} within {_TIMEOUT:g} s") from None
    except OSError as error:
        raise _NoAnswer(f"no daemon answers at {path}: {error.strerror or error}") from None
    except ValueError:
        raise _NoAnswer(f"what answers at {path} is no daemon of ours, or it ended meanwhile") from None
    if not isinstance(document, Mapping) or document.get("schema") != 1:
        raise _NoAnswer(f"what answers at {path} is of another version than this command")
    return dict(document)


def _watch(path: Path) -> int:
    from sandbox_plugin.cli.screen import opened
    from sandbox_plugin.cli.status_table import status_lines
    from sandbox_plugin.cli.tables import Line, Styled, is_terminal

    if not is_terminal():
        raise UsageError("--watch: stdout is not a terminal")
    try:
        with opened() as screen:
            while True:
                try:
                    lines: list[Line] = status_lines(_ask(path), shutil.get_terminal_size().columns)
                except _NoAnswer as error:
                    lines = [[Styled(str(error), "bold red")], ["It is asked again every second. Ctrl-C ends this."]]
                screen.draw(lines)
                time.sleep(_REFRESH)
    except Interrupted:
        return 0
