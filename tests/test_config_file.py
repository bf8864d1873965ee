"""The config file: what it means, and that a wrong one is refused with the place and with what is allowed.

Cases are asked of `load_settings`, the function behind every command; a few of them of the command itself.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon import run_command
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox_plugin.config.file import parse_config
from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import OPTIONS, Consumer, Policy, ResourceRule, Settings, UsageError

KEYS = frozenset(option.flag.removeprefix("--") for option in OPTIONS)

EVERY_KEY = ", ".join(sorted([*KEYS, "names", "resources"]))
CONDITIONS = "vendor, device, class, subsystem, address, driver"
HEX = "is not four hexadecimal digits, e.g. '10de'"
CLASS = "is not two, four or six hexadecimal digits, e.g. '0302'"
PAIR = "is not VENDOR:DEVICE, e.g. '10de:16c1'"
ADDRESS = "is not a whole PCI address such as '0000:41:00.0', in which * matches anything and ? any one character"
ALIAS = "allowed are 2 to 63 letters, digits, `-` and `_`, a letter first and a letter or digit last"
TOO_LONG = "a number has too many digits"


def load(folder: Path, text: str | bytes, **environment: str) -> Settings:
    path = folder / "plugin.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings({"config": str(path)}, environment)


def refused(folder: Path, text: str | bytes) -> str:
    """Why, without the file's name, which must stand at its beginning."""
    with pytest.raises(UsageError) as caught:
        load(folder, text)
    place, found, why = str(caught.value).partition(f"config file {folder}/plugin.toml: ")
    assert (place, bool(found)) == ("", True), str(caught.value)
    return why


# What a file says


def test_every_setting_may_stand_in_the_file_by_its_flags_name(tmp_path: Path) -> None:
    text = """
        kubelet-dir = "/k"
        pod-resources-socket = "/p/kubelet.sock"
        cdi-dir = "/c"
        gpu-alias = ""
        nvswitch-alias = "switch"
        consumer = "kubevirt"
        require-iommufd = true
        allocation-policy = "spread"
        health-interval = 2.5
        log-format = "json"
        log-level = "debug"
    """
    assert {line.partition("=")[0].strip() for line in text.splitlines() if line.strip()} == KEYS
    assert load(tmp_path, text) == Settings(
        kubelet_dir=Path("/k"),
        pod_resources_socket=Path("/p/kubelet.sock"),
        cdi_dir=Path("/c"),
        gpu_alias="",
        nvswitch_alias="switch",
        consumer=Consumer.KUBEVIRT,
        require_iommufd=True,
        allocation_policy=Policy.SPREAD,
        health_interval=2.5,
        log_format="json",
        log_level="debug",
    )


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing yet\n") == Settings()


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plugin.toml"
    path.write_text('gpu-alias = "file"\nnvswitch-alias = "file-switch"\nlog-level = "error"\n')
    flags = {"config": str(path), "gpu_alias": "flag"}
    found = load_settings(flags, {"P_GPU_ALIAS": "variable", "NVSWITCH_ALIAS": "variable-switch"})
    assert (found.gpu_alias, found.nvswitch_alias, found.log_level) == ("flag", "variable-switch", "error")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    (tmp_path / "plugin.toml").write_text('gpu-alias = "file"\n')
    assert load_settings({}, {"SANDBOX_PLUGIN_CONFIG": f"{tmp_path}/plugin.toml"}).gpu_alias == "file"


def test_rules_are_read_in_their_order_with_every_condition_as_a_word_or_a_list(tmp_path: Path) -> None:
    text = """
        [[resources]]
        name = "amd.com/gpu"
        vendor = "0x1002"
        device = ["744C", "74a1"]
        class = ["03", "0x1200", "120000"]
        subsystem = ["1002:0E3B"]
        address = ["0000:4?:00.0", "000A:*"]
        driver = "vfio-pci"

        [[resources]]
        exclude = true
        driver = ["nvidia", "nouveau"]
    """
    assert load(tmp_path, text).resources == (
        ResourceRule(
            label="resources[0]",
            name="amd.com/gpu",
            vendors=frozenset({0x1002}),
            devices=frozenset({0x744C, 0x74A1}),
            classes=("03", "1200", "120000"),
            subsystems=frozenset({(0x1002, 0x0E3B)}),
            addresses=("0000:4?:00.0", "000a:*"),
            drivers=frozenset({"vfio-pci"}),
        ),
        ResourceRule(label="resources[1]", name=None, drivers=frozenset({"nvidia", "nouveau"})),
    )


def test_models_are_named_by_their_ids_in_any_case(tmp_path: Path) -> None:
    found = load(tmp_path, '[names]\n"10de:2330" = "H100"\n"10DE:2BB5" = "RTX-PRO"\n"10DE:2330" = "H100"\n')
    assert found.model_names == {(0x10DE, 0x2330): "H100", (0x10DE, 0x2BB5): "RTX-PRO"}


