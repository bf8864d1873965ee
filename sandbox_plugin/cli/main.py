"""The door: runs a command, with signals attended to, and makes an exit status of how it ended.

What commands need is imported within, because that takes a large part of a second, in which a signal may come too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sandbox_plugin.cli.signals import Interrupted, interrupting

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
            from sandbox_plugin.cli.commands import run_command

            return run_command(arguments)
    except Interrupted as end:
        from sandbox_plugin.cli.stdout import drop

        drop()
        return 0 if arguments[0] in _UNTIL_A_SIGNAL else 128 + end.number
    except Exception as error:
        from sandbox_plugin.cli.commands import status_after

        return status_after(error)
