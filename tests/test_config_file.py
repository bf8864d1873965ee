"""The config file: what it means, and that a wrong one is refused with the place and with what is allowed.

Cases are asked of `load_settings`, the function behind every command.
"""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import OPTIONS, Consumer, Policy, ResourceRule, Settings, UsageError
from sandbox_plugin.model import Reason

KEYS = {option.flag.removeprefix("--") for option in OPTIONS}
EVERY_KEY = ", ".join(sorted([*KEYS, "names", "resources"]))
CONDITIONS = "vendor, device, class, subsystem, address, driver, virtual, physical-function, type"
HEX = "is not four hexadecimal digits, e.g. '10de'"
CLASS = "is not two, four or six hexadecimal digits, e.g. '0302'"
TYPE = "is not the number of a vGPU type, e.g. '10de:26b9:1155'"
PAIR = "is not VENDOR:DEVICE, e.g. '10de:16c1'"
ADDRESS = (
    "is not a whole PCI address such as '0000:41:00.0', or the UUID of a mediated device, "
    "in which * matches anything and ? any one character"
)
ALIAS = "allowed are 2 to 63 letters, digits, `-` and `_`, a letter first and a letter or digit last"
SECONDS = "is not a number of seconds between 0.1 and 3600"
TABLES = "resources must be tables, each one starts with a line [[resources]]"
STRINGS = "must be a string or a list of strings"
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
        fabric-partitions = "/f.json"
        whole-node = "nvidia.com/pgpu=8"
        status-socket = "/s.sock"
        node-features = "/features.d"
        gpu-feature-labels = true
        metrics-address = "127.0.0.1:9400"
        metrics-pod-labels = false
        device-plugin = "off"
        dra = true
        dra-driver-name = "gpus.example.com"
        dra-evict = "off-the-bus"
        node-name = "gpu-1"
        api-server = "https://10.0.0.1:6443"
        node-events = true
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
        fabric_partitions=Path("/f.json"),
        whole_node=("nvidia.com/pgpu", 8),
        status_socket=Path("/s.sock"),
        node_features=Path("/features.d"),
        gpu_feature_labels=True,
        metrics_address=("127.0.0.1", 9400),
        metrics_pod_labels=False,
        device_plugin="off",
        dra=True,
        dra_driver_name="gpus.example.com",
        dra_evict=frozenset({Reason.OFF_THE_BUS}),
        node_name="gpu-1",
        api_server="https://10.0.0.1:6443",
        node_events=True,
        health_interval=2.5,
        log_format="json",
        log_level="debug",
    )
    assert load(tmp_path, "# nothing yet\n") == Settings()


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plugin.toml"
    path.write_text('gpu-alias = "file"\nnvswitch-alias = "file-switch"\nlog-level = "error"\n')
    environment = {
        "SANDBOX_PLUGIN_CONFIG": str(path),
        "P_GPU_ALIAS": "variable",
        "NVSWITCH_ALIAS": "variable-switch",
        "SANDBOX_PLUGIN_LOG_LEVEL": "",
    }
    found = load_settings({"gpu_alias": "flag"}, environment)
    assert (found.gpu_alias, found.nvswitch_alias, found.log_level) == ("flag", "variable-switch", "error")


def test_an_empty_variable_is_none_but_one_of_the_reference_plugins_is_an_empty_alias_as_there() -> None:
    aliases = {"P_GPU_ALIAS": "", "NVSWITCH_ALIAS": ""}
    found = load_settings({}, {**aliases, "SANDBOX_PLUGIN_CDI_DIR": "", "SANDBOX_PLUGIN_CONFIG": ""})
    assert found == Settings(gpu_alias="", nvswitch_alias="")


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


@pytest.mark.parametrize(("word", "meant"), [("YES", True), ("on", True), ("1", True), ("No", False), ("off", False)])
def test_what_is_true_or_false_may_be_given_by_another_word_for_it(tmp_path: Path, word: str, meant: bool) -> None:
    text = f'require-iommufd = "{word}"\n[[resources]]\nexclude = "yes"\nvirtual = "{word}"'
    found = load(tmp_path, text)
    assert (found.require_iommufd, found.resources[0].name, found.resources[0].virtual) == (meant, None, meant)
    assert load_settings({"require_iommufd": word}, {}).require_iommufd is meant
    assert load_settings({}, {"SANDBOX_PLUGIN_REQUIRE_IOMMUFD": word}).require_iommufd is meant


def test_numbers_for_true_and_false_need_no_quotes(tmp_path: Path) -> None:
    text = "require-iommufd = 1\n[[resources]]\nexclude = 1\nvirtual = 0"
    found = load(tmp_path, text)
    assert (found.require_iommufd, found.resources[0].name, found.resources[0].virtual) == (True, None, False)