# What is refused

UNREADABLE = [
    (b"gpu-alias = 'a'\n\ngpu-alias = 'b'\n", "line 3: 'gpu-alias' has a value already"),
    (b"gpu-alias = 'a'\ngpu-alias = 'b'", "line 2: 'gpu-alias' has a value already"),
    (b"gpu-alias = 'a'\r\ngpu-alias = [\r\n'b', # b\r\n]\r\n\r\n# end\r\n", "line 2: 'gpu-alias' has a value already"),
    (b"[[resources]]\nname = 'a.b/cc'\nname = 'a.b/dd'\n", "line 3: 'name' has a value already"),
    (b"[names]\n'10de:2330' = 'A'\n'10de:2330' = 'B'", "line 3: \"'10de:2330'\" has a value already"),
    (b"names = 1\n[names]\n", "line 2: '[names]' has a value already"),
    (b"a = 1\na.b = 2 # = 3", "line 2: 'a.b' has a value already"),
    (b"names = {a = 1, a.b = 2}\n", "Cannot overwrite a value (at line 1, column 24)"),
    (b"'a=b' = 1\n'a=b' = 2\n", "Cannot overwrite a value (at line 2, column 10)"),
    (b"gpu-alias\n", "Expected '=' after a key in a key/value pair (at line 1, column 10)"),
    (b"[[resources]]\nname = amd\n", "Invalid value (at line 2, column 8)"),
    (b"[[resources]\n", "Expected ']]' at the end of an array declaration (at line 1, column 12)"),
    (b"gpu-alias = '\xff'\n", "cannot be read: it is not UTF-8"),
    (b"health-interval = " + b"1" * 5000, TOO_LONG),
    (b"health-interval = 0x" + b"f" * 5000, f"health-interval: {TOO_LONG}"),
    (b"log-level = " + b"[" * 20000, "brackets are nested too deeply"),
]
SETTINGS = [
    ('gpu-aliass = "x"', f"unknown key 'gpu-aliass'; allowed are {EVERY_KEY}"),
    ('gpu_alias = "x"', f"unknown key 'gpu_alias'; allowed are {EVERY_KEY}"),
    ('config = "x"', f"unknown key 'config'; allowed are {EVERY_KEY}"),
    ('"a\\nb" = 1', f"unknown key 'a\\nb'; allowed are {EVERY_KEY}"),
    ('gpu-alias = "NVIDIA GPU"', f"gpu-alias: 'NVIDIA GPU' is not a valid resource name: {ALIAS}"),
    ("gpu-alias = 9", f"gpu-alias: '9' is not a valid resource name: {ALIAS}"),
    ("gpu-alias = false", "gpu-alias must be a string or a number, not false"),
    ('gpu-alias = ["a"]', "gpu-alias must be a string or a number"),
    ("gpu-alias = {a = 1}", "gpu-alias must be a string or a number"),
    ("cdi-dir = 2026-01-01", "cdi-dir must be a string or a number"),
    ("cdi-dir = true", "cdi-dir must be a string or a number, not true"),
    ('cdi-dir = ""', "cdi-dir: '' is not a path"),
    ('cdi-dir = "a\\u0000b"', "cdi-dir: 'a\\x00b' is not a path"),
    ('consumer = "docker"', "consumer: 'docker' is not one of kata, kubevirt"),
    ('allocation-policy = "best"', "allocation-policy: 'best' is not one of packed, spread"),
    ("require-iommufd = [true]", "require-iommufd must be true or false"),
    ("require-iommufd = 1", "require-iommufd: '1' is not one of true, false"),
    ("health-interval = 0", "health-interval: '0' is not a number of seconds between 0.1 and 3600"),
    ("health-interval = nan", "health-interval: 'nan' is not a number of seconds between 0.1 and 3600"),
    ('health-interval = "soon"', "health-interval: 'soon' is not a number of seconds between 0.1 and 3600"),
    ('log-format = "xml"', "log-format: 'xml' is not one of json, console"),
    ('log-level = "loud"', "log-level: 'loud' is not one of debug, info, warning, error"),
]
NAMES = [
    ("names = 1", "names must be a table of lines such as '10de:2330' = 'H100'"),
    ('[names]\n"2330" = "H100"', f"names: '2330': '2330' {PAIR}"),
    ('[names]\n10de.2330 = "H100"', "names: '10de': a name must be a string"),
    ('[names]\n"10de:233" = "H100"', f"names: '10de:233': '233' {HEX}"),
    (
        '[names]\n"1002:74a1" = "MI300X"',
        "names: '1002:74a1': names are for NVIDIA's models, '10de:...'; others are named by [[resources]]",
    ),
    ('[names]\n"10de:2330" = 100', "names: '10de:2330': a name must be a string"),
    ('[names]\n"10de:2330" = "H 100"', f"names: '10de:2330': 'H 100' is not a valid resource name: {ALIAS}"),
    ('[names]\n"10de:2330" = ""', f"names: '10de:2330': '' is not a valid resource name: {ALIAS}"),
    ('[names]\n"10de:\\n" = "H100"', f"names: '10de:\\n': '\\n' {HEX}"),
    ('[names]\n"10de:2bb5" = "AA"\n"10DE:2BB5" = "BB"', "names: '10DE:2BB5': this model has the name 'AA' already"),
]
RULES = [
    ('resources = "x"', "resources must be tables, each one starts with a line [[resources]]"),
    ('[resources]\nname = "a.b/cc"', "resources must be tables, each one starts with a line [[resources]]"),
    ("resources = [1]", "resources must be tables, each one starts with a line [[resources]]"),
]
NAME = 'vendor = "10de"\n'
RULE = [
    (f'vendr = "x"\n{NAME}', f"unknown key 'vendr'; allowed are name, exclude, {CONDITIONS}"),
    ('name = "a.b/cc"', f"no condition, so it would match everything; use one of {CONDITIONS}"),
    (NAME, "use name = 'example.com/gpu', or exclude = true to offer none of these"),
    (f"{NAME}exclude = false", "use name = 'example.com/gpu', or exclude = true to offer none of these"),
    (f'{NAME}name = "a.b/cc"\nexclude = true', "use either name or exclude = true, not both"),
    (f'{NAME}exclude = "yes"', "exclude must be true or false"),
    (f"{NAME}name = 7", "name must be a string such as 'example.com/gpu'"),
    (f'{NAME}name = "gpu"', "name: 'gpu' is not domain/name with a domain in lower case, such as 'example.com/gpu'"),
    (
        f'{NAME}name = "AMD.com/gpu"',
        "name: 'AMD.com/gpu' is not domain/name with a domain in lower case, such as 'example.com/gpu'",
    ),
    (
        f'{NAME}name = "kubernetes.io/gpu"',
        "name: 'kubernetes.io/gpu': names with kubernetes.io in them belong to Kubernetes",
    ),
    (f'{NAME}name = "amd.com/g.pu"', f"name: 'g.pu' is not a valid resource name: {ALIAS}"),
    (
        f'{NAME}name = "3com.com/nic"',
        "name: '3com.com/nic': for CDI the domain must begin with a letter and have at least 2 characters",
    ),
    ("exclude = true\nvendor = 4318", "vendor must be a string or a list of strings"),
    ("exclude = true\nvendor = []", "vendor must be a string or a list of strings"),
    ('exclude = true\nvendor = ""', "vendor must be a string or a list of strings"),
    ('exclude = true\nvendor = ["10de", 1]', "vendor must be a string or a list of strings"),
    ('exclude = true\nvendor = "nvidia"', f"vendor: 'nvidia' {HEX}"),
    ('exclude = true\nvendor = "de"', f"vendor: 'de' {HEX}"),
    ('exclude = true\nvendor = "10de\\n"', f"vendor: '10de\\n' {HEX}"),
    ('exclude = true\ndevice = ["2330", "23300"]', f"device: '23300' {HEX}"),
    ('exclude = true\ndevice = "٢٣٣٠"', f"device: '٢٣٣٠' {HEX}"),
    ('exclude = true\nclass = "3"', f"class: '3' {CLASS}"),
    ('exclude = true\nclass = "03020"', f"class: '03020' {CLASS}"),
    ('exclude = true\nclass = "vga"', f"class: 'vga' {CLASS}"),
    ('exclude = true\nsubsystem = "16c1"', f"subsystem: '16c1' {PAIR}"),
    ('exclude = true\nsubsystem = "10de:"', f"subsystem: '' {HEX}"),
    ('exclude = true\naddress = "41:00.0"', f"address: '41:00.0' {ADDRESS}"),
    ('exclude = true\naddress = "0000:41:00"', f"address: '0000:41:00' {ADDRESS}"),
    ('exclude = true\naddress = "0000:41:00.8"', f"address: '0000:41:00.8' {ADDRESS}"),
    ('exclude = true\naddress = "0000:4[12]:*"', f"address: '0000:4[12]:*' {ADDRESS}"),
    ('exclude = true\naddress = "slot 4"', f"address: 'slot 4' {ADDRESS}"),
    ("exclude = true\ndriver = true", "driver must be a string or a list of strings"),
]


