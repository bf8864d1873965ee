"""What models and types of vGPU are called: in logs, and as resources.

The rule for a model's resource name is the reference plugin's, so that a pod that asks for one finds it with ours
too: the name in pci.ids in capitals, `/`, `.` and white space as `_`, and everything dropped that is not a letter, a
digit, `_` or `-`. Where that gives no valid name it is repaired, and the model's ID is put at its end.

The table is a part of pci.ids, made by scripts/generate-pci-names.py. `ModelNames.load` reads it once, at the start; it
is a part of the program, and the only file that anything in `inventory` reads. People see the names of all that is in
it; resources are named after NVIDIA's models alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sandbox_plugin.model import NVIDIA
from sandbox_plugin.names import NAME_LENGTH, is_alias

_TABLE = Path(__file__).with_name("pci_names.tsv")


@dataclass(frozen=True)
class ModelNames:
    """What models are called. Keys of `table` are (vendor, device)."""

    table: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def load(cls) -> ModelNames:
        """Reads the packaged table."""
        return cls(_PackagedNames(_TABLE.read_text(encoding="utf-8")))

    def describe(self, vendor: int, device: int) -> str:
        """For people: `GH100 [H100 SXM5 80GB]`, or the bare ID of an unknown model."""
        return self.table.get((vendor, device), f"unknown model {vendor:04x}:{device:04x}")

    def resource_name(self, vendor: int, device: int) -> str:
        """The last part of the model's resource name, e.g. `GH100_H100_SXM5_80GB`. Always valid.

        Unknown models get a name that tells them apart: `UNKNOWN_10DE_2FFF`.
        """
        name = self.table.get((vendor, device)) if vendor == NVIDIA else None
        return f"UNKNOWN_{vendor:04X}_{device:04X}" if name is None else clean_name(name, device)

    def is_resource_name(self, name: str) -> bool:
        """Whether some model, known or unknown, has this resource name."""
        return name in self._resource_names or re.fullmatch(r"UNKNOWN_[0-9A-F]{4}_[0-9A-F]{4}", name) is not None

    @cached_property
    def _resource_names(self) -> frozenset[str]:
        return frozenset(clean_name(name, device) for (vendor, device), name in self.table.items() if vendor == NVIDIA)


class _PackagedNames(Mapping[tuple[int, int], str]):
    """The text of the table: a line for each model, of which few are ever asked for. Parsing all takes milliseconds."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._asked: dict[tuple[int, int], str] = {}

    def __getitem__(self, model_id: tuple[int, int]) -> str:
        if model_id not in self._asked:
            _, found, rest = self._text.partition("\n{:04x}{:04x}\t".format(*model_id))
            if not found:
                raise KeyError(model_id)
            self._asked[model_id] = rest[: rest.index("\n")]
        return self._asked[model_id]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for line in self._text.splitlines():
            if not line.startswith("#"):
                yield int(line[:4], 16), int(line[4:8], 16)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def clean_name(name: str, device: int) -> str:
    """A model's name by the reference's rule; where that is not valid, repaired and with the device ID at its end."""
    cleaned = _cleaned(name.upper())
    begun = cleaned if cleaned[:1].isalpha() else f"MODEL_{cleaned}"
    return cleaned if is_alias(cleaned) else _ending_in(f"_{device:04X}", begun)


def type_name(name: str) -> str:
    """The last part of a resource name for a type of vGPU: `GRID T4-1Q` is `GRID_T4-1Q`, as KubeVirt's users know it.

    Always valid; what had to be cut or changed has a digest of the whole at its end.
    """
    cleaned = _cleaned(name)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return cleaned if is_alias(cleaned) else _ending_in(f"_{digest}", f"T{cleaned}")


def _cleaned(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", re.sub(r"\s+|[/.]", "_", name))


def _ending_in(suffix: str, name: str) -> str:
    return name[: NAME_LENGTH - len(suffix)].rstrip("_-") + suffix
