"""The command line: finds the command, turns a `UsageError` into one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sandbox_plugin import __version__
from sandbox_plugin.cli import demo, fake_node, list_devices, run
from sandbox_plugin.settings import UsageError

_DESCRIPTION = """\
Gives whole passthrough GPUs to virtual machines that run pods (Kata Containers, confidential Kata, KubeVirt):
a Kubernetes device plugin that follows what is bound to vfio-pci on this node.

Without a command it is `run`, the daemon.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 a graceful end, 2 something wrong was given, 1 otherwise."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["run", *arguments]
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        words = " ".join(unknown)
        parser.exit(2, f"sandbox-plugin: unrecognized arguments: {words} (see {parser.prog} {arguments[0]} --help)\n")
    try:
        status: int = args.run(args)
    except UsageError as error:
        print(f"sandbox-plugin: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        sys.stderr.close()
        return 1
    return status


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"sandbox-plugin: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="sandbox-plugin",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sandbox-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_parser(commands)
    list_devices.add_parser(commands)
    demo.add_parser(commands)
    fake_node.add_parser(commands)
    return parser