@pytest.mark.parametrize(("text", "why"), UNREADABLE, ids=[why[:40] for _, why in UNREADABLE])
def test_a_file_that_is_no_toml_is_refused_with_the_line(tmp_path: Path, text: bytes, why: str) -> None:
    assert refused(tmp_path, text) == why


@pytest.mark.parametrize(("text", "why"), [*SETTINGS, *NAMES, *RULES], ids=repr)
def test_what_is_wrong_is_refused_with_its_key_and_what_is_allowed(tmp_path: Path, text: str, why: str) -> None:
    assert refused(tmp_path, text) == why


@pytest.mark.parametrize(("text", "why"), RULE, ids=repr)
def test_a_wrong_rule_is_refused_with_its_place_in_the_file(tmp_path: Path, text: str, why: str) -> None:
    good = '[[resources]]\nname = "a.b/cc"\nvendor = "1002"\n'
    assert refused(tmp_path, f"{good}[[resources]]\n{text}\n") == f"resources[1]: {why}"


@pytest.mark.parametrize("name", ["none.toml", ""])
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({"config": f"{tmp_path}/{name}"}, {})
    reason = "No such file or directory" if name else "Is a directory"
    assert str(caught.value) == f"config file {tmp_path}/{name}: cannot be read: {reason}"


