"""The command line: finds the command, and turns what stops it into one line and an exit status."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from sandbox_plugin import __version__
from sandbox_plugin.cli.stdout import drop, flush, visible
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.hints import did_you_mean, not_one_of

_DESCRIPTION = """\
Kubernetes device plugin for whole passthrough GPUs, for pods that run in
virtual machines (Kata Containers, confidential Kata, KubeVirt). Without a
command it runs the daemon.
"""


_COMMANDS = {
    "run": ("run", "the daemon, until SIGTERM or SIGINT (also what runs without a command)"),
    "list": ("list_devices", "what would be advertised, and why not the rest"),
    "status": ("status", "what the running daemon thinks: devices, holders, registrations"),
    "doctor": ("doctor", "is this node ready for passthrough, and what to do if it is not"),
    "vfio": ("vfio", "give GPUs to vfio drivers and back: status, bind, unbind"),
    "demo": ("demo", "watch the daemon on a fake node with a fake kubelet"),
    "fake-node": ("fake_node", "make a fake node, and change it as hardware would"),
    "completion": ("completion", "print the completion of this command line for bash, zsh or fish"),
}
"""Command -> its module, with a function `set_up` that makes its parser, and what it is for. Only the module of the one
that is wanted is imported: the daemon needs nothing of what people's commands need, and a node waits for it."""


def run_command(arguments: Sequence[str]) -> int:
    """Runs the command that these arguments name. Returns its exit status."""
    try:
        args = parser_of(lambda name: name == arguments[0]).parse_args(arguments)
    except SystemExit:  # it has printed help
        flush()
        raise
    status: int = args.run(args)
    return status


def parser_of(is_wanted: Callable[[str], bool]) -> argparse.ArgumentParser:
    """The parser of the whole command line. The arguments of a command that is not wanted are left out."""
    parser = _OneLineParser(
        prog="sandbox-plugin",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sandbox-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if is_wanted(name):
            _module(f"sandbox_plugin.cli.{module}").set_up(command)
    return parser


def _module(name: str) -> Any:
    """A command's module. What it imports stays, so no garbage is looked for in that, neither now nor later."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def status_after(error: Exception) -> int:
    """The exit status of a command that this stopped; the line that says why is printed. Raises what is our fault."""
    match error:
        case UsageError():
            return _failed(2, str(error))
        case BrokenPipeError():  # the reader of our output has seen enough, as `head` does
            drop()
            return 1
        case OSError():
            drop()
            return _failed(1, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    raise error


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it, and which help to read."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own, but the parser of a command names what it does not know: the outer one has other help."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            words = (f"{word}{self._hint(word) if word.startswith('--') else ''}" for word in unknown)
            self.error(f"unrecognized arguments: {' '.join(words)}")
        return known, unknown

    def _hint(self, flag: str) -> str:
        return did_you_mean(flag.partition("=")[0], self._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's own, with a hint: the choices of a command, a verb or a flag."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(str(value), map(str, action.choices)))

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"sandbox-plugin: {visible(message)} (see {self.prog} --help)\n")


def _failed(status: int, why: str) -> int:
    with suppress(OSError):  # whoever closed stderr does not want to know
        print(f"sandbox-plugin: {visible(why)}", file=sys.stderr)
    return status
