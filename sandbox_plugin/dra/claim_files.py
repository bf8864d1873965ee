"""Writing and removing the files of prepared claims. All of it blocks, and may hang on a dead mount: for threads."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from sandbox_plugin.dra.checkpoint import checkpoint_path, encode
from sandbox_plugin.dra.claim_specs import Terms, claim_folder, metadata_folder, spec_prefix
from sandbox_plugin.dra.claims import Prepared
from sandbox_plugin.host import files
from sandbox_plugin.host.files import Known


class ClaimFiles:
    """What lies in the folders, and what was last seen there: a file that is as it should be is not read again."""

    def __init__(self, terms: Terms, boot: str) -> None:
        self._terms = terms
        self._boot = boot
        self._known: dict[Path, Known[bytes]] = {}

    def record(self, prepared: Prepared) -> None:
        """Writes the checkpoint of a claim. Raises OSError."""
        self._put(checkpoint_path(self._terms.folder, prepared.claim.uid), encode(prepared, self._boot))

    def write(self, prepared: Prepared, wanted: Mapping[Path, bytes]) -> None:
        """Brings the files of a claim to what they should say; others of its files go. Raises OSError."""
        for path, content in wanted.items():
            self._put(path, content)
        for path in self._specs_of(prepared.claim.uid) - wanted.keys():
            self._remove(path)

    def clear(self, prepared: Prepared) -> None:
        """Removes all files of a claim, the checkpoint last: if that fails the claim is still known. Raises OSError."""
        for path in self._specs_of(prepared.claim.uid):
            self._remove(path)
        _remove_tree(metadata_folder(self._terms) / claim_folder(prepared))
        self._remove(checkpoint_path(self._terms.folder, prepared.claim.uid))

    def clean(self, prepared: Collection[Prepared]) -> list[Path]:
        """Removes what an earlier run left of other claims than these; says what. Raises OSError."""
        kept = {path for each in prepared for path in self._specs_of(each.claim.uid)}
        left = [path for path in self._specs() if path not in kept]
        for path in left:
            self._remove(path)
        folders = {claim_folder(each) for each in prepared}
        root = metadata_folder(self._terms)
        strays = [path for path in sorted(root.iterdir()) if path.name not in folders] if root.is_dir() else []
        for path in strays:
            _remove_tree(path)
        return [*left, *strays]

    def _put(self, path: Path, content: bytes) -> None:
        try:
            self._known[path] = files.read(path, self._known.get(path), bytes)
        except FileNotFoundError:
            self._known.pop(path, None)
        if path not in self._known or self._known[path].says != content:
            self._known[path] = files.replace(path, content)

    def _remove(self, path: Path) -> None:
        self._known.pop(path, None)
        path.unlink(missing_ok=True)

    def _specs(self) -> list[Path]:
        """All CDI specs for claims on this driver."""
        folder = self._terms.cdi_dir
        prefix = spec_prefix(self._terms.driver)
        if not folder.is_dir():
            return []
        return sorted(p for p in folder.iterdir() if p.name.startswith(prefix) and p.suffix == ".json")

    def _specs_of(self, uid: str) -> set[Path]:
        """Those of one claim: its UID is a part of their names, and ends or is followed by a request's name."""
        return {path for path in self._specs() if path.stem.split("_")[2:3] == [uid]}


def _remove_tree(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
