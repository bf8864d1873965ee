"""The checkpoint of prepared claims, and the files that belong to them, on disk."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sandbox_plugin.config.settings import Consumer
from sandbox_plugin.dra.checkpoint import NotACheckpoint, checkpoint_path, decode, encode, read_all
from sandbox_plugin.dra.claim_files import ClaimFiles
from sandbox_plugin.dra.claim_specs import Terms
from sandbox_plugin.dra.claims import ClaimId, Given, Prepared, Wanted
from sandbox_plugin.dra.config import NodeKind
from sandbox_plugin.inventory.ledger import Places

DRIVER, BOOT = "vfio.sandbox-plugin", "boot-1"


def prepared(uid: str = "uid-1", name: str = "gpus", **changes: Any) -> Prepared:
    wanted = Wanted(request="gpu/h100", pool="node-1", device="pci-0000-01-00-0", node=NodeKind.CDEV)
    places = Places(node="/dev/vfio/devices/vfio3", group=50, addresses=frozenset({"0000:01:00.0", "0000:01:00.1"}))
    given = Given(wanted=wanted, places=places, former_nodes=("/dev/vfio/devices/vfio7",))
    known: dict[str, Any] = {
        "claim": ClaimId(namespace="default", name=name, uid=uid),
        "pod_claim": "vm-gpus",
        "devices": (given,),
    }
    return Prepared(**known | changes)


def files_in(folder: Path) -> tuple[ClaimFiles, Terms]:
    terms = Terms(driver=DRIVER, consumer=Consumer.KUBEVIRT, cdi_dir=folder / "cdi", folder=folder / "plugin")
    return ClaimFiles(terms, BOOT), terms


def test_what_is_written_is_read_again() -> None:
    assert decode(encode(prepared(), BOOT), BOOT) == prepared()
    assert decode(encode(prepared(pod_claim=None), BOOT), BOOT) == prepared(pod_claim=None)


def test_after_another_boot_numbers_do_not_count_any_more() -> None:
    (given,) = decode(encode(prepared(), BOOT), "boot-2").devices
    assert given.places.addresses == {"0000:01:00.0", "0000:01:00.1"}
    assert (given.places.node, given.places.group, given.former_nodes) == ("0000:01:00.0", None, ())


def spoilt(**changes: Any) -> bytes:
    document = json.loads(encode(prepared(), BOOT))
    for name, value in changes.items():
        where = document if name in document else document["devices"][0]
        if value is None:
            del where[name]
        else:
            where[name] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not what this plugin writes"),
        (b"\xff", "not what this plugin writes"),
        (b"[]", "not what this plugin writes"),
        (b"[" * 100_000, "not what this plugin writes"),
        (encode(prepared(), BOOT)[:-30], "not what this plugin writes"),
        (spoilt(version=2), "its version is 2, and this plugin knows 1"),
        (spoilt(uid="../../etc"), "not a claim's names"),
        (spoilt(request="../x"), "not such names"),
        (spoilt(nodeKind="both"), "'both' is not a valid NodeKind"),
        (spoilt(addresses=[]), "no address"),
        (spoilt(group=True), "no sensible group"),
        (spoilt(group="x"), "no sensible group"),
        (spoilt(devices=[]), "no devices"),
        (spoilt(podClaim=7), "no sensible podClaim"),
        (spoilt(node=None), "KeyError: 'node'"),
        (spoilt(node=7), "7 is no text"),
    ],
)
def test_a_file_that_makes_no_sense_is_no_checkpoint(content: bytes, why: str) -> None:
    with pytest.raises(NotACheckpoint) as error:
        decode(content, BOOT)
    assert why in str(error.value)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_whatever_a_disk_has_made_of_a_file_is_a_checkpoint_or_none(rubbish: bytes, at: int) -> None:
    whole = encode(prepared(), BOOT)
    with contextlib.suppress(NotACheckpoint):
        decode(whole[:at] + rubbish + whole[at + len(rubbish) :], BOOT)


def test_one_bad_file_is_named_with_what_to_do_and_the_others_are_read(tmp_path: Path) -> None:
    assert read_all(tmp_path, BOOT) == {}
    for each in (prepared("uid-1"), prepared("uid-2")):
        files_in(tmp_path)[0].record(each)
    folder = tmp_path / "plugin"
    checkpoint_path(folder, "uid-2").rename(checkpoint_path(folder, "uid-3"))
    checkpoint_path(folder, "uid-4").write_text("{")
    (folder / "claims/.uid-5.json.sandbox-plugin.tmp").write_text("cut off")
    (folder / "claims/notes.txt").write_text("not ours")
    with capture_logs() as logged:
        assert read_all(folder, BOOT) == {"uid-1": prepared("uid-1")}
    assert [Path(event["path"]).name for event in logged] == ["uid-3.json", "uid-4.json"]
    assert "it is of the claim with UID uid-2" in logged[0]["reason"]
    assert "when no pod of this node has a claim" in logged[1]["action"]


# The files of a claim


def test_files_are_brought_to_what_they_should_say_and_go_with_their_claim(tmp_path: Path) -> None:
    files, terms = files_in(tmp_path)
    one, other = prepared("uid-1"), prepared("uid-11", "other")
    spec, stale, theirs, metadata = (
        terms.cdi_dir / f"{DRIVER}_claim_uid-1.json",
        terms.cdi_dir / f"{DRIVER}_metadata_uid-1_gpu.json",
        terms.cdi_dir / f"{DRIVER}_claim_uid-11.json",
        terms.folder / "dra-device-metadata/default_gpus/gpu/metadata.json",
    )
    files.record(one)
    files.write(one, {spec: b"1", stale: b"2", metadata: b"3"})
    files.record(other)
    files.write(other, {theirs: b"4"})
    spec.write_bytes(b"somebody else's")
    before = theirs.stat()
    files.write(one, {spec: b"1", metadata: b"3"})
    files.write(other, {theirs: b"4"})
    assert spec.read_bytes() == b"1"
    assert not stale.exists()
    assert theirs.stat() == before, "what is as it should be is not written"
    files.clear(one)
    files.clear(one)
    assert sorted(terms.cdi_dir.iterdir()) == [theirs]
    assert not metadata.parent.parent.exists()
    assert read_all(terms.folder, BOOT).keys() == {"uid-11"}


def test_what_crashes_left_is_removed_and_nothing_of_others(tmp_path: Path) -> None:
    files, terms = files_in(tmp_path)
    assert files.clean([]) == []
    kept = prepared("uid-1")
    mine = terms.cdi_dir / f"{DRIVER}_claim_uid-1.json"
    files.write(kept, {mine: b"1", terms.folder / "dra-device-metadata/default_gpus/gpu/metadata.json": b"2"})
    left = terms.cdi_dir / f"{DRIVER}_metadata_uid-2_gpu.json"
    folder = terms.folder / "dra-device-metadata/default_gone"
    foreign = [terms.cdi_dir / name for name in ("nvidia.com-pgpu.yaml", f"{DRIVER}.other_claim_uid-2.json")]
    for path in (left, folder / "gpu/metadata.json", *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert files.clean([kept]) == [left, folder]
    assert sorted(terms.cdi_dir.iterdir()) == sorted([mine, *foreign])
    assert [path.name for path in folder.parent.iterdir()] == ["default_gpus"]
