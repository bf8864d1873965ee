"""A Kubernetes device plugin that gives whole passthrough GPUs to virtual machines that run pods."""

__version__ = "0.1.0"
