"""The TOML config file: resource rules, and any setting by its flag's name. A wrong file is refused whole.

    gpu-alias = ""                 # a resource for each model
    [names]                        # what models are called then, instead of their names in pci.ids
    "10de:2330" = "H100"
    "10de:26b9:1155" = "L40S-24Q"  # a type of vGPU, by its number, where no card shows its name

    [[resources]]                  # asked in order before the built-in rules; the first that matches wins
    name = "example.com/gpu"       # or: exclude = true
    vendor = "1002"                # hexadecimal, as lspci -nn prints it; a list means any of them
    class = "0300"                 # two to six digits; the rest may be anything

Every `UsageError` says which key is wrong and what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sandbox_plugin.config import parsers
from sandbox_plugin.config.settings import OPTIONS, ConfigFile, Given, Option, ResourceRule, UsageError, refusing
from sandbox_plugin.hints import did_you_mean
from sandbox_plugin.model import NVIDIA
from sandbox_plugin.names import check_alias, check_resource_name

_T = TypeVar("_T")

_ADDRESS = r"[0-9a-fA-F?]{4,8}:[0-9a-fA-F?]{2}:[01?][0-9a-fA-F?]\.[0-7?]"
_UUID = r"[0-9a-fA-F?]{8}(-[0-9a-fA-F?]{4}){3}-[0-9a-fA-F?]{12}"
_ADDRESS_PATTERN = r"[0-9a-fA-F:.*?-]+"
_OVERWRITTEN = "Cannot overwrite a value"
"""What tomllib says of a key that is there twice."""
_CONDITIONS = (
    *("vendor", "device", "class", "subsystem", "address", "driver"),
    *("virtual", "physical-function", "type"),
)


def parse_config(text: str, where: str) -> ConfigFile:
    """Reads a config file. `where` names the file in messages. Raises `UsageError`."""
    document = _read(text, where)
    rules, names = document.pop("resources", []), document.pop("names", {})
    options = {option.flag.removeprefix("--"): option for option in OPTIONS}
    settings = {}
    for key, value in document.items():
        if key not in options:
            raise _unknown_key(key, sorted([*options, "resources", "names"]), where)
        settings[options[key].name] = _setting(options[key], value, f"{where}: {key}")
    named = _names(names, f"{where}: names")
    types = {(vendor, device, number): name for (vendor, device, number), name in named.items() if number is not None}
    models = {(vendor, device): name for (vendor, device, number), name in named.items() if number is None}
    return ConfigFile(settings, _rules(rules, where), models, types)


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        why = str(error)
        raise UsageError(f"{where}: {_given_twice(text, why) if _OVERWRITTEN in why else why}") from None
    except RecursionError:
        raise UsageError(f"{where}: brackets are nested too deeply") from None
    except ValueError:  # int() of the standard library takes only so many digits
        raise UsageError(f"{where}: a number has too many digits") from None


def _given_twice(text: str, why: str) -> str:
    """Which key is meant, and its line: tomllib says at best where the value ends, and never the key.

    The line is the last one before which all is complete. As it was, if the key is one within the value.
    """
    lines = text.split("\n")
    number = len(lines)
    while _what_is_wrong(lines[: number - 1]):
        number -= 1
    key, has_value, _ = lines[number - 1].partition("=")
    if has_value and _OVERWRITTEN not in _what_is_wrong([*lines[: number - 1], f"{key}= 0"]):
        return why
    return f"line {number}: {key.strip()!r} has a value already"


def _unknown_key(key: str, allowed: Sequence[str], where: str) -> UsageError:
    hint = did_you_mean(key, allowed)
    return UsageError(f"{where}: unknown key {key!r}{hint}; allowed are {', '.join(allowed)}")


def _what_is_wrong(lines: Sequence[str]) -> str:
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        return str(error)
    return ""


def _setting(option: Option, value: Any, where: str) -> Given:
    """As if the value were written behind the flag."""
    if isinstance(value, bool) and not option.is_switch:  # a parser of text would take it for the word
        raise UsageError(f"{where} must be a string or a number, not {str(value).lower()}")
    if not isinstance(value, str | int | float):
        allowed = "true or false" if option.is_switch else "a string or a number"
        raise UsageError(f"{where} must be {allowed}")
    try:
        text = str(value)
    except ValueError:  # str() of the standard library writes only so many digits
        raise UsageError(f"{where}: a number has too many digits") from None
    return option.given(text, where)


def _names(table: Any, where: str) -> dict[tuple[int, int, int | None], Given]:
    """By vendor, device, and the number of a type of vGPU, or None for the model itself."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table of lines such as '10de:2330' = 'H100'")
    names: dict[tuple[int, int, int | None], Given] = {}
    for model, name in table.items():
        with refusing(f"{where}: {model!r}"):
            if not isinstance(name, str):
                raise ValueError("a name must be a string")
            check_alias(name)
            vendor, device, number = _model_or_type(model)
            if vendor != NVIDIA:  # only the built-in rules make a resource of a model
                raise ValueError(
                    f"names are for NVIDIA's models, '{NVIDIA:04x}:...'; others are named by [[resources]]"
                )
            suffix = "" if number is None else f":{number}"
            given = Given(name, f"{where}: '{vendor:04x}:{device:04x}{suffix}'")
            if (known := names.setdefault((vendor, device, number), given)) != given:
                raise ValueError(f"this {'model' if number is None else 'type'} has the name {known.value!r} already")
    return names


