"""`sandbox-plugin completion`: a script that makes a shell complete this command line.

shtab makes it from the parsers, so the shell need not start this program at each TAB: that would take a tenth of a
second and more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

from sandbox_plugin.cli.commands import parser_of
from sandbox_plugin.cli.stdout import say
from sandbox_plugin.config.settings import OPTIONS
from sandbox_plugin.fake.presets import PRESETS

_SHELLS = ("bash", "zsh", "fish")
_FILES = {"DIR": shtab.DIRECTORY, "DIR|PRESET": shtab.DIRECTORY, "FILE": shtab.FILE, "PATH": shtab.FILE}
"""By what the help calls a value."""
_HOW = """\
for this shell alone:
  bash:  source <(sandbox-plugin completion bash)
  fish:  sandbox-plugin completion fish | source
for each new one, into a file:
  bash:  ~/.local/share/bash-completion/completions/sandbox-plugin
  zsh:   _sandbox-plugin in a folder of $fpath, before compinit runs
  fish:  ~/.config/fish/completions/sandbox-plugin.fish
"""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints a script that makes a shell complete commands, flags, choices and paths."
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    parser = parser_of(lambda _: True)
    for action in _actions(parser):
        _say_what_it_takes(action)
    say(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments, those of commands and verbs too."""
    for action in parser._actions:  # argparse has no other way, and shtab goes it too
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _say_what_it_takes(action: argparse.Action) -> None:
    """Choices that our own parsers check, so that a refusal is in our words; and paths."""
    words = {option.flag: option.words for option in OPTIONS}
    if action.metavar == "PRESET":
        action.choices = list(PRESETS)
    for flag in action.option_strings:
        action.choices = words.get(flag) or action.choices
    if isinstance(action.metavar, str) and action.metavar in _FILES:
        action.complete = _FILES[action.metavar]  # type: ignore[attr-defined]
