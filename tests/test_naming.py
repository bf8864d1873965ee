"""Names of models and resources, and of the files that carry them.

What is valid is written down here once more, from the rules of the kubelet and of CDI and without a line of naming.py.
"""

from __future__ import annotations

import gzip
import re
import string
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sandbox_plugin.inventory.naming import ModelNames, clean_name, type_name
from sandbox_plugin.model import NVIDIA
from sandbox_plugin.names import (
    SHORTEST_SOCKET_NAME,
    SOCKET_PATH_BYTES,
    cdi_file_name,
    check_alias,
    check_resource_name,
    socket_name,
)

ROOT = Path(__file__).resolve().parent.parent
NAMES = ModelNames.load()
LETTERS, DIGITS = set(string.ascii_letters), set(string.digits)

any_id = st.integers(0, 0xFFFF)
any_name = st.text() | st.text(alphabet=string.ascii_letters + string.digits + " ._-/[]()+'", max_size=90)
aliases = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,61}[A-Za-z0-9]", fullmatch=True)
labels = st.from_regex(r"[a-z]([a-z0-9-]{0,12}[a-z0-9])?", fullmatch=True)
long_enough = st.lists(labels, min_size=1, max_size=4).map(".".join).filter(lambda domain: len(domain) > 1)
domains = long_enough | st.just("nvidia.com")
resources = st.builds("{}/{}".format, domains, aliases)


def is_class(name: str) -> bool:
    """A CDI class that is a qualified name's last part too; Kata's Go library panics at one of a single letter."""
    return (
        1 < len(name) <= 63
        and name[0] in LETTERS
        and name[-1] in LETTERS | DIGITS
        and set(name) <= LETTERS | DIGITS | {"-", "_"}
    )


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (0x2330, "GH100_H100_SXM5_80GB"),
        (0x22A3, "GH100_H100_NVSWITCH"),
        (0x2342, "GH100_GH200_120GB___480GB"),
        (0x20B1, "GA100_A100_PCIE_40GB"),
        (0x20F1, "GA100_A100_PCIE_40GB"),
    ],
)
def test_a_model_is_named_as_the_reference_names_it(device: int, name: str) -> None:
    assert NAMES.resource_name(NVIDIA, device) == name


def test_people_see_the_name_as_pci_ids_has_it() -> None:
    assert NAMES.describe(NVIDIA, 0x2330) == "GH100 [H100 SXM5 80GB]"
    assert NAMES.describe(NVIDIA, 0xFFFF) == "unknown model 10de:ffff"


@pytest.mark.parametrize(
    ("vendor", "device", "name"),
    [
        (0x1002, 0x74A1, "Aqua Vanjaram [Instinct MI300X]"),
        (0x8086, 0x56C0, "ATS-M [Data Center GPU Flex 170]"),
        (0x8086, 0x0BD5, "Ponte Vecchio XT (2 Tile) [Data Center GPU Max 1550]"),
        (0x8086, 0x1583, "Ethernet Controller XL710 for 40GbE QSFP+"),
        (0x15B3, 0x1021, "MT2910 Family [ConnectX-7]"),
    ],
)
def test_gpus_and_nics_of_other_vendors_have_names_for_people_and_no_resources_of_their_own(
    vendor: int, device: int, name: str
) -> None:
    assert NAMES.describe(vendor, device) == name
    unnamed = NAMES.resource_name(vendor, device)
    assert unnamed == f"UNKNOWN_{vendor:04X}_{device:04X}"
    assert clean_name(name, device) not in {NAMES.resource_name(*model) for model in NAMES.table if model[0] == NVIDIA}


def test_the_table_says_its_version_its_date_and_its_licence() -> None:
    table = (ROOT / "sandbox_plugin/inventory/pci_names.tsv").read_text(encoding="utf-8")
    assert re.match(r"# pci.ids 20.* \(20.*\n#.*GNU General Public License.*\n#.*3-clause BSD License", table)


def test_every_model_of_the_table_has_a_valid_name() -> None:
    assert len(NAMES.table) > 4000
    assert {model: name for model in NAMES.table if not is_class(name := NAMES.resource_name(*model))} == {}


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("Gx-100.5 [a/b \t c_(é+'d)]", "GX-100_5_A_B_C_D"),
        ("3D Controller", "MODEL_3D_CONTROLLER_2FFF"),
        ("GX100 [Sample /]", "GX100_SAMPLE_2FFF"),
        (".9", "MODEL__9_2FFF"),
        ("GX100 [" + "Long " * 20 + "]", "GX100_" + "LONG_" * 10 + "LO_2FFF"),
        ("[]", "MODEL_2FFF"),
    ],
)
def test_a_name_is_by_the_references_rule_or_repaired_with_the_device_id_at_its_end(name: str, cleaned: str) -> None:
    assert clean_name(name, 0x2FFF) == cleaned