def _model_or_type(word: str) -> tuple[int, int, int | None]:
    model, _, number = word.rpartition(":")
    if ":" not in model:
        return (*_pair(word), None)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise ValueError(f"{number!r} is not the number of a vGPU type, e.g. '10de:26b9:1155'")
    return (*_pair(model), int(number))


def _rules(tables: Any, where: str) -> tuple[ResourceRule, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{where}: resources must be tables, each one starts with a line [[resources]]")
    return tuple(_rule(table, f"{where}: resources[{index}]") for index, table in enumerate(tables))


def _rule(table: Mapping[str, Any], where: str) -> ResourceRule:
    unknown = sorted(table.keys() - {"name", "exclude", *_CONDITIONS})
    if unknown:
        raise _unknown_key(unknown[0], ("name", "exclude", *_CONDITIONS), where)
    if not table.keys() & set(_CONDITIONS):
        raise UsageError(f"{where}: no condition, so it would match everything; use one of {', '.join(_CONDITIONS)}")
    return ResourceRule(
        label=where.rpartition(": ")[2],
        name=_name(table, where),
        vendors=frozenset(_words(table, "vendor", where, _four_digits)),
        devices=frozenset(_words(table, "device", where, _four_digits)),
        classes=tuple(_words(table, "class", where, _class_prefix)),
        subsystems=frozenset(_words(table, "subsystem", where, _pair)),
        addresses=tuple(_words(table, "address", where, _address)),
        drivers=frozenset(_words(table, "driver", where, str)),
        virtual=_virtual(table, where),
        physical_functions=tuple(_words(table, "physical-function", where, _pci_address)),
        types=tuple(_words(table, "type", where, str)),
    )


def _virtual(table: Mapping[str, Any], where: str) -> bool | None:
    return _truth(table["virtual"], f"{where}: virtual") if "virtual" in table else None


def _truth(value: Any, where: str) -> bool:
    """As with a setting that is true or false, a word for it will do."""
    if not isinstance(value, bool | str | int):
        raise UsageError(f"{where} must be true or false")
    with refusing(where):
        return parsers.switch(str(value))


def _name(table: Mapping[str, Any], where: str) -> str | None:
    exclude, name = _truth(table.get("exclude", False), f"{where}: exclude"), table.get("name")
    if exclude and name is not None:
        raise UsageError(f"{where}: use either name or exclude = true, not both")
    if not exclude and name is None:
        raise UsageError(f"{where}: use name = 'example.com/gpu', or exclude = true to offer none of these")
    if exclude:
        return None
    if not isinstance(name, str):
        raise UsageError(f"{where}: name must be a string such as 'example.com/gpu'")
    with refusing(f"{where}: name"):
        check_resource_name(name)
    return name


def _words(table: Mapping[str, Any], key: str, where: str, parse: Callable[[str], _T]) -> list[_T]:
    given = table.get(key, [])
    words = given if isinstance(given, list) else [given]
    if (key in table and not words) or not all(isinstance(word, str) and word for word in words):
        raise UsageError(f"{where}: {key} must be a string or a list of strings")
    with refusing(f"{where}: {key}"):
        return [parse(word) for word in words]


def _four_digits(word: str) -> int:
    if not re.fullmatch(r"(0x)?[0-9a-fA-F]{4}", word):
        raise ValueError(f"{word!r} is not four hexadecimal digits, e.g. '10de'")
    return int(word, 16)


def _class_prefix(word: str) -> str:
    digits = word.lower().removeprefix("0x")
    if not re.fullmatch(r"[0-9a-f]{2}|[0-9a-f]{4}|[0-9a-f]{6}", digits):
        raise ValueError(f"{word!r} is not two, four or six hexadecimal digits, e.g. '0302'")
    return digits


def _pair(word: str) -> tuple[int, int]:
    vendor, separator, device = word.partition(":")
    if not separator:
        raise ValueError(f"{word!r} is not VENDOR:DEVICE, e.g. '10de:16c1'")
    return (_four_digits(vendor), _four_digits(device))


def _address(word: str) -> str:
    """Of a PCI function, or the UUID of a mediated device."""
    return word.lower() if re.fullmatch(_UUID, word) else _pci_address(word, other=", or the UUID of a mediated device")


def _pci_address(word: str, other: str = "") -> str:
    """A pattern with a `*` can match; any other must have the shape of an address, or it never matches. `other`: what
    else would be allowed, in words."""
    if not re.fullmatch(_ADDRESS_PATTERN if "*" in word else _ADDRESS, word):
        raise ValueError(
            f"{word!r} is not a whole PCI address such as '0000:41:00.0'{other}, "
            "in which * matches anything and ? any one character"
        )
    return word.lower()