@pytest.mark.parametrize(
    ("command", "text", "why"),
    [
        ("run", *UNREADABLE[2]),
        ("run", *SETTINGS[0]),
        ("list", RULES[1][0], RULES[1][1]),
        ("run", f"[[resources]]\n{RULE[1][0]}", f"resources[0]: {RULE[1][1]}"),
    ],
    ids=["run, no TOML", "run, unknown key", "list, no tables", "run, no condition"],
)
def test_the_command_refuses_in_one_line_with_exit_status_2(
    tmp_path: Path, command: str, text: str | bytes, why: str
) -> None:
    path = tmp_path / "plugin.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    folders = [f"--kubelet-dir={tmp_path}/kubelet", f"--cdi-dir={tmp_path}/cdi"] if command == "run" else []
    ended = run_command(command, "--fake-sysfs=workstation", *folders, f"--config={path}")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"sandbox-plugin: config file {path}: {why}\n"
    assert [found.name for found in tmp_path.iterdir()] == ["plugin.toml"]


# Whatever stands in it


def quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {toml(each)}" for key, each in value.items()) + "}"
    return str(value)


words = st.sampled_from(["10de", "10de:2330", "0302", "a.b/cc", "0000:41:00.*", "kata", "true", "", "2.5", "*", "\n"])
texts = words | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.booleans() | st.integers() | st.floats() | texts | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
rule_keys = st.sampled_from(["name", "exclude", "vendor", "device", "class", "subsystem", "address", "driver"]) | texts
rules = st.lists(st.dictionaries(rule_keys, values, max_size=4) | values, max_size=3)
documents = st.fixed_dictionaries(
    {}, optional={"resources": rules | values, "names": st.dictionaries(texts, texts | values, max_size=3) | values}
).flatmap(
    lambda both: st.dictionaries(st.sampled_from(sorted(KEYS)) | texts, values, max_size=3).map(lambda d: d | both)
)


@given(documents)
def test_any_values_are_read_or_refused_in_one_line_that_names_the_file(document: dict[str, Any]) -> None:
    text = "\n".join(f"{quoted(key)} = {toml(value)}" for key, value in document.items())
    assert_read_or_refused(text)


@given(
    st.text()
    | st.lists(st.sampled_from([*string.printable, "[[resources]]\n", "names", '"""']), max_size=60).map("".join)
)
@example("a = " + "[" * 20000)
@example("a = {" + "b={" * 20000)
@example("health-interval = -0b" + "1" * 20000)
@example("health-interval = " + "1" * 5000)
@example("health-interval = 1e999999999")
@example("gpu-alias = 2026-13-40\n")
@example("gpu-alias = 9999-12-31T23:59:60Z\n")
@example("\0")
def test_any_text_is_read_or_refused_in_one_line_that_names_the_file(text: str) -> None:
    assert_read_or_refused(text)


def said_of(read: Callable[[], object]) -> str | None:
    """The one line of a refusal; None: there was none. Any other error is a failure of the test."""
    try:
        read()
    except UsageError as error:
        return str(error)
    return None


def assert_read_or_refused(text: str) -> None:
    said = said_of(lambda: parse_config(text, "config file x"))
    assert said is None or (said.startswith("config file x: ") and len(said.splitlines()) == 1)


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), values, max_size=4))
def test_any_value_of_a_setting_is_taken_or_refused_with_its_key(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    text = "\n".join(f"{key} = {toml(value)}" for key, value in document.items())
    said = said_of(lambda: load(tmp_path_factory.getbasetemp(), text))
    assert said is None or (len(said.splitlines()) == 1 and any(key in said for key in document))
