"""The flags that `run` and `list` share, and how they become `Settings`: a flag beats the environment."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sandbox_plugin.config import parsers
from sandbox_plugin.config.load import CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, flag_or_variable, load_settings
from sandbox_plugin.config.settings import OPTIONS, Settings, UsageError, refusing
from sandbox_plugin.hints import did_you_mean


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the flags of these settings, with their environment variable and default in the help.

    A flag that is not given is not in the parsed arguments.
    """
    parser.add_argument(
        "--fake-sysfs",
        metavar="DIR|PRESET",
        default=argparse.SUPPRESS,
        help="use a fake host instead of the real one: a directory with sys/ and dev/, or a preset (`sandbox-plugin "
        f"fake-node presets` lists them) [{FAKE_SYSFS_VARIABLE}]",
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


def require_aiohttp(flag: str) -> None:
    """Raises `UsageError` where what this flag needs is not installed."""
    if find_spec("aiohttp") is None:
        raise UsageError(f"{flag}: aiohttp is not installed: install the package with its extra, sandbox-plugin[dra]")


def pci_address(text: str) -> str:
    """As sysfs writes it: lower-case, with the domain, which people leave out when it is 0000."""
    text = text.lower()
    return f"0000:{text}" if text.count(":") == 1 else text


@contextmanager
def settings_from(args: argparse.Namespace) -> Iterator[Settings]:
    """The settings of one run. A preset's tree exists for as long as the context."""
    flags = vars(args)
    settings = load_settings(flags, os.environ)
    fake = flag_or_variable("fake_sysfs", flags, FAKE_SYSFS_VARIABLE, os.environ)
    if fake is None:
        yield settings
    elif _has_sys(*fake):
        with refusing(fake[1]):
            root = parsers.path(fake[0])
        yield settings.on_fake_host(root)
    else:
        with _preset(*fake) as root:
            yield settings.on_fake_host(root)


@contextmanager
def _preset(name: str, where: str) -> Iterator[Path]:
    """A node that is made for this run. Raises `UsageError` if there is no such preset."""
    from sandbox_plugin.cli.temporary import temporary_folder
    from sandbox_plugin.fake.node import FakeNode
    from sandbox_plugin.fake.presets import PRESETS

    if name not in PRESETS or os.path.exists(name):
        hint = did_you_mean(name, PRESETS)
        why = f"{name!r}{hint} is neither a folder with `sys` in it nor a preset ({', '.join(PRESETS)})"
        raise UsageError(f"{where}: {why}")
    with temporary_folder("sandbox-plugin-") as folder:
        yield FakeNode.create(folder / name, name).root


def _has_sys(folder: str, where: str) -> bool:
    """Whether there is a folder `sys` in this one. Raises `UsageError` where that cannot be told."""
    try:
        return bool(folder) and stat.S_ISDIR(os.stat(f"{folder}/sys").st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return False
    except OSError as error:
        raise UsageError(f"{where}: {folder!r}: {error.strerror}") from None
