"""The flags that `run` and `list` share, and how they become `Settings`: a flag beats the environment."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_plugin.cli.temporary import temporary_folder
from sandbox_plugin.config import parsers
from sandbox_plugin.config.load import CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, flag_or_variable, load_settings
from sandbox_plugin.config.settings import OPTIONS, Settings, UsageError, refusing
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the flags of these settings, with their environment variable and default in the help.

    A flag that is not given is not in the parsed arguments.
    """
    parser.add_argument(
        "--fake-sysfs",
        metavar="DIR|PRESET",
        default=argparse.SUPPRESS,
        help="use a fake host instead of the real one: a directory with sys/ and dev/, or a preset "
        f"({', '.join(PRESETS)}) [{FAKE_SYSFS_VARIABLE}]",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"TOML file with resource rules and any of the settings [{CONFIG_VARIABLE}]",
    )
    for option in OPTIONS:
        if option.name in names:
            parser.add_argument(
                option.flag,
                nargs="?" if option.is_switch else None,
                const="true" if option.is_switch else None,
                metavar=option.metavar,
                default=argparse.SUPPRESS,
                help=f"{option.help} [{option.environment}; default: {option.default_text}]",
            )


@contextmanager
def settings_from(args: argparse.Namespace) -> Iterator[Settings]:
    """The settings of one run. A preset's tree exists for as long as the context."""
    flags = vars(args)
    settings = load_settings(flags, os.environ)
    fake = flag_or_variable("fake_sysfs", flags, FAKE_SYSFS_VARIABLE, os.environ)
    if fake is None:
        yield settings
    elif fake[0] in PRESETS and not os.path.exists(fake[0]):
        with temporary_folder("sandbox-plugin-") as folder:
            yield settings.on_fake_host(FakeNode.create(folder / fake[0], fake[0]).root)
    else:
        yield settings.on_fake_host(_fake_host(*fake))


def _fake_host(folder: str, where: str) -> Path:
    """Raises `UsageError` unless there is a folder `sys` in this one that can be entered, and its path can be used."""
    try:
        has_sys = bool(folder) and stat.S_ISDIR(os.stat(f"{folder}/sys").st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        has_sys = False
    except OSError as error:
        raise UsageError(f"{where}: {folder!r}: {error.strerror}") from None
    if not has_sys:
        raise UsageError(
            f"{where}: {folder!r} is neither a folder with `sys` in it nor a preset ({', '.join(PRESETS)})"
        )
    with refusing(where):
        return parsers.path(folder)
