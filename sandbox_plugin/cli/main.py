"""The command line: finds the command, and turns what stops it into one line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sandbox_plugin import __version__
from sandbox_plugin.cli.signals import Interrupted, interrupting
from sandbox_plugin.cli.stdout import drop, flush
from sandbox_plugin.settings import UsageError

_DESCRIPTION = """\
Kubernetes device plugin for whole passthrough GPUs, for pods that run in virtual machines (Kata Containers,
confidential Kata, KubeVirt). Without a command it runs the daemon.
"""
_UNTIL_A_SIGNAL = ("run", "demo")
"""Commands whose graceful end is a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 a graceful end, 2 something wrong was given, 128 and its number a signal, 1 otherwise.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["run", *arguments]
    try:
        with interrupting():
            return _run(arguments)
    except UsageError as error:
        return _failed(2, str(error))
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        drop()
        return 1
    except OSError as error:
        drop()
        return _failed(1, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    except Interrupted as end:
        drop()
        return 0 if arguments[0] in _UNTIL_A_SIGNAL else 128 + end.number


def _run(arguments: list[str]) -> int:
    # Imported here, because it takes a large part of a second in which a signal may come too.
    from sandbox_plugin.cli import demo, fake_node, list_devices, run

    parser = _OneLineParser(
        prog="sandbox-plugin",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sandbox-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (run, list_devices, demo, fake_node):
        command.add_parser(commands)
    try:
        args = parser.parse_args(arguments)
    except SystemExit:  # it has printed help
        flush()
        raise
    status: int = args.run(args)
    return status


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it, and which help to read."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own, but the parser of a command names what it does not know: the outer one has other help."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"sandbox-plugin: {message} (see {self.prog} --help)\n")


def _failed(status: int, why: str) -> int:
    with suppress(OSError):  # whoever closed stderr does not want to know
        print(f"sandbox-plugin: {why}", file=sys.stderr)
    return status
