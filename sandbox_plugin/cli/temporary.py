"""Temporary folders of commands, which are gone when the command has ended, however it ends.

Apart from `signals`, which must have little to import.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_plugin.cli.signals import Interrupted


@contextmanager
def temporary_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """A folder that is removed at the end, also when a signal comes while it is being removed."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        yield Path(folder)
    finally:
        try:
            shutil.rmtree(folder)
        except Interrupted:  # the only one that comes
            shutil.rmtree(folder, ignore_errors=True)
            raise
