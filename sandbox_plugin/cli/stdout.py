"""Printing for commands: what stdout cannot take is an OSError that names it, and never a traceback.

Apart from `tables`, because it needs none of rich, which takes a while to import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def say(text: str) -> None:
    """Prints a line or more, at once."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with _naming_stdout():
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def visible(text: str) -> str:
    """One line, with what a terminal would obey, or not show, written as in Python: `\\x1b` for an escape.

    Names come from vendors and from sysfs, and may hold anything.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def flush() -> None:
    """Prints at once what others have written to stdout."""
    with _naming_stdout():
        print(end="", flush=True)


def drop() -> None:
    """Gives up what could not be printed. Else the interpreter would try again at its end, and complain or hang."""
    with suppress(OSError, AttributeError):  # AttributeError: there is no stdout at all
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None
