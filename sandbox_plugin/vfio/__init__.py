"""Giving functions to vfio drivers and back: what `sandbox-plugin vfio` does. The daemon imports none of it."""
