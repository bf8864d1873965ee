"""From what the user gives to `Settings`: a flag beats the environment, which beats the config file.

Everything is validated here, once; every `UsageError` says which flag, variable or key is wrong and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sandbox_plugin.config import parsers
from sandbox_plugin.config.settings import OPTIONS, VARIABLE_PREFIX, ConfigFile, Given, Settings, UsageError, refusing

CONFIG_VARIABLE = f"{VARIABLE_PREFIX}CONFIG"
_NODE_NAME = next(option.environment for option in OPTIONS if option.name == "node_name")
FAKE_SYSFS_VARIABLE = f"{VARIABLE_PREFIX}FAKE_SYSFS"


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str]) -> Settings:
    """The settings, from the flags that were given, by field name, and the environment. Raises `UsageError`.

    All that is in the config file is checked, also what a flag or variable overrides: a wrong file is refused whole.
    """
    config = _config_file(flags, environment)
    if {"gpu_alias", "nvswitch_alias"} <= config.settings.keys():
        _refuse_the_same(config.settings["gpu_alias"], config.settings["nvswitch_alias"])
    given = {option.name: Given(option.default, f"the default of {option.flag}") for option in OPTIONS}
    given |= config.settings
    for option in OPTIONS:
        variable = environment.get(option.environment)
        if option.name in flags:
            given[option.name] = option.given(flags[option.name], option.flag)
        elif variable is not None and (variable or option.reference_variable):
            given[option.name] = option.given(variable, option.environment)
    aliases = given["gpu_alias"], given["nvswitch_alias"]
    _refuse_the_same(*aliases)
    for name in config.type_names.values():  # a vGPU never shares a resource with whole GPUs
        for alias in (*aliases, *config.model_names.values()):
            _refuse_the_same(name, alias)
    if not all(alias.value for alias in aliases):
        for model in config.model_names.values():
            for alias in aliases:
                _refuse_the_same(model, alias)
    for needing in [each for each in (given["dra"], given["node_events"]) if each.value]:
        if given["node_name"].value is None:
            raise UsageError(f"{needing.where}: needs the name of this node, as {_NODE_NAME} or --node-name")
        if given["api_server"].value is None and not environment.get("KUBERNETES_SERVICE_HOST"):
            raise UsageError(f"{needing.where}: this is no pod, so --api-server must say where the API server is")
    if given["device_plugin"].value == "off" and not given["dra"].value:
        raise UsageError(f"{given['device_plugin'].where}: without --dra nothing would be offered")
    return Settings(
        **{name: each.value for name, each in given.items()},
        resources=config.resources,
        model_names={its_id: model.value for its_id, model in config.model_names.items()},
        type_names={its_id: each.value for its_id, each in config.type_names.items()},
    )


def flag_or_variable(
    name: str, flags: Mapping[str, str], variable: str, environment: Mapping[str, str]
) -> tuple[str, str] | None:
    """The text of a flag that is no setting, or of its variable, and which of them it was.

    None: neither was given. An empty variable is as good as unset, an empty flag is not.
    """
    if name in flags:
        return flags[name], "--" + name.replace("_", "-")
    return (environment[variable], variable) if environment.get(variable) else None


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: a misspelt one would be missed without a word."""
    known = known_variables()
    return sorted(name for name in environment if name.startswith(VARIABLE_PREFIX) and name not in known)


def known_variables() -> set[str]:
    """The variables that mean something to the program."""
    return {CONFIG_VARIABLE, FAKE_SYSFS_VARIABLE, *(option.environment for option in OPTIONS)}


def _config_file(flags: Mapping[str, str], environment: Mapping[str, str]) -> ConfigFile:
    found = flag_or_variable("config", flags, CONFIG_VARIABLE, environment)
    if found is None:
        return ConfigFile({}, (), {}, {})
    from sandbox_plugin.config.file import parse_config  # with a parser of TOML, which few need

    path, given_by = found
    with refusing(given_by):
        parsers.path(path)
    where = f"config file {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{where}: cannot be read: {reason}") from None
    return parse_config(text, where)


def _refuse_the_same(one: Given, other: Given) -> None:
    """Two kinds of device under one alias, or a model and a kind under one name, would be one resource."""
    if one.value and one.value == other.value:
        raise UsageError(f"{one.where} and {other.where} are both {one.value!r}: they must differ")
