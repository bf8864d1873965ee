"""What tests call resources, and PCI functions of the presets."""

from __future__ import annotations

PGPU, NVSWITCH = "nvidia.com/pgpu", "nvidia.com/nvswitch"
GEFORCE, AUDIO, T4 = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
"""Of the preset `workstation`: two GPUs, and a function that shares the group of the first."""
FIRST_GPU = "0000:1b:00.0"
"""Of the preset `hgx-h100`; its ID is 4."""
