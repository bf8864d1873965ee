"""From what the user gives to `Settings`: a flag beats the environment, which beats the config file.

Everything is validated here, once; every `UsageError` says which flag, variable or key is wrong and what is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_plugin.config.file import ConfigFile, parse_config
from sandbox_plugin.config.settings import Consumer, Policy, Settings, UsageError
from sandbox_plugin.names import SHORTEST_SOCKET_NAME, SOCKET_PATH_BYTES, check_alias

CONFIG_VARIABLE = "SANDBOX_PLUGIN_CONFIG"
FAKE_SYSFS_VARIABLE = "SANDBOX_PLUGIN_FAKE_SYSFS"
_PREFIX = "SANDBOX_PLUGIN_"
_SOCKET_FOLDER_BYTES = SOCKET_PATH_BYTES - len("/") - SHORTEST_SOCKET_NAME
"""Longest path of a folder in which there is room for a socket of ours, if need be with its shortest name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting as the user gives it. `parse` raises ValueError saying what is allowed."""

    name: str
    """The field of `Settings`."""
    flag: str
    environment: str
    metavar: str
    help: str
    parse: Callable[[str], Any]
    switch: bool = False
    """The flag alone means true."""
    empty_counts: bool = False
    """Whether a variable that is set but empty is a value of its own; else it is as good as unset."""

    @property
    def default_text(self) -> str:
        """The default as the user would give it."""
        default = getattr(Settings(), self.name)
        if default is None:
            return "console on a terminal, else json"
        if isinstance(default, float):
            return f"{default:g}"
        return str(default).lower() if isinstance(default, bool) else str(default)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A value, and the flag, variable or key that it comes from."""

    value: Any
    where: str


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str]) -> Settings:
    """The settings, from the flags that were given, by field name, and the environment. Raises `UsageError`."""
    path = _config_path(flags, environment)
    in_file, rules = _from_file(path)
    given = dict(in_file)
    for option in OPTIONS:
        if option.name in flags:
            given[option.name] = _parsed(option, flags[option.name], option.flag)
        elif environment.get(option.environment) or (option.empty_counts and option.environment in environment):
            given[option.name] = _parsed(option, environment[option.environment], option.environment)
    aliases = [given.get(name) or _default(name) for name in ("gpu_alias", "nvswitch_alias")]
    _refuse_the_same(*aliases)
    if any(not alias.value for alias in aliases):
        for (vendor, device), name in rules.model_names.items():
            model = _Given(value=name, where=f"config file {path}: names: '{vendor:04x}:{device:04x}'")
            for alias in aliases:
                _refuse_the_same(model, alias)
    values = {name: each.value for name, each in given.items()}
    return Settings(**values, resources=rules.resources, model_names=rules.model_names)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: a misspelt one would be missed without a word."""
    known = {CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, *(option.environment for option in OPTIONS)}
    return sorted(name for name in environment if name.startswith(_PREFIX) and name not in known)


def _config_path(flags: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    given, where = flags.get("config"), "--config"
    if given is None:
        given, where = environment.get(CONFIG_VARIABLE) or None, CONFIG_VARIABLE
    if given is not None:
        try:
            as_path(given)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
    return given


def _from_file(path: str | None) -> tuple[dict[str, _Given], ConfigFile]:
    """Settings by field name, and the file as a whole. No path, nothing.

    All of them are checked, also those that a flag or variable overrides: a wrong file is refused whole.
    """
    if path is None:
        return {}, ConfigFile()
    where = f"config file {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{where}: cannot be read: {reason}") from None
    by_key = {option.flag.removeprefix("--"): option for option in OPTIONS}
    switches = frozenset(option.flag.removeprefix("--") for option in OPTIONS if option.switch)
    config = parse_config(text, where, frozenset(by_key), switches)
    given = {by_key[key].name: _parsed(by_key[key], text, f"{where}: {key}") for key, text in config.settings.items()}
    if {"gpu_alias", "nvswitch_alias"} <= given.keys():
        _refuse_the_same(given["gpu_alias"], given["nvswitch_alias"])
    return given, config


def _parsed(option: Option, text: str, where: str) -> _Given:
    try:
        return _Given(value=option.parse(text), where=where)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _default(name: str) -> _Given:
    (flag,) = (option.flag for option in OPTIONS if option.name == name)
    return _Given(value=getattr(Settings(), name), where=f"the default of {flag}")


def _refuse_the_same(one: _Given, other: _Given) -> None:
    """Two kinds of device under one alias, or a model and a kind under one name, would be one resource."""
    if one.value and one.value == other.value:
        raise UsageError(f"{one.where} and {other.where} are both {one.value!r}: they must differ")


def _alias(text: str) -> str:
    if text:
        check_alias(text)
    return text


def as_path(text: str) -> Path:
    """Raises ValueError for what is no path, or none that inotify and the kubelet's API can name: those need UTF-8."""
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8, as a path must be here") from None
    return Path(text)


