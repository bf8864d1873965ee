"""Metrics: what the registry and the parts know, for Prometheus."""
