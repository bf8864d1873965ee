"""The flags that `run` and `list` share, and how they become `Settings`: a flag beats the environment."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_plugin.configuration import CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, OPTIONS, load_settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.settings import Settings, UsageError


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the flags of these settings, with their environment variable and default in the help."""
    parser.add_argument(
        "--fake-sysfs",
        metavar="DIR|PRESET",
        default=None,
        help="read a made-up host: DIR/sys and DIR/dev, or a preset made in a temporary folder "
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
    fake = args.fake_sysfs if args.fake_sysfs is not None else os.environ.get(FAKE_SYSFS_VARIABLE, "")
    if not fake:
        yield settings
    elif fake in PRESETS and not Path(fake).exists():
        with tempfile.TemporaryDirectory(prefix="sandbox-plugin-") as folder:
            FakeNode.create(Path(folder) / fake, fake)
            yield settings.on_fake_host(Path(folder) / fake)
    elif not (Path(fake) / "sys").is_dir():
        raise UsageError(
            f"--fake-sysfs: {fake!r} is neither a folder with `sys` in it nor a preset ({', '.join(PRESETS)})"
        )
    else:
        yield settings.on_fake_host(Path(fake))