@given(name=any_name, device=any_id)
@example(name="ß" * 40, device=0)  # longer in capitals
@example(name="Ω²½", device=0)  # nothing is left
@example(name="A" * 63, device=0)
@example(name="A" * 64, device=0)
def test_whatever_pci_ids_may_say_the_name_is_valid_and_cleaning_it_again_changes_nothing(
    name: str, device: int
) -> None:
    cleaned = clean_name(name, device)
    assert is_class(cleaned)
    assert clean_name(cleaned, device) == cleaned


def test_names_of_models_are_known_again_and_others_are_not() -> None:
    assert all(NAMES.is_resource_name(NAMES.resource_name(*model)) for model in NAMES.table)
    assert NAMES.resource_name(NVIDIA, 0xFFFF) == "UNKNOWN_10DE_FFFF", "of a model that is not in the table"
    assert NAMES.is_resource_name("UNKNOWN_10DE_FFFF")
    assert not NAMES.is_resource_name("UNKNOWN_10DE_FFFF\n")
    assert not NAMES.is_resource_name("pgpu")


@given(name=any_name)
def test_a_type_of_vgpu_has_a_valid_name_and_keeps_the_one_that_kubevirts_users_know(name: str) -> None:
    assert type_name("GRID T4-1Q") == "GRID_T4-1Q"
    assert is_class(type_name(name))


@given(start=aliases, one=any_name, other=any_name)
def test_types_of_vgpus_whose_names_had_to_be_cut_are_still_told_apart(start: str, one: str, other: str) -> None:
    assume(one != other)
    assert type_name(start + "x" * 63 + one) != type_name(start + "x" * 63 + other)


@pytest.mark.parametrize("alias", ["", "NVIDIA GPU", "pgpu\n"])
def test_a_wrong_alias_is_refused_in_one_line_that_says_what_is_allowed(alias: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]* 2 to 63 letters, digits, `-` and `_`[^\n]*$"):
        check_alias(alias)


def test_who_gives_a_whole_resource_name_as_an_alias_is_told_to_leave_out_the_domain() -> None:
    with pytest.raises(ValueError, match=r"give only the part after `nvidia\.com/`"):
        check_alias("nvidia.com/pgpu")


