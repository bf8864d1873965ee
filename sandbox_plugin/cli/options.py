"""The flags that `run` and `list` share, and how they become `Settings`: a flag beats the environment."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_plugin.cli.temporary import temporary_folder
from sandbox_plugin.config.options import CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, OPTIONS, as_path, load_settings
from sandbox_plugin.config.settings import Settings, UsageError
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the flags of these settings, with their environment variable and default in the help."""
    parser.add_argument(
        "--fake-sysfs",
        metavar="DIR|PRESET",
        default=None,
        help="use a fake host instead of the real one: a directory with sys/ and dev/, or a preset "
        f"({', '.join(PRESETS)}) [{FAKE_SYSFS_VARIABLE}]",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help=f"TOML file with resource rules and any of the settings [{CONFIG_VARIABLE}]",
    )
    for option in OPTIONS:
        if option.name in names:
            parser.add_argument(
                option.flag,
                dest=option.name,
                nargs="?" if option.switch else None,
                const="true" if option.switch else None,
                metavar=option.metavar,
                default=None,
                help=f"{option.help} [{option.environment}; default: {option.default_text}]",
            )


@contextmanager
def settings_from(args: argparse.Namespace) -> Iterator[Settings]:
    """The settings of one run. A preset's tree exists for as long as the context."""
    flags = {name: getattr(args, name, None) for name in ("config", *(option.name for option in OPTIONS))}
    settings = load_settings({name: text for name, text in flags.items() if text is not None}, os.environ)
    if args.fake_sysfs is not None:
        fake, where = args.fake_sysfs, "--fake-sysfs"
    else:
        fake, where = os.environ.get(FAKE_SYSFS_VARIABLE), FAKE_SYSFS_VARIABLE
        if not fake:
            yield settings
            return
    if fake in PRESETS and not os.path.exists(fake):
        with temporary_folder("sandbox-plugin-") as folder:
            yield settings.on_fake_host(FakeNode.create(folder / fake, fake).root)
    else:
        yield settings.on_fake_host(_fake_host(fake, where))


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
    try:
        return as_path(folder)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