def _socket_folder(text: str) -> Path:
    """A folder that is not there yet is waited for; what is something else will not become one."""
    length = len(os.fsencode(text))
    if length > _SOCKET_FOLDER_BYTES:
        allowed = f"at most {_SOCKET_FOLDER_BYTES} are allowed, so that the names of sockets fit behind it"
        raise ValueError(f"the path has {length} bytes; {allowed}")
    folder = as_path(text)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{text} is not a folder")
    return folder


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise ValueError(f"{text!r} is not a number of seconds between 0.1 and 3600")
    return seconds


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse


OPTIONS: tuple[Option, ...] = (
    Option(
        name="kubelet_dir",
        flag="--kubelet-dir",
        environment="SANDBOX_PLUGIN_KUBELET_DIR",
        metavar="DIR",
        help="the kubelet's device plugin folder",
        parse=_socket_folder,
    ),
    Option(
        name="pod_resources_socket",
        flag="--pod-resources-socket",
        environment="SANDBOX_PLUGIN_POD_RESOURCES_SOCKET",
        metavar="PATH",
        help="the kubelet's PodResources socket; it may be absent",
        parse=as_path,
    ),
    Option(
        name="cdi_dir",
        flag="--cdi-dir",
        environment="SANDBOX_PLUGIN_CDI_DIR",
        metavar="DIR",
        help="where CDI specs are written",
        parse=as_path,
    ),
    Option(
        name="gpu_alias",
        flag="--gpu-alias",
        environment="P_GPU_ALIAS",
        metavar="NAME",
        help="GPUs are nvidia.com/NAME; empty: a resource per model",
        parse=_alias,
        empty_counts=True,
    ),
    Option(
        name="nvswitch_alias",
        flag="--nvswitch-alias",
        environment="NVSWITCH_ALIAS",
        metavar="NAME",
        help="NVSwitches are nvidia.com/NAME; empty: a resource per model",
        parse=_alias,
        empty_counts=True,
    ),
    Option(
        name="consumer",
        flag="--consumer",
        environment="SANDBOX_PLUGIN_CONSUMER",
        metavar="CONSUMER",
        help="who uses the devices: kata or kubevirt",
        parse=lambda text: Consumer(_one_of(*Consumer)(text)),
    ),
    Option(
        name="require_iommufd",
        flag="--require-iommufd",
        environment="SANDBOX_PLUGIN_REQUIRE_IOMMUFD",
        metavar="BOOL",
        switch=True,
        help="list devices without an iommufd cdev as Unhealthy (confidential guests need one)",
        parse=lambda text: _one_of("true", "false")(text.lower()) == "true",
    ),
    Option(
        name="allocation_policy",
        flag="--allocation-policy",
        environment="SANDBOX_PLUGIN_ALLOCATION_POLICY",
        metavar="POLICY",
        help="packed: GPUs that are close together; spread: far apart",
        parse=lambda text: Policy(_one_of(*Policy)(text)),
    ),
    Option(
        name="health_interval",
        flag="--health-interval",
        environment="SANDBOX_PLUGIN_HEALTH_INTERVAL",
        metavar="SECONDS",
        help="seconds between periodic rescans",
        parse=_seconds,
    ),
    Option(
        name="log_format",
        flag="--log-format",
        environment="SANDBOX_PLUGIN_LOG_FORMAT",
        metavar="FORMAT",
        help="json or console",
        parse=_one_of("json", "console"),
    ),
    Option(
        name="log_level",
        flag="--log-level",
        environment="SANDBOX_PLUGIN_LOG_LEVEL",
        metavar="LEVEL",
        help="debug, info, warning or error",
        parse=_one_of("debug", "info", "warning", "error"),
    ),
)