@given(alias=any_name | aliases)
@example("g")
@example("gx")
@example("g-")
@example("3g")
@example("a.b")
@example("gpü")
@example("pgpu\n")
@example("a" * 63)
@example("a" * 64)
def test_an_alias_is_accepted_exactly_if_it_is_a_cdi_class_and_a_qualified_name(alias: str) -> None:
    with nullcontext() if is_class(alias) else pytest.raises(ValueError, match="is not a valid resource name"):
        check_alias(alias)


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        ("pgpu", "not domain/name"),
        ("NVIDIA.com/pgpu", "lower case"),
        ("nvidia.com/", "2 to 63 letters"),
        ("a..b/gpu", "not domain/name"),
        ("a-.com/gpu", "not domain/name"),
        ("3com.com/nic", "begin with a letter"),
        ("a/gpu", "begin with a letter and have at least 2 characters"),
        ("node.kubernetes.io/gpu", "belong to Kubernetes"),
        ("requests.nvidia.com/gpu", "quota"),
        ("a." * 122 + "b/gpu", "at most 244"),
    ],
)
def test_a_resource_name_that_the_kubelet_or_cdi_refuses_is_refused_with_the_reason(resource: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        check_resource_name(resource)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("resource", ["ab/gx", "x-1.example.com/GPU_8-1", "requests/gpu", "a." * 121 + "bb/gpu"])
def test_a_resource_name_that_the_kubelet_and_cdi_take_is_accepted(resource: str) -> None:
    check_resource_name(resource)


@pytest.mark.parametrize(
    ("resource", "socket", "spec"),
    [
        ("nvidia.com/pgpu", "sandbox-pgpu.sock", "nvidia.com-pgpu.yaml"),
        ("nvidia.com/GA100_A100-SXM-64GB", "sandbox-GA100_A100-SXM-64GB.sock", "nvidia.com-GA100_A100-SXM-64GB.yaml"),
        ("amd.com/gpu", "sandbox-amd.com-gpu.sock", "amd.com-gpu.yaml"),
    ],
)
def test_files_are_named_after_their_resource(resource: str, socket: str, spec: str) -> None:
    assert socket_name(resource, max_bytes=80) == socket
    assert cdi_file_name(resource) == spec


lengths = st.integers(SHORTEST_SOCKET_NAME, SOCKET_PATH_BYTES)


@given(resource=resources, max_bytes=lengths)
@example(resource="a" * 60 + "." + "b" * 63 + "." + "c" * 63 + "." + "d" * 55 + "/" + "g" * 63, max_bytes=107)
def test_no_files_name_passes_its_limit(resource: str, max_bytes: int) -> None:
    socket, spec = socket_name(resource, max_bytes=max_bytes), cdi_file_name(resource)
    assert len(socket.encode()) <= max_bytes
    assert len(spec.encode()) <= 200, "it is written under a longer name first"
    assert (socket[-5:], spec[-5:]) == (".sock", ".yaml")
    assert "/" not in socket + spec


def test_a_socket_is_shortened_from_the_first_byte_too_many() -> None:
    whole = "sandbox-" + "g" * 20 + ".sock"
    assert socket_name("nvidia.com/" + "g" * 20, max_bytes=len(whole)) == whole
    shortened = socket_name("nvidia.com/" + "g" * 20, max_bytes=len(whole) - 1)
    assert (len(shortened), shortened[:11]) == (len(whole) - 1, "sandbox-ggg")


@st.composite
def lookalikes(draw: st.DrawFn) -> tuple[str, str]:
    """Two resources whose names are the same but for where the domain ends."""
    parts = [*draw(st.lists(labels, min_size=2, max_size=4)), draw(st.from_regex("[a-z]{1,9}", fullmatch=True))]
    joint = draw(st.sampled_from(["", "nvidia.com-", "example.com-", "example-"]))
    cuts = draw(st.lists(st.integers(1, len(parts) - 1), min_size=2, max_size=2, unique=True))
    one, other = (f"{joint}{'-'.join(parts[:cut])}/{'-'.join(parts[cut:])}" for cut in cuts)
    return one, other


@given(pair=lookalikes() | st.tuples(resources, resources), max_bytes=lengths)
@example(pair=("example.com-x/y", "example.com/x-y"), max_bytes=SOCKET_PATH_BYTES)
@example(pair=("nvidia.com/a-b", "a/b"), max_bytes=SOCKET_PATH_BYTES)
@example(pair=("nvidia.com/" + "g" * 62 + "a", "nvidia.com/" + "g" * 62 + "b"), max_bytes=40)
def test_no_two_resources_share_a_file(pair: tuple[str, str], max_bytes: int) -> None:
    one, other = pair
    assume(one != other)
    assert socket_name(one, max_bytes=max_bytes) != socket_name(other, max_bytes=max_bytes)
    assert cdi_file_name(one) != cdi_file_name(other)


PCI_IDS = """#
#\tVersion: 2026.01.02
#\tDate:    2026-01-02 03:04:05
#
#\tThis file can be distributed under either the GNU General Public License
#\t(version 2 or higher) or the 3-clause BSD License.
#
10dd  Other
\t2330  Not ours
10de  NVIDIA Corporation
# a comment in between
\t2330  GH100 [H100 SXM5 80GB]
\t\t10de 16c1  a subsystem
\t2fff  GX100  [two  spaces]
8086  Intel Corporation
\t1583  Ethernet Controller XL710 for 40GbE QSFP+
\t29c0  82G33/G31/P35/P31 Express DRAM Controller
C 03  Display controller
\t00  VGA compatible controller
"""


@pytest.mark.parametrize(
    ("name", "content"), [("pci.ids", PCI_IDS.encode()), ("x.gz", gzip.compress(PCI_IDS.encode()))]
)
def test_the_table_is_made_of_all_devices_of_nvidia_and_of_gpus_and_nics_of_intel(
    tmp_path: Path, name: str, content: bytes
) -> None:
    done, table = make_table(tmp_path, name, content)
    assert done.returncode == 0, done.stderr
    assert table.splitlines() == [
        "# pci.ids 2026.01.02 (2026-01-02 03:04:05), in part: NVIDIA, AMD (ATI), Mellanox, GPUs and NICs of Intel",
        "# This file can be distributed under either the GNU General Public License",
        "# (version 2 or higher) or the 3-clause BSD License.",
        "10de2330\tGH100 [H100 SXM5 80GB]",
        "10de2fff\tGX100  [two  spaces]",
        "80861583\tEthernet Controller XL710 for 40GbE QSFP+",
    ]


def test_no_table_is_made_from_a_pci_ids_under_another_licence(tmp_path: Path) -> None:
    done, table = make_table(tmp_path, "pci.ids", PCI_IDS.replace("3-clause", "no").encode())
    assert (done.returncode, table) == (1, "")
    assert "licence" in done.stderr


def make_table(folder: Path, name: str, content: bytes) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs a copy of the script in a checkout of its own; the second is the table it made."""
    source, script = folder / name, folder / "scripts/generate-pci-names.py"
    table = folder / "sandbox_plugin/inventory/pci_names.tsv"
    source.write_bytes(content)
    script.parent.mkdir()
    table.parent.mkdir(parents=True)
    script.write_text((ROOT / "scripts/generate-pci-names.py").read_text())
    command = [sys.executable, str(script), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done, table.read_text(encoding="utf-8") if table.exists() else ""