def test_a_choice_of_words_may_be_given_in_capitals(tmp_path: Path) -> None:
    assert load(tmp_path, 'log-level = "INFO"\nconsumer = "KubeVirt"') == Settings(consumer=Consumer.KUBEVIRT)
    assert load_settings({"log_format": "JSON"}, {}).log_format == "json"
    given = {"SANDBOX_PLUGIN_ALLOCATION_POLICY": "Spread", "SANDBOX_PLUGIN_WHOLE_NODE": "OFF"}
    assert load_settings({}, given) == Settings(allocation_policy=Policy.SPREAD)


TRUTH = "is not one of true, false, yes, no, on, off, 1, 0"
WRONG = [
    # No TOML, or no text
    (b"gpu-alias = 'a'\r\ngpu-alias = [\r\n'b', # b\r\n]\r\n\r\n# end\r\n", "line 2: 'gpu-alias' has a value already"),
    ("names = 1\n[names]\n", "line 2: '[names]' has a value already"),
    ("names = {a = 1, a.b = 2}\n", "Cannot overwrite a value (at line 1, column 24)"),
    ("[[resources]]\nname = amd\n", "Invalid value (at line 2, column 8)"),
    (b"gpu-alias = '\xff'\n", "cannot be read: it is not UTF-8"),
    ("health-interval = " + "1" * 5000, TOO_LONG),
    ("health-interval = 0x" + "f" * 5000, f"health-interval: {TOO_LONG}"),
    ("log-level = " + "[" * 20000, "brackets are nested too deeply"),
    # Settings
    ('gpu_alias = "x"', f"unknown key 'gpu_alias' (did you mean 'gpu-alias'?); allowed are {EVERY_KEY}"),
    ("[[resource]]", f"unknown key 'resource' (did you mean 'resources'?); allowed are {EVERY_KEY}"),
    ('colour = "red"', f"unknown key 'colour'; allowed are {EVERY_KEY}"),
    ("gpu-alias = 9", f"gpu-alias: '9' is not a valid resource name: {ALIAS}"),
    ("gpu-alias = false", "gpu-alias must be a string or a number, not false"),
    ("cdi-dir = 2026-01-01", "cdi-dir must be a string or a number"),
    ('cdi-dir = ""', "cdi-dir: '' is not a path"),
    ('consumer = "docker"', "consumer: 'docker' is not one of kata, kubevirt"),
    ("require-iommufd = [true]", "require-iommufd must be true or false"),
    ("require-iommufd = 2", f"require-iommufd: '2' {TRUTH}"),
    ('require-iommufd = "yess"', f"require-iommufd: 'yess' (did you mean 'yes'?) {TRUTH}"),
    ("health-interval = 0", f"health-interval: '0' {SECONDS}"),
    ("health-interval = 3601", f"health-interval: '3601' {SECONDS}"),
    ("health-interval = nan", f"health-interval: 'nan' {SECONDS}"),
    ('health-interval = "soon"', f"health-interval: 'soon' {SECONDS}"),
    ('log-level = "loud"', "log-level: 'loud' is not one of debug, info, warning, error"),
    # Names of models
    ("names = 1", "names must be a table of lines such as '10de:2330' = 'H100'"),
    ('[names]\n"2330" = "H100"', f"names: '2330': '2330' {PAIR}"),
    ('[names]\n"10de:233" = "H100"', f"names: '10de:233': '233' {HEX}"),
    (
        '[names]\n"1002:74a1" = "MI300X"',
        "names: '1002:74a1': names are for NVIDIA's models, '10de:...'; others are named by [[resources]]",
    ),
    ('[names]\n"10de:2330" = 100', "names: '10de:2330': a name must be a string"),
    ('[names]\n"10de:2330" = ""', f"names: '10de:2330': '' is not a valid resource name: {ALIAS}"),
    ('[names]\n"10de:2bb5" = "AA"\n"10DE:2BB5" = "BB"', "names: '10DE:2BB5': this model has the name 'AA' already"),
    ('[names]\n"10de:26b9:0" = "HALF"', f"names: '10de:26b9:0': '0' {TYPE}"),
    ('[names]\n"10de:26b9:L40S-24Q" = "HALF"', f"names: '10de:26b9:L40S-24Q': 'L40S-24Q' {TYPE}"),
    # Rules
    ('[resources]\nname = "a.b/cc"', TABLES),
    ("resources = [1]", TABLES),
]
VENDOR = 'vendor = "10de"\n'
WRONG_RULES = [
    (
        f'vendr = "x"\n{VENDOR}',
        f"unknown key 'vendr' (did you mean 'vendor'?); allowed are name, exclude, {CONDITIONS}",
    ),
    (
        f'physical_function = "x"\n{VENDOR}',
        f"unknown key 'physical_function' (did you mean 'physical-function'?); allowed are name, exclude, {CONDITIONS}",
    ),
    ('name = "a.b/cc"', f"no condition, so it would match everything; use one of {CONDITIONS}"),
    (f"{VENDOR}exclude = false", "use name = 'example.com/gpu', or exclude = true to offer none of these"),
    (f'{VENDOR}name = "a.b/cc"\nexclude = true', "use either name or exclude = true, not both"),
    (f'{VENDOR}exclude = "y"', f"exclude: 'y' {TRUTH}"),
    (f"{VENDOR}exclude = []", "exclude must be true or false"),
    (f"{VENDOR}name = 7", "name must be a string such as 'example.com/gpu'"),
    (
        f'{VENDOR}name = "kubernetes.io/gpu"',
        "name: 'kubernetes.io/gpu': names with kubernetes.io in them belong to Kubernetes",
    ),
    ("exclude = true\nvendor = 4318", f"vendor {STRINGS}"),
    ("exclude = true\nvendor = []", f"vendor {STRINGS}"),
    ('exclude = true\nvendor = "10de\\n"', f"vendor: '10de\\n' {HEX}"),
    ('exclude = true\ndevice = ["2330", "23300"]', f"device: '23300' {HEX}"),
    ('exclude = true\ndevice = "٢٣٣٠"', f"device: '٢٣٣٠' {HEX}"),
    ('exclude = true\nclass = "03020"', f"class: '03020' {CLASS}"),
    ('exclude = true\nsubsystem = "10de:"', f"subsystem: '' {HEX}"),
    ("exclude = true\nvirtual = 1.0", "virtual must be true or false"),
    ("exclude = true\nvirtual = 2", f"virtual: '2' {TRUTH}"),
    ('exclude = true\naddress = "41:00.0"', f"address: '41:00.0' {ADDRESS}"),
    ('exclude = true\naddress = "0000:41:00.8"', f"address: '0000:41:00.8' {ADDRESS}"),
    ('exclude = true\naddress = "0000:4[12]:*"', f"address: '0000:4[12]:*' {ADDRESS}"),
]


@pytest.mark.parametrize(("text", "why"), WRONG, ids=[why[:50] for _, why in WRONG])
def test_what_is_wrong_is_refused_with_its_key_or_line_and_what_is_allowed(
    tmp_path: Path, text: str | bytes, why: str
) -> None:
    assert refused(tmp_path, text) == why


@pytest.mark.parametrize(("text", "why"), WRONG_RULES, ids=repr)
def test_a_wrong_rule_is_refused_with_its_place_in_the_file(tmp_path: Path, text: str, why: str) -> None:
    good = '[[resources]]\nname = "a.b/cc"\nvendor = "1002"\n'
    assert refused(tmp_path, f"{good}[[resources]]\n{text}\n") == f"resources[1]: {why}"


def test_a_file_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({"config": f"{tmp_path}/none"}, {})
    assert str(caught.value) == f"config file {tmp_path}/none: cannot be read: No such file or directory"


# Whatever stands in it


pieces = st.sampled_from(
    ["1", "-0.5", "nan", "1e999", "true", "[]", "[1]", "{}", "{a = 1}", "2026-01-01", '"', "'\\u0000'"]
    + [f"'{word}'" for word in ("", "10de", "10de:2330", "0302", "a.b/cc", "0000:41:00.*", "kata", "true", "2.5", "*")]
    + ["['10de', '']", "[['a']]", "{'10de:2330' = 'H100'}", "{'10de:2330' = 1}", "[{vendor = '10de', name = 'a.b/cc'}]"]
)
keys = st.sampled_from([*sorted(KEYS), "name", "exclude", *CONDITIONS.split(", "), "names", "resources", "'10de:2330'"])
lines = st.builds("{} = {}".format, keys, pieces) | st.sampled_from(["[[resources]]", "[names]", "[resources]"])


@given(st.lists(lines, max_size=5).map("\n".join) | st.text(string.printable, max_size=60))
@example("health-interval = 1e999999999")
@example("gpu-alias = 2026-13-40\n")
@example("\0")
def test_whatever_is_in_it_a_file_is_read_or_refused_in_one_line_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        load(folder, text)
    except UsageError as error:
        said = str(error)
        assert said.startswith(f"config file {folder}/plugin.toml: ")
        assert len(said.splitlines()) == 1
